"""Division of pictures into training and validation, with the pictures of one group on one side."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence

from utils.errors import DataError

#: Sides of a division.
TRAIN, VAL, TEST = "train", "val", "test"
#: Names of folders, in lower case, that name a side.
NAMES_OF_SIDES = {
    "train": TRAIN,
    "training": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validation": VAL,
    "dev": VAL,
    "test": TEST,
    "testing": TEST,
}

#: Share of the pictures for validation, and seed of the division, by default.
SHARE, SEED = 0.2, 0
#: A random division of fewer folders or groups than this gets a note that names those for validation.
FEW_GROUPS = 5


def sides_in(path: str) -> set[str]:
    """Return the sides that the folders of a path name; several if they contradict each other.

    The name of a folder counts as a whole and in any case. A year may follow it, as in train2017.

    Args:
        path: path of a file, relative to the data set.
    """
    names = (re.sub(r"(?:19|20)\d\d$", "", name.lower()) for name in path.split(os.sep)[:-1])
    return {NAMES_OF_SIDES[name] for name in names if name in NAMES_OF_SIDES}


def sides_of(paths: Sequence[str], names: Sequence[str] | None = None) -> tuple[list[str | None], str | None]:
    """Return the side that the folders of each path name, and a note if they name sides but can't divide.

    Folders divide if they name both "train" and "val" and do not contradict each other. If they can't
    divide, no path is of these sides; "test" remains.

    Args:
        paths: paths of the files, relative to the data set.
        names: names of the files in the note; by default the paths.
    """
    found = [sides_in(path) for path in paths]
    first: dict[str, str] = {}
    for name, sides in zip(names or paths, found, strict=True):
        if len(sides) > 1:
            both = " and ".join(sorted(sides, key=(TRAIN, VAL, TEST).index))
            note = f"the names of folders do not divide the pictures: {name} is for both {both}"
            return [TEST if sides == {TEST} else None for sides in found], note
        for side in sides:
            first.setdefault(side, name)
    alone = {TRAIN, VAL} & first.keys()
    if len(alone) != 1:
        return [next(iter(sides), None) for sides in found], None
    (side,) = alone
    note = (
        f"the names of folders do not divide the pictures: {first[side]} is for {side}, but none is for "
        f"{VAL if side == TRAIN else TRAIN}"
    )
    return [TEST if sides == {TEST} else None for sides in found], note


def groups_of(pictures: Sequence[str], pattern: str | None = None) -> list[str]:
    """Return the group of each picture. A group is one scene, or pictures that are much alike.

    Args:
        pictures: paths relative to the folder of the pictures.
        pattern: regular expression to search in each path. The group is the text of its first parentheses,
            or else of the whole match. By default, the group is the folder; if all pictures are in one
            folder, every picture is a group.

    Raises:
        DataError: the pattern is invalid or not found in a path.
    """
    if pattern is None:
        folders = [os.path.dirname(picture) for picture in pictures]
        return folders if len(set(folders)) > 1 else list(pictures)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--group {pattern}: not a regular expression ({error}); correct it") from error
    groups = []
    for picture in pictures:
        if not (found := expression.search(picture)):
            raise DataError(f"--group {pattern}: not found in {picture}; give a pattern that fits every name")
        groups.append((expression.groups and found[1]) or found[0])
    return groups


def series_of(pictures: Sequence[str]) -> dict[str, int]:
    """Return the series that numbered pictures may be, such as the frames of a video, with their lengths.

    Pictures are a series if their paths differ only in their last number. The result is empty if every
    picture, or no picture, is in one series.

    Args:
        pictures: paths relative to the folder of the pictures.
    """
    series = Counter(re.sub(r"\d+(?=\D*$)", "", os.path.splitext(picture)[0]) for picture in pictures)
    return dict(series) if 1 < len(series) <= len(pictures) // 2 else {}


def divide(groups: Sequence[str], share: float = SHARE, seed: int = SEED) -> list[bool]:
    """Return for each picture whether it is for validation.

    Groups are taken in the order of a hash of the seed and their name until the number of pictures for
    validation is closest to `share`. At least one group is on each side. The result does not depend on the
    order of the pictures. If each picture is a group, a new one changes the side of at most one other.

    Args:
        groups: group of each picture.
        share: share of the pictures for validation, above 0 and below 1.
        seed: seed of the draw.

    Raises:
        DataError: there is only one group.
    """
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise DataError(
            "the pictures are one group, so they can't be divided into training and validation; label more "
            "pictures, or give another --group"
        )
    names = sorted(sizes, key=lambda name: _rank(name, seed))
    wanted = share * len(groups)
    chosen: set[str] = set()
    number = 0
    for name in names:
        size = sizes[name]
        # Take the group if that brings the number closer to the wanted one.
        if abs(number + size - wanted) < abs(number - wanted):
            chosen.add(name)
            number += size
    if not chosen:
        chosen = {min(names, key=lambda name: sizes[name])}
    if len(chosen) == len(names):
        chosen.remove(max(names, key=lambda name: sizes[name]))
    return [group in chosen for group in groups]


def _rank(group: str, seed: int) -> bytes:
    """Return the hash by which groups are ordered."""
    return hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogateescape")).digest()


def say_coarse(groups: Sequence[str], is_val: Sequence[bool]) -> str | None:
    """Return a line about a division of few groups of several pictures; None if the groups are enough.

    Args:
        groups: group of each picture.
        is_val: whether each picture is for validation.
    """
    sizes = Counter(groups)
    if len(sizes) >= FEW_GROUPS or len(sizes) == len(groups):
        return None
    names = sorted({group or os.curdir for group, chosen in zip(groups, is_val, strict=True) if chosen})
    return (
        f"the division is coarse: of only {len(sizes)} groups of pictures, {' and '.join(names)} "
        f"({sum(is_val)} of {len(groups)} pictures) {'is' if len(names) == 1 else 'are'} for validation"
    )
