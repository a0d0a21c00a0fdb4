"""Reading and decoding of pictures and labels, with checks of every file."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import IO, NamedTuple

import cv2
import numpy as np
from PIL import Image

from utils.errors import DataError
from utils.files import open_input
from utils.silence import silence

try:  # optional: libspng decodes PNG files about 25 % faster than OpenCV, and can stop after some rows
    import pyspng
except ImportError:
    pyspng = None

# Pillow rejects pictures of 180 million pixels as an attack, but data sets may have such pictures.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns of unusual metadata, with a line for each file.
warnings.filterwarnings("ignore", module=r"PIL\.")

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
#: Number of bytes read from the start of a file to identify it, and from its end to find the end marker.
HEAD, TAIL = 1024, 65536
#: Color types in a PNG header, with their modes in Pillow and the allowed bits per channel.
GRAY, RGB = 0, 2
PNG_KINDS = {
    GRAY: ("L", (1, 2, 4, 8, 16)),
    RGB: ("RGB", (8, 16)),
    3: ("P", (1, 2, 4, 8)),
    4: ("LA", (8, 16)),
    6: ("RGBA", (8, 16)),
}
#: Formats that OpenCV decodes, by their names in Pillow.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "SUN", "TIFF", "WEBP")
#: Endings of picture files, in lower case.
ENDINGS = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
#: Limits of OpenCV: pixels in total, pixels of a side, and bytes of a file.
MOST_PIXELS, LONGEST_SIDE, MOST_BYTES = 2**30, 2**20, 2**31 - 1
#: Formats that change values, or may change them, with the start of the error message.
LOSSY = {
    "AVIF": "AVIF may change",
    "GIF": "GIF may change",  # most programs renumber its palette
    "JPEG": "JPEG changes",
    "JPEG2000": "JPEG 2000 may change",
    "MPO": "JPEG changes",
    "WEBP": "WebP may change",
}
LABEL_FORMATS = ("BMP", "PNG", "PPM", "TIFF")
#: Modes in Pillow of one-channel pictures, whose values can be ids.
LABEL_MODES = ("1", "L", "P", "I;16", "I;16B", "I")
#: Lossless compressions of TIFF, by their names in Pillow.
TIFF_COMPRESSIONS = (
    "raw", "tiff_raw_16", "packbits", "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_deflate",
    "tiff_adobe_deflate", "tiff_thunderscan", "lzma", "zstd",
)  # fmt: skip
#: TIFF tags.
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339
#: Orientations in which height and width are exchanged.
TURNED = (5, 6, 7, 8)
#: A picture without brighter values is reported as nearly black, such as one with 14-bit values in 16 bits.
DARK = 63


class Header(NamedTuple):
    """Size and format of a picture, from its header."""

    height: int
    width: int
    format: str  # name in Pillow, such as PNG or JPEG
    mode: str  # mode in Pillow; for a gray PNG always L
    depth: int  # bits per channel


class Encoded(NamedTuple):
    """The content of a picture file that was checked for completeness, and its header."""

    path: str
    content: bytes
    header: Header

    @property
    def height(self) -> int:
        """Return the height in pixels."""
        return self.header.height

    @property
    def width(self) -> int:
        """Return the width in pixels."""
        return self.header.width


def read_header(path: str) -> Header:
    """Return the header of a picture, and check that the file is not truncated, without decoding it.

    Raises:
        DataError: the file is missing, not a picture, truncated, or too large for OpenCV.
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


def read_orientation(path: str) -> int:
    """Return the orientation tag of a picture (see `orientation_of`); 1 if the file can't be read."""
    try:
        with open_input(path) as file:
            return orientation_of(file)
    except OSError:
        return 1


def _png_exif(part: bytes) -> bytes:
    """Return the content of the chunk eXIf in a part of a PNG file; nothing if it is not there."""
    for found in re.finditer(b"eXIf", part):
        length = int.from_bytes(part[found.start() - 4 : found.start()], "big")
        end = found.end() + length
        if zlib.crc32(part[found.start() : end]) == int.from_bytes(part[end : end + 4], "big"):
            return part[found.end() : end]
    return b""


def fits_both(orientation: int, header: Header | Encoded) -> bool:
    """Return whether a label of the size of a picture as stored has that of the upright picture too.

    Args:
        orientation: orientation tag of the picture, 1 to 8; 1 is upright.
        header: header of the picture.
    """
    return orientation in (2, 3, 4) or (orientation in TURNED and header.height == header.width)


