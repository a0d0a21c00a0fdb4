"""The layout of a data directory: a published data set, the Cityscapes folders, or a folder pair."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from dataset import folder_pair
from dataset.catalog import DATA_SETS
from dataset.layout import MOST_TEXT, Found, Pair, files_below, named
from dataset.published import STEM, DataSet, Split
from dataset.split import NAMES_OF_SIDES, TEST, TRAIN
from utils.errors import DataError, UsageError
from utils.files import read_text

#: The layouts of dataset.layout and dataset.folder_pair.
CITYSCAPES, FOLDERS = "cityscapes", "folders"
#: Values of --dataset.
NAMES = (CITYSCAPES, FOLDERS, *DATA_SETS)


class Place(NamedTuple):
    """A data directory and its layout."""

    root: str
    name: str  # one of NAMES
    data: DataSet | None = None  # None for CITYSCAPES and FOLDERS
    folder: str = ""  # where the data set begins, relative to `root`

    @property
    def is_pair(self) -> bool:
        """Return whether it is a folder pair."""
        return self.name == FOLDERS

    def path(self, relative: str) -> str:
        """Return the path of a file of the data set."""
        return os.path.join(self.root, self.folder, relative)


def recognize(root: str, name: str | None = None, listed: bool = False) -> Place:
    """Return the layout of a data directory.

    Args:
        root: the data directory.
        name: value of --dataset; None to find it.
        listed: whether a list names the pictures, so that a named data set need not have its folders.

    Returns:
        The layout. A directory that has none is taken for Cityscapes, whose checks say what is missing.

    Raises:
        DataError: the directory has several layouts.
        UsageError: there is no data set `name`, or the directory does not have its layout.
    """
    if name is not None and name not in NAMES:
        raise UsageError(f"--dataset {name}: is not known; give one of {', '.join(NAMES)}")
    data = DATA_SETS.get(name) if name else None
    if name and data:
        for folder in data.folders:
            if any(_lacking(root, folder, data, split) is None for split in data.splits):
                return Place(root, name, data, folder)
        if listed:
            return Place(root, name, data)
        raise UsageError(
            f"--dataset {name}: {root} has no {_lacking(root, '', data, TRAIN)}; give --data-dir the folder "
            f"in which you unpacked {data.archives} (docs/datasets.md)"
        )
    if name:
        return Place(root, name)
    found = [
        Place(root, each, data, folder)
        for each, data in DATA_SETS.items()
        for folder in data.folders
        if _lacking(root, folder, data, TRAIN) is None
        and not any(os.path.exists(os.path.join(root, folder, path)) for path in data.unless)
    ]
    is_pair = folder_pair.is_pair(root)
    if is_pair and os.path.isdir(os.path.join(root, folder_pair.LABELS)):
        found.append(Place(root, FOLDERS))
    if all(os.path.isdir(os.path.join(root, folder, TRAIN)) for folder in ("leftImg8bit", "gtFine")):
        found.append(Place(root, CITYSCAPES))
    names = sorted({place.name for place in found}, key=NAMES.index)
    if len(names) > 1:
        raise DataError(
            f"{root}: has the folders of several data sets, {' and '.join(names)}; name one of them with "
            "--dataset"
        )
    if found:
        return found[0]
    others = ("leftImg8bit", folder_pair.LABELS)
    if not listed and not any(os.path.isdir(os.path.join(root, folder)) for folder in others):
        _check_parts(root)
    return Place(root, FOLDERS if is_pair else CITYSCAPES)


def _check_parts(root: str) -> None:
    """Raise DataError if a directory has a part of a published data set; the message says what it lacks."""
    for data in DATA_SETS.values():
        for folder in data.folders:
            lacking = _lacking(root, folder, data, TRAIN)
            split = data.splits[TRAIN]
            for path in map(_folder_of, (*split.pictures, *split.labels)):
                # The name of a side tells no data set.
                is_telling = lacking and path not in NAMES_OF_SIDES
                if is_telling and os.path.isdir(os.path.join(root, folder, path)):
                    raise DataError(
                        f"{root}: has the folder {os.path.join(folder, path)} of {data.title}, but no "
                        f"{lacking}; unpack {data.archives} (docs/datasets.md)"
                    )


def _lacking(root: str, folder: str, data: DataSet, name: str) -> str | None:
    """Return the first folder or list that a data set lacks for a split; None if all are there."""
    split = data.splits[name]
    needed = [split.pictures, split.labels, *([split.lists] if needs_list(data, split) else [])]
    for patterns in needed:
        paths = [_folder_of(pattern) for pattern in patterns]
        if not any(os.path.exists(os.path.join(root, folder, path)) for path in paths):
            return os.path.join(folder, paths[0])
    return None


def needs_list(data: DataSet, split: Split) -> bool:
    """Return whether only a list can tell the pictures of a split, as another split has the same folder."""
    shared = sum(other.pictures == split.pictures for other in data.splits.values()) > 1
    return shared and bool(split.lists)


def _folder_of(pattern: str) -> str:
    """Return the folder of a pattern; a path without {} is returned as it is."""
    return pattern.split(STEM)[0].rstrip("/")


def check_side(place: Place, name: str) -> Split:
    """Return a split of a data set.

    Raises:
        DataError: the data set has no such split.
    """
    assert place.data is not None
    if name not in place.data.splits:
        *others, last = place.data.splits
        raise DataError(
            f"--split {name}: {place.data.title} has labels for {', '.join(others)} and {last}; give one of "
            "them, or a list (--data-list)"
        )
    return place.data.splits[name]


def has_labels(place: Place, split: str, listed: bool = False) -> bool:
    """Return whether a split can be scored. That named "test" can where its labels are published.

    Args:
        place: the data directory.
        split: name of the split.
        listed: whether a list names the pictures.
    """
    return split != TEST or (place.data is not None and not listed and TEST in place.data.splits)


def scan(place: Place, name: str, labeled: bool = True) -> Found:
    """Return the pictures and labels of a split, ordered by name or as in its list.

    Args:
        place: the data directory.
        name: name of the split.
        labeled: whether to look for labels.

    Raises:
        DataError: there is no such split, or a folder or list can't be read.
    """
    split = check_side(place, name)
    listed = _read_list(place, split)
    names, pattern, skipped = _below(place, split.pictures, split.names)
    others, of_label, more = _below(place, split.labels, split.names)
    pairs, without_label = [], []
    for stem in names if listed is None else listed:
        image = os.path.join(place.folder, pattern.replace(STEM, stem))
        labels = [os.path.join(place.folder, label.replace(STEM, stem)) for label in split.labels]
        # Use lexists: a label that exists but can't be read is reported when it is opened.
        there = next((label for label in labels if os.path.lexists(os.path.join(place.root, label))), None)
        if labeled and there is None:
            without_label.append((image, os.path.join(place.folder, of_label.replace(STEM, stem))))
        else:
            pairs.append((image, there if labeled and there else ""))
    without_picture = []
    if labeled and listed is None:
        skipped += more
        lonely = sorted(set(others) - set(names))
        without_picture = [os.path.join(place.folder, of_label.replace(STEM, stem)) for stem in lonely]
    return Found(named(pairs), named(without_label), without_picture, [], skipped)


def _below(place: Place, patterns: Sequence[str], names: str) -> tuple[list[str], str, list[str]]:
    """Return the names of the files of the first pattern whose folder exists.

    Args:
        place: the data directory.
        patterns: the patterns.
        names: regular expression of the names; empty for all.

    Returns:
        The names in order, the pattern, and skipped files.
    """
    folders = [_folder_of(pattern) for pattern in patterns]
    there = next((k for k, folder in enumerate(folders) if os.path.isdir(place.path(folder))), 0)
    pattern, folder = patterns[there], os.path.join(place.folder, folders[there])
    ending = pattern.split(STEM)[1]
    files, skipped = files_below(place.root, folder)
    paths = (os.path.join(inner, name) for inner, name in files if name.endswith(ending))
    stems = [path.removesuffix(ending) for path in paths]
    return [stem for stem in stems if not names or re.fullmatch(names, stem)], pattern, skipped


def _read_list(place: Place, split: Split) -> list[str] | None:
    """Return the names of the list of a split; None without a list."""
    path = next((path for path in map(place.path, split.lists) if os.path.lexists(path)), None)
    if path is None:
        assert place.data is not None
        if needs_list(place.data, split):
            raise DataError(f"{place.path(split.lists[0])}: no such file; unpack {place.data.archives}")
        return None
    text = read_text(path, "list of pictures", "unpack the data set again", MOST_TEXT)
    words = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not words:
        raise DataError(f"{path}: the list is empty; unpack the data set again")
    return [os.path.splitext(os.path.basename(word))[0] for word in words]


def discover(place: Place, name: str, labeled: bool = True) -> Found:
    """Return the pairs of a split, and the skipped files.

    Args:
        place: the data directory.
        name: name of the split.
        labeled: whether labels are needed.

    Raises:
        DataError: see `scan`; also if there are no pictures, pictures without a label, or labels without a
            picture.
    """
    found, data = scan(place, name, labeled), place.data
    assert data is not None
    problems = problems_of(place, name, found)
    if problems:
        others = f" (python -m dataset.check lists all {len(problems)})" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{others}")
    return found


def problems_of(place: Place, name: str, found: Found) -> list[str]:
    """Return lines about missing files of a split."""
    split, data = check_side(place, name), place.data
    assert data is not None
    problems = [
        f"{os.path.join(place.root, pair.label)}: no such label, of {pair.image}; unpack {data.archives}"
        for pair in found.without_label
    ]
    problems += [
        f"{os.path.join(place.root, label)}: has no picture; unpack {data.archives}"
        for label in found.without_picture
    ]
    if not found.pairs and not problems:
        problems.append(
            f"{place.path(split.pictures[0].replace(STEM, '*'))}: no such pictures for {name}; unpack "
            f"{data.archives}"
        )
    return problems


def say(place: Place, name: str, pairs: Sequence[Pair]) -> str:
    """Return the line about a split of a data set and the official number of its pictures."""
    assert place.data is not None
    official = place.data.splits[name].number
    return (
        f"{place.root}: {place.data.title}: {len(pairs)} of the official {official} pictures for {name} "
        f"(--dataset {place.name})"
    )
