"""Reading pictures and labels, with one clear error for each way in which a file can be wrong."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL import Image

from utils.errors import DataError
from utils.files import open_input
from utils.silence import silence

try:  # optional: libspng decodes a PNG about a quarter faster than OpenCV, and can stop early
    import pyspng
except ImportError:
    pyspng = None

# Pillow takes 180 million pixels for an attack; a data set is its user's own, and may have such pictures.
Image.MAX_IMAGE_PIXELS = None
# Odd metadata, a line for each file on standard error.
warnings.filterwarnings("ignore", module=r"PIL\.")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
#: Bytes from the beginning of a file that tell its kind, and from its end that hold the closing marker.
HEAD, TAIL = 1024, 65536
#: Color types of a PNG header, with Pillow's modes for them and the bits that a channel may have.
GRAY, RGB = 0, 2
PNG_KINDS = {
    GRAY: ("L", (1, 2, 4, 8, 16)),
    RGB: ("RGB", (8, 16)),
    3: ("P", (1, 2, 4, 8)),
    4: ("LA", (8, 16)),
    6: ("RGBA", (8, 16)),
}
#: What OpenCV decodes, by Pillow's names.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "SUN", "TIFF", "WEBP")
#: OpenCV's limits, in pixels, and that of its buffers, in bytes.
MOST_PIXELS, LONGEST_SIDE, MOST_BYTES = 2**30, 2**20, 2**31 - 1
#: Formats that change values, or may.
LOSSY = {
    "AVIF": "an AVIF label may have",
    "GIF": "a GIF label may have",  # most programs number its palette anew
    "JPEG": "a JPEG label has",
    "JPEG2000": "a JPEG 2000 label may have",
    "MPO": "a JPEG label has",
    "WEBP": "a WebP label may have",
}
LABEL_FORMATS = ("BMP", "PNG", "PPM", "TIFF")
#: Pillow's modes of one-channel pictures whose values are ids.
LABEL_MODES = ("1", "L", "P", "I;16", "I;16B", "I")
#: Lossless compressions of TIFF, by Pillow's names.
TIFF_COMPRESSIONS = (
    "raw", "tiff_raw_16", "packbits", "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_deflate",
    "tiff_adobe_deflate", "tiff_thunderscan", "lzma", "zstd",
)  # fmt: skip
#: Tags of TIFF.
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339
#: Pictures without a brighter value are nearly black: 14 of 16 bits leave 6 of 8.
DARK = 63


class Header(NamedTuple):
    """What the first bytes of a picture say."""

    height: int
    width: int
    format: str  # Pillow's name: PNG, JPEG, ...
    mode: str  # Pillow's, but of a PNG of gray always L
    depth: int  # bits a channel


class Encoded(NamedTuple):
    """The bytes of a picture, found whole, and what its header says."""

    path: str
    content: bytes
    header: Header

    @property
    def height(self) -> int:
        return self.header.height

    @property
    def width(self) -> int:
        return self.header.width


def read_header(path: str) -> Header:
    """Return size and kind of a picture, without decoding it; finds files that were cut short too.

    Raises:
        DataError: missing, not a picture, truncated, or larger than OpenCV decodes.
    """
    try:
        with open_input(path) as file:
            header = _header(path, file)
            start, end = _ends(file)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise _unopened(path, error) from error
    if _lacks_end(start, end):
        raise DataError(f"{path}: truncated picture; copy it again")
    return header


def load(path: str) -> Encoded:
    """Read a picture's file, without decoding it.

    Raises:
        DataError: missing, not a picture, larger than OpenCV decodes, or damaged in a way that OpenCV would
            silently fill in: a missing end, data that does not have its checksum.
    """
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise DataError(f"{path}: has {size} bytes, too many for a picture; check the file")
            content = file.read()
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise _unopened(path, error) from error
    if content.startswith(PNG_SIGNATURE) and not _png_is_whole(content):
        raise DataError(f"{path}: damaged or truncated picture; copy it again")
    if _lacks_end(content[:8], content[-TAIL:]):
        raise DataError(f"{path}: truncated picture; copy it again")
    return Encoded(path, content, _header(path, io.BytesIO(content)))


def _unopened(path: str, error: Exception) -> DataError:
    """Return the error for a picture that can't be opened or read."""
    why = (
        "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
    )
    return DataError(f"{path}: {why}; check the data set and the list")


