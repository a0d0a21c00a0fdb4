"""The generated streets with the names of Cityscapes."""

import cv2
import numpy as np

from dataset.mini.street import City, render

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


def png(array: np.ndarray) -> bytes:
    """Return an array as a PNG file."""
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
