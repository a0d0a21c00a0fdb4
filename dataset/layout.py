"""Finding the pictures and labels of a data set, in the Cityscapes folders or in a list."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from utils.errors import DataError
from utils.files import read_input

LABEL_IDS = "_labelIds.png"
LABEL_TRAIN_IDS = "_labelTrainIds.png"
INSTANCE_IDS = "_instanceIds.png"
PICTURE = "_leftImg8bit"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg")
#: Maximum bytes of a list.
MOST_TEXT = 2**28
#: Files and folders that systems and programs create next to pictures; names that start with a dot are not
#: listed.
LITTER = frozenset(
    ("$recycle.bin", "#recycle", "@eadir", "@tmp", "__macosx", "desktop.ini", "ehthumbs.db", "lost+found",
     "system volume information", "thumbs.db")
)  # fmt: skip


class Pair(NamedTuple):
    """A picture and its label."""

    image: str  # relative to the data directory
    label: str  # relative to the data directory; empty without a label, as in the test set
    name: str  # used in the file names of results


class Found(NamedTuple):
    """The content of the folders of a split, relative to the data directory."""

    pairs: list[Pair]
    without_label: list[Pair]  # pictures without their label, with the name that it should have
    without_picture: list[str]  # labels without their picture
    strays: list[str]  # pictures whose names do not fit the layout
    skipped: list[str]  # hidden and system files (see `is_litter`)


def instances_of(label: str) -> str:
    """Return the instanceIds file that belongs to a labelIds file."""
    return label.removesuffix(LABEL_IDS) + INSTANCE_IDS


def is_litter(name: str) -> bool:
    """Return whether a file or folder is hidden or a system file, such as ._a.png or Thumbs.db."""
    return name.startswith(".") or name.lower() in LITTER


def say_skipped(skipped: Sequence[str]) -> str:
    """Return the line about files and folders skipped by `is_litter`."""
    return f"{len(skipped)} hidden or system files skipped, the first is {skipped[0]}"


def read_list(root: str, list_path: str, labeled: bool | None = True) -> list[Pair]:
    """Read `image<TAB>label` lines from a list. Empty lines are skipped.

    File names may have bytes that are not valid UTF-8.

    Args:
        root: the data directory, to which the paths in the list are relative.
        list_path: the list.
        labeled: whether labels are needed. If False, a line may have only the picture, and labels are not
            used; if None, they are used where a line has one.

    Raises:
        DataError: the list is unreadable or empty, or a line has other columns.
    """
    try:
        text = read_input(list_path, MOST_TEXT).decode("utf-8", "surrogateescape")
        if "\0" in text:
            raise ValueError("not text in UTF-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{list_path}: not a readable list ({why}); check --data-list") from error
    pairs = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), 1):
        if not line.strip():
            continue
        # With tabs, file names may have spaces. The lists of the original use tabs or spaces.
        columns = [column.strip() for column in line.split("\t")] if "\t" in line else line.split()
        if not labeled and os.path.isfile(os.path.join(root, line.strip())):
            columns = [line.strip()]
        where = f"{list_path}:{number}: {_clipped(line.strip())!r}"
        if labeled and len(columns) == 1:
            raise DataError(
                f"{where} has no label; write 'image<TAB>label' (evaluate.py --split test needs no labels)"
            )
        if not all(columns) or len(columns) > 2:
            raise DataError(f"{where} is not 'image<TAB>label'; fix the line")
        pairs.append((columns[0], columns[1] if labeled is not False and len(columns) > 1 else ""))
    if not pairs:
        raise DataError(f"{list_path}: the list is empty; check --data-list")
    return named(pairs)


def _clipped(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def check_split(split: str) -> None:
    """Raise DataError if `split` can't be the name of a folder below leftImg8bit."""
    if any(part in ("", ".", "..") for part in split.split("/")):
        raise DataError(f"--split {split!r}: is not a folder name below leftImg8bit; give one such as val")


def check_root(root: str) -> None:
    """Raise DataError if `root` has no folder leftImg8bit; the message says how to get the data set."""
    try:
        inner = _folders(root)
    except NotADirectoryError:
        problem = "is not a folder"
    except FileNotFoundError:
        problem = "no such directory"
    except OSError as error:
        raise _unreadable(error, root) from error
    else:
        if "leftImg8bit" in inner:
            return
        problem = "has no folder leftImg8bit"
        for name in inner:
            if os.path.isdir(os.path.join(root, name, "leftImg8bit")):
                raise DataError(
                    f"{root}: {problem}, but its folder {name} has one; name {os.path.join(root, name)}"
                )
        problem += ", and no folders images and labels"
    raise DataError(
        f"{root}: {problem}; give --data-dir the folder in which leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip were unpacked (csDownload of the package cityscapesscripts downloads both, "
        "python -m dataset.check checks them), another data set of docs/datasets.md, a folder with your own "
        "pictures in images and their labels in labels (docs/own_data.md), or the folder of the paths in "
        "--data-list"
    )


def _unreadable(error: OSError, path: str) -> DataError:
    """Return the error for a folder that can't be listed."""
    return DataError(f"{error.filename or path}: can't be read ({error.strerror}); check the folder")


def splits(root: str) -> list[str]:
    """Return the names of the folders below leftImg8bit, such as train, val and test."""
    folder = os.path.join(root, "leftImg8bit")
    try:
        return _folders(folder)
    except OSError as error:
        raise _unreadable(error, folder) from error


