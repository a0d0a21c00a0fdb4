"""Where the pictures of a data set lie: in Cityscapes' folders, or in a list of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from utils.errors import DataError

LABEL_IDS = "_labelIds.png"
LABEL_TRAIN_IDS = "_labelTrainIds.png"
INSTANCE_IDS = "_instanceIds.png"
PICTURE = "_leftImg8bit"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg")


class Pair(NamedTuple):
    """A picture and its label, relative to the data directory, and the name that results carry.

    The label is empty where none is wanted: the test set has none.
    """

    image: str
    label: str
    name: str


class Found(NamedTuple):
    """What lies in the folders of a split, relative to the data directory."""

    pairs: list[Pair]
    without_label: list[str]  # the labels that pictures lack
    without_picture: list[str]  # labels whose picture is not there
    strays: list[str]  # pictures that are not named as pictures of the layout are


def instances_of(label: str) -> str:
    """The file with the instance ids that belong to a labelIds file."""
    return label.removesuffix(LABEL_IDS) + INSTANCE_IDS


def read_list(root: str, list_path: str, labelled: bool = True) -> list[Pair]:
    """Read `image<TAB>label` lines, both relative to `root`. Empty lines are skipped.

    Args:
        labelled: whether labels are wanted; otherwise lines may also hold the picture alone.

    Raises:
        DataError: no such list, a line of other columns, or no line at all.
    """
    try:
        with open(list_path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_path}: not a readable list ({error}); check --data-list") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # A tab allows spaces in file names; the original's lists have either.
        columns = [column.strip() for column in line.split("\t")] if "\t" in line else line.split()
        if not labelled and os.path.isfile(os.path.join(root, line.strip())):
            columns = [line.strip()]
        where = f"{list_path}:{number}: {line.strip()!r}"
        if labelled and len(columns) == 1:
            raise DataError(
                f"{where} names no label, as 'image<TAB>label' does; evaluate.py --split test needs none"
            )
        if not all(columns) or len(columns) > 2:
            raise DataError(f"{where} is not 'image<TAB>label'; mend the line")
        pairs.append((columns[0], columns[1] if labelled else ""))
    if not pairs:
        raise DataError(f"{list_path}: the list is empty; check --data-list")
    return _named(pairs)


def check_root(root: str) -> None:
    """Raises DataError, saying how to get it, where `root` has no leftImg8bit of Cityscapes' layout."""
    if not os.path.isdir(root):
        problem = "no such directory"
    elif os.path.isdir(os.path.join(root, "leftImg8bit")):
        return
    else:
        problem = "has no folder leftImg8bit"
        inner = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        for name in inner:
            if os.path.isdir(os.path.join(root, name, "leftImg8bit")):
                raise DataError(f"{root}: {problem}, but {name} in it has; name {os.path.join(root, name)}")
    raise DataError(
        f"{root}: {problem}; --data-dir names the folder in which leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip were unpacked (csDownload of the package cityscapesscripts gets both; "
        "python -m dataset.check looks them over), or that --data-list is relative to"
    )


def splits(root: str) -> list[str]:
    """The folders below leftImg8bit: train, val, test, ..."""
    with os.scandir(os.path.join(root, "leftImg8bit")) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def scan(root: str, split: str, labelled: bool = True) -> Found:
    """Everything in the folders of `split`, ordered by city and name.

    labelIds serve where there are both kinds of labels.

    Args:
        labelled: whether labels are looked for.
    """
    pairs, without_label, strays = [], [], []
    folder = os.path.join(root, "leftImg8bit", split)
    for city, file in _files(folder):
        stem, extension = os.path.splitext(file)
        if extension.lower() not in PICTURE_ENDINGS:
            continue
        image = os.path.join("leftImg8bit", split, city, file)
        if not stem.endswith(PICTURE):
            strays.append(image)
            continue
        base = os.path.join("gtFine", split, city, stem.removesuffix(PICTURE) + "_gtFine")
        kinds = [base + kind for kind in (LABEL_IDS, LABEL_TRAIN_IDS)]
        label = next((kind for kind in kinds if os.path.isfile(os.path.join(root, kind))), None)
        if labelled and label is None:
            without_label.append(kinds[0])
        else:
            pairs.append((image, label if labelled and label else ""))
    without_picture = []
    if labelled:
        expected = {label for _, label in pairs}
        expected |= {label.removesuffix(LABEL_IDS) + LABEL_TRAIN_IDS for label in expected}
        for city, file in _files(os.path.join(root, "gtFine", split)):
            label = os.path.join("gtFine", split, city, file)
            if file.endswith((LABEL_IDS, LABEL_TRAIN_IDS)) and label not in expected:
                without_picture.append(label)
    return Found(_named(pairs), without_label, without_picture, strays)


def discover(root: str, split: str, labelled: bool = True) -> list[Pair]:
    """The pairs of `split` in a directory of Cityscapes' layout.

    Args:
        labelled: whether labels are wanted.

    Raises:
        DataError: no such directory, no picture, pictures without a label or labels without a picture (with
            their number).
    """
    check_root(root)
    found = scan(root, split, labelled)
    number = len(found.pairs)
    if found.without_label:
        count = len(found.without_label)
        raise DataError(
            f"{root}: {count} of {count + number} pictures in leftImg8bit/{split} have no label, the first "
            f"missing is {found.without_label[0]}; unpack the whole gtFine_trainvaltest.zip, or name the "
            f"pairs with --data-list{_see_check(root)}"
        )
    if found.without_picture:
        count = len(found.without_picture)
        raise DataError(
            f"{root}: {count} of {count + number} labels in gtFine/{split} have no picture, the first is "
            f"{found.without_picture[0]}; unpack the whole leftImg8bit_trainvaltest.zip, or name the pairs "
            f"with --data-list{_see_check(root)}"
        )
    if not found.pairs:
        stray = f" ({found.strays[0]} is not named so)" if found.strays else ""
        raise DataError(
            f"{root}: no picture *{PICTURE}.png below leftImg8bit/{split}{stray}; unpack "
            "leftImg8bit_trainvaltest.zip in it, or name other pairs with --data-list"
        )
    return found.pairs


def _see_check(root: str) -> str:
    return f" (python -m dataset.check {root} lists them all)"


def _files(folder: str) -> list[tuple[str, str]]:
    """(folder relative to `folder`, name) of each file below it, in order; linked folders are followed."""
    found = []
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        city = os.path.relpath(directory, folder)
        found += [("" if city == "." else city, file) for file in sorted(files)]
    return found


def _named(pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Names are the pictures' own, or their whole paths where the former would clash."""
    stems = [os.path.splitext(os.path.basename(image))[0].removesuffix(PICTURE) for image, _ in pairs]
    if len(set(stems)) < len(set(pairs)):
        stems = [os.path.splitext(os.path.normpath(image))[0].replace(os.sep, "_") for image, _ in pairs]
    if len(set(stems)) < len(set(pairs)):
        stems = [f"{stem}_{number}" for number, stem in enumerate(stems)]
    return [Pair(image, label, stem) for (image, label), stem in zip(pairs, stems, strict=True)]