def say_turned(pictures: Sequence[str]) -> str:
    """Return a line about pictures whose labels fit them both as stored and upright, used as stored."""
    number = "1 picture has" if len(pictures) == 1 else f"{len(pictures)} pictures have"
    return (
        f"{number} an orientation tag, and a label that fits both the stored and the upright picture; the "
        "tag is ignored; if the label is for the upright picture, save the picture turned, without the tag; "
        f"the first is {pictures[0]}"
    )


def load(path: str) -> Encoded:
    """Read a picture file without decoding it.

    Raises:
        DataError: the file is missing, not a picture, or too large for OpenCV. It is also raised for damage
            that OpenCV would silently fill in: a missing end, or data with a wrong checksum.
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
    return check_content(path, content)


def check_content(path: str, content: bytes) -> Encoded:
    """Check the content of a picture file without decoding it; see `load` for the errors."""
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
        advice = "macOS creates such files next to others, remove it from the list"
    return DataError(f"{path}: not a readable picture; {advice}")


def _header(path: str, file: IO[bytes]) -> Header:
    """Return the header of an open file; see `read_header` for the errors."""
    start = file.read(HEAD)
    if start.startswith(PNG_SIGNATURE):
        header = _png_header(start)
    else:
        file.seek(0)
        try:
            with silence, Image.open(file) as picture:
                depth = _depth(picture, start)
                header = Header(picture.height, picture.width, picture.format or "", picture.mode, depth)
        except Exception:  # Pillow's parsers raise all kinds of errors for other files
            header = None
    if header is None:
        raise _unreadable(path)
    if header.height * header.width > MOST_PIXELS or max(header.height, header.width) > LONGEST_SIDE:
        raise DataError(
            f"{path}: {header.width}x{header.height} pixels, more than OpenCV decodes (2^30, and 2^20 per "
            "side); split it into several pictures"
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
    """Return the bits per channel of a picture that is not a PNG."""
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(BITS, (1,))  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else int(bits)
    if picture.format == "PPM":
        return _netpbm(start)[1].bit_length()
    return 16 if picture.mode.startswith("I") else 8


def _netpbm(start: bytes) -> tuple[bytes, int]:
    """Return the magic number of a PBM, PGM or PPM file, such as b"P5", and its maximum value."""
    words = re.sub(rb"#[^\r\n]*", b"", start).split(None, 4)
    return words[0], 1 if words[0] in (b"P1", b"P4") else int(float(words[3]))


def _ends(file: IO[bytes]) -> tuple[bytes, bytes]:
    """Return the first and the last bytes of a file."""
    file.seek(0)
    start = file.read(8)
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    return start, file.read()


def _lacks_end(start: bytes, end: bytes) -> bool:
    """Return whether the end marker of a PNG or JPEG is missing; other formats are left to the decoders."""
    if start == PNG_SIGNATURE:
        return b"IEND" not in end
    # Cameras write more data after the end marker.
    return start.startswith(JPEG_SIGNATURE) and b"\xff\xd9" not in end


def check_picture(path: str, header: Header) -> None:
    """Raise DataError if OpenCV can't decode a picture with this header to 8-bit colors."""
    if header.format not in FORMATS:
        raise DataError(f"{path}: format {header.format} is not supported; save it as PNG or JPEG")
    if header.mode == "F" or (header.mode == "I" and header.depth > 16):
        raise DataError(f"{path}: has 32-bit pixel values; save it with 8 bits per channel")