def _folders(place: str) -> list[str]:
    """Return the names of the folders in a folder, including links, without those of `is_litter`."""
    with os.scandir(place) as entries:
        return sorted(e.name for e in entries if os.path.isdir(e.path) and not is_litter(e.name))


def scan(root: str, split: str, labeled: bool = True) -> Found:
    """Return the content of the folders of a split, ordered by city and name.

    If a picture has both kinds of labels, labelIds is used.

    Args:
        root: the data directory.
        split: name of the split.
        labeled: whether to look for labels.

    Raises:
        DataError: the name of the split is invalid, or a folder can't be read.
    """
    check_split(split)
    pairs, without_label, strays = [], [], []
    files, skipped = files_below(root, os.path.join("leftImg8bit", split))
    for city, file in files:
        stem, extension = os.path.splitext(file)
        if extension.lower() not in PICTURE_ENDINGS:
            continue
        image = os.path.join("leftImg8bit", split, city, file)
        if not stem.endswith(PICTURE):
            strays.append(image)
            continue
        base = os.path.join("gtFine", split, city, stem.removesuffix(PICTURE) + "_gtFine")
        kinds = [base + kind for kind in (LABEL_IDS, LABEL_TRAIN_IDS)]
        # Use lexists: a label that exists but can't be read is reported when it is opened.
        label = next((kind for kind in kinds if os.path.lexists(os.path.join(root, kind))), None)
        if labeled and label is None:
            without_label.append((image, kinds[0]))
        else:
            pairs.append((image, label if labeled and label else ""))
    without_picture = []
    if labeled:
        expected = {label for _, label in pairs}
        expected |= {label.removesuffix(LABEL_IDS) + LABEL_TRAIN_IDS for label in expected}
        files, more = files_below(root, os.path.join("gtFine", split))
        skipped += more
        for city, file in files:
            label = os.path.join("gtFine", split, city, file)
            if file.endswith((LABEL_IDS, LABEL_TRAIN_IDS)) and label not in expected:
                without_picture.append(label)
    return Found(named(pairs), named(without_label), without_picture, strays, skipped)


def discover(root: str, split: str, labeled: bool = True) -> Found:
    """Return the pairs of a split in the Cityscapes layout, and the skipped files.

    Args:
        root: the data directory.
        split: name of the split.
        labeled: whether labels are needed.

    Raises:
        DataError: the directory does not exist or has no pictures, or there are pictures without a label or
            labels without a picture.
    """
    check_root(root)
    found = scan(root, split, labeled)
    number = len(found.pairs)
    if found.without_label:
        count = len(found.without_label)
        raise DataError(
            f"{root}: {count} of {count + number} pictures in leftImg8bit/{split} have no label, the first "
            f"missing is {found.without_label[0].label}; unpack the whole gtFine_trainvaltest.zip, or name "
            f"the pairs with --data-list{_see_check(root)}"
        )
    if found.without_picture:
        count = len(found.without_picture)
        raise DataError(
            f"{root}: {count} of {count + number} labels in gtFine/{split} have no picture, the first is "
            f"{found.without_picture[0]}; unpack the whole leftImg8bit_trainvaltest.zip, or name the pairs "
            f"with --data-list{_see_check(root)}"
        )
    if not found.pairs:
        stray = f" ({found.strays[0]} has another name)" if found.strays else ""
        raise DataError(
            f"{root}: no picture *{PICTURE}.png below leftImg8bit/{split}{stray}; unpack "
            "leftImg8bit_trainvaltest.zip in this folder, or name the pairs with --data-list"
        )
    return found


def _see_check(root: str) -> str:
    return f" (python -m dataset.check {root} lists them all)"


def files_below(root: str, folder: str) -> tuple[list[tuple[str, str]], list[str]]:
    """List the files below `folder`, a path relative to `root`. Links to folders are followed.

    Returns:
        The files in order, as (path of its folder relative to `folder`, name), and the paths that were
        skipped because of `is_litter`.

    Raises:
        DataError: a folder can't be read.
    """
    found: list[tuple[str, str]] = []
    skipped: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]  # folders with the real paths of their parents
    while waiting:
        inner, above = waiting.pop()
        place = os.path.join(root, folder, inner) if inner else os.path.join(root, folder)
        real = os.path.realpath(place)
        if real in above:  # a link to a parent
            continue
        try:
            with os.scandir(place) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except FileNotFoundError:  # a split without labels
            continue
        except OSError as error:
            raise _unreadable(error, place) from error
        folders = []
        for entry in entries:
            if is_litter(entry.name):
                skipped.append(os.path.join(folder, inner, entry.name))
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append((os.path.join(inner, entry.name), (*above, real)))
            else:
                found.append((inner, entry.name))
        waiting += reversed(folders)
    return found, skipped


def named(pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Name each pair after its picture; if names are not unique, after the whole path of the picture."""
    stems = [os.path.splitext(os.path.basename(image))[0].removesuffix(PICTURE) for image, _ in pairs]
    if len(set(stems)) < len(set(pairs)):
        stems = [os.path.splitext(os.path.normpath(image))[0].replace(os.sep, "_") for image, _ in pairs]
    if len(set(stems)) < len(set(pairs)):
        stems = [f"{stem}_{number}" for number, stem in enumerate(stems)]
    return [Pair(image, label, stem) for (image, label), stem in zip(pairs, stems, strict=True)]
