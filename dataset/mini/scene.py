"""Drawing of generated street scenes: canvas, camera and vertical planes.

A scene is described in meters: x to the right of the camera, y up from the ground, z ahead. It is drawn in a
frame of width 2 and height 1, which is stretched to the picture. Objects are drawn from far to near. Later
objects cover earlier ones in the picture, the labels and the instances.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataset.labels import LABELS
from dataset.mini.textures import Color

ID = {label.name: label.id for label in LABELS}

_NEAR = 0.7  # meters; nothing is drawn closer to the camera
_SHIFT = 4  # fractional bits of polygon corners

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Camera:
    """A horizontal pinhole camera over a road with its center at `start + slope * z + bend * z^2`."""

    focal: float
    horizon: float
    height: float
    start: float
    slope: float
    bend: float

    def middle(self, z):
        """Return the lateral position of the road center at distance z, a number or an array."""
        return self.start + self.slope * z + self.bend * z * z

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Return the frame position of a point in meters."""
        return 1 + self.focal * x / z, self.horizon + self.focal * (self.height - y) / z


class Canvas:
    """A picture with its label ids and instance ids, painted together.

    Attributes:
        image: float32 [3, h, w], BGR.
        labels: uint8 [h, w].
        instances: uint16 [h, w].
        x: frame coordinate of each column, float32 [1, w].
        y: frame coordinate of each row, float32 [h, 1].
    """

    def __init__(self, height: int, width: int):
        self.image = np.zeros((3, height, width), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.instances = np.zeros((height, width), np.uint16)
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) * np.float32(2 / width))[None, :]
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) * np.float32(1 / height))[:, None]

    def mask(self, contours: Sequence[Points]) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """Return the window (rows, columns) of some contours, and their bool mask in it (even-odd rule)."""
        height, width = self.labels.shape
        scale = np.array([width / 2, height])
        corners = [np.asarray(points, dtype=np.float64) * scale - 0.5 for points in contours]
        everything = np.concatenate(corners)
        left, top = np.maximum(np.floor(everything.min(0)), 0).astype(int)
        right, bottom = np.minimum(np.ceil(everything.max(0)) + 1, (width, height)).astype(int)
        if left >= right or top >= bottom:
            return None
        mask = np.zeros((bottom - top, right - left), np.uint8)
        limit = 2.0**14  # keeps distant corners within the integer range of the polygon filler
        fixed = [
            np.rint(np.clip(c - (left, top), -limit, limit) * 2**_SHIFT).astype(np.int32) for c in corners
        ]
        cv2.fillPoly(mask, fixed, 1, lineType=cv2.LINE_8, shift=_SHIFT)
        return (slice(top, bottom), slice(left, right)), mask.view(bool)

    def fill(self, contours: Sequence[Points], paint, label: int | None, instance: int | None = None) -> None:
        """Paint the inside of the contours.

        Args:
            contours: polygons in frame coordinates, filled by the even-odd rule.
            paint: color, a function of the frame coordinates (x [1, w], y [h, 1]) to BGR [3, h, w], or None
                to leave the picture unchanged (for the gaps between spokes and bars).
            label: label id, or None to leave the labels unchanged (for shadows).
            instance: instance id; None for the label id.
        """
        found = self.mask(contours)
        if found is None:
            return
        window, mask = found
        if paint is not None:
            values = paint(self.x[:, window[1]], self.y[window[0]]) if callable(paint) else paint
            np.copyto(self.image[(slice(None), *window)], values, where=mask)
        if label is not None:
            self.labels[window][mask] = label
            self.instances[window][mask] = label if instance is None else instance

    def darken(self, points: Points, factor: float) -> None:
        """Multiply the picture inside a polygon by a factor."""
        found = self.mask([points])
        if found is not None:
            window, mask = found
            self.image[(slice(None), *window)][:, mask] *= np.float32(factor)


