"""Readers of label pictures: folders of VOC, and folders with images/ and labels/.

The values of label pictures (ids, or colors) are classes. A class table, a labelmap.txt or a list of names
says which; otherwise each value is a class, as in dataset/label_values.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from dataset import folder_pair
from dataset.classes import NAMES, read_names
from dataset.folder_pair import IMAGES, LABELS, LISTS
from dataset.label_values import BACKGROUND, Values, scan, table_of
from dataset.labels import CITYSCAPES, IGNORE, ClassTable, key_of, read_table
from dataset.layout import LABEL_IDS, LABEL_TRAIN_IDS
from dataset.pairing import pictures_below
from dataset.pictures import say_turned
from dataset.split import TEST
from tools.prepare.classes import problems_of
from tools.prepare.labelmap import read_labelmap
from tools.prepare.mask_files import (
    VOC_LISTS,
    Mask,
    by_folders,
    check_sizes,
    of_folder_pair,
    of_folders,
    with_parts,
)
from tools.prepare.mask_values import (
    Decoder,
    Meaning,
    look_up_tables,
    number_rows,
    unknown_values,
    without_gray_colors,
)
from tools.prepare.source import Found, Problems, Scene, Wanted
from utils.errors import DataError
from utils.run_files import CLASSES

#: Folders of a VOC data set: pictures, and label pictures (the first one that exists).
PICTURES, MASKS = "JPEGImages", ("SegmentationClassPNG", "SegmentationClass")
#: Files with class names of a VOC data set, in the order of their ids.
VOC_NAMES = ("class_names.txt", *NAMES)
PASCAL = (
    BACKGROUND, "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


class Given(NamedTuple):
    """The meaning that a source gives the values of its label pictures."""

    table: ClassTable | None = None
    names: tuple[str, Sequence[str]] | None = None  # file of the class names by id, and the names
    origin: str = ""  # where the table or the names are from
    zero_is_background: bool = False  # whether the class of id 0 is the background, if nothing names it
    decoder: Decoder = Decoder()


def is_pair(source: str) -> bool:
    """Return whether a folder has pictures below images/ and label pictures below labels/."""
    return folder_pair.is_pair(source) and all(
        pictures_below(source, folder).pictures for folder in (IMAGES, LABELS)
    )


def is_voc(source: str) -> bool:
    """Return whether a folder has pictures and label pictures of VOC."""
    return os.path.isdir(os.path.join(source, PICTURES)) and _masks_of(source) is not None


def _masks_of(source: str) -> str | None:
    """Return the folder of the label pictures of a VOC folder; None if there is none."""
    for folder in MASKS:
        if os.path.isdir(os.path.join(source, folder)) and pictures_below(source, folder).pictures:
            return folder
    return None


def read_pair(source: str, wanted: Wanted) -> Found:
    """Read a folder with pictures in images/ and label pictures in labels/ (see dataset.folder_pair).

    Label pictures may be those that train.py reads, or gray pictures saved with several channels.

    Args:
        source: the folder; with `wanted.pictures`, it may hold the labels itself.
        wanted: the flags.

    Raises:
        Problems: a file can't be used, or the classes are unknown.
    """
    try:
        if wanted.pictures is None:
            masks, notes, problems = of_folder_pair(source)
        else:
            if lists := [name for name in LISTS.values() if os.path.lexists(os.path.join(source, name))]:
                raise DataError(
                    f"--images {wanted.pictures}: {source} has {lists[0]}, which names its pictures; omit it"
                )
            labels = LABELS if os.path.isdir(os.path.join(source, LABELS)) else os.curdir
            masks, notes, problems = of_folders(source, os.path.abspath(wanted.pictures), labels)
            masks = by_folders(masks, notes)
        return _read(source, masks, _given_of_pair(source), wanted, notes, problems)
    except Problems:
        raise
    except DataError as error:
        raise Problems(source, [str(error)]) from error


def read_voc(source: str, wanted: Wanted) -> Found:
    """Read a folder of VOC: JPEGImages, and SegmentationClass or SegmentationClassPNG.

    The classes are those of classes.tsv, labelmap.txt, class_names.txt, classes.txt or labels.txt. Without
    these files, they are the 21 of Pascal VOC in its own folder, and otherwise the values of the labels. The
    lists train.txt and val.txt of ImageSets/Segmentation are the split, or else folders called train and val.

    Raises:
        Problems: a file can't be used, or the classes are unknown.
    """
    try:
        folder = _masks_of(source)
        if folder is None:
            raise DataError(f"{source}: has no label pictures in {' or '.join(MASKS)}; export them as PNG")
        pictures = PICTURES if wanted.pictures is None else os.path.abspath(wanted.pictures)
        masks, notes, problems = of_folders(source, pictures, folder)
        masks = with_parts(source, masks, notes, problems)
        return _read(source, masks, _given_of_voc(source), wanted, notes, problems)
    except Problems:
        raise
    except DataError as error:
        raise Problems(source, [str(error)]) from error


def _given_of_pair(source: str) -> Given:
    """Return what a folder pair says about its values: classes.tsv, or a list of names."""
    path = os.path.join(source, CLASSES)
    if os.path.lexists(path):
        return Given(read_table(path), origin=path)
    return _names_of(source, NAMES) or Given()


def _given_of_voc(source: str) -> Given:
    """Return what a VOC folder says about its values."""
    path = os.path.join(source, CLASSES)
    if os.path.lexists(path):
        return Given(read_table(path), origin=path)
    path = os.path.join(source, "labelmap.txt")
    if os.path.lexists(path):
        table = read_labelmap(path)
        ids = {key_of(label.color): label.id for label in table.labels if label.id >= 0}
        ids |= {key_of(label.color): IGNORE for label in table.labels if label.id < 0}
        return Given(table, origin=path, decoder=Decoder(ids, path))
    if found := _names_of(source, VOC_NAMES):
        return found
    annotations = os.path.join(source, "Annotations")
    if os.path.isdir(annotations) and os.path.isdir(os.path.join(source, VOC_LISTS)):
        origin = "the classes of Pascal VOC"
        return Given(names=(origin, PASCAL), origin=origin)
    return Given(zero_is_background=True)


def _names_of(source: str, files: Sequence[str]) -> Given | None:
    """Return the class names of the first file that exists; None if there is none."""
    path = next((path for file in files if os.path.lexists(path := os.path.join(source, file))), None)
    return None if path is None else Given(names=(path, read_names(path)), origin=path)


def _read(
    source: str, masks: Sequence[Mask], given: Given, wanted: Wanted, notes: list[str], problems: list[str]
) -> Found:
    """Check all files, and return the classes and scenes.

    Raises:
        DataError: a file can't be used, or the classes are unknown.
    """
    labels = [mask.label for mask in masks]
    given, wanted = _with_flags(given, wanted, labels)
    sizes, turned = check_sizes(masks, problems)
    # A label of another size than its picture may be huge. As in train.py, the pictures for testing do not
    # tell the classes.
    fitting = [mask for mask, size in zip(masks, sizes, strict=True) if size is not None]
    values = scan([mask.label for mask in fitting if mask.part != TEST], problems, given.decoder)
    tests = scan([mask.label for mask in fitting if mask.part == TEST], problems, given.decoder)
    if problems:
        raise Problems(source, problems)
    values, is_gray = without_gray_colors(values, given.table)
    if is_gray or not values.colors:
        tests, are_gray = without_gray_colors(tests, given.table)
        is_gray = is_gray or are_gray
    table, is_named = _table_for(source, values, given, wanted)
    classes, train_ids, problem = number_rows(table, is_named, wanted)
    by_id, by_color = look_up_tables(table, train_ids)
    origin = given.origin if wanted.names is None else wanted.origin
    problems += [f"{source}: {problem}"] if problem else unknown_values(values, by_id, by_color, origin)
    if not problem:
        known = origin or "the labels for training and validation"
        problems += unknown_values(tests.without(values), by_id, by_color, known)
    if given.table is None and (clash := _clash(values, tests)):
        problems.append(clash)
    problems += problems_of(source, classes)
    if problems:
        raise Problems(source, problems)
    meaning = Meaning(by_id, by_color, given.decoder, is_gray)
    how = f"the classes are those of {origin}" if origin else "each is a class"
    void = f"; {IGNORE} is void" if IGNORE in values.ids and by_id[IGNORE] == IGNORE else ""
    notes.append(f"the labels hold {values.listed()}; {how}{void}")
    if is_gray:
        notes.append("the labels are gray pictures of several channels, whose values are ids")
    if turned:
        notes.append(say_turned(turned))
    scenes = [
        Scene(mask.name, mask.picture, size[0], partial(meaning.read, mask.label), size[1], part=mask.part)
        for mask, size in zip(masks, sizes, strict=True)
        if size is not None
    ]
    return Found(classes, scenes, notes)


def _clash(values: Values, tests: Values) -> str | None:
    """Return a line about palettes of labels for testing that differ from the others; None if none does."""
    both = Values()
    for each in (values, tests):
        both.add(each)
    return None if values.clash else both.clash


def _with_flags(given: Given, wanted: Wanted, labels: Sequence[str]) -> tuple[Given, Wanted]:
    """Return what the source says together with --classes and the names of the label files, and the flags.

    A list of names in --classes names the ids, if the source does not name its classes; then it is no longer
    among the flags.
    """
    if wanted.table is not None:
        given = Given(wanted.table, origin=wanted.origin)
    elif given.table is None and labels and all(label.endswith(LABEL_IDS) for label in labels):
        given = given._replace(table=CITYSCAPES, names=None, origin="Cityscapes")
    elif given.table is None and given.names is None and wanted.ids is not None:
        given = Given(names=(wanted.origin, wanted.ids), origin=wanted.origin)
        wanted = wanted._replace(names=None, train_ids=None)
    if given.table is not None and labels and all(label.endswith(LABEL_TRAIN_IDS) for label in labels):
        rows = [row._replace(id=row.train_id) for row in given.table.classes]
        given = given._replace(table=ClassTable(rows))
    return given, wanted


def _table_for(source: str, values: Values, given: Given, wanted: Wanted) -> tuple[ClassTable, bool]:
    """Return the class table of the values, and whether the source names its classes.

    Raises:
        DataError: the values do not tell the classes.
    """
    if given.table is not None:
        return given.table, wanted.table is None
    table = table_of(source, values, given.names)
    if given.zero_is_background:
        rows = [row._replace(name=BACKGROUND) if row.id == 0 else row for row in table.labels]
        table = ClassTable(rows)
    return table, given.names is not None
