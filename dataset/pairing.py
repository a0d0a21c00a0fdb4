"""Matching of pictures and label pictures in two folders by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Set
from typing import NamedTuple

from dataset import layout
from dataset.pictures import ENDINGS
from utils.errors import DataError


class Listing(NamedTuple):
    """The files below a folder, as paths relative to the data directory."""

    pictures: list[str]
    others: list[str]  # files with other endings
    skipped: list[str]  # hidden and system files


class Pairing(NamedTuple):
    """Pictures and labels that belong together, as paths relative to the data directory."""

    pairs: list[tuple[str, str]]  # picture and label
    suffix: str  # what the names of the labels add to those of the pictures
    unlabeled: list[str]  # pictures without a label
    problems: list[str]  # lines about labels that belong to no picture, or to the same one


def pictures_below(root: str, folder: str) -> Listing:
    """List the files below `folder`, a path relative to `root`.

    Raises:
        DataError: a folder can't be read.
    """
    files, skipped = layout.files_below(root, folder)
    paths = [os.path.join(folder, inner, name) for inner, name in files]
    # Label pictures of lossy formats are listed too, so that they are refused.
    pictures = [path for path in paths if path.lower().endswith(ENDINGS)]
    return Listing(pictures, sorted(set(paths) - set(pictures)), skipped)


def pair_up(root: str, pictures: Listing, labels: Listing, folders: tuple[str, str]) -> Pairing:
    """Match pictures and labels by their names.

    Args:
        root: the data directory, for the lines about problems.
        pictures: files below the first folder.
        labels: files below the second folder.
        folders: the folders of the pictures and of the labels, relative to `root`.

    Raises:
        DataError: a folder has no pictures, or no label fits a picture.
    """
    for listing, folder, what in zip(
        (pictures, labels), folders, ("pictures", "label pictures"), strict=True
    ):
        if not listing.pictures:
            other = f" ({listing.others[0]} is none)" if listing.others else ""
            raise DataError(
                f"{os.path.join(root, folder)}: has no {what}{other}; put pictures in {folders[0]} and a "
                f"label picture of the same name in {folders[1]}, or convert annotations with "
                "python -m tools.prepare"
            )
    by_stem: dict[str, str] = {}
    twins: dict[str, str] = {}  # second picture of the same name, by the first one
    for path in pictures.pictures:
        if (first := by_stem.setdefault(_stem(path, folders[0]), path)) != path:
            twins[first] = path
    stems = {path: _stem(path, folders[1]) for path in labels.pictures}
    suffix = _common_suffix(stems.values(), by_stem.keys())
    if suffix is None:
        raise DataError(
            f"{root}: no label fits a picture by its name, for example {pictures.pictures[0]} and "
            f"{labels.pictures[0]}; give each label the name of its picture, if need be with one suffix"
        )
    label_of: dict[str, str] = {}
    problems: list[str] = []
    odd: list[str] = []
    for label, stem in stems.items():
        picture = by_stem.get(stem.removesuffix(suffix)) if stem.endswith(suffix) else None
        if picture is None:
            odd.append(label)
        elif (first := label_of.setdefault(picture, label)) != label:
            problems.append(f"{os.path.join(root, label)}: belongs to {picture}, as does {first}; keep one")
        elif picture in twins:
            problems.append(
                f"{os.path.join(root, label)}: fits both {picture} and {twins[picture]}; rename one of them"
            )
    for label in odd:
        stem = stems[label]
        starts = (by_stem.get(stem[:end]) for end in range(len(stem) - 1, 0, -1) if not stem[end].isalnum())
        near = next((picture for picture in starts if picture in label_of), None)
        what = f"has no picture in {folders[0]}; add the picture or remove the label"
        if near:
            what = f"has no picture, unless it belongs to {near}, as does {label_of[near]}; keep one"
        problems.append(f"{os.path.join(root, label)}: {what}")
    unlabeled = [path for path in by_stem.values() if path not in label_of]
    return Pairing(list(label_of.items()), suffix, unlabeled, problems)


def _stem(path: str, folder: str) -> str:
    """Return a path relative to `folder`, without its ending."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _common_suffix(labels: Iterable[str], pictures: Set[str]) -> str | None:
    """Return the suffix by which most labels fit a picture, the shortest one of several; None if none fits.

    Args:
        labels: paths of the labels without endings, relative to their folder.
        pictures: likewise those of the pictures.
    """
    counts: Counter[str] = Counter()
    for label in labels:
        for end in range(label.rfind(os.sep) + 2, len(label) + 1):
            # A number is not a suffix of another one: 1 and 10 are different names.
            inside = end < len(label) and label[end - 1].isdigit() and label[end].isdigit()
            if label[:end] in pictures and not inside:
                counts[label[end:]] += 1
    return max(counts, key=lambda suffix: (counts[suffix], -len(suffix)), default=None)
