"""Label pictures of every format: the stored ids exactly, or an error that names the format."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset import DataError, pictures
from dataset.labels import LabelReader
from dataset.pictures import decode_image, decode_label, load

SIZE = HEIGHT, WIDTH = 12, 17


def ids(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, number, SIZE).astype(np.uint8)


def by_pillow(pixels, form: str, palette: list[int] | None = None, **options) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if palette:
        picture.putpalette(palette)
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def packed(pixels: np.ndarray, bits: int) -> list[bytes]:
    """Pack rows with several pixels per byte, the first in the highest bits."""
    each = 8 // bits
    rows = np.zeros((HEIGHT, -(-WIDTH // each) * each), np.uint8)
    rows[:, :WIDTH] = pixels
    shifts = np.arange(8 - bits, -1, -bits)
    return [row.tobytes() for row in (rows.reshape(HEIGHT, -1, each) << shifts).sum(2).astype(np.uint8)]


def tiff(pixels: bytes, bits: int, photometric: int = 1, order: str = "<", **more: int) -> bytes:
    """Return a TIFF file of one uncompressed strip. `more` has tags by number, such as _274=3."""
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 277: 1, 278: HEIGHT}
    tags |= {int(name[1:]): value for name, value in more.items()} | {273: 0, 279: len(pixels)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    content = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag in sorted(tags):
        content += struct.pack(f"{order}HHII", tag, 4, 1, tags[tag])
    return content + struct.pack(f"{order}I", 0) + pixels


def bmp(pixels: np.ndarray, bits: int, palette: list[tuple[int, int, int]]) -> bytes:
    rows = packed(pixels, bits) if bits < 8 else [row.tobytes() for row in pixels]
    data = b"".join(row + bytes(-len(row) % 4) for row in rows[::-1])
    start = 54 + 4 * len(palette)
    header = struct.pack("<IHHI", start + len(data), 0, 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, bits, 0, len(data), 0, 0, len(palette), 0)
    return b"BM" + header + b"".join(bytes((b, g, r, 0)) for r, g, b in palette) + data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, bits: int, *more: bytes, color_type: int = 0) -> bytes:
    """Return a PNG file with the chunks `more` between header and data."""
    rows = packed(pixels, bits) if bits < 8 else [row.tobytes() for row in pixels]
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return pictures.PNG_SIGNATURE + b"".join(parts)


def netpbm(magic: str, largest: str, pixels: bytes) -> bytes:
    return f"{magic}\n# drawn by hand\n{WIDTH} {HEIGHT}\n{largest}\n".encode() + pixels


def ramp(number: int) -> list[tuple[int, int, int]]:
    """Return grays from black to white."""
    return [(value, value, value) for value in np.linspace(0, 255, number).astype(int).tolist()]


def flat(colors: list[tuple[int, int, int]]) -> list[int]:
    return [channel for color in colors for channel in color]


COLORS = [(7 * k % 256, 31 * k % 256, k) for k in range(256)]
MIXED = [(0, 0, 0), (200, 0, 0), (0, 200, 0), (70, 70, 70), (153, 153, 153)]
BLACK, WHITE = bytes(3), b"\xff" * 3
SAME = [(k, k, k) for k in range(256)]
FLAT = flat(COLORS)
TEXT = " ".join(map(str, ids(19).ravel())).encode()
PALETTE = chunk(b"PLTE", bytes(FLAT[:48]))
EXACT = {
    # name: (ids, file)
    **{f"PNG, gray, {bits} bits": (ids(2**bits), png(ids(2**bits), bits)) for bits in (1, 2, 4, 8)},
    **{
        f"PNG, palette, {bits} bits": (
            ids(2**bits),
            png(ids(2**bits), bits, chunk(b"PLTE", bytes(FLAT[: 3 * 2**bits])), color_type=3),
        )
        for bits in (1, 2, 4)
    },
    "PNG, gray, 16 bits": (ids(19), cv2.imencode(".png", ids(19).astype(np.uint16))[1].tobytes()),
    "PNG, palette, 8 bits": (ids(200), by_pillow(ids(200), "PNG", FLAT)),
    "PNG, palette, a transparent id": (ids(200), by_pillow(ids(200), "PNG", FLAT, transparency=3)),
    "PNG, palette, degrees of it": (
        ids(16),
        png(ids(16), 4, PALETTE, chunk(b"tRNS", b"\0\x80"), color_type=3),
    ),
    "PNG, palette of the same grays": (ids(200), by_pillow(ids(200), "PNG", flat(SAME))),
    "PNG, palette of grays spread out": (ids(3), by_pillow(ids(3), "PNG", flat(ramp(3)))),
    "PNG, palette of black and white": (ids(2), png(ids(2), 1, chunk(b"PLTE", BLACK + WHITE), color_type=3)),
    "PNG, gray part of a palette": (ids(3) // 2 + 3, by_pillow(ids(3) // 2 + 3, "PNG", flat(MIXED))),
    "PNG, gray, a transparent id": (ids(19), png(ids(19), 8, chunk(b"tRNS", b"\0\3"))),
    "PNG, gray, 4 bits, a transparent id": (ids(16), png(ids(16), 4, chunk(b"tRNS", b"\0\3"))),
    "PNG, gamma": (ids(19), png(ids(19), 8, chunk(b"gAMA", struct.pack(">I", 100000)))),
    "PNG, significant bits": (ids(19), png(ids(19), 8, chunk(b"sBIT", b"\4"))),
    "TIFF, 1 bit": (ids(2), by_pillow(ids(2).astype(bool), "TIFF")),
    "TIFF, 1 bit, as a fax": (ids(2), by_pillow(ids(2).astype(bool), "TIFF", compression="group4")),
    **{f"TIFF, {k} bits": (ids(2**k), tiff(b"".join(packed(ids(2**k), k)), k)) for k in (2, 4)},
    "TIFF, 8 bits": (ids(19), by_pillow(ids(19), "TIFF", compression="tiff_lzw")),
    "TIFF, palette": (ids(200), by_pillow(ids(200), "TIFF", FLAT)),
    "TIFF, 16 bits, small end": (ids(19), tiff(ids(19).astype("<u2").tobytes(), 16)),
    "TIFF, 16 bits, big end": (ids(19), tiff(ids(19).astype(">u2").tobytes(), 16, order=">")),
    "TIFF, 16 bits, signed": (ids(19), tiff(ids(19).astype("<i2").tobytes(), 16, _339=2)),
    "TIFF, 32 bits": (ids(19), by_pillow(ids(19).astype(np.int32), "TIFF")),
    "BMP, 1 bit": (ids(2), by_pillow(ids(2).astype(bool), "BMP")),
    **{f"BMP, {k} bits, gray": (ids(2**k), bmp(ids(2**k), k, ramp(2**k))) for k in (1, 4, 8)},
    **{f"BMP, {k} bits, colors": (ids(2**k), bmp(ids(2**k), k, COLORS[: 2**k])) for k in (4, 8)},
    "PGM": (ids(200), netpbm("P5", "255", ids(200).tobytes())),
    "PGM, 16 bits": (ids(19), netpbm("P5", "65535", ids(19).astype(">u2").tobytes())),
    "PGM, text": (ids(19), netpbm("P2", "255", TEXT)),
}  # fmt: skip
SEVERAL = {"save_all": True, "append_images": [Image.fromarray(ids(7)), Image.fromarray(ids(5))]}
RGB = np.stack([ids(19)] * 3, -1)
OTHER_GRAYS = "maps the ids to other gray values"
REFUSED = {
    # name: (file, words)
    "JPEG": (by_pillow(ids(19), "JPEG", quality=100), "JPEG changes the ids of a label"),
    "JPEG 2000": (by_pillow(ids(19), "JPEG2000"), "JPEG 2000 may change"),
    "WebP": (cv2.imencode(".webp", RGB)[1].tobytes(), "WebP may change"),
    "TIFF by JPEG": (by_pillow(ids(19), "TIFF", compression="jpeg"), "compressed by jpeg"),
    "TIFF, 0 is white": (tiff(ids(19).tobytes(), 8, photometric=0), "in which 0 is white"),
    "TIFF, 8 bits, signed": (tiff(ids(19).tobytes(), 8, _339=2), "signed values of 8 bits"),
    "TIFF, upside down": (tiff(ids(19).tobytes(), 8, _274=3), "turned or mirrored"),
    "TIFF, on its side": (tiff(ids(19).tobytes(), 8, _274=6), "turned or mirrored"),
    "TIFF, floating-point": (by_pillow(ids(19).astype(np.float32), "TIFF"), "mode F"),
    "TIFF, several": (by_pillow(ids(19), "TIFF", **SEVERAL), "holds 3 pictures"),
    "GIF": (by_pillow(ids(19) * 3, "GIF"), "GIF may change the ids"),
    **{f"BMP, {k} bits, white first": (bmp(ids(2**k), k, ramp(2**k)[::-1]), OTHER_GRAYS) for k in (1, 4, 8)},
    "PNG, palette of other grays": (by_pillow(ids(3), "PNG", flat(SAME[::9][:3])), OTHER_GRAYS),
    "PNG, white first": (png(ids(2), 1, chunk(b"PLTE", WHITE + BLACK), color_type=3), OTHER_GRAYS),
    "PNG, several": (by_pillow(ids(19), "PNG", **SEVERAL), "an animation"),
    "PBM": (by_pillow(ids(2).astype(bool), "PPM"), "a PBM label"),
    "PGM, other white": (netpbm("P5", "18", ids(19).tobytes()), "relative to 18"),
    "PGM, other white, text": (netpbm("P2", "18", TEXT), "relative to 18"),
    "TGA": (by_pillow(ids(19), "TGA"), "format TGA"),
    "gray in RGB": (by_pillow(RGB, "PNG"), "a gray mask saved as RGB"),
    "gray in RGB, BMP": (by_pillow(RGB, "BMP"), "a gray mask saved as RGB"),
    "gray in RGBA": (by_pillow(np.dstack([RGB, ids(200)]), "PNG"), "a gray mask saved as RGBA"),
    "gray and transparency": (by_pillow(np.stack([ids(19)] * 2, -1), "PNG"), "a gray mask saved as LA"),
    "colors": (by_pillow(np.dstack([ids(7), ids(8), ids(9)]), "PNG"), "mode RGB"),
    "colors of 16 bits": (cv2.imencode(".png", RGB.astype(np.uint16))[1].tobytes(), "16 bits per channel"),
    "CMYK": (by_pillow(Image.fromarray(RGB).convert("CMYK"), "TIFF"), "mode CMYK"),
}  # fmt: skip


def loaded(tmp_path, content: bytes) -> pictures.Encoded:
    (tmp_path / "label.png").write_bytes(content)
    return load(str(tmp_path / "label.png"))


@pytest.mark.parametrize("pyspng", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_ids_are_those_stored(name, pyspng, tmp_path, monkeypatch):
    if not pyspng:
        monkeypatch.setattr(pictures, "pyspng", None)
    expected, content = EXACT[name]
    encoded = loaded(tmp_path, content)
    label = decode_label(encoded)
    assert label.shape == SIZE and np.array_equal(label, expected)
    some = decode_label(encoded, rows=5)
    assert len(some) >= 5 and np.array_equal(some, expected[: len(some)])
    counts = LabelReader(num_classes=255).count(encoded)
    assert np.array_equal(counts.train_ids, np.bincount(expected.ravel(), minlength=256))
    assert np.array_equal(counts.values, counts.train_ids)


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_by_name(name, tmp_path):
    content, words = REFUSED[name]
    with pytest.raises(DataError) as error:
        LabelReader().read(loaded(tmp_path, content))
    assert str(error.value).startswith(f"{tmp_path / 'label.png'}: ") and words in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # as dataset.pictures does for Pillow's
@pytest.mark.parametrize("name", [*EXACT, *REFUSED])
def test_damaged_files_are_one_line(name, tmp_path):
    """A truncated or changed file gives ids of the right size or a DataError."""
    content = EXACT[name][1] if name in EXACT else REFUSED[name][0]
    rng = np.random.default_rng(len(content))
    variants = [content[: len(content) * part // 8] for part in range(8)]
    for _ in range(20):
        changed = np.frombuffer(content, np.uint8).copy()
        changed[rng.integers(len(content), size=3)] = rng.integers(0, 256, 3)
        variants.append(changed.tobytes())
    for variant in variants:
        try:
            encoded = loaded(tmp_path, variant)
            assert decode_label(encoded).shape[:2] == (encoded.height, encoded.width)
        except DataError as error:
            assert "\n" not in str(error)
        try:
            encoded = loaded(tmp_path, variant)
            assert decode_image(encoded).shape == (encoded.height, encoded.width, 3)
        except DataError as error:
            assert "\n" not in str(error)
