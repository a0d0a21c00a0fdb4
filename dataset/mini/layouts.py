"""The generated pictures in the layouts and label encodings of the published data sets."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

import cv2
import numpy as np
from PIL import Image

from dataset.catalog import DATA_SETS
from dataset.labels import IGNORE, LABELS, Label
from dataset.mini import person
from dataset.mini.cityscapes import picture, png
from dataset.published import STEM
from utils.errors import UsageError

#: Names in other data sets of the labels of Cityscapes: ADE20K, PASCAL VOC and CamVid. Other labels are
#: unlabeled, background and void.
NAMES = {
    "road": ("road", "background", "Road"),
    "sidewalk": ("sidewalk", "background", "Pavement"),
    "parking": ("road", "background", "ParkingBlock"),
    "rail track": ("runway", "background", "LaneMkgsNonDriv"),
    "building": ("building", "background", "Building"),
    "wall": ("wall", "background", "Wall"),
    "fence": ("fence", "background", "Fence"),
    "guard rail": ("railing", "background", "Fence"),
    "bridge": ("bridge", "background", "Bridge"),
    "tunnel": ("base", "background", "Tunnel"),
    "pole": ("pole", "background", "Pole"),
    "polegroup": ("pole", "background", "Pole"),
    "traffic light": ("traffic light", "background", "TrafficLight"),
    "traffic sign": ("signboard", "background", "SignSymbol"),
    "vegetation": ("tree", "background", "Tree"),
    "terrain": ("grass", "background", "VegetationMisc"),
    "sky": ("sky", "background", "Sky"),
    "person": ("person", "person", "Pedestrian"),
    "rider": ("person", "person", "Bicyclist"),
    "car": ("car", "car", "Car"),
    "truck": ("truck", "background", "Truck_Bus"),
    "bus": ("bus", "bus", "Truck_Bus"),
    "caravan": ("van", "background", "SUVPickupTruck"),
    "trailer": ("van", "background", "OtherMoving"),
    "train": ("van", "train", "Train"),
    "motorcycle": ("minibike", "motorbike", "MotorcycleScooter"),
    "bicycle": ("bicycle", "bicycle", "Bicyclist"),
}
#: Column of NAMES by data set, and the label of all labels of Cityscapes that are not in NAMES.
COLUMNS = {"ade20k": 0, "voc2012": 1, "voc2012_aug": 1, "camvid": 2, "camvid_stills": 2}
OTHERS = ("unlabeled", "background", "Void")
#: Names of the pictures of CamVid by split: sequences, and numbers of their frames.
FRAMES = {
    "train": (
        ("0001TP_{:06d}", range(6690, 8521, 30)),
        ("0006R0_f{:05d}", range(930, 3931, 30)),
        ("0016E5_{:05d}", (*range(390, 2401, 30), *range(4350, 7921, 30), *range(8190, 8641, 30))),
    ),
    "val": (("0016E5_{:05d}", range(7959, 8160, 2)),),
    "test": (("Seq05VD_f{:05d}", range(0, 5101, 30)), ("0001TP_{:06d}", range(8550, 10381, 30))),
}
CAMVID = {split: [name.format(n) for name, frames in each for n in frames] for split, each in FRAMES.items()}
#: Number of the first scene of the split "test", whose cities are those of "val".
TEST_FROM = 500_000
#: Smallest height and width in data sets whose pictures differ in size, relative to the largest.
SMALLEST = 0.75

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def splits(layout: str, train: int, val: int) -> dict[str, int]:
    """Return the number of pictures of each split; "test" has as many as "val".

    Raises:
        UsageError: CamVid, whose names tell the split, does not have so many.
    """
    counts = {name: train if name == "train" else val for name in DATA_SETS[layout].splits}
    for split, number in counts.items():
        if layout.startswith("camvid") and number > len(CAMVID[split]):
            raise UsageError(
                f"--{'train' if split == 'train' else 'val'} {number}: CamVid has {len(CAMVID[split])} "
                f"pictures for {split}; give at most that number"
            )
    return counts


def files(layout: str, split: str, index: int, size: tuple[int, int], seed: int) -> dict[str, bytes]:
    """Generate picture `index` of a split.

    Args:
        layout: name of a published data set.
        split: name of the split.
        index: number of the picture in the split.
        size: (height, width) of the pictures, or of the largest one where sizes differ.
        seed: seed of the data set.

    Returns:
        The content of each file by its path.
    """
    data = DATA_SETS[layout]
    patterns = data.splits[split]
    rng = np.random.default_rng((seed, list(data.splits).index(split), 2, index))
    name = name_of(layout, split, index)
    if layout == "lip":
        image, ids = person.render(_drawn(size, rng), rng)
        label = png(ids)
    else:
        scene = ("val", TEST_FROM + index) if split == "test" else (split, index)
        city, stem, arrays = picture(*scene, size, seed)
        if layout in ("ade20k", "voc2012", "voc2012_aug"):
            arrays = _cut(arrays, rng)
        name = name or f"{city}/{stem}"
        image, label = arrays[0], encoded(layout, split, arrays)
    image_path, label_path = (
        os.path.join(data.folders[-1], pattern.replace(STEM, name))
        for pattern in (patterns.pictures[0], patterns.labels[0])
    )
    found = {image_path: cv2.imencode(os.path.splitext(image_path)[1], image)[1].tobytes(), label_path: label}
    if layout == "coarse" and split == "val":
        found[label_path.replace("labelIds", "instanceIds")] = png(arrays[2])
    return found


def lists(layout: str, counts: Mapping[str, int]) -> dict[str, bytes]:
    """Return the content of each list of pictures by its path.

    Args:
        layout: name of a published data set.
        counts: number of pictures of each split.
    """
    data = DATA_SETS[layout]
    found = {}
    for split, number in counts.items():
        names = [name_of(layout, split, index) for index in range(number)]
        for path in data.splits[split].lists[:1]:
            found[os.path.join(data.folders[-1], path)] = "".join(f"{name}\n" for name in names).encode()
        if layout == "camvid":  # SegNet's lists have the paths of its authors
            base = f"/SegNet/CamVid/{split}"
            lines = (f"{base}/{name}.png {base}annot/{name}.png\n" for name in names)
            found[os.path.join(data.folders[-1], f"{split}.txt")] = "".join(lines).encode()
    return found


def name_of(layout: str, split: str, index: int) -> str:
    """Return the name of a picture as in the data set; empty for that of Cityscapes."""
    if layout == "ade20k":
        return f"ADE_{split}_{index + 1:08d}"
    if layout.startswith("voc2012"):
        return f"{2007 if split == 'train' else 2008}_{index + 1:06d}"
    if layout == "lip":
        return f"{index + 1}_{1000 * (split == 'val') + index + 1}"
    if layout.startswith("camvid"):
        return CAMVID[split][index]
    return ""


def encoded(layout: str, split: str, arrays: Arrays) -> bytes:
    """Return the label picture of a scene.

    Args:
        layout: name of a published data set other than LIP.
        split: name of the split.
        arrays: see `street.render`.
    """
    _, ids, instances = arrays
    if layout == "coarse":
        return png(coarse(ids) if split == "train" else ids)
    labels = labels_of(layout)
    if layout == "camvid_stills":
        colors = np.array([label.color[::-1] for label in labels], np.uint8)
        return png(colors[ids])
    if layout == "camvid":
        values = [11 if label.train_id == IGNORE else label.train_id for label in labels]
    else:
        values = [label.id for label in labels]
    pixels = np.array(values, np.uint8)[ids]
    if not (layout == "voc2012" or (layout == "voc2012_aug" and split == "val")):
        return png(pixels)
    pixels[borders(pixels, instances)] = IGNORE
    found = Image.fromarray(pixels, "P")
    known = {label.id: label.color for label in DATA_SETS["voc2012"].classes().labels}  # type: ignore[union-attr]
    found.putpalette([channel for value in range(256) for channel in known.get(value, (0, 0, 0))])
    file = io.BytesIO()
    found.save(file, "PNG")
    return file.getvalue()


def labels_of(layout: str) -> list[Label]:
    """Return the label of a data set for each label id of Cityscapes."""
    table, column = DATA_SETS[layout].classes(), COLUMNS[layout]
    assert table is not None
    by_name = {label.name: label for label in table.labels}
    return [by_name[NAMES.get(label.name, OTHERS)[column]] for label in LABELS]


def coarse(ids: np.ndarray) -> np.ndarray:
    """Return label ids without the pixels near the border of a region, as annotators leave them out."""
    around = np.ones((7, 7), np.uint8)
    return np.where(cv2.erode(ids, around) == cv2.dilate(ids, around), ids, np.uint8(0))


def borders(pixels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Return whether each pixel is at the border of an object, bool [h, w]."""
    objects = np.where(pixels > 0, instances, np.uint16(0))
    around = np.ones((3, 3), np.uint8)
    return cv2.erode(objects, around) != cv2.dilate(objects, around)


def _drawn(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Draw the (height, width) of an upright picture."""
    height = round(size[0] * rng.uniform(SMALLEST, 1))
    return height, min(size[1], round(height * rng.uniform(0.5, 0.8)))


def _cut(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    """Cut a random window from all arrays."""
    height, width = arrays[1].shape
    h, w = round(height * rng.uniform(SMALLEST, 1)), round(width * rng.uniform(SMALLEST, 1))
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    image, ids, instances = (np.ascontiguousarray(each[top : top + h, left : left + w]) for each in arrays)
    return image, ids, instances
