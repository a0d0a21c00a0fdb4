"""Generated pictures of one person with labeled parts, in the classes of LIP.

Left and right are those of the person. Seen from the front, the left arm is on the right side of the picture;
seen from behind, it is on the left side. A mirror image of the picture is another such picture, in which left
and right parts are exchanged.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from dataset.catalog import DATA_SETS
from dataset.mini.textures import anything, color, mostly

#: Label ids of LIP by name.
ID = {name: number for number, name in enumerate(getattr(DATA_SETS["lip"].classes(), "names", ()))}

Points = Sequence[tuple[float, float]]


class _Figure:
    """A canvas of twice the size, with coordinates in body heights: x from the middle, y from the top."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        height, width = size
        self.rng = rng
        self.tall = 2 * height * rng.uniform(0.8, 0.94)
        self.middle = 2 * width * rng.uniform(0.42, 0.58)
        self.top = rng.uniform(0.02, 2 * height / self.tall - 1.0) * self.tall
        ramp = np.linspace(rng.uniform(0.6, 1.0), rng.uniform(0.4, 1.0), 2 * height, dtype=np.float32)
        back = anything(rng).reshape(3) * ramp[:, None, None]
        self.image = np.ascontiguousarray(np.broadcast_to(back, (2 * height, 2 * width, 3)))
        self.labels = np.zeros((2 * height, 2 * width), np.uint8)
        for _ in range(4):  # furniture, in the background
            x, y = rng.uniform(-0.6, 0.6), rng.uniform(0.1, 1.0)
            self.fill(_box(x, y, rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3)), anything(rng), "background")

    def fill(self, points: Points, paint: np.ndarray, name: str) -> None:
        """Fill a polygon."""
        corners = np.rint(np.array(points) * self.tall + (self.middle, self.top)).astype(np.int32)
        cv2.fillPoly(self.image, [corners], tuple(map(float, paint.ravel())))
        cv2.fillPoly(self.labels, [corners], ID[name])

    def limb(self, start: tuple[float, float], end: tuple[float, float], width: float, paint, name) -> None:
        """Draw a straight limb from one joint to another."""
        along = np.subtract(end, start)
        across = np.array((-along[1], along[0])) / np.hypot(*along) * width / 2
        self.fill([start + across, end + across, end - across, start - across], paint, name)  # type: ignore

    def disc(self, x: float, y: float, radius: float, paint: np.ndarray, name: str) -> None:
        """Draw a disc."""
        angles = np.arange(16) * (np.pi / 8)
        self.fill([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], paint, name)


def _box(x: float, y: float, half: float, tall: float) -> Points:
    return [(x - half, y), (x + half, y), (x + half, y + tall), (x - half, y + tall)]


def render(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one person.

    Args:
        size: (height, width) of the picture.
        rng: random generator.

    Returns:
        Image uint8 [h, w, 3] BGR, and labels of LIP, uint8 [h, w].
    """
    figure = _Figure(size, rng)
    from_front = rng.random() < 0.7
    skin = color(rng, (0.03, 0.08), (0.3, 0.6), (0.35, 0.9))
    top, bottom, shoe, hair = anything(rng), anything(rng) * 0.8, anything(rng) * 0.6, anything(rng) * 0.4
    outfit = rng.choice(["trousers", "skirt", "dress", "jumpsuits"], p=[0.5, 0.2, 0.15, 0.15])
    chest = "coat" if rng.random() < 0.3 else "upper-clothes"
    chest = outfit if outfit in ("dress", "jumpsuits") else chest
    for side in (-1, 1):  # in the picture
        own = "left" if (side > 0) == from_front else "right"
        hip, knee = (side * 0.055, 0.5), (side * rng.uniform(0.06, 0.11), 0.72)
        foot = (side * rng.uniform(0.06, 0.14), 0.95)
        figure.limb(hip, knee, 0.09, skin, f"{own}-leg")
        figure.limb(knee, foot, 0.07, skin, f"{own}-leg")
        if outfit in ("trousers", "jumpsuits"):
            name, paint = ("pants", bottom) if outfit == "trousers" else ("jumpsuits", top)
            end = knee if rng.random() < 0.4 else foot
            figure.limb(hip, knee, 0.1, paint, name)
            figure.limb(knee, end if end != knee else (knee[0], knee[1] + 0.01), 0.085, paint, name)
        elif rng.random() < 0.5:
            figure.limb((foot[0], foot[1] - 0.1), foot, 0.075, anything(rng), "socks")
        figure.fill(_box(foot[0], foot[1] - 0.01, 0.045, 0.05), shoe, f"{own}-shoe")
        elbow = (side * rng.uniform(0.15, 0.22), rng.uniform(0.3, 0.36))
        hand = (elbow[0] + side * rng.uniform(-0.06, 0.05), elbow[1] + rng.uniform(0.08, 0.16))
        figure.limb((side * 0.11, 0.2), elbow, 0.06, skin, f"{own}-arm")
        figure.limb(elbow, hand, 0.05, skin, f"{own}-arm")
        figure.limb((side * 0.1, 0.19), elbow, 0.075, top, chest)
        if rng.random() < 0.2:
            figure.disc(*hand, 0.03, anything(rng), "glove")
    torso = [(-0.13, 0.18), (0.13, 0.18), (0.1, 0.5), (-0.1, 0.5)]
    if outfit == "dress":
        figure.fill([(-0.13, 0.18), (0.13, 0.18), (0.17, 0.66), (-0.17, 0.66)], top, "dress")
    else:
        figure.fill(torso, top, chest)
        if outfit == "skirt":
            figure.fill([(-0.1, 0.45), (0.1, 0.45), (0.16, 0.66), (-0.16, 0.66)], bottom, "skirt")
    figure.disc(0, 0.09, 0.075, hair, "hair")
    if from_front:
        figure.disc(0, 0.105, 0.055, skin, "face")
        if rng.random() < 0.25:
            figure.fill(_box(0, 0.085, 0.05, 0.02), mostly(rng, (0, 1), (0, 0.3), (0.05, 0.3)), "sunglasses")
    if rng.random() < 0.3:
        figure.fill(_box(0, 0.15, 0.07, 0.04), anything(rng), "scarf")
    if rng.random() < 0.3:
        figure.fill([(-0.1, 0.05), (0.1, 0.05), (0.05, 0.0), (-0.05, 0.0)], anything(rng), "hat")
    image = figure.image + rng.uniform(-14, 14, figure.image.shape).astype(np.float32)
    parts = [image[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    mean = sum(parts[1:], start=parts[0]) / np.float32(4)
    return np.rint(np.clip(mean, 0, 255)).astype(np.uint8), figure.labels[::2, ::2].copy()
