"""Pictures of one's own in two folders: images/ with the pictures, and labels/ with a label picture for each.

A label belongs to the picture with the same path below its folder, except for the ending and one suffix that
all labels have, such as images/a/1.jpg and labels/a/1_mask.png.

The pictures are divided into training and validation by the files train.lst and val.lst, or by folders called
train and val below images/, or else at random (dataset.split).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dataset import layout, split
from dataset.layout import Pair
from dataset.pairing import pair_up, pictures_below
from dataset.split import TEST, TRAIN, VAL
from utils.errors import DataError
from utils.files import read_input

IMAGES, LABELS = "images", "labels"
#: Lists of the two sides, as tools.prepare writes them.
LISTS = {TRAIN: "train.lst", VAL: "val.lst"}
#: List of the pictures for testing, which may be missing.
TEST_LIST = "test.lst"


class FolderPair(NamedTuple):
    """The pictures of a data directory with images/ and labels/."""

    root: str
    sides: dict[str, list[Pair]]  # training, validation, and labeled test pictures
    taken: str  # number of pictures, and where they and their labels are
    division: str  # how they are divided
    is_given: bool  # whether lists or folders divide them
    left_out: list[str]  # lines about files that are left out, and about folders that can't divide
    skipped: list[str]  # hidden and system files
    problems: list[str]

    @property
    def notes(self) -> list[str]:
        """Return lines about what was taken for what."""
        numbers = f"{len(self.sides[TRAIN])} for training, {len(self.sides[VAL])} for validation"
        lines = [f"{self.root}: {self.taken}; {numbers} ({self.division})"]
        if not self.is_given:
            drawn = [*self.sides[TRAIN], *self.sides[VAL]]
            groups = split.groups_of([_inner(pair.image) for pair in drawn])
            is_val = [number >= len(self.sides[TRAIN]) for number in range(len(drawn))]
            if coarse := split.say_coarse(groups, is_val):
                lines.append(f"{self.root}: {coarse}")
        return [*lines, *self.left_out]


def is_pair(root: str) -> bool:
    """Return whether a data directory is a folder pair; a Cityscapes layout is none."""
    return os.path.isdir(os.path.join(root, IMAGES)) and not os.path.lexists(
        os.path.join(root, "leftImg8bit")
    )


def find(root: str) -> FolderPair:
    """Return the pictures of a folder pair, and what is wrong with their names.

    Raises:
        DataError: a folder or list can't be read or is empty, or no label fits a picture.
    """
    lists = {side: os.path.join(root, name) for side, name in LISTS.items()}
    there = [path for path in (*lists.values(), os.path.join(root, TEST_LIST)) if os.path.lexists(path)]
    if there:
        if not all(map(os.path.lexists, lists.values())):
            raise DataError(
                f"{there[0]}: {' and '.join(LISTS.values())} divide the pictures together; write both, or "
                "remove this one to divide them at random"
            )
        return _of_lists(root, lists)
    pictures, labels = pictures_below(root, IMAGES), pictures_below(root, LABELS)
    pairing = pair_up(root, pictures, labels, (IMAGES, LABELS))
    pairs = layout.named(pairing.pairs)
    named, note = split.sides_of([_inner(path) for path in pictures.pictures])
    side_of = dict(zip(pictures.pictures, named, strict=True))
    sides, division, is_given, problems = _divide(root, pairs, side_of)
    number = sum(len(sides[side]) for side in (TRAIN, VAL))
    name = f"STEM{pairing.suffix}{os.path.splitext(pairs[0].label)[1]}"
    taken = f"{number} pictures of {IMAGES}/ with their labels of {LABELS}/ ({name})"
    left_out = {
        "pictures have no label and are left out": [p for p in pairing.unlabeled if side_of[p] != TEST],
        "pictures are in none of the folders for training, validation and testing and are left out": [
            pair.image for pair in pairs if is_given and side_of[pair.image] is None
        ],
        "other files are no pictures and are left out": [*pictures.others, *labels.others],
    }
    lines = [
        f"{root}: {len(paths)} {what}, the first is {paths[0]}" for what, paths in left_out.items() if paths
    ]
    if note:
        lines.insert(0, f"{root}: {note}")
    skipped, problems = [*pictures.skipped, *labels.skipped], [*pairing.problems, *problems]
    return FolderPair(root, sides, taken, division, is_given, lines, skipped, problems)


def checked(root: str) -> FolderPair:
    """Return the pictures of a folder pair.

    Raises:
        DataError: there is a problem (see `find`); the message names the first one.
    """
    found = find(root)
    if found.problems:
        number = len(found.problems)
        others = f" (python -m dataset.check {root} lists all {number} problems)" if number > 1 else ""
        raise DataError(found.problems[0] + others)
    return found


def check_side(root: str, name: str) -> None:
    """Raise DataError unless `name` is the name of a side."""
    if name not in (TRAIN, VAL, TEST):
        raise DataError(
            f"--split {name}: {root} has {IMAGES} and {LABELS}, divided into {TRAIN}, {VAL} and {TEST}; give "
            "one of them"
        )


def discover(root: str, name: str, labeled: bool = True) -> tuple[list[Pair], list[str], list[str]]:
    """Return the pairs of a side, lines about what was taken for what, and the skipped files.

    Args:
        root: the data directory.
        name: "train", "val" or "test".
        labeled: whether labels are needed; otherwise "test" has the pictures of test.lst or images/test.

    Raises:
        DataError: there is no such side, it is empty, or a name of a file is wrong.
    """
    check_side(root, name)
    if name == TEST and not labeled:
        pairs = pictures_to_predict(root)
        if not pairs:
            raise DataError(
                f"--split {TEST}: {root} has no pictures for testing; put those to predict into "
                f"{os.path.join(IMAGES, TEST)}, or name them in {TEST_LIST} or with --data-list"
            )
        return pairs, [f"{root}: {len(pairs)} pictures for testing, without labels"], []
    found = checked(root)
    pairs = found.sides[name]
    if not pairs:
        raise DataError(f"--split {name}: no picture of {root} for {name} has a label; add labels")
    pairs = pairs if labeled else [pair._replace(label="") for pair in pairs]
    return pairs, found.notes, found.skipped


def pictures_to_predict(root: str) -> list[Pair]:
    """Return the pictures of test.lst, or else in folders for testing below images/, without labels."""
    if os.path.lexists(os.path.join(root, TEST_LIST)):
        return [pair._replace(label="") for pair in _listed_tests(root)]
    paths = pictures_below(root, IMAGES).pictures
    sides, _ = split.sides_of([_inner(path) for path in paths])
    return layout.named([(path, "") for path, side in zip(paths, sides, strict=True) if side == TEST])


def _listed_tests(root: str) -> list[Pair]:
    """Return the pictures of test.lst, some of them possibly without labels; none without the list."""
    path = os.path.join(root, TEST_LIST)
    try:
        if not read_input(path, layout.MOST_TEXT).strip():
            return []
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); check the file") from error
    return layout.read_list(root, path, labeled=None)


def _of_lists(root: str, lists: dict[str, str]) -> FolderPair:
    """Return the pictures of the lists in the data directory."""
    listed = {side: layout.read_list(root, path) for side, path in lists.items()}
    listed[TEST] = _listed_tests(root)
    first: dict[str, str] = {}
    problems = []
    for side, pairs in listed.items():
        for pair in pairs:
            name = lists.get(side) or os.path.join(root, TEST_LIST)
            other = first.setdefault(os.path.normpath(pair.image), name)
            if other != name:
                inner = os.path.basename(other)
                problems.append(f"{name}: {pair.image} is in {inner} too; remove it from one list")
    sides = {side: [pair for pair in pairs if pair.label] for side, pairs in listed.items()}
    names = [*LISTS.values(), *([TEST_LIST] if listed[TEST] else [])]
    taken = f"{sum(map(len, listed.values()))} pictures"
    return FolderPair(root, sides, taken, f"by {', '.join(names)}", True, [], [], problems)


def _divide(
    root: str, pairs: Sequence[Pair], side_of: Mapping[str, str | None]
) -> tuple[dict[str, list[Pair]], str, bool, list[str]]:
    """Divide pairs into the sides.

    Args:
        root: the data directory, for messages.
        pairs: all pairs.
        side_of: the side that the folders of each picture name, also of those without a label.

    Returns:
        The pairs of each side, how they were divided, whether by folders, and problems.
    """
    sides: dict[str, list[Pair]] = {TRAIN: [], VAL: [], TEST: []}
    is_given = {TRAIN, VAL} <= {*side_of.values()}
    pool: list[Pair] = []
    for pair in pairs:
        if side := side_of[pair.image]:
            sides[side].append(pair)
        else:
            pool.append(pair)
    if is_given:
        empty = [side for side in (TRAIN, VAL) if not sides[side]]
        problems = [f"{root}: no picture for {side} has a label; add labels" for side in empty]
        return sides, "by their folders", True, problems
    if len(pool) < 2:
        what = f"{root}: only {len(pool)} picture for training and validation has a label; label at least 2"
        return sides | {TRAIN: pool}, "", False, [what]
    groups = split.groups_of([_inner(pair.image) for pair in pool])
    for pair, is_val in zip(pool, split.divide(groups), strict=True):
        sides[VAL if is_val else TRAIN].append(pair)
    each = "each picture is a group" if len(set(groups)) == len(pool) else "one group per folder"
    return sides, f"seed {split.SEED}; {each}", False, []


def _inner(picture: str) -> str:
    """Return the path of a picture below images/."""
    return os.path.relpath(picture, IMAGES)
