"""Scores of each picture of an evaluation, and the file pictures.npz that holds them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.evaluation.bootstrap import Ratios
from utils.errors import UsageError
from utils.files import open_input, replacing

#: Name of the file.
PICTURES = "pictures.npz"
#: Scores of `Pictures.others` with one column for each class.
BOUNDARY_IOU, BOUNDARY_F, INSTANCE_IOU = "boundary_iou", "boundary_f", "instance_iou"
#: Scores of `Pictures.others` with one column for each category of Cityscapes.
CATEGORY_IOU, CATEGORY_INSTANCE_IOU = "category_iou", "category_instance_iou"
OTHERS = (BOUNDARY_IOU, BOUNDARY_F, INSTANCE_IOU, CATEGORY_IOU, CATEGORY_INSTANCE_IOU)


class Pictures(NamedTuple):
    """Confusion matrices and other scores of P pictures, in the order of the data set.

    Only the entries of the matrices that are not 0 are stored: with 150 classes, a picture has some hundred
    of 22,500.

    Attributes:
        names: names of the pictures.
        num_classes: number of classes, K.
        picture: index of the picture of each entry, int64 [n].
        label: true class of each entry, int64 [n].
        prediction: predicted class of each entry, int64 [n].
        pixels: number of pixels of each entry, int64 [n].
        others: other scores that were computed, by name (OTHERS).
    """

    names: Sequence[str]
    num_classes: int
    picture: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    pixels: np.ndarray
    others: dict[str, Ratios]

    @classmethod
    def of(
        cls, names: Sequence[str], confusions: Sequence[Tensor], others: dict[str, Ratios] | None = None
    ) -> Pictures:
        """Return the scores of pictures from their confusion matrices, integers [K, K], at least one."""
        entries = [cells_of(confusion) for confusion in confusions]
        return cls.of_cells(names, len(confusions[0]), entries, others)

    @classmethod
    def of_cells(
        cls,
        names: Sequence[str],
        num_classes: int,
        cells: Sequence[tuple[np.ndarray, np.ndarray]],
        others: dict[str, Ratios] | None = None,
    ) -> Pictures:
        """Return the scores of pictures from the `cells_of` their confusion matrices."""
        nothing = np.zeros(0, np.int64)
        picture = np.repeat(np.arange(len(cells)), [len(places) for places, _ in cells])
        places = np.concatenate([nothing, *(places for places, _ in cells)])
        pixels = np.concatenate([nothing, *(pixels for _, pixels in cells)])
        label, prediction = np.divmod(places, num_classes)
        return cls(list(names), num_classes, picture, label, prediction, pixels, others or {})

    def confusion(self) -> Tensor:
        """Return the confusion matrix of all pictures together, int64 [K, K]; rows are labels."""
        total = np.zeros((self.num_classes,) * 2, np.int64)
        np.add.at(total, (self.label, self.prediction), self.pixels)
        return torch.from_numpy(total)

    def iou(self) -> Ratios:
        """Return intersection and union of each class, int64 [P, K]."""
        labeled, predicted = self.labeled(), self._sums(self.prediction, self.pixels)
        right = self._sums(self.label, np.where(self.label == self.prediction, self.pixels, 0))
        return Ratios(right, labeled + predicted - right)

    def labeled(self) -> np.ndarray:
        """Return the number of pixels that each class has in the labels, int64 [P, K]."""
        return self._sums(self.label, self.pixels)

    def _sums(self, classes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(self.names), self.num_classes), np.int64)
        np.add.at(sums, (self.picture, classes), pixels)
        return sums

    def write(self, path: str) -> None:
        """Write pictures.npz. The write is atomic.

        Raises:
            OSError: the file can't be written.
        """
        arrays: dict[str, Any] = {
            "names": np.array(self.names, dtype=np.str_),
            "num_classes": np.int64(self.num_classes),
            **{name: getattr(self, name) for name in ("picture", "label", "prediction", "pixels")},
        }
        for name, ratios in self.others.items():
            arrays |= {f"{name}_{part}": value for part, value in ratios._asdict().items()}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)


def cells_of(confusion: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the places, row * K + column, of the entries that are not 0, and the entries, int64 [n] both."""
    flat = confusion.numpy().ravel()
    places = np.flatnonzero(flat)
    return places, flat[places]


def read(folder: str) -> Pictures:
    """Read the pictures.npz of a folder.

    Raises:
        UsageError: the file is missing or damaged.
    """
    path = os.path.join(folder, PICTURES)
    try:
        with open_input(path) as file, np.load(file, allow_pickle=False) as archive:
            return _checked({name: archive[name] for name in archive.files})
    except FileNotFoundError as error:
        raise UsageError(f"{path}: is missing; run evaluate.py to write it") from error
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{path}: can't be read ({reason}); run evaluate.py again") from error


def _checked(arrays: dict[str, np.ndarray]) -> Pictures:
    """Return the content of pictures.npz.

    Raises:
        KeyError: an array is missing.
        ValueError: an array has a wrong shape, type or value.
    """
    names, num_classes = arrays["names"], arrays["num_classes"]
    entries = [arrays[name] for name in ("picture", "label", "prediction", "pixels")]
    length = len(entries[0]) if entries[0].ndim == 1 else -1
    right = names.ndim == 1 and names.dtype.kind == "U" and num_classes.shape == ()
    right = right and all(each.dtype == np.int64 for each in (num_classes, *entries))
    if not (right and all(each.shape == (length,) for each in entries) and 0 < num_classes <= 255):
        raise ValueError("arrays of another shape or type")
    limits = (len(names), num_classes, num_classes, 1 << 40)
    for each, limit in zip(entries, limits, strict=True):
        if length and not (each.min() >= 0 and each.max() < limit):
            raise ValueError("numbers out of range")
    others = {}
    for name in OTHERS:
        if f"{name}_numerator" not in arrays:
            continue
        ratios = Ratios(arrays[f"{name}_numerator"], arrays[f"{name}_denominator"])
        for each in ratios:
            if each.dtype.kind not in "if" or each.ndim != 2 or each.shape != ratios.numerator.shape:
                raise ValueError(f"{name}: arrays of another shape or type")
            if len(each) != len(names) or not (np.isfinite(each).all() and (each >= 0).all()):
                raise ValueError(f"{name}: numbers out of range")
        if name in (BOUNDARY_IOU, BOUNDARY_F, INSTANCE_IOU) and ratios.numerator.shape[1] != num_classes:
            raise ValueError(f"{name}: another number of classes")
        others[name] = ratios
    picture, label, prediction, pixels = entries
    texts = [str(name) for name in names]
    return Pictures(texts, int(num_classes), picture, label, prediction, pixels, others)
