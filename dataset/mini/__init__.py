"""Generated street scenes in the Cityscapes layout, a small data set for tests and first trials.

    python -m dataset.mini OUT [--train N] [--val N] [--size HxW] [--seed S] [--video]

Every class of the Cityscapes benchmark occurs in both splits, with instances, occlusion, perspective and void
regions. Light, colors and positions vary between pictures and between cities, so classes must be recognized
by shape, texture and context rather than by color or position. Picture i of a split depends only on the seed,
the split, i and the size.
"""

import json
import os
from pathlib import Path

import cv2
import numpy as np

from dataset.mini import video
from dataset.mini.street import City, render
from utils.errors import UsageError
from utils.files import write_file

__all__ = ["picture", "render", "write"]

#: Format version; increase it whenever the same parameters would give different files.
FORMAT = 1

CITIES = {
    "train": (
        "ambersund",
        "brinkhaven",
        "corvale",
        "dunmarch",
        "eastmoor",
        "fennick",
        "galdorf",
        "hollbrueck",
    ),
    "val": ("ivenstadt", "jorvelle", "kestrel", "lunebrook"),
}

_COMPLETE, _STARTED = "mini.json", "mini.started.json"
#: Smallest and largest (height, width) of the pictures.
SIZES = ((32, 64), (1024, 2048))


def _png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def picture(split: str, index: int, size: tuple[int, int], seed: int) -> tuple[str, str, tuple]:
    """Generate one picture of a split.

    Args:
        split: "train" or "val".
        index: number of the picture in the split.
        size: (height, width).
        seed: seed of the data set.

    Returns:
        City, file name stem, and the arrays of `render`.
    """
    names = CITIES[split]
    which, number = index % len(names), list(CITIES).index(split)
    city = City.draw(np.random.default_rng((seed, number, 0, which)))
    arrays = render(size, np.random.default_rng((seed, number, 1, index)), city)
    return names[which], f"{names[which]}_{index // len(names):06d}_000019", arrays


def _is_complete(out: Path, parameters: dict) -> bool:
    """Return whether `out` holds the complete data set; see `write` for the errors."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder")
    # A full disk or a crash may leave only the first marker, partially written.
    begun = out.is_dir() and any(not entry.name.endswith(_STARTED) for entry in out.iterdir())
    marker = next((out / name for name in (_COMPLETE, _STARTED) if (out / name).is_file()), None)
    if not begun:
        return False
    if marker is None:
        raise UsageError(f"{out}: is not empty and not a generated data set; name a new or empty folder")
    try:
        found = json.loads(marker.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{marker}: is damaged; delete {out} or name another folder") from error
    if found != parameters:
        raise UsageError(f"{out}: holds a data set with other parameters; delete it or name another folder")
    return marker.name == _COMPLETE


def write(
    out: str | Path, train: int, val: int, size: tuple[int, int], seed: int, with_frames: bool = False
) -> bool:
    """Write the data set to a folder, or complete a part of it.

    Args:
        out: the folder.
        train: number of pictures in the split "train".
        val: number of pictures in the split "val".
        size: (height, width) of the pictures.
        seed: seed of the data set.
        with_frames: whether to hide parts of the pictures and to write the frames before and after them,
            which show these parts, to leftImg8bit_sequence (dataset/mini/video.py).

    Returns:
        Whether anything was written; False if the complete data set already exists.

    Raises:
        UsageError: `out` is a file, or a folder with other content than a data set with these parameters.
    """
    out = Path(out)
    parameters = {"format": FORMAT, "train": train, "val": val, "size": list(size), "seed": seed}
    if with_frames:
        parameters["video"] = True
    if _is_complete(out, parameters):
        return False
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / _STARTED, json.dumps(parameters).encode())
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            city, stem, (image, labels, instances) = picture(split, index, size, seed)
            pictures, truth = out / "leftImg8bit" / split / city, out / "gtFine" / split / city
            pictures.mkdir(parents=True, exist_ok=True)
            if with_frames:
                frames = out / "leftImg8bit_sequence" / split / city
                frames.mkdir(parents=True, exist_ok=True)
                for name in video.names(stem):
                    write_file(frames / f"{name}_leftImg8bit.png", _png(image))
                number = list(CITIES).index(split)
                image, _ = video.hide(image, np.random.default_rng((seed, number, 3, index)))
                write_file(frames / f"{stem}_leftImg8bit.png", _png(image))
            truth.mkdir(parents=True, exist_ok=True)
            write_file(pictures / f"{stem}_leftImg8bit.png", _png(image))
            write_file(truth / f"{stem}_gtFine_labelIds.png", _png(labels))
            write_file(truth / f"{stem}_gtFine_instanceIds.png", _png(instances))
    os.replace(out / _STARTED, out / _COMPLETE)
    return True
