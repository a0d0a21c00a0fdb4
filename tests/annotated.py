"""Small labeled scenes, written as files of labelme, COCO and CVAT, as these programs write them."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

LABELS = ("cat", "dog", "tree")
SIZE = (48, 64)


class Scene(NamedTuple):
    """A picture with polygons."""

    name: str  # path without ending
    picture: np.ndarray  # uint8 [h, w, 3] BGR
    shapes: list[tuple[str, list[list[float]]]]  # labels and corners

    def masks(self) -> list[tuple[str, np.ndarray]]:
        """Return the labels and the pixels, bool [h, w], of the shapes, as labelme draws them."""
        return [(label, polygon_mask(self.picture.shape[:2], points)) for label, points in self.shapes]

    def label(self) -> np.ndarray:
        """Return the train ids, uint8 [h, w]: background, then LABELS; later shapes cover earlier ones."""
        ids = np.zeros(self.picture.shape[:2], np.uint8)
        for label, mask in self.masks():
            ids[mask] = 1 + LABELS.index(label)
        return ids


def parts_by_name(found: Any) -> dict[str, str]:
    """Return the parts that tools.prepare found, by name of the scene."""
    return {scene.name: scene.part for scene in found.scenes if scene.part}


def labelme_shape() -> Any:
    """Return labelme's module utils.shape, without the rest of the package, whose import needs Qt."""
    name = "labelme_utils_shape"
    if name not in sys.modules:
        package = importlib.util.find_spec("labelme")
        if package is None or not package.submodule_search_locations:
            pytest.skip("labelme is not installed (tools/setup_env.sh installs it)")
        path = Path(package.submodule_search_locations[0], "utils/shape.py")
        stub = ModuleType("labelme._label_file")
        stub.ShapeDict = dict  # type: ignore[attr-defined]
        parent = ModuleType("labelme")
        before = {key: sys.modules.get(key) for key in ("labelme", "labelme._label_file")}
        sys.modules |= {"labelme": parent, "labelme._label_file": stub}
        try:
            spec = importlib.util.spec_from_file_location(name, path)
            assert isinstance(spec, ModuleSpec) and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        finally:
            for key, module in before.items():
                if module is None:
                    del sys.modules[key]
                else:
                    sys.modules[key] = module
    return sys.modules[name]


def polygon_mask(size: tuple[int, ...], points: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the pixels of a polygon, bool [h, w], as labelme draws it."""
    image = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in points], fill=1, outline=1)
    return np.array(image)


def polygon(rng: np.random.Generator, size: tuple[int, int], corners: int | None = None) -> list[list[float]]:
    """Draw a star-shaped polygon, which may reach beyond the picture."""
    number = corners or int(rng.integers(3, 10))
    angles = np.sort(rng.uniform(0, 2 * np.pi, number))
    radii = rng.uniform(0.15, 0.45, number) * min(size)
    center = rng.uniform(0.1, 0.9, 2) * size[::-1]
    points = center + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1)
    return points.round(3).tolist()


def make_scenes(number: int, folders: Sequence[str] = ("",), size: tuple[int, int] = SIZE) -> list[Scene]:
    """Generate scenes with all labels, spread over folders."""
    scenes = []
    for index in range(number):
        rng = np.random.default_rng(index)
        picture = rng.integers(0, 256, (*size, 3), np.uint8)
        labels = [*LABELS, *rng.choice(LABELS, rng.integers(0, 3))]
        rng.shuffle(labels)
        shapes = [(str(label), polygon(rng, size)) for label in labels]
        folder = folders[index % len(folders)]
        scenes.append(Scene(f"{folder}/{index:02d}".lstrip("/"), picture, shapes))
    return scenes


def write_pictures(folder: Path, scenes: Sequence[Scene], ending: str = ".png") -> None:
    for scene in scenes:
        path = folder / f"{scene.name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), scene.picture)


def png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def labelme_page(scene: Scene, masks: bool = False) -> dict[str, Any]:
    """Return the content of labelme's file of a scene: polygons, or masks of their pixels."""
    shapes: list[dict[str, Any]] = []
    for (label, points), (_, pixels) in zip(scene.shapes, scene.masks(), strict=True):
        shape: dict[str, Any] = {
            "label": label,
            "points": points,
            "group_id": None,
            "shape_type": "polygon",
            "flags": {},
        }
        if masks:
            rows, columns = np.nonzero(pixels)
            low, high = (columns.min(), rows.min()), (columns.max(), rows.max())
            part = pixels[low[1] : high[1] + 1, low[0] : high[0] + 1]
            corners = [[float(x), float(y)] for x, y in (low, high)]
            shape |= {"points": corners, "shape_type": "mask", "mask": png(part)}
        shapes.append(shape)
    height, width = scene.picture.shape[:2]
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{Path(scene.name).name}.png",
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def write_labelme(folder: Path, scenes: Sequence[Scene], masks: bool = False) -> Path:
    write_pictures(folder, scenes)
    for scene in scenes:
        (folder / f"{scene.name}.json").write_text(json.dumps(labelme_page(scene, masks), indent=2))
    return folder


def coco_content(scenes: Sequence[Scene], kind: str = "polygons") -> dict[str, Any]:
    """Return the content of a COCO file.

    Args:
        scenes: the scenes.
        kind: polygons, counts (RLE as numbers, of a crowd) or text (compressed RLE).
    """
    from pycocotools import mask as coco_mask

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        height, width = scene.picture.shape[:2]
        images.append({"id": number, "file_name": f"{scene.name}.png", "height": height, "width": width})
        for (label, points), (_, pixels) in zip(scene.shapes, scene.masks(), strict=True):
            segmentation: Any = [np.ravel(points).tolist()]
            if kind == "counts":
                segmentation = {"counts": runs(pixels.ravel(order="F")), "size": [height, width]}
            elif kind == "text":
                rle = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
                segmentation = {"counts": rle["counts"].decode(), "size": [height, width]}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 10 * (1 + LABELS.index(label)),
                    "segmentation": segmentation,
                    "iscrowd": int(kind == "counts"),
                }
            )
    categories = [{"id": 10 * number, "name": name} for number, name in enumerate(LABELS, 1)]
    return {"images": images, "annotations": annotations, "categories": categories[::-1]}


