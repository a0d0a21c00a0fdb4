"""The data set of pictures and labels, found by a list, in the Cityscapes layout or in a folder pair.

A train id is the class index that the network is trained with. Void pixels are neither trained nor scored.

Source: dataset/datasets.py of the original.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import clips, folder_pair, layout, recognition, transforms
from dataset.cache import PictureCache, on_disk
from dataset.classes import CLASS_FILES, classes_of
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
    fits_both,
    load,
    no_label,
    read_header,
    read_orientation,
    say_turned,
)
from utils.errors import DataError

#: Mean of the pictures that the ImageNet backbone was trained on, BGR in 0..255.
IMG_MEAN = np.array((104.00698793, 116.66876762, 122.67891434), dtype=np.float32)


class Sample(NamedTuple):
    """An augmented sample as uint8 arrays; they are converted to float on the device of the network."""

    image: np.ndarray  # uint8 [h, w, 3], BGR; [h, w, 3 * T] for a clip
    label: np.ndarray  # uint8 [h, w], train ids
    content: transforms.Content  # area of the picture; the network gets 0 in the padding
    name: str
    augmentation: transforms.Augmentation

    def record(self) -> str:
        """Describe the sample in one line: name, scale, crop offset, mirror."""
        scale, top, left, mirror, _ = self.augmentation
        factor = f"{scale:.1f}" if transforms.is_tenths(scale) else f"{scale:.6f}"
        return f"{self.name} scale={factor} crop={top},{left} mirror={int(mirror)}"


class Picture(NamedTuple):
    """A whole picture for evaluation."""

    image: np.ndarray  # uint8 [h, w, 3], BGR; [h, w, 3 * T] for a clip
    label: np.ndarray | None  # train ids, uint8 [h, w]; None without labels
    name: str
    label_ids: np.ndarray | None  # uint8 [h, w]; None unless requested
    instance_ids: np.ndarray | None  # uint16 [h, w]; None unless requested


class CSDataSet(Dataset):
    """Pictures with labels: a published data set (dataset.catalog), a folder pair, or given by a list.

    Labels named `*_labelTrainIds.png` hold train ids. Other labels are converted with `table` if it is given,
    by their ids or, for color pictures, by their colors. Without a table, labels named `*_labelIds.png` are
    converted with the table of Cityscapes, and all others hold train ids. Without `table` and `num_classes`,
    a published data set has its own table, and that of a folder pair is made from the values of its labels
    (`dataset.classes.classes_of`).

    An item is a tuple of image (float32 [3, h, w], BGR minus mean), label (train ids, int64 [h, w]), size
    (height, width, 3) of the picture on disk, and name. The augmentation is drawn from torch's random state.
    Reading an item raises DataError if a file is unreadable or mislabeled.

    Args:
        root: the data directory.
        list_path: file of `image<TAB>label` lines relative to `root`; None finds the pairs of `split` in
            `root`.
        crop_size: (height, width) of the samples; None for whole pictures.
        mean: BGR mean to subtract.
        scale: how to scale randomly; True for factors from 0.7 to 2.1, False for not at all.
        mirror: whether to mirror randomly.
        ignore_label: label of void pixels and padding.
        num_classes: number of classes; None for that of the table. Larger train ids, other than
            `ignore_label`, are an error.
        split: "train", "val" or another folder below leftImg8bit, or a split of another data set; used
            without a list.
        table: meaning of the values of the label pictures.
        labeled: whether there are labels; without them only `picture` and `check` can be called.
        cache: cache for decoded pictures, with a plan for `sizes()`; not for clips.
        dataset: name of the layout of `root`; None to find it (see `recognition.recognize`).
        photometric: whether to distort colors randomly (dataset/photometric.py).
        clip: number of frames T, odd: with each picture, the frames before and after it (`clips.Frames`) are
            read. They are augmented alike, and the image of a sample has the channels of all of them.
        clip_stride: distance of the frames of a clip.

    Raises:
        DataError: see `recognition.recognize`, `layout.read_list`, `classes_of`, and `discover` of layout,
            folder_pair and recognition.
    """

    def __init__(  # noqa: PLR0913
        self,
        root: str,
        list_path: str | None = None,
        crop_size: tuple[int, int] | None = (769, 769),
        mean: Sequence[float] | np.ndarray = IMG_MEAN,
        scale: bool | transforms.Scaling = True,
        mirror: bool = True,
        ignore_label: int = IGNORE,
        num_classes: int | None = None,
        split: str = "train",
        table: ClassTable | None = None,
        labeled: bool = True,
        cache: PictureCache | None = None,
        dataset: str | None = None,
        photometric: bool = False,
        clip: int = 1,
        clip_stride: int = 1,
    ):
        self.skipped: list[str] = []
        self.taken: list[str] = []  # lines about what was taken for what in a folder pair
        self.described: list[str] = []  # possible files of lists and classes in a folder pair
        place = recognition.recognize(root, dataset, list_path is not None)
        if place.data and table is None and num_classes is None:
            table = place.data.classes()
        if list_path is not None:
            if not os.path.isdir(root):
                layout.check_root(root)
            self.pairs, self.source = layout.read_list(root, list_path, labeled), list_path
        elif place.data:
            found = recognition.discover(place, split, labeled)
            self.pairs, self.skipped = found.pairs, found.skipped
            self.taken = [recognition.say(place, split, self.pairs)]
            self.source = f"{os.path.join(root, place.folder)} ({split})"
        elif place.is_pair:
            self.pairs, self.taken, self.skipped = folder_pair.discover(root, split, labeled)
            self.source = f"{os.path.join(root, folder_pair.IMAGES)} ({split})"
            self.described = [*folder_pair.LISTS.values(), folder_pair.TEST_LIST, *CLASS_FILES]
            if table is None and num_classes is None and labeled:
                classes = classes_of(root)
                table, num_classes = classes.table, classes.number
                self.taken = self.taken + classes.notes
        else:
            found = layout.discover(root, split, labeled)
            self.pairs, self.skipped = found.pairs, found.skipped
            self.source = os.path.join(root, "leftImg8bit", split)
        self.root = root
        self.crop_size = crop_size
        self.mean = np.tile(np.asarray(mean), clip)
        self.scale = scale
        self.mirror = mirror
        self.photometric = photometric
        self.labeled = labeled
        self.cache = cache
        self.labels = LabelReader(table, ignore_label, num_classes)
        frames = clips.Frames(clip, clip_stride, root)
        self.clips = [frames.of(pair.image) for pair in self.pairs] if clip > 1 else []

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
        """Return an item for other programs; the training loop uses `sample`."""
        seed = int(torch.randint(2**63 - 1, ()))
        sample, size = self._augmented(index, np.random.default_rng(seed))
        image = transforms.subtract_mean(sample.image, self.mean, sample.content)
        return image, sample.label.astype(np.int64), np.array((*size, 3)), sample.name

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample `index`, with its augmentation drawn from `rng`."""
        return self._augmented(index, rng)[0]

    def _augmented(self, index: int, rng: np.random.Generator) -> tuple[Sample, tuple[int, int]]:
        """Return a sample and the (height, width) of its picture."""
        cached = self.cache.get(index) if self.cache is not None else None
        if cached is not None:
            size = cached[0].shape[:2]
        else:
            encoded = self._load(index)
            size = encoded[0].height, encoded[0].width
        crop = size if self.crop_size is None else self.crop_size
        augmentation = transforms.draw(rng, size, crop, self.scale, self.mirror, self.photometric)
        if cached is not None:
            image, label = cached
        elif self.cache is not None:
            image, label = self._decode(index, encoded)
            self.cache.put(index, image, label)
        else:
            # Rows below the crop need not be decoded.
            image, label = self._decode(index, encoded, transforms.rows_needed(size, crop, augmentation))
        image, label, content = transforms.apply(
            image, label, size, crop, augmentation, self.labels.ignore_label, self.labels.mirror_lookup()
        )
        return Sample(image, label, content, self.pairs[index].name, augmentation), size

    def digest(self) -> str:
        """Return a hash of the pairs and the class table, independent of the data directory."""
        about = repr(self.pairs) + (repr(self.clips) if self.clips else "")
        if self.labels.table:  # its names do not matter
            about += repr([(label.id, label.train_id, label.color) for label in self.labels.table.labels])
            about += repr(self.labels.mirrored()) if self.labels.mirrored() else ""
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of every picture, from its header."""
        with ThreadPoolExecutor(8) as pool:
            headers = pool.map(read_header, (self.path(pair.image) for pair in self.pairs))
            return [(header.height, header.width) for header in headers]

    def cache_file(self, folder: str) -> str:
        """Return the path of the cache file for these pictures in `folder`."""
        files = [file for pair in self.pairs for file in (pair.image, pair.label)]
        return on_disk(
            folder, self.root, files, f"{self.digest()} {self.labels.ignore_label} {self.labels.num_classes}"
        )

    def files(self) -> list[str]:
        """Return the paths of all pictures and labels, and possible ones of instances, classes and lists."""
        labels = [pair.label for pair in self.pairs if pair.label]
        instances = [instances_of(label) for label in labels if label.endswith(LABEL_IDS)]
        images = [*(pair.image for pair in self.pairs), *(file for clip in self.clips for file in clip.files)]
        return [self.path(file) for file in (*images, *labels, *instances, *self.described)]

    def has_instances(self) -> bool:
        """Return whether every label is a labelIds file that has an instanceIds file."""
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
        """Return picture `index`, whole and without augmentation.

        Args:
            index: number of the picture.
            instances: whether to read label ids and instance ids too.
        """
        pair = self.pairs[index]
        if not self.labeled:
            image = self._decode_image(index, load(self.path(pair.image)))
            return Picture(image, None, pair.name, None, None)
        encoded = self._load(index)
        image, label = self._decode(index, encoded)
        label_ids = instance_ids = None
        if instances:
            found = load(self.path(instances_of(pair.label)))
            check_size(found.path, found, pair.label, encoded[1])
            label_ids, instance_ids = decode_label(encoded[1]), decode_label(found)
        return Picture(image, label, pair.name, label_ids, instance_ids)

    def path(self, relative: str) -> str:
        """Return the path of a file given relative to the data directory."""
        return os.path.join(self.root, relative)

    def check(self, instances: bool = False) -> str:
        """Check the header of every file and the ids of every label, and return the lines to print.

        The first line has the number of pictures and the share of void pixels. Further lines name classes
        that occur in no label, skipped files, 16-bit pictures that are nearly black, and
        pictures with an orientation tag whose labels fit both ways.

        Args:
            instances: check the headers of the instanceIds files too.

        Raises:
            DataError: a file is missing, unreadable, truncated or of the wrong kind, a label has another size
                than its picture or an unknown id (the message names the first such file), or all labels have
                only void pixels.
        """
        counts = Counts()
        odd = None  # a picture that does not have 8 bits per channel
        turned: list[str] = []
        try:
            with ThreadPoolExecutor(8) as pool:
                looks = pool.map(lambda pair: self._check_pair(pair, instances), self.pairs)
                checked = pool.map(self._check_clip, self.pairs, self.clips)
                for pair, (header, counted, is_turned) in zip(self.pairs, looks, strict=True):
                    counts.add(counted)
                    turned += [pair.image] if is_turned else []
                    odd = odd or (pair.image if header.depth != 8 else None)
                for _ in checked:  # raises their errors
                    pass
        except DataError as error:
            raise DataError(f"{error} (python -m dataset.check finds all such files)") from error
        folders = len({os.path.dirname(pair.image) for pair in self.pairs})
        line = f"{self.source}: {len(self.pairs)} pictures in {folders} folder{'s' * (folders > 1)}, "
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
        if self.clips:
            notes.insert(0, clips.say_missing(self.source, self.clips))
        if self.skipped:
            notes.append(layout.say_skipped(self.skipped))
        if turned:
            notes.append(say_turned(turned))
        if odd is not None:
            encoded = load(self.path(odd))
            if dark := darkness(encoded, decode_image(encoded)):
                notes.append(dark)
        return "\n".join([line, *(f"note: {note}" for note in notes)])

    def _check_pair(self, pair: Pair, instances: bool) -> tuple[Header, Counts, bool]:
        """Check a pair.

        Returns:
            The header of the picture, the counts of the label, and whether the label fits the picture both as
            stored and as an orientation tag turns it.
        """
        image = read_header(self.path(pair.image))
        check_picture(self.path(pair.image), image)
        if not self.labeled:
            return image, Counts(), False
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
        return image, counts, fits_both(read_orientation(self.path(pair.image)), image)

    def _check_clip(self, pair: Pair, clip: clips.Clip) -> None:
        """Check the headers of the other frames of a picture."""
        for path in map(self.path, set(clip.files) - {pair.image}):
            header = read_header(path)
            check_picture(path, header)
            check_size(path, header, pair.image, read_header(self.path(pair.image)))

    def _load(self, index: int) -> tuple[Encoded, Encoded]:
        """Read the files of a picture and its label, and check that they have the same size."""
        pair = self.pairs[index]
        image, label = load(self.path(pair.image)), load(self.path(pair.label))
        check_size(label.path, label, pair.image, image)
        return image, label

    def _decode(
        self, index: int, encoded: tuple[Encoded, Encoded], rows: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return picture `index` (see `_decode_image`) and its train ids uint8 [h, w]."""
        return self._decode_image(index, encoded[0], rows), self.labels.read(encoded[1], rows)

    def _decode_image(self, index: int, encoded: Encoded, rows: int | None = None) -> np.ndarray:
        """Return picture `index` uint8 [h, w, 3 * T] BGR with its other frames; h is at least `rows`."""
        if not self.clips:
            return decode_image(encoded, rows)

        def read(file: str) -> np.ndarray:
            if file == self.pairs[index].image:
                return decode_image(encoded, rows)
            frame = load(self.path(file))
            check_size(frame.path, frame, self.pairs[index].image, encoded)
            return decode_image(frame, rows)

        return clips.stack(self.clips[index].files, read)