def decode_image(encoded: Encoded, rows: int | None = None) -> np.ndarray:
    """Decode a picture to uint8 [h, w, 3] BGR, with the same values as OpenCV (as in the original).

    Args:
        encoded: the picture file.
        rows: number of rows needed from the top; decoding may stop there, with h >= rows. None for all.

    Raises:
        DataError: the file is damaged or not a picture.
    """
    pixels = _decode_png(encoded, RGB, rows)
    if pixels is not None:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    # Ignore the orientation tag of cameras, since it does not apply to the label.
    image = _decode_colors(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image.shape[:2] != (encoded.height, encoded.width):
        raise _unreadable(encoded.path)
    return image


def decode_upright(encoded: Encoded) -> np.ndarray:
    """Decode like `decode_image`, but apply the orientation tag of cameras; for pictures without labels.

    Raises:
        DataError: the file is damaged or not a picture.
    """
    if encoded.header.format == "TIFF":  # about which decoders disagree
        return _decode_colors(encoded, cv2.IMREAD_COLOR)
    # OpenCV applies the tags of some formats only.
    image, orientation = decode_image(encoded), orientation_of(io.BytesIO(encoded.content))
    if orientation in TURNED:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def orientation_of(file: IO[bytes]) -> int:
    """Return the orientation tag of an open picture, 1 to 8 as in Exif; 1 without a valid one.

    Only the start and the end of a PNG file, and the headers of others, are read.
    """
    try:
        start = file.read(TAIL)
        if start.startswith(PNG_SIGNATURE):
            exif = Image.Exif()
            exif.load(_png_exif(start) or _png_exif(_ends(file)[1]))
        else:
            file.seek(0)
            with silence, Image.open(file) as picture:
                exif = picture.getexif()
        value = exif.get(ORIENTATION, 1)
    except Exception:  # Pillow's parsers raise all kinds of errors for damaged tags
        return 1
    return value if value in range(1, 9) else 1


def _decode_colors(encoded: Encoded, flags: int) -> np.ndarray:
    check_picture(encoded.path, encoded.header)
    image = _decode(encoded, flags)
    if image.ndim != 3 or image.dtype != np.uint8:
        raise _unreadable(encoded.path)
    return image


def darkness(encoded: Encoded, image: np.ndarray) -> str | None:
    """Return a line about a decoded picture if it is nearly black, such as 12-bit values in 16 bits."""
    if (brightest := int(image.max())) > DARK:
        return None
    line = f"{encoded.path}: nearly black, its brightest value is {brightest} of 255"
    if encoded.header.depth > 8:
        line += f" (only the upper 8 of its {encoded.header.depth} bits are used; scale up its values)"
    return line


def decode_label(encoded: Encoded, rows: int | None = None) -> np.ndarray:
    """Decode a label to its ids as stored, integers [h, w], or for a color label to uint8 [h, w, 3] RGB.

    The ids of a palette picture are its indices. The ids of a gray picture with less than 8 bits are not
    scaled to 0..255.

    Args:
        encoded: the label file.
        rows: see `decode_image`.

    Raises:
        DataError: the file is damaged, has a format that may change values, or holds neither ids nor colors.
    """
    header = encoded.header
    check_label(encoded.path, header)
    if header.format == "PNG":
        if b"acTL" in encoded.content[: encoded.content.find(b"IDAT")]:
            raise DataError(f"{encoded.path}: is an animation, a label is one picture; save one frame as PNG")
        # For all rows, OpenCV is as fast and releases Python's global lock.
        label = None if rows is None else _decode_png(encoded, GRAY, rows)
        if label is None and header.mode == "L" and header.depth >= 8:
            label = _decode(encoded, cv2.IMREAD_UNCHANGED)
        if label is not None and label.ndim == 2:
            return label
    return _decode_ids(encoded)


def _decode_ids(encoded: Encoded) -> np.ndarray:
    """Decode a label with Pillow: slower than OpenCV, but without changing palettes and values."""
    path, header = encoded.path, encoded.header
    try:
        with silence, Image.open(io.BytesIO(encoded.content)) as picture:
            if problem := _inexact(picture, encoded.content[:HEAD]):
                raise DataError(f"{path}: {problem}; save it as PNG")
            mode = picture.mode
            label = np.array(picture)
            if mode == "P" and not _even(picture.getpalette() or [], label):
                raise DataError(
                    f"{path}: the palette maps the ids to other gray values, so either may be the ids; save "
                    "the ids as PNG without a palette"
                )
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged files
        raise _unreadable(path) from error
    if mode not in (*LABEL_MODES, "RGB"):
        raise no_label(path, mode, mode == "LA" or (mode == "RGBA" and is_gray(label)))
    if mode == "1":
        return label.astype(np.uint8)
    if mode == "L" and header.depth < 8:
        return label // (255 // (2**header.depth - 1))  # Pillow scales the values to 0..255
    return label.astype(label.dtype.newbyteorder("="), copy=False)


def _even(palette: list[int], label: np.ndarray) -> bool:
    """Return whether the ids of a palette picture are certainly its indices uint8 [h, w].

    They are if the palette has colors, maps each index to the same gray value, or spreads the indices evenly
    from black to white. Other gray palettes are created by programs that store a gray picture in fewer bits;
    then the gray values are the ids.
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
    """Return why the ids of a label may not be read correctly; None if they are."""
    if getattr(picture, "n_frames", 1) > 1:
        return f"holds {picture.n_frames} pictures, a label is one picture"  # type: ignore[attr-defined]
    if picture.format == "PPM":
        magic, largest = _netpbm(start)
        if magic in (b"P1", b"P4"):
            return "is a PBM label, in which 1 is black, so its ids are ambiguous"
        if largest not in (255, 65535):
            return f"has values relative to {largest}"
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        compression = picture.info.get("compression", "raw")
        if compression not in TIFF_COMPRESSIONS:
            return f"is a TIFF label compressed by {compression}, which may change its ids"
        if tags.get(PHOTOMETRIC) == 0:
            return "is a TIFF label in which 0 is white, so its ids are ambiguous"
        if tags.get(SAMPLE_FORMAT, (1,))[0] == 2 and picture.mode == "L":
            return "is a TIFF label with signed values of 8 bits, whose negative values are read incorrectly"
        if tags.get(ORIENTATION, 1) != 1:
            return "is a TIFF label that is stored turned or mirrored"
    return None


def check_label(path: str, header: Header) -> None:
    """Raise DataError if the format of a picture can't be used for a label, because it may change ids."""
    if header.format in LOSSY:
        raise DataError(f"{path}: {LOSSY[header.format]} the ids of a label; save the original as PNG")
    if header.format not in LABEL_FORMATS:
        raise DataError(f"{path}: format {header.format} is not supported for labels; save it as PNG")
    if header.mode == "RGB" and header.depth > 8:
        raise DataError(f"{path}: is a color label with {header.depth} bits per channel; save it with 8")


def no_label(path: str, mode: str, gray: bool = False, colors: bool = True) -> DataError:
    """Return the error for a label that does not hold ids.

    Args:
        path: the label file.
        mode: its mode in Pillow.
        gray: whether its red, green and blue channels are equal.
        colors: whether an RGB label is allowed here.
    """
    what, advice = f"a picture of mode {mode}", "name the file with the ids"
    if gray:
        what = f"a gray mask saved as {mode}"
        advice = "save one channel of it as PNG, or convert the folder (python -m tools.prepare DIR OUT)"
    elif mode == "RGB" and not colors:
        advice += ", or give a table of its colors with --classes"
    return DataError(f"{path}: a label has one channel of ids, but this is {what}; {advice}")


def is_gray(pixels: np.ndarray) -> bool:
    """Return whether the first three channels of [h, w, channels] are equal everywhere."""
    return bool((pixels[..., 1:3] == pixels[..., :1]).all())


def check_size(path: str, picture: Header | Encoded, other: str, expected: Header | Encoded) -> None:
    """Raise DataError unless two pictures have the same size.

    Args:
        path: the file to check, for the error message.
        picture: its header.
        other: the file that it belongs to.
        expected: header of that file.
    """
    sizes = [f"{each.width}x{each.height}" for each in (picture, expected)]
    if sizes[0] != sizes[1]:
        advice = "use files that belong together"
        if (picture.width, picture.height) == (expected.height, expected.width):
            advice += (
                ", or turn the picture upright, as a camera's orientation tag asks (python -m tools.prepare)"
            )
        raise DataError(f"{path}: {sizes[0]} pixels, but {other} has {sizes[1]}; {advice}")


def _decode_png(encoded: Encoded, color_type: int, rows: int | None) -> np.ndarray | None:
    """Decode a PNG with libspng to uint8 [h, w] or [h, w, 3] RGB; None without it or for other files."""
    content = encoded.content
    # Check the header: eight bits per channel, this color type, not interlaced.
    if pyspng is None or not content.startswith(PNG_SIGNATURE):
        return None
    if (content[24], content[25], content[28]) != (8, color_type, 0):
        return None
    if rows is not None and rows < encoded.height:
        # To stop early, decode with a header that declares fewer rows.
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
    """Return whether a PNG has its header and all chunks up to IEND, with correct checksums."""
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
