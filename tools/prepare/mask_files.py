"""Folders with pictures and label pictures: which belong together, their sizes, and their split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dataset import folder_pair
from dataset.folder_pair import IMAGES
from dataset.layout import say_skipped
from dataset.pairing import Listing, pair_up, pictures_below
from dataset.pictures import read_header
from dataset.split import TEST, TRAIN, VAL, sides_of
from tools.prepare.pictures import examine
from tools.prepare.reading import by_x, count, number_of
from utils.errors import DataError
from utils.files import read_input

#: Folder with the lists of the parts of a VOC data set.
VOC_LISTS = os.path.join("ImageSets", "Segmentation")


class Mask(NamedTuple):
    """A picture and its label picture."""

    name: str
    picture: str
    label: str
    part: str | None = None  # train, val or test, if the source tells


def of_folder_pair(source: str) -> tuple[list[Mask], list[str], list[str]]:
    """Return the masks of a folder pair, notes and problems."""
    found = folder_pair.find(source)
    masks = []
    for side, pairs in found.sides.items():
        for pair in pairs:
            name = os.path.splitext(os.path.normpath(pair.image))[0].removeprefix(IMAGES + os.sep)
            picture, label = (os.path.join(source, path) for path in (pair.image, pair.label))
            masks.append(Mask(name, picture, label, side if found.is_given or side == TEST else None))
    notes = [found.taken, *(line.removeprefix(f"{source}: ") for line in found.left_out)]
    if found.skipped:
        notes.append(say_skipped(found.skipped))
    return sorted(masks), notes, found.problems


def of_folders(source: str, pictures: str, labels: str) -> tuple[list[Mask], list[str], list[str]]:
    """Return the masks of two folders, notes and problems."""
    listings: tuple[Listing, Listing] = pictures_below(source, pictures), pictures_below(source, labels)
    found = pair_up(source, *listings, (pictures, labels))
    masks = [
        Mask(
            os.path.splitext(os.path.relpath(picture, pictures))[0],
            os.path.join(source, picture),
            os.path.join(source, label),
        )
        for picture, label in found.pairs
    ]
    notes = [f"{number_of(masks, 'picture')} of {pictures} with their labels of {labels}"]
    if found.unlabeled:
        first = f"; the first is {found.unlabeled[0]}"
        notes.append(f"{count(found.unlabeled, 'picture')} without a label, and left out{first}")
    return sorted(masks), notes, found.problems


def by_folders(masks: Sequence[Mask], notes: list[str]) -> list[Mask]:
    """Return the masks with the parts that the folders of their pictures name."""
    parts, note = sides_of([mask.name for mask in masks])
    notes += [note] if note else []
    return [mask._replace(part=part) for mask, part in zip(masks, parts, strict=True)]


def with_parts(source: str, masks: Sequence[Mask], notes: list[str], problems: list[str]) -> list[Mask]:
    """Return the masks with their parts in the lists of VOC, or else those that folders name."""
    paths = {part: os.path.join(source, VOC_LISTS, f"{part}.txt") for part in (TRAIN, VAL, TEST)}
    if not all(os.path.isfile(paths[part]) for part in (TRAIN, VAL)):
        return by_folders(masks, notes)
    if not os.path.isfile(paths[TEST]):
        del paths[TEST]
    part_of: dict[str, str] = {}
    names = {mask.name for mask in masks}
    for part, path in paths.items():
        try:
            lines = read_input(path).decode("utf-8", "surrogateescape").splitlines()
        except OSError as error:
            problems.append(f"{path}: can't be read ({error.strerror or error}); check the file")
            continue
        for number, line in enumerate(lines, 1):
            if not (name := line.strip()):
                continue
            if name not in names and part == TEST:
                continue  # the labels of VOC's test pictures are not public
            if name not in names:
                problems.append(
                    f"{path}:{number}: {name[:80]} has no label picture; add it or remove the line"
                )
            elif part_of.setdefault(name, part) != part:
                problems.append(
                    f"{path}:{number}: {name} is in {part_of[name]}.txt too; remove it from one list"
                )
    return [mask._replace(part=part_of.get(mask.name)) for mask in masks]


def check_sizes(
    masks: Sequence[Mask], problems: list[str]
) -> tuple[list[tuple[tuple[int, int], bool] | None], list[str]]:
    """Check by their headers that pictures and labels have the same size, as stored or upright.

    Returns:
        For each mask (height, width), and whether it fits the upright picture only, or None if there is a
        problem; and the pictures with an orientation tag whose labels fit them both as stored and upright.
    """
    sizes: list[tuple[tuple[int, int], bool] | None] = []
    turned = []

    def look(mask: Mask) -> tuple[tuple[int, int], bool, bool] | str:
        try:
            picture, label = examine(mask.picture), read_header(mask.label)
        except DataError as error:
            return str(error)
        size = label.height, label.width
        if size not in (picture.stored, picture.upright):
            what = f"{by_x(size)} pixels, but {mask.picture} has {by_x(picture.stored)}"
            return f"{mask.label}: {what}; use files that belong together"
        return size, size != picture.stored, picture.fits_both

    with ThreadPoolExecutor(8) as pool:
        for mask, looked in zip(masks, pool.map(look, masks), strict=True):
            if isinstance(looked, str):
                problems.append(looked)
                sizes.append(None)
                continue
            size, upright, is_both = looked
            sizes.append((size, upright))
            if is_both:
                turned.append(mask.picture)
    return sizes, turned