class Scene:
    """A canvas with a camera, haze in the distance, and counters of instances."""

    def __init__(
        self, canvas: Canvas, camera: Camera, rng: np.random.Generator, haze: Color, clearness: float
    ):
        self.canvas, self.camera, self.rng = canvas, camera, rng
        self.haze, self.clearness = haze, clearness
        self._counts: dict[int, int] = {}

    def instance(self, label: int) -> int:
        """Return the next instance id of a label: label id * 1000 + number."""
        number = self._counts.get(label, 0)
        self._counts[label] = number + 1
        return label * 1000 + number

    def veiled(self, values: np.ndarray, z) -> np.ndarray:
        """Mix colors [3, h, w] with haze according to the distance, a number or an array [h, w]."""
        share = np.asarray(z / (z + self.clearness), dtype=np.float32)
        return values * (1 - share) + self.haze * share

    def upright(self, x: float, z: float, mirrored: bool = False) -> "Plane":
        """Return the vertical plane that faces the camera at distance z, with its s axis starting at x."""
        return Plane(self, x, z, -1.0 if mirrored else 1.0, 0.0)

    def shadow(self, x0: float, x1: float, z: float, depth: float) -> None:
        """Draw the shadow under an object that extends from x0 to x1."""
        middle, half = (x0 + x1) / 2, (x1 - x0) / 2 * 1.1
        ring = [(math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)]
        points = [
            self.camera.project(middle + half * c, 0, max(z + depth / 2 + depth * 0.6 * s, _NEAR))
            for c, s in ring
        ]
        self.canvas.darken(points, 0.55)


class Plane:
    """A vertical plane through (x, z) along (ex, ez), with coordinates s (meters along) and t (meters up)."""

    def __init__(self, scene: Scene, x: float, z: float, ex: float, ez: float):
        # Use Python numbers, since numpy scalars would convert arrays to double precision.
        self.scene, self.x, self.z = scene, float(x), float(z)
        norm = math.hypot(ex, ez)
        self.ex, self.ez = ex / norm, ez / norm

    def _project(self, points: Points) -> list[tuple[float, float]]:
        placed = []
        for s, t in points:
            if self.z + s * self.ez < _NEAR:  # move along the plane to the nearest visible point
                s = (_NEAR - self.z) / self.ez
            placed.append(self.scene.camera.project(self.x + s * self.ex, t, self.z + s * self.ez))
        return placed

    def _locate(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (s, t, z) of frame positions, where their viewing rays intersect the plane."""
        camera = self.scene.camera
        ray = (x - 1) / np.float32(camera.focal)
        across = self.ex - ray * self.ez
        across = np.where(np.abs(across) < 1e-4, np.float32(1e-4), across)
        s = (ray * self.z - self.x) / across
        z = np.maximum(self.z + s * self.ez, np.float32(0.1))
        return s, camera.height - (y - camera.horizon) * z / np.float32(camera.focal), z

    def shape(
        self, contours: Sequence[Points], paint, label: int | None, instance: int | None = None
    ) -> None:
        """Fill contours.

        Args:
            contours: polygons in (s, t).
            paint: color, material, or None (see `Canvas.fill`).
            label: see `Canvas.fill`.
            instance: see `Canvas.fill`.
        """
        scene = self.scene

        def material(x, y):
            s, t, z = self._locate(x, y)
            return scene.veiled(paint(s, t), z + 0 * t)

        shade: np.ndarray | Callable | None = None
        if callable(paint):
            shade = material
        elif paint is not None:
            shade = scene.veiled(paint, self.z)
        scene.canvas.fill([self._project(points) for points in contours], shade, label, instance)

    def polygon(self, points: Points, paint, label: int | None, instance: int | None = None) -> None:
        """Draw a polygon."""
        self.shape([points], paint, label, instance)

    def rectangle(self, s0: float, t0: float, s1: float, t1: float, paint, label, instance=None) -> None:
        """Draw a rectangle between two corners."""
        self.polygon([(s0, t0), (s1, t0), (s1, t1), (s0, t1)], paint, label, instance)

    def disc(self, s: float, t: float, radius: float, paint, label, instance=None, hole: float = 0.0) -> None:
        """Draw a disc, or a ring with the inner radius `hole`."""
        contours = [circle(s, t, r) for r in (radius, hole) if r > 0]
        self.shape(contours, paint, label, instance)

    def stroke(self, start, end, width: float, paint, label, instance=None) -> None:
        """Draw a straight bar of the given width."""
        (s0, t0), (s1, t1) = start, end
        length = max(math.hypot(s1 - s0, t1 - t0), 1e-6)
        ds, dt = -(t1 - t0) / length * width / 2, (s1 - s0) / length * width / 2
        corners = [(s0 + ds, t0 + dt), (s1 + ds, t1 + dt), (s1 - ds, t1 - dt), (s0 - ds, t0 - dt)]
        self.polygon(corners, paint, label, instance)


def circle(s: float, t: float, radius: float, corners: int = 20) -> Points:
    """Return the corners of a regular polygon that approximates a circle."""
    step = 2 * math.pi / corners
    return [(s + radius * math.cos(i * step), t + radius * math.sin(i * step)) for i in range(corners)]
