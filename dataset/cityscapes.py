"""The loader: pictures and labels by list or layout, augmented or whole (original: dataset/datasets.py)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import layout, transforms
from dataset.cache import PictureCache, on_disk
from dataset.labels import IGNORE, ClassTable, Counts, LabelReader
from dataset.layout import LABEL_IDS, Pair, instances_of
from dataset.pictures import (
    LABEL_MODES,
    Encoded,
    Header,
    check_label,
    check_picture,
    check_size,
    darkness,
    decode_image,
    decode_label,
    load,
    no_label,
    read_header,
)
from utils.errors import DataError

#: Mean of the training pictures, BGR, 0-255 (of the ImageNet backbone's training).
IMG_MEAN = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)


class Sample(NamedTuple):
    """One augmented sample, in bytes: the network's device makes floats of them.

    image uint8 [h, w, 3] BGR, label uint8 [h, w] train ids, where in them the picture is (outside of it the
    network gets 0), and what was done to it.
    """

    image: np.ndarray
    label: np.ndarray
    content: transforms.Content
    name: str
    augmentation: transforms.Augmentation

    def record(self) -> str:
        """The sample in one line: name, scale, crop offset, mirror."""
        scale, top, left, mirror = self.augmentation
        return f"{self.name} scale={scale:.1f} crop={top},{left} mirror={int(mirror)}"


class Picture(NamedTuple):
    """One whole picture for evaluation.

    image uint8 [h, w, 3] BGR, label uint8 [h, w] train ids (None where there are no labels), and where they
    are wanted label ids uint8 [h, w] and instance ids uint16 [h, w] (else None).
    """

    image: np.ndarray
    label: np.ndarray | None
    name: str
    label_ids: np.ndarray | None
    instance_ids: np.ndarray | None


class CSDataSet(Dataset):
    """Pictures with labels in the Cityscapes layout, or in any layout by a list.

    Labels named `*_labelTrainIds.png` are train ids as they are. Others go through `table`, if one is given:
    by their ids, or by their colors where they are color pictures. Without it those named `*_labelIds.png`
    go through Cityscapes' table, and all others are train ids too.

    Args:
        root: the data directory.
        list_path: file of `image<TAB>label` lines relative to `root`; None discovers `split` from the layout.
        crop_size: (height, width) of the samples; None for whole pictures.
        mean: BGR mean to subtract.
        scale, mirror: whether to scale (0.7 to 2.1) and mirror at random.
        ignore_label: label of void pixels and padding.
        num_classes: labels of this value or more (other than `ignore_label`) are an error; None for as many
            as the table has.
        split: "train", "val" or another folder below leftImg8bit, when there is no list.
        table: what the values of the label pictures mean.
        labeled: whether there are labels; without them only `picture` and `check` can be called.
        cache: where decoded pictures are kept, of `sizes()`.

    Items: (image float32 [3, h, w] BGR minus mean, label int64 [h, w] train ids, size (height, width, 3) of
    the picture on disk, name). Their augmentation is drawn from torch's random state.

    Raises:
        DataError: see `layout.read_list` and `layout.discover`; an item raises it for an unreadable or
            mislabeled file.
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
        num_classes: int | None = None,
        split: str = "train",
        table: ClassTable | None = None,
        labeled: bool = True,
        cache: PictureCache | None = None,
    ):
        self.skipped: list[str] = []
        if list_path is None:
            found = layout.discover(root, split, labeled)
            self.pairs, self.skipped = found.pairs, found.skipped
        else:
            if not os.path.isdir(root):
                layout.check_root(root)
            self.pairs = layout.read_list(root, list_path, labeled)
        self.root = root
        self.source = os.path.join(root, "leftImg8bit", split) if list_path is None else list_path
        self.crop_size = crop_size
        self.mean = np.asarray(mean)
        self.scale = scale
        self.mirror = mirror
        self.labeled = labeled
        self.cache = cache
        self.labels = LabelReader(table, ignore_label, num_classes)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def num_classes(self) -> int:
        """Number of train ids."""
        return self.labels.num_classes

    @property
    def ignore_label(self) -> int:
        """Train id of void pixels."""
        return self.labels.ignore_label

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        seed = int(torch.randint(2**63 - 1, ()))
        sample, size = self._augmented(index, np.random.default_rng(seed))
        image = transforms.subtract_mean(sample.image, self.mean, sample.content)
        return image, sample.label.astype(np.int64), np.array((*size, 3)), sample.name

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Item `index` in bytes, with its augmentation drawn from `rng`."""
        return self._augmented(index, rng)[0]

    def _augmented(self, index: int, rng: np.random.Generator) -> tuple[Sample, tuple[int, int]]:
        """A sample, and (height, width) of its picture."""
        cached = self.cache.get(index) if self.cache is not None else None
        if cached is not None:
            size = cached[0].shape[:2]
        else:
            encoded = self._load(index)
            size = encoded[0].height, encoded[0].width
        crop = size if self.crop_size is None else self.crop_size
        augmentation = transforms.draw(rng, size, crop, self.scale, self.mirror)
        if cached is not None:
            image, label = cached
        elif self.cache is not None:
            image, label = self._decode(encoded)
            self.cache.put(index, image, label)
        else:
            # A crop far up spares the decoding of what is below it.
            image, label = self._decode(encoded, transforms.rows_needed(size, crop, augmentation))
        image, label, content = transforms.apply(
            image, label, size, crop, augmentation, self.labels.ignore_label
        )
        return Sample(image, label, content, self.pairs[index].name, augmentation), size

    def digest(self) -> str:
        """Tells data sets apart by their pairs and the meaning of their labels, wherever they lie."""
        about = repr(self.pairs) + (repr(self.labels.table.labels) if self.labels.table else "")
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every picture, by their headers."""
        with ThreadPoolExecutor(8) as pool:
            headers = pool.map(read_header, (self.path(pair.image) for pair in self.pairs))
            return [(header.height, header.width) for header in headers]

    def cache_file(self, folder: str) -> str:
        """The file in `folder` that a cache of these pictures is kept in."""
        files = [file for pair in self.pairs for file in (pair.image, pair.label)]
        return on_disk(
            folder, self.root, files, f"{self.digest()} {self.labels.ignore_label} {self.labels.num_classes}"
        )

    def files(self) -> list[str]:
        """Return the paths of all pictures and labels, and of the instanceIds that may lie beside them."""
        labels = [pair.label for pair in self.pairs if pair.label]
        instances = [instances_of(label) for label in labels if label.endswith(LABEL_IDS)]
        return [self.path(file) for file in (*(pair.image for pair in self.pairs), *labels, *instances)]

    def has_instances(self) -> bool:
        """Return whether every label is a labelIds file with an instanceIds file beside it."""
        return all(
            pair.label.endswith(LABEL_IDS) and os.path.isfile(self.path(instances_of(pair.label)))
            for pair in self.pairs
        )

    def has_cityscapes_classes(self) -> bool:
        """Return whether there are labels, of the classes of Cityscapes."""
        return self.labeled and self.labels.is_cityscapes()

    def missing_for_instances(self) -> str | None:
        """Return what the official scores of instances lack; None if nothing.

        They need the classes of Cityscapes, label ids and instance ids. The text is empty where nobody
        expects them, as with other classes.
        """
        if not self.has_cityscapes_classes():
            return ""
        if self.has_instances():
            return None
        paths = [self.path(pair.label) for pair in self.pairs]
        if lacking := [path for path in paths if not path.endswith(LABEL_IDS)]:
            return f"{len(lacking)} of {len(paths)} labels are not *{LABEL_IDS}, the first is {lacking[0]}"
        lacking = [path for path in map(instances_of, paths) if not os.path.isfile(path)]
        return (
            f"{len(lacking)} of {len(paths)} files of instance ids are missing, the first is {lacking[0]}; "
            "unpack the whole gtFine_trainvaltest.zip"
        )

    def picture(self, index: int, instances: bool) -> Picture:
        """Item `index` whole and unchanged, with label and instance ids if `instances`."""
        pair = self.pairs[index]
        if not self.labeled:
            return Picture(decode_image(load(self.path(pair.image))), None, pair.name, None, None)
        encoded = self._load(index)
        image, label = self._decode(encoded)
        label_ids = instance_ids = None
        if instances:
            found = load(self.path(instances_of(pair.label)))
            check_size(found.path, found, pair.label, encoded[1])
            label_ids, instance_ids = decode_label(encoded[1]), decode_label(found)
        return Picture(image, label, pair.name, label_ids, instance_ids)

    def path(self, relative: str) -> str:
        return os.path.join(self.root, relative)

    def check(self, instances: bool = False) -> str:
        """Look at the header of every file and at the ids of every label; return the lines to print.

        The first line has the number of pictures and the share of void; more follow about classes that occur
        in no label, files that were skipped, and pictures of 16 bits that are nearly black.

        Args:
            instances: look at the headers of the instanceIds files too.

        Raises:
            DataError: naming the first file that is missing, unreadable, truncated, of the wrong kind, of
                another size than its picture, or a label with an id that is none of the classes; or every
                label is void alone.
        """
        counts = Counts()
        odd = None  # a picture whose channels don't have 8 bits
        try:
            with ThreadPoolExecutor(8) as pool:
                looks = pool.map(lambda pair: self._check_pair(pair, instances), self.pairs)
                for pair, (header, counted) in zip(self.pairs, looks, strict=True):
                    counts.add(counted)
                    odd = odd or (pair.image if header.depth != 8 else None)
        except DataError as error:
            raise DataError(f"{error} (python -m dataset.check finds all such files)") from error
        folders = len({os.path.dirname(pair.image) for pair in self.pairs})
        line = f"{self.source}: {len(self.pairs)} pictures in {folders} folders, "
        notes = []
        if self.labeled:
            void = counts.train_ids[self.labels.ignore_label] / counts.train_ids.sum()
            line += f"each with its label, none missing; {100 * void:.1f} % of the pixels are void"
            notes = self.labels.notes(counts)
            if void == 1:
                raise DataError(
                    f"{self.source}: every pixel of its {len(self.pairs)} labels is void; check --classes "
                    f"and --ignore-label ({'; '.join(notes)})"
                )
        else:
            line += "none missing"
        if self.skipped:
            notes.append(layout.say_skipped(self.skipped))
        if odd is not None:
            encoded = load(self.path(odd))
            if dark := darkness(encoded, decode_image(encoded)):
                notes.append(dark)
        return "\n".join([line, *(f"note: {note}" for note in notes)])

    def _check_pair(self, pair: Pair, instances: bool) -> tuple[Header, Counts]:
        """Return the header of the picture, and what its label holds."""
        image = read_header(self.path(pair.image))
        check_picture(self.path(pair.image), image)
        if not self.labeled:
            return image, Counts()
        label = load(self.path(pair.label))
        check_size(label.path, label, pair.image, image)
        counts = self.labels.count(label)
        if instances:
            path = self.path(instances_of(pair.label))
            header = read_header(path)
            check_label(path, header)
            if header.mode not in LABEL_MODES:
                raise no_label(path, header.mode)
            check_size(path, header, pair.label, label)
        return image, counts

    def _load(self, index: int) -> tuple[Encoded, Encoded]:
        """The files of picture and label, of the same size."""
        pair = self.pairs[index]
        image, label = load(self.path(pair.image)), load(self.path(pair.label))
        check_size(label.path, label, pair.image, image)
        return image, label

    def _decode(
        self, encoded: tuple[Encoded, Encoded], rows: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The picture uint8 [h, w, 3] BGR and its train ids uint8 [h, w], at least the first `rows` rows."""
        return decode_image(encoded[0], rows), self.labels.read(encoded[1], rows)
