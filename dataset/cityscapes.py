"""The Cityscapes loader: pairs of pictures and labels, by list or layout (original: dataset/datasets.py)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import transforms
from dataset.labels import IGNORE, NUM_CLASSES, train_id_table
from dataset.pictures import DataError, check_label_mode, read_header, read_image, read_label

#: Mean of the training pictures, BGR, 0-255 (of the ImageNet backbone's training).
IMG_MEAN = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)

LABEL_IDS = "_labelIds.png"
LABEL_TRAIN_IDS = "_labelTrainIds.png"
INSTANCE_IDS = "_instanceIds.png"
PICTURE = "_leftImg8bit"


class Pair(NamedTuple):
    """A picture and its label, relative to the data directory, and the name that results carry."""

    image: str
    label: str
    name: str


class Sample(NamedTuple):
    """One augmented sample: image float32 [3, h, w], label int64 [h, w], and what was done to it."""

    image: np.ndarray
    label: np.ndarray
    name: str
    augmentation: transforms.Augmentation

    def record(self) -> str:
        """The sample in one line: name, scale, crop offset, mirror."""
        scale, top, left, mirror = self.augmentation
        return f"{self.name} scale={scale:.1f} crop={top},{left} mirror={int(mirror)}"


class Picture(NamedTuple):
    """One whole picture for evaluation.

    image float32 [3, h, w] BGR minus mean, label int64 [h, w] train ids, and where the data set has them
    label ids uint8 [h, w] and instance ids int32 [h, w] (else None).
    """

    image: np.ndarray
    label: np.ndarray
    name: str
    label_ids: np.ndarray | None
    instance_ids: np.ndarray | None


def read_list(root: str, list_path: str) -> list[Pair]:
    """Read `image<TAB>label` lines, both relative to `root`. Empty lines are skipped.

    Raises:
        DataError: no such list, a line without exactly two columns, or no line at all.
    """
    try:
        with open(list_path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_path}: not a readable list ({error}); check --data-list") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # A tab allows spaces in file names; the original's lists have either.
        columns = [column.strip() for column in line.split("\t")] if "\t" in line else line.split()
        if len(columns) != 2 or not all(columns):
            raise DataError(f"{list_path}:{number}: {line.strip()!r} is not 'image<TAB>label'; mend the line")
        pairs.append((columns[0], columns[1]))
    if not pairs:
        raise DataError(f"{list_path}: the list is empty; check --data-list")
    return _named(pairs)


def discover(root: str, split: str) -> list[Pair]:
    """The pairs of `split` in a directory of Cityscapes' layout, ordered by city and name.

    labelIds serve where there are both kinds of labels.

    Raises:
        DataError: no such directory, no picture, or pictures without a label (with their number).
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such directory; --data-dir names the folder with leftImg8bit and gtFine")
    folder = os.path.join(root, "leftImg8bit", split)
    pairs, missing = [], []
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if extension.lower() not in (".png", ".jpg", ".jpeg") or not stem.endswith(PICTURE):
                continue
            image = os.path.relpath(os.path.join(directory, file), root)
            city = os.path.relpath(directory, folder)
            base = os.path.normpath(
                os.path.join("gtFine", split, city, stem.removesuffix(PICTURE) + "_gtFine")
            )
            kinds = [base + kind for kind in (LABEL_IDS, LABEL_TRAIN_IDS)]
            label = next((kind for kind in kinds if os.path.isfile(os.path.join(root, kind))), None)
            if label is None:
                missing.append(kinds[0])
            else:
                pairs.append((image, label))
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of {len(missing) + len(pairs)} pictures in leftImg8bit/{split} have no "
            f"label, the first missing is {missing[0]}; unpack the whole gtFine archive, or name the pairs "
            "with --data-list"
        )
    if not pairs:
        raise DataError(
            f"{root}: no picture *{PICTURE}.png below leftImg8bit/{split}; --data-dir names the folder with "
            "leftImg8bit and gtFine, --data-list other pairs"
        )
    return _named(pairs)


def _instances_of(label: str) -> str:
    return label.removesuffix(LABEL_IDS) + INSTANCE_IDS