def _unreadable(path: str) -> DataError:
    advice = "copy it again"
    if os.path.basename(path).startswith("._"):
        advice = "macOS writes such files beside others, take it out of the list"
    return DataError(f"{path}: not a readable picture; {advice}")


def _header(path: str, file: IO[bytes]) -> Header:
    """Return what the first bytes of an open file say; see `read_header` for the errors."""
    start = file.read(HEAD)
    if start.startswith(PNG_SIGNATURE):
        header = _png_header(start)
    else:
        file.seek(0)
        try:
            with silence, Image.open(file) as picture:
                depth = _depth(picture, start)
                header = Header(picture.height, picture.width, picture.format or "", picture.mode, depth)
        except Exception:  # whatever Pillow's many parsers make of a file that is no picture
            header = None
    if header is None:
        raise _unreadable(path)
    if header.height * header.width > MOST_PIXELS or max(header.height, header.width) > LONGEST_SIDE:
        raise DataError(
            f"{path}: {header.width}x{header.height} pixels, more than OpenCV decodes (2^30, and 2^20 a "
            "side); cut it into several pictures"
        )
    return header


def _png_header(start: bytes) -> Header | None:
    if len(start) < 33 or start[12:16] != b"IHDR":
        return None
    if zlib.crc32(start[12:29]) != int.from_bytes(start[29:33], "big"):
        return None
    width, height, depth, color_type = struct.unpack(">IIBB", start[16:26])
    mode, depths = PNG_KINDS.get(color_type, ("", ()))
    if depth not in depths or not width or not height:
        return None
    return Header(height, width, "PNG", mode, depth)


def _depth(picture: Image.Image, start: bytes) -> int:
    """Return the bits of a channel of a picture that is no PNG."""
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(BITS, (1,))  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if picture.format == "PPM":
        return _netpbm(start)[1].bit_length()
    return 16 if picture.mode.startswith("I") else 8


def _netpbm(start: bytes) -> tuple[bytes, int]:
    """Return the letters that a PBM, PGM or PPM begins with, and its largest value."""
    words = re.sub(rb"#[^\r\n]*", b"", start).split(None, 4)
    return words[0], 1 if words[0] in (b"P1", b"P4") else int(float(words[3]))


def _ends(file: IO[bytes]) -> tuple[bytes, bytes]:
    """Return the first and the last bytes of a file."""
    file.seek(0)
    start = file.read(8)
    file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
    return start, file.read()


def _lacks_end(start: bytes, end: bytes) -> bool:
    """Return whether a PNG or JPEG lacks its closing marker near its end; decoders judge other formats."""
    if start == PNG_SIGNATURE:
        return b"IEND" not in end
    # Cameras write more behind the end.
    return start.startswith(JPEG_SIGNATURE) and b"\xff\xd9" not in end


def check_picture(path: str, header: Header) -> None:
    """Raise DataError where OpenCV makes no 8-bit colors of such a picture."""
    if header.format not in FORMATS:
        raise DataError(f"{path}: a picture of format {header.format}; save it as PNG or JPEG")
    if header.mode == "F" or (header.mode == "I" and header.depth > 16):
        raise DataError(f"{path}: has 32-bit numbers for pixels; save it with 8 bits a channel")