def runs(pixels: np.ndarray) -> list[int]:
    """Return the lengths of the runs of a bool array [n], of which the first is of False."""
    changes = np.flatnonzero(np.diff(np.concatenate(([False], pixels, [not pixels[-1]]))))
    return np.diff(changes, prepend=0).tolist()


def write_coco(folder: Path, scenes: Sequence[Scene], kind: str = "polygons") -> Path:
    write_pictures(folder / "images", scenes)
    (folder / "annotations.json").write_text(json.dumps(coco_content(scenes, kind)))
    return folder


def cvat_content(scenes: Sequence[Scene], masks: bool = False) -> ElementTree.Element:
    """Return the root of a CVAT file, with polygons or masks in reverse order, and their z_order."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    meta = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    labels = ElementTree.SubElement(meta, "labels")
    for name in LABELS:
        element = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(element, "name").text = name
        ElementTree.SubElement(element, "color").text = f"#{name.encode()[:3].hex()}"
    for number, scene in enumerate(scenes):
        height, width = scene.picture.shape[:2]
        attributes = {"id": str(number), "name": f"{scene.name}.png"}
        attributes |= {"width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", attributes)
        shapes = list(enumerate(zip(scene.shapes, scene.masks(), strict=True)))
        for order, ((label, points), (_, pixels)) in shapes[::-1]:
            common: dict[str, str] = {
                "label": label,
                "occluded": "0",
                "source": "manual",
                "z_order": str(order),
            }
            if masks:
                rows, columns = np.nonzero(pixels)
                top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
                box = {"left": left, "top": top, "width": right - left, "height": bottom - top}
                rle = ", ".join(map(str, runs(pixels[top:bottom, left:right].ravel())))
                values = {key: str(value) for key, value in box.items()}
                ElementTree.SubElement(image, "mask", {**common, "rle": rle, **values})
            else:
                text = ";".join(f"{x},{y}" for x, y in points)
                ElementTree.SubElement(image, "polygon", {**common, "points": text})
    return root


def write_cvat(folder: Path, scenes: Sequence[Scene], masks: bool = False) -> Path:
    write_pictures(folder / "images", scenes)
    ElementTree.ElementTree(cvat_content(scenes, masks)).write(folder / "annotations.xml", "utf-8", True)
    return folder


def write_voc(folder: Path, scenes: Sequence[Scene]) -> Path:
    """Write palette pictures, and a labelmap.txt as CVAT writes it."""
    write_pictures(folder / "JPEGImages", scenes)
    colors = {name: tuple(name.encode()[:3]) for name in LABELS}
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    lines += [f"{name}:{','.join(map(str, color))}::" for name, color in colors.items()]
    (folder / "labelmap.txt").write_text("\n".join(lines) + "\n")
    palette = [0, 0, 0, *(channel for color in colors.values() for channel in color)]
    for scene in scenes:
        picture = Image.fromarray(scene.label())
        picture.putpalette(palette)
        path = folder / "SegmentationClass" / f"{scene.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def write_pair(folder: Path, scenes: Sequence[Scene]) -> Path:
    """Write images/, labels/ with ids, and the names of the ids."""
    write_pictures(folder / "images", scenes)
    (folder / "classes.txt").write_text("\n".join(("background", *LABELS)))
    for scene in scenes:
        path = folder / "labels" / f"{scene.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.label()).save(path)
    return folder
