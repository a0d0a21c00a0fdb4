"""The declaration of a published data set: its files, classes, counts and published settings.

Each module of dataset.catalog declares one data set as `DATA_SET`. Nothing else is needed to add one, except
for its class table (docs/own_data.md) next to this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dataset.labels import ClassTable, choose_table

#: Place of a file's name in a pattern.
STEM = "{}"


@dataclass(frozen=True, kw_only=True)
class Split:
    """The places of the pictures and labels of a split.

    Patterns are paths below the folder of the data set, with {} for the name of a picture, which may have
    folders (`images/train/{}.jpg`). Of several patterns or lists, the first one whose file exists is used.

    Attributes:
        pictures: patterns of the pictures.
        labels: patterns of the label pictures.
        number: official number of pictures.
        lists: text files that name the pictures of the split, one on each line. The name is the first word
            of the line, without folders and ending. Without a list, all pictures of the folder are used.
        names: regular expression for the names of the pictures of this split, if several splits share a
            folder and there are no lists.
    """

    pictures: tuple[str, ...]
    labels: tuple[str, ...]
    number: int
    lists: tuple[str, ...] = ()
    names: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A published data set.

    Attributes:
        title: name for people.
        archives: what to download and unpack, for messages.
        splits: the splits by name. Each data set has "train" and "val"; "test" is there if its labels are
            published.
        table: file of the class table, in the folder of this module; None for the classes of Cityscapes.
        train: flags of train.py that come closest to the published settings.
        evaluate: likewise, flags of evaluate.py.
        snapshot: file name of the snapshot of this training that is evaluated.
        folders: where the data set may begin, relative to --data-dir.
        unless: paths below the folder; if one of them exists, it is another data set.
    """

    title: str
    archives: str
    splits: Mapping[str, Split]
    table: str | None
    train: str
    evaluate: str
    snapshot: str
    folders: tuple[str, ...] = ("",)
    unless: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, str]:
        """Return the flags of both commands, by the name of the command."""
        return {"train": self.train, "evaluate": f"{self.evaluate} --restore-from snapshots/{self.snapshot}"}

    @property
    def table_path(self) -> str | None:
        """Return the path of the class table; None for the classes of Cityscapes."""
        return None if self.table is None else os.path.join(os.path.dirname(__file__), self.table)

    def classes(self) -> ClassTable | None:
        """Return the class table; None for the classes of Cityscapes."""
        return choose_table(self.table_path, None)[0]
