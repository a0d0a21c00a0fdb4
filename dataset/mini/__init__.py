"""Generated pictures in the layout of Cityscapes or another data set, for tests and first trials.

    python -m dataset.mini OUT [--layout NAME | --video] [--train N] [--val N] [--size HxW] [--seed S]

The pictures are street scenes; those in the layout of LIP are persons. Every class of the Cityscapes
benchmark occurs in both splits, with instances, occlusion, perspective and void regions. Light, colors and
positions vary between pictures and between cities, so classes must be recognized by shape, texture and
context rather than by color or position. Picture i of a split depends only on the seed, the split, i, the
size and the layout.
"""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from dataset.catalog import DATA_SETS
from dataset.mini import layouts, video
from dataset.mini.cityscapes import CITIES, picture, png
from dataset.mini.street import render
from utils.errors import UsageError
from utils.files import write_file

__all__ = ["CITIES", "LAYOUTS", "picture", "render", "write"]

#: The layout of Cityscapes, and those of the published data sets.
CITYSCAPES = "cityscapes"
LAYOUTS = (CITYSCAPES, *DATA_SETS)

#: Format version; increase it whenever the same parameters would give different files.
FORMAT = 1

_COMPLETE, _STARTED = "mini.json", "mini.started.json"
#: Smallest and largest (height, width) of the pictures.
SIZES = ((32, 64), (1024, 2048))


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


def is_generated(out: str | Path) -> bool:
    """Return whether a folder holds a complete generated data set."""
    return (Path(out) / _COMPLETE).is_file()


def write(
    out: str | Path,
    train: int,
    val: int,
    size: tuple[int, int],
    seed: int,
    layout: str = CITYSCAPES,
    with_frames: bool = False,
) -> bool:
    """Write the data set to a folder, or complete a part of it.

    Args:
        out: the folder.
        train: number of pictures in the split "train".
        val: number of pictures in the split "val".
        size: (height, width) of the pictures.
        seed: seed of the data set.
        layout: one of LAYOUTS.
        with_frames: whether to hide parts of the pictures and to write the frames before and after them,
            which show these parts, to leftImg8bit_sequence (dataset/mini/video.py). This is for the layout of
            Cityscapes.

    Returns:
        Whether anything was written; False if the complete data set already exists.

    Raises:
        UsageError: `out` is a file, or a folder with other content than a data set with these parameters, or
            the layout does not have so many pictures.
    """
    out = Path(out)
    parameters = {"format": FORMAT, "train": train, "val": val, "size": list(size), "seed": seed}
    is_cityscapes = layout == CITYSCAPES
    if not is_cityscapes:
        parameters["layout"] = layout
    if with_frames:
        parameters["video"] = True
    counts = {"train": train, "val": val} if is_cityscapes else layouts.splits(layout, train, val)
    if _is_complete(out, parameters):
        return False
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / _STARTED, json.dumps(parameters).encode())
    files = partial(_files, with_frames=with_frames) if is_cityscapes else partial(layouts.files, layout)
    lists = {} if is_cityscapes else layouts.lists(layout, counts)
    for path, content in lists.items():
        _write(out / path, content)
    for split, count in counts.items():
        for index in range(count):
            for path, content in files(split, index, size, seed).items():
                _write(out / path, content)
    os.replace(out / _STARTED, out / _COMPLETE)
    return True


def _files(split: str, index: int, size: tuple[int, int], seed: int, with_frames: bool) -> dict[str, bytes]:
    """Return the content of each file of a picture in the layout of Cityscapes, by its path."""
    city, stem, (image, labels, instances) = picture(split, index, size, seed)
    truth = f"gtFine/{split}/{city}/{stem}_gtFine"
    files = {}
    if with_frames:
        frames = f"leftImg8bit_sequence/{split}/{city}"
        files = {f"{frames}/{name}_leftImg8bit.png": png(image) for name in video.names(stem)}
        number = list(CITIES).index(split)
        image, _ = video.hide(image, np.random.default_rng((seed, number, 3, index)))
        files[f"{frames}/{stem}_leftImg8bit.png"] = png(image)
    return files | {
        f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png": png(image),
        f"{truth}_labelIds.png": png(labels),
        f"{truth}_instanceIds.png": png(instances),
    }


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)
