"""Division of pictures into training and validation, with the pictures of one group on one side."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from utils.errors import DataError

#: Share of the pictures for validation, and seed of the division, by default.
SHARE, SEED = 0.2, 0


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

    Groups are drawn at random until the number of pictures for validation is closest to `share`. At least one
    group is on each side. The result depends on the groups of the pictures, not on their order.

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
    names = sorted(sizes)
    wanted = share * len(groups)
    chosen: set[str] = set()
    number = 0
    for index in np.random.default_rng(seed).permutation(len(names)):
        size = sizes[names[index]]
        # Take the group if that brings the number closer to the wanted one.
        if abs(number + size - wanted) < abs(number - wanted):
            chosen.add(names[index])
            number += size
    if not chosen:
        chosen = {min(names, key=lambda name: sizes[name])}
    if len(chosen) == len(names):
        chosen.remove(max(names, key=lambda name: sizes[name]))
    return [group in chosen for group in groups]
