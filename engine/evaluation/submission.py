"""The archive that a benchmark's server takes: checked pictures of label ids in one zip file."""

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
    """See that an archive can hold pictures of these names, before they are predicted.

    Args:
        source: where the names come from, for the error.

    Raises:
        DataError: a name occurs twice, or is not UTF-8, in which zip files have their names.
    """
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise DataError(f"{source}: {twice} is in it twice; name each picture once")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{source}: the name of {name!r} is not UTF-8, as names in a zip file are; rename the picture"
            ) from None


def write_archive(
    path: str, pictures: Iterable[tuple[str, tuple[int, int]]], label_ids: Sequence[int] | np.ndarray
) -> None:
    """Put pictures of label ids into a zip file, without folders, once all of them are found right.

    Args:
        path: the zip file. One of that name is replaced.
        pictures: files, and (height, width) that each has to have.
        label_ids: the values that they may hold.

    Raises:
        RunError: a picture is missing, unreadable, not of one channel of eight bits, of another size, or has
            other values; or two have the same name.
    """
    pictures = list(pictures)
    allowed = np.zeros(256, bool)
    allowed[np.asarray(label_ids, np.intp)] = True
    names = [os.path.basename(file) for file, _ in pictures]
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise RunError(f"{path}: {twice} would be in it twice; give the pictures other names")

    def check(picture: tuple[str, tuple[int, int]]) -> None:
        file, size = picture
        try:
            with Image.open(file) as opened:
                mode, ids = opened.mode, np.asarray(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise RunError(f"{file}: not a readable prediction ({error}); evaluate again") from error
        if mode != "L" or ids.shape != size:
            raise RunError(f"{file}: {mode} of {ids.shape}, expected L of {size}; evaluate again")
        if not allowed[ids].all():
            raise RunError(f"{file}: holds {ids[~allowed[ids]][0]}, which is no class's id; evaluate again")

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(check, pictures):
            pass
    with replacing(path) as temporary:
        # PNGs are compressed already. A wrong clock gives times that zip files have no room for.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            for (file, _), name in zip(pictures, names, strict=True):
                archive.write(file, name)
        with zipfile.ZipFile(temporary) as archive:
            if damaged := archive.testzip():
                raise RunError(f"{path}: {damaged} was not written right; look at the disk")
