"""Archive for the server of a benchmark: checked pictures of label ids in one zip file."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from utils.errors import DataError, RunError
from utils.files import replacing


def check_names(source: str, names: Sequence[str]) -> None:
    """Check, before the prediction, that a zip file can hold pictures of these names.

    Args:
        source: list or folder that the names come from, for error messages.
        names: names of the pictures.

    Raises:
        DataError: a name occurs twice, or is not valid UTF-8.
    """
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise DataError(f"{source}: lists {twice} twice; list each picture once")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{source}: the name {name!r} is not valid UTF-8, which zip files need; rename the picture"
            ) from None


def write_archive(
    path: str, pictures: Iterable[tuple[str, tuple[int, int]]], label_ids: Sequence[int] | np.ndarray
) -> None:
    """Check pictures of label ids and write them into a zip file, without folders.

    Args:
        path: the zip file; an existing file is replaced.
        pictures: path and required (height, width) of each picture.
        label_ids: values that the pictures may hold.

    Raises:
        RunError: a picture is missing or unreadable, does not have one channel of eight bits, or has another
            size or other values; or two pictures have the same name.
        OSError: the zip file can't be written.
    """
    pictures = list(pictures)
    allowed = np.zeros(256, bool)
    allowed[np.asarray(label_ids, np.intp)] = True
    names = [os.path.basename(file) for file, _ in pictures]
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise RunError(f"{path}: two pictures are named {twice}; give them different names")

    def check(picture: tuple[str, tuple[int, int]]) -> None:
        file, size = picture
        try:
            with Image.open(file) as opened:
                mode, ids = opened.mode, np.asarray(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise RunError(f"{file}: not a readable prediction ({error}); evaluate again") from error
        if mode != "L" or ids.shape != size:
            raise RunError(f"{file}: is mode {mode} of size {ids.shape}, not L of {size}; evaluate again")
        if not allowed[ids].all():
            raise RunError(
                f"{file}: holds {ids[~allowed[ids]][0]}, which is not the id of a class; evaluate again"
            )

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(check, pictures):
            pass
    with replacing(path) as temporary:
        # PNGs are compressed already. strict_timestamps=False: zip files can't store the dates that a wrong
        # clock may give.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            for (file, _), name in zip(pictures, names, strict=True):
                archive.write(file, name)
        with zipfile.ZipFile(temporary) as archive:
            if damaged := archive.testzip():
                raise RunError(f"{path}: {damaged} was written incorrectly; check the disk")
