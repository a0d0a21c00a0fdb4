"""Generated street scenes in the Cityscapes layout: a small data set to try everything without the real one.

    python -m dataset.mini OUT [--train N] [--val N] [--size HxW] [--seed S]

Every class of the benchmark occurs in both splits, with instances, occlusion, perspective and void regions.
Light, colours and the place of things differ from picture to picture and from city to city, so that shape,
texture and context tell the classes apart rather than colour or position. Picture i of a split depends on
seed, split, i and size alone.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import cv2
import numpy as np

from dataset.mini_street import City, render
from utils import args as flags
from utils.errors import UsageError
from utils.files import unwritable, write_file

__all__ = ["main", "render", "write"]

#: Raised whenever the same parameters would give other files.
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
_SIZES = ((32, 64), (1024, 2048))  # smallest and largest height and width


def _png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def picture(split: str, index: int, size: tuple[int, int], seed: int) -> tuple[str, str, tuple]:
    """City, file name stem and arrays (see `render`) of picture `index` of a split."""
    names = CITIES[split]
    which, number = index % len(names), list(CITIES).index(split)
    city = City.draw(np.random.default_rng((seed, number, 0, which)))
    arrays = render(size, np.random.default_rng((seed, number, 1, index)), city)
    return names[which], f"{names[which]}_{index // len(names):06d}_000019", arrays


def _is_complete(out: Path, parameters: dict) -> bool:
    """Return whether the whole set is in `out`, rather than a part of it or nothing; see `write`."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: name a folder")
    # A full disk or a crash may leave the first marker alone, half written.
    begun = out.is_dir() and any(not entry.name.endswith(_STARTED) for entry in out.iterdir())
    marker = next((out / name for name in (_COMPLETE, _STARTED) if (out / name).is_file()), None)
    if not begun:
        return False
    if marker is None:
        raise UsageError(f"{out} is not empty and holds no generated set: name a new or empty folder")
    try:
        found = json.loads(marker.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{marker} is damaged: remove {out} or name another folder") from error
    if found != parameters:
        raise UsageError(f"{out} holds a set with other parameters: remove it or name another folder")
    return marker.name == _COMPLETE


def write(out: str | Path, train: int, val: int, size: tuple[int, int], seed: int) -> bool:
    """Write the data set under `out`.

    Returns:
        False where a complete set with the same parameters was there already, and nothing was done.

    Raises:
        UsageError: `out` is a file, or holds anything but (part of) a set with the same parameters.
    """
    out = Path(out)
    parameters = {"format": FORMAT, "train": train, "val": val, "size": list(size), "seed": seed}
    if _is_complete(out, parameters):
        return False
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / _STARTED, json.dumps(parameters).encode())
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            city, stem, (image, labels, instances) = picture(split, index, size, seed)
            pictures, truth = out / "leftImg8bit" / split / city, out / "gtFine" / split / city
            pictures.mkdir(parents=True, exist_ok=True)
            truth.mkdir(parents=True, exist_ok=True)
            write_file(pictures / f"{stem}_leftImg8bit.png", _png(image))
            write_file(truth / f"{stem}_gtFine_labelIds.png", _png(labels))
            write_file(truth / f"{stem}_gtFine_instanceIds.png", _png(instances))
    os.replace(out / _STARTED, out / _COMPLETE)
    return True


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    (low_h, low_w), (high_h, high_w) = _SIZES
    if match is None or not (low_h <= int(match[1]) <= high_h and low_w <= int(match[2]) <= high_w):
        raise argparse.ArgumentTypeError(
            f"'{text}' does not fit: give HxW from {low_h}x{low_w} to {high_h}x{high_w}, such as 128x256"
        )
    return int(match[1]), int(match[2])


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(prog="python -m dataset.mini", description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="folder to write; new, empty, or the same set")
    number = flags.number(int, 1, 999_999)
    parser.add_argument("--train", type=number, default=120, help="pictures to train on")
    parser.add_argument("--val", type=number, default=24, help="pictures to validate on")
    parser.add_argument("--size", type=_size, default=(128, 256), help="HEIGHTxWIDTH of the pictures")
    parser.add_argument("--seed", type=flags.seed, default=0, help="another seed, another set")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    what = f"{args.train} training and {args.val} validation pictures of {args.size[0]}x{args.size[1]}"
    try:
        written = write(args.out, args.train, args.val, args.size, args.seed)
    except OSError as error:
        raise unwritable(error) from error
    print(f"{args.out}: {'wrote' if written else 'already holds'} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
