"""Reading pictures and labels, with one clear error for each way in which a file can be wrong."""

from __future__ import annotations

import io
import os
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
#: Pillow's modes of one-channel pictures whose values are ids.
LABEL_MODES = ("L", "P", "I;16", "I")


class DataError(ValueError):
    """A data set that can't be used; the message is one line that names the file and what to do."""


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
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        end = file.read()
    if start == PNG_SIGNATURE:
        return b"IEND" not in end
    return start.startswith(JPEG_SIGNATURE) and b"\xff\xd9" not in end


def read_image(path: str) -> np.ndarray:
    """The picture as uint8 [h, w, 3] BGR, decoded by OpenCV as the original does.

    Raises:
        DataError: missing, damaged or no picture.
    """
    # The orientation that a camera notes is left alone, as the label knows nothing of it.
    return _decode(path, _read(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


def read_label(path: str) -> np.ndarray:
    """The label's ids as integers [h, w]; of palette pictures the indices.

    Raises:
        DataError: missing, damaged, or a picture with more than one channel.
    """
    content = _read(path)
    label = _decode(path, content, cv2.IMREAD_UNCHANGED)
    if label.ndim == 2:
        depth = content[24] if content.startswith(PNG_SIGNATURE) else 8
        # OpenCV stretches greys of 1, 2 and 4 bits to 0..255.
        return label // (255 // (2**depth - 1)) if depth < 8 else label
    # OpenCV looks palettes up; Pillow, slower, gives the indices.
    with Image.open(io.BytesIO(content)) as picture:
        check_label_mode(path, picture.mode)
        return np.asarray(picture)


def check_label_mode(path: str, mode: str) -> None:
    """Raises DataError where a picture of this mode can't be a label."""
    if mode not in LABEL_MODES:
        raise DataError(
            f"{path}: a label has one channel of ids, this is a {mode} picture; name the ids' file"
        )


def _decode(path: str, content: bytes, flags: int) -> np.ndarray:
    try:
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        picture = None
    if picture is None:
        raise DataError(f"{path}: not a readable picture; copy it again")
    return picture


def _read(path: str) -> bytes:
    """The bytes of a picture, checked for what OpenCV silently fills in: a missing end, damaged data."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the data set and the list") from error
    if content.startswith(PNG_SIGNATURE) and not _png_is_whole(content):
        raise DataError(f"{path}: damaged or truncated picture; copy it again")
    if content.startswith(JPEG_SIGNATURE) and b"\xff\xd9" not in content[-1024:]:
        raise DataError(f"{path}: truncated picture; copy it again")
    return content


def _png_is_whole(content: bytes) -> bool:
    """Whether every chunk up to IEND is there and has its checksum."""
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
