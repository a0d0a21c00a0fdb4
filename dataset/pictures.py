"""Reading pictures and labels, with one clear error for each way in which a file can be wrong."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from utils.errors import DataError

try:  # optional: libspng decodes a PNG about a quarter faster than OpenCV, and can stop early
    import pyspng
except ImportError:
    pyspng = None

# Pillow takes 180 million pixels for an attack; a data set is its user's own, and may have such pictures.
Image.MAX_IMAGE_PIXELS = None

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
#: Colour types of a PNG header.
GREY, RGB = 0, 2
#: Pillow's modes of one-channel pictures whose values are ids.
LABEL_MODES = ("1", "L", "P", "I;16", "I")


class Header(NamedTuple):
    """What the first bytes of a picture say."""

    height: int
    width: int
    mode: str


def read_header(path: str) -> Header:
    """Size and mode of a picture, without decoding it; finds files that were cut short too.

    Raises:
        DataError: missing, not a picture, or truncated.
    """
    try:
        with Image.open(path) as picture:
            header = Header(picture.height, picture.width, picture.mode)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; check the data set and the list") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable picture; copy it again") from error
    if _is_truncated(path):
        raise DataError(f"{path}: truncated picture; copy it again")
    return header


def _is_truncated(path: str) -> bool:
    """Whether a PNG or JPEG lacks its closing marker near the end (other formats are left to the decoder)."""
    with open(path, "rb") as file:
        start = file.read(8)
        file.seek(-min(65536, os.path.getsize(path)), os.SEEK_END)
        end = file.read()
    if start == PNG_SIGNATURE:
        return b"IEND" not in end
    return start.startswith(JPEG_SIGNATURE) and b"\xff\xd9" not in end


class Encoded(NamedTuple):
    """The bytes of a picture, found whole, and its size."""

    path: str
    content: bytes
    height: int
    width: int


def load(path: str) -> Encoded:
    """Read a picture's file, without decoding it.

    Raises:
        DataError: missing, no picture, or damaged in a way that OpenCV would silently fill in: a missing end,
            data that does not have its checksum.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise DataError(f"{path}: {why}; check the data set and the list") from error
    if content.startswith(PNG_SIGNATURE) and not _png_is_whole(content):
        raise DataError(f"{path}: damaged or truncated picture; copy it again")
    # Cameras write more behind the end.
    if content.startswith(JPEG_SIGNATURE) and b"\xff\xd9" not in content[-65536:]:
        raise DataError(f"{path}: truncated picture; copy it again")
    if content.startswith(PNG_SIGNATURE):
        width, height = struct.unpack(">II", content[16:24])
        return Encoded(path, content, height, width)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return Encoded(path, content, picture.height, picture.width)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable picture; copy it again") from error


def decode_image(encoded: Encoded, rows: int | None = None) -> np.ndarray:
    """The picture as uint8 [h, w, 3] BGR, with the values that OpenCV gives, as the original's.

    Args:
        rows: how many are needed, from the top; decoding may stop there (h is `rows` or more). None for all.

    Raises:
        DataError: damaged or no picture.
    """
    pixels = _decode_png(encoded, RGB, rows)
    if pixels is not None:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    # The orientation that a camera notes is left alone, as the label knows nothing of it.
    return _decode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


def decode_upright(encoded: Encoded) -> np.ndarray:
    """As `decode_image`, but turned the way up that the camera noted: for pictures without labels.

    Raises:
        DataError: damaged or no picture.
    """
    return _decode(encoded, cv2.IMREAD_COLOR)


def decode_label(encoded: Encoded, rows: int | None = None) -> np.ndarray:
    """The label's ids as integers [h, w]; of palette pictures the indices, of colours uint8 [h, w, 3] RGB.

    Args:
        rows: see `decode_image`.

    Raises:
        DataError: damaged, or a picture with transparency.
    """
    # Of the whole, OpenCV is as fast, and other threads run meanwhile.
    label = None if rows is None else _decode_png(encoded, GREY, rows)
    if label is not None:
        return label
    label = _decode(encoded, cv2.IMREAD_UNCHANGED)
    if label.ndim == 2:
        depth = encoded.content[24] if encoded.content.startswith(PNG_SIGNATURE) else 8
        # OpenCV stretches greys of 1, 2 and 4 bits to 0..255.
        return label // (255 // (2**depth - 1)) if depth < 8 else label
    # OpenCV looks palettes up; Pillow, slower, gives the indices.
    with Image.open(io.BytesIO(encoded.content)) as picture:
        check_label_mode(encoded.path, picture.mode, colors=True)
        return np.array(picture)


def check_label_mode(path: str, mode: str, colors: bool) -> None:
    """Raises DataError where a picture of this mode can't be a label; `colors`: whether RGB can be one."""
    if mode not in LABEL_MODES and not (colors and mode == "RGB"):
        raise DataError(
            f"{path}: a label has one channel of ids, this is a {mode} picture; name the ids' file"
            + ("" if colors or mode != "RGB" else ", or say with --classes what its colours are")
        )


def check_size(path: str, picture: Header | Encoded, other: str, expected: Header | Encoded) -> None:
    """Raises DataError where the picture in `path` is not of the size of the one that it belongs to."""
    sizes = [f"{each.width}x{each.height}" for each in (picture, expected)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{path}: {sizes[0]} pixels, but {other} has {sizes[1]}; give the one that belongs to it"
        )


def _decode_png(encoded: Encoded, color_type: int, rows: int | None) -> np.ndarray | None:
    """uint8 [h, w] or [h, w, 3] RGB by libspng; None without it, and for files of another kind."""
    content = encoded.content
    # Of the header: eight bits a channel, this colour type, not interlaced.
    if pyspng is None or not content.startswith(PNG_SIGNATURE):
        return None
    if (content[24], content[25], content[28]) != (8, color_type, 0):
        return None
    if rows is not None and rows < encoded.height:
        # A PNG can only be decoded from its beginning: with a header that promises fewer rows, no more are.
        header = content[12:20] + struct.pack(">I", rows) + content[24:29]
        content = b"".join((content[:12], header, struct.pack(">I", zlib.crc32(header)), content[33:]))
    try:
        return pyspng.load(content, "L" if color_type == GREY else "RGB")
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{encoded.path}: not a readable picture; copy it again") from error


def _decode(encoded: Encoded, flags: int) -> np.ndarray:
    try:
        picture = cv2.imdecode(np.frombuffer(encoded.content, np.uint8), flags)
    except cv2.error:
        picture = None
    if picture is None:
        raise DataError(f"{encoded.path}: not a readable picture; copy it again")
    return picture


def _png_is_whole(content: bytes) -> bool:
    """Whether it begins with a header, and every chunk up to IEND is there and has its checksum."""
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