def _named(pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Names are the pictures' own, or their whole paths where the former would clash."""
    stems = [os.path.splitext(os.path.basename(image))[0].removesuffix(PICTURE) for image, _ in pairs]
    if len(set(stems)) < len(set(pairs)):
        stems = [os.path.splitext(os.path.normpath(image))[0].replace(os.sep, "_") for image, _ in pairs]
    return [Pair(image, label, stem) for (image, label), stem in zip(pairs, stems, strict=True)]


class CSDataSet(Dataset):
    """Pictures with labels in the Cityscapes layout, or in any layout by a list.

    Labels named `*_labelIds.png` go through the Cityscapes id table; all others are train ids as they are.

    Args:
        root: the data directory.
        list_path: file of `image<TAB>label` lines relative to `root`; None discovers `split` from the layout.
        crop_size: (height, width) of the samples; None for whole pictures.
        mean: BGR mean to subtract.
        scale, mirror: whether to scale (0.7 to 2.1) and mirror at random.
        ignore_label: label of void pixels and padding.
        num_classes: labels of this value or more (other than `ignore_label`) are an error.
        split: "train", "val" or another folder below leftImg8bit, when there is no list.

    Items: (image float32 [3, h, w] BGR minus mean, label int64 [h, w] train ids, size (height, width, 3) of
    the picture on disk, name). Their augmentation is drawn from torch's random state.

    Raises:
        DataError: see `read_list` and `discover`; an item raises it for an unreadable or mislabelled file.
    """

    def __init__(
        self,
        root: str,
        list_path: str | None = None,
        crop_size: tuple[int, int] | None = (769, 769),
        mean: Sequence[float] | np.ndarray = IMG_MEAN,
        scale: bool = True,
        mirror: bool = True,
        ignore_label: int = IGNORE,
        num_classes: int = NUM_CLASSES,
        split: str = "train",
    ):
        if not os.path.isdir(root):
            raise DataError(
                f"{root}: no such directory; --data-dir names the folder with leftImg8bit and gtFine"
            )
        self.root = root
        self.pairs = discover(root, split) if list_path is None else read_list(root, list_path)
        self.source = os.path.join(root, "leftImg8bit", split) if list_path is None else list_path
        self.crop_size = crop_size
        self.scale = scale
        self.mirror = mirror
        self.ignore_label = ignore_label
        self.num_classes = num_classes
        self._mean = transforms.mean_table(np.asarray(mean))
        self._train_ids = train_id_table(ignore_label)
        self._unchanged = np.arange(256, dtype=np.int16)
        for table in (self._train_ids, self._unchanged):
            table[(table >= num_classes) & (table != ignore_label)] = -1

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        seed = int(torch.randint(2**63 - 1, ()))
        image, label = self._read(index)
        size = np.array(image.shape)
        sample = self._augmented(index, image, label, np.random.default_rng(seed))
        return sample.image, sample.label, size, sample.name

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Item `index` with its augmentation drawn from `rng`."""
        return self._augmented(index, *self._read(index), rng)

    def digest(self) -> str:
        """Tells data sets apart by their lists of pictures and labels, wherever they lie."""
        return hashlib.sha256(repr(self.pairs).encode()).hexdigest()[:16]

    def has_instances(self) -> bool:
        """Whether every label is a labelIds file with an instanceIds file beside it."""
        return all(
            pair.label.endswith(LABEL_IDS) and os.path.isfile(self.path(_instances_of(pair.label)))
            for pair in self.pairs
        )

    def picture(self, index: int, instances: bool) -> Picture:
        """Item `index` whole and unchanged, with label and instance ids if `instances`."""
        pair = self.pairs[index]
        image, label = self._read(index)
        label_ids = instance_ids = None
        if instances:
            path = self.path(_instances_of(pair.label))
            label_ids, instance_ids = read_label(self.path(pair.label)), read_label(path).astype(np.int32)
            if instance_ids.shape != label_ids.shape:
                raise DataError(
                    f"{path}: not of the size of {pair.label}; give the instances of this picture"
                )
        image = transforms.subtract_mean(image, self._mean)
        return Picture(image, label.astype(np.int64), pair.name, label_ids, instance_ids)

    def path(self, relative: str) -> str:
        return os.path.join(self.root, relative)

    def check(self, instances: bool = False) -> str:
        """Look at the header of every file and at the ids of every label; the line to print when all is well.

        Args:
            instances: look at the headers of the instanceIds files too.

        Raises:
            DataError: naming the first file that is missing, unreadable, truncated, of the wrong kind, of
                another size than its picture, or a label with an id that is none of the classes.
        """
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(partial(self._check_pair, instances=instances), self.pairs):
                pass
        folders = len({os.path.dirname(pair.image) for pair in self.pairs})
        count = len(self.pairs)
        return f"{self.source}: {count} pictures in {folders} folders, each with its label, none missing"

    def _check_pair(self, pair: Pair, instances: bool) -> None:
        image, label = (read_header(self.path(name)) for name in (pair.image, pair.label))
        check_label_mode(self.path(pair.label), label.mode)
        if image[:2] != label[:2]:
            raise DataError(
                f"{self.path(pair.label)}: {label.width}x{label.height} pixels, but its picture {pair.image} "
                f"has {image.width}x{image.height}; give the label of this picture"
            )
        self._read_train_ids(pair.label)
        if instances:
            path = self.path(_instances_of(pair.label))
            if read_header(path)[:2] != label[:2]:
                raise DataError(
                    f"{path}: not of the size of {pair.label}; give the instances of this picture"
                )

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The whole picture uint8 [h, w, 3] and its train ids int16 [h, w]."""
        pair = self.pairs[index]
        image, label = read_image(self.path(pair.image)), self._read_train_ids(pair.label)
        if image.shape[:2] != label.shape:
            raise DataError(
                f"{self.path(pair.label)}: not of the size of {pair.image}; give the label of this picture"
            )
        return image, label

    def _read_train_ids(self, relative: str) -> np.ndarray:
        """The label file `relative` as train ids, int16 [h, w]."""
        label = read_label(self.path(relative))
        table = self._train_ids if relative.endswith(LABEL_IDS) else self._unchanged
        if label.dtype == np.uint8:
            present = np.flatnonzero(cv2.calcHist([label], [0], None, [256], [0, 256]))
        else:
            present = np.unique(label)
        for value in present.tolist():
            if not 0 <= value < 256 or table[value] < 0:
                kind = "label id" if table is self._train_ids else "train id"
                raise DataError(
                    f"{self.path(relative)}: {kind} {value} is none of the {self.num_classes} classes nor "
                    "void; mend the label, or check --num-classes and --ignore-label"
                )
        return table[label]

    def _augmented(
        self, index: int, image: np.ndarray, label: np.ndarray, rng: np.random.Generator
    ) -> Sample:
        size = image.shape[:2]
        crop = size if self.crop_size is None else self.crop_size
        augmentation = transforms.draw(rng, size, crop, self.scale, self.mirror)
        image, label = transforms.apply(image, label, crop, augmentation, self._mean, self.ignore_label)
        return Sample(image, label.astype(np.int64), self.pairs[index].name, augmentation)