def decode_image(encoded: Encoded, rows: int | None = None) -> np.ndarray:
    """Return the picture as uint8 [h, w, 3] BGR, with the values that OpenCV gives, as the original's.

    Args:
        rows: how many are needed, from the top; decoding may stop there (h is `rows` or more). None for all.

    Raises:
        DataError: damaged or no picture.
    """
    pixels = _decode_png(encoded, RGB, rows)
    if pixels is not None:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    # The orientation that a camera notes is left alone, as the label knows nothing of it.
    image = _decode_colors(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image.shape[:2] != (encoded.height, encoded.width):
        raise _unreadable(encoded.path)
    return image


def decode_upright(encoded: Encoded) -> np.ndarray:
    """As `decode_image`, but turned the way up that the camera noted: for pictures without labels.

    Raises:
        DataError: damaged or no picture.
    """
    return _decode_colors(encoded, cv2.IMREAD_COLOR)


def _decode_colors(encoded: Encoded, flags: int) -> np.ndarray:
    check_picture(encoded.path, encoded.header)
    image = _decode(encoded, flags)
    if image.ndim != 3 or image.dtype != np.uint8:
        raise _unreadable(encoded.path)
    return image


def darkness(encoded: Encoded, image: np.ndarray) -> str | None:
    """Return a line about a decoded picture that is nearly black, such as one of 12-bit values in 16 bits."""
    if (brightest := int(image.max())) > DARK:
        return None
    line = f"{encoded.path}: nearly black, its brightest value is {brightest} of 255"
    if encoded.header.depth > 8:
        line += f" (the upper 8 of its {encoded.header.depth} bits are read; scale its values to all of them)"
    return line


def decode_label(encoded: Encoded, rows: int | None = None) -> np.ndarray:
    """Return the ids of a label exactly as stored: integers [h, w]; of colors uint8 [h, w, 3] RGB.

    Of a palette picture these are the indices, of a gray picture of few bits the values before they are
    stretched to 0..255.

    Args:
        rows: see `decode_image`.

    Raises:
        DataError: damaged, of a format that may change values, or neither of ids nor of colors.
    """
    header = encoded.header
    check_label(encoded.path, header)
    if header.format == "PNG":
        if b"acTL" in encoded.content[: encoded.content.find(b"IDAT")]:
            raise DataError(f"{encoded.path}: an animation, a label is one picture; save that as PNG")
        # Of the whole, OpenCV is as fast, and other threads run meanwhile.
        label = None if rows is None else _decode_png(encoded, GRAY, rows)
        if label is None and header.mode == "L" and header.depth >= 8:
            label = _decode(encoded, cv2.IMREAD_UNCHANGED)
        if label is not None and label.ndim == 2:
            return label
    return _decode_ids(encoded)


def _decode_ids(encoded: Encoded) -> np.ndarray:
    """Do as `decode_label` by Pillow: slower than OpenCV, but it leaves palettes and values alone."""
    path, header = encoded.path, encoded.header
    try:
        with silence, Image.open(io.BytesIO(encoded.content)) as picture:
            if problem := _inexact(picture, encoded.content[:HEAD]):
                raise DataError(f"{path}: {problem}; save it as PNG")
            mode = picture.mode
            label = np.array(picture)
            if mode == "P" and not _even(picture.getpalette() or [], label):
                raise DataError(
                    f"{path}: a label whose ids a palette maps to other grays, so that either may be meant; "
                    "save the ids as PNG without a palette"
                )
    except DataError:
        raise
    except Exception as error:  # whatever Pillow's many decoders make of a damaged file
        raise _unreadable(path) from error
    if mode not in (*LABEL_MODES, "RGB"):
        raise no_label(path, mode, mode == "LA" or (mode == "RGBA" and is_gray(label)))
    if mode == "1":
        return label.astype(np.uint8)
    if mode == "L" and header.depth < 8:
        return label // (255 // (2**header.depth - 1))  # Pillow stretches them
    return label.astype(label.dtype.newbyteorder("="), copy=False)


def _even(palette: list[int], label: np.ndarray) -> bool:
    """Return whether the indices uint8 [h, w] of a palette picture are surely its ids.

    They are where the palette has colors, shows each index as that gray, or spreads those used from black to
    white. Other grays are what programs make of a picture without a palette, to store it in fewer bits: there
    the grays are the ids.
    """
    colors = np.reshape(palette, (-1, 3))
    if (colors != colors[:, :1]).any():
        return True
    indices = np.unique(label).astype(int)
    if indices[-1] >= len(colors):
        return True
    grays = colors[indices, 0]
    spread = (np.abs(grays - indices * 255 / max(white, 1)) < 1 for white in (indices[-1], len(colors) - 1))
    return bool((grays == indices).all()) or any(each.all() for each in spread)


def _inexact(picture: Image.Image, start: bytes) -> str | None:
    """Return why the ids that a label was drawn with can't be told from it, if so."""
    if getattr(picture, "n_frames", 1) > 1:
        return f"holds {picture.n_frames} pictures, a label is one"  # type: ignore[attr-defined]
    if picture.format == "PPM":
        magic, largest = _netpbm(start)
        if magic in (b"P1", b"P4"):
            return "a PBM label, in which 1 is black, may mean either value by it"
        if largest not in (255, 65535):
            return f"a label whose values are relative to {largest}"
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        compression = picture.info.get("compression", "raw")
        if compression not in TIFF_COMPRESSIONS:
            return f"a TIFF label compressed by {compression} may have other ids than were drawn"
        if tags.get(PHOTOMETRIC) == 0:
            return "a TIFF label in which 0 is white may mean either value by it"
        if tags.get(SAMPLE_FORMAT, (1,))[0] == 2 and picture.mode == "L":
            return "a TIFF label of signed values of 8 bits, of which those below 0 are read as others"
        if tags.get(ORIENTATION, 1) != 1:
            return "a TIFF label that is stored turned or mirrored"
    return None


def check_label(path: str, header: Header) -> None:
    """Raise DataError where a picture of this format can't be a label: its ids would not be those drawn."""
    if header.format in LOSSY:
        raise DataError(f"{path}: {LOSSY[header.format]} other ids than were drawn; save the drawing as PNG")
    if header.format not in LABEL_FORMATS:
        raise DataError(f"{path}: a label of format {header.format}; save it as PNG")
    if header.mode == "RGB" and header.depth > 8:
        raise DataError(f"{path}: a label whose colors have {header.depth} bits a channel; save it with 8")


def no_label(path: str, mode: str, gray: bool = False, colors: bool = True) -> DataError:
    """Return the error for a label of Pillow's `mode` that holds no ids.

    Args:
        gray: whether its red, green and blue are equal everywhere.
        colors: whether RGB could be one.
    """
    what, advice = f"a picture of mode {mode}", "name the ids' file"
    if gray:
        what, advice = f"a gray mask saved as {mode}", "save one channel of it as PNG"
    elif mode == "RGB" and not colors:
        advice += ", or say with --classes what its colors are"
    return DataError(f"{path}: a label has one channel of ids, this is {what}; {advice}")


def is_gray(pixels: np.ndarray) -> bool:
    """Return whether red, green and blue of [h, w, 3 or more] are equal everywhere."""
    return bool((pixels[..., 1:3] == pixels[..., :1]).all())


def check_size(path: str, picture: Header | Encoded, other: str, expected: Header | Encoded) -> None:
    """Raise DataError where the picture in `path` is not of the size of the one that it belongs to."""
    sizes = [f"{each.width}x{each.height}" for each in (picture, expected)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{path}: {sizes[0]} pixels, but {other} has {sizes[1]}; give the one that belongs to it"
        )


def _decode_png(encoded: Encoded, color_type: int, rows: int | None) -> np.ndarray | None:
    """uint8 [h, w] or [h, w, 3] RGB by libspng; None without it, and for files of another kind."""
    content = encoded.content
    # Of the header: eight bits a channel, this color type, not interlaced.
    if pyspng is None or not content.startswith(PNG_SIGNATURE):
        return None
    if (content[24], content[25], content[28]) != (8, color_type, 0):
        return None
    if rows is not None and rows < encoded.height:
        # A PNG can only be decoded from its beginning: with a header that promises fewer rows, no more are.
        header = content[12:20] + struct.pack(">I", rows) + content[24:29]
        content = b"".join((content[:12], header, struct.pack(">I", zlib.crc32(header)), content[33:]))
    try:
        return pyspng.load(content, "L" if color_type == GRAY else "RGB")
    except (RuntimeError, ValueError) as error:
        raise _unreadable(encoded.path) from error


def _decode(encoded: Encoded, flags: int) -> np.ndarray:
    try:
        with silence:
            picture = cv2.imdecode(np.frombuffer(encoded.content, np.uint8), flags)
    except cv2.error:
        picture = None
    if picture is None:
        raise _unreadable(encoded.path)
    return picture


def _png_is_whole(content: bytes) -> bool:
    """Return whether it begins with a header, and every chunk up to IEND is there and has its checksum."""
    if content[12:16] != b"IHDR":
        return False
    view = memoryview(content)
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(view):
        length = int.from_bytes(view[position : position + 4], "big")
        end = position + 12 + length
        if end > len(view):
            return False
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return False
        if view[position + 4 : position + 8] == b"IEND":
            return True
        position = end
    return False
