"""Writing of a prepared data set: pictures, label pictures, lists and class table."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np

from dataset.folder_pair import IMAGES, LABELS
from dataset.labels import IGNORE, ClassTable, Label, format_table
from dataset.pictures import LOSSY, check_content, decode_image, decode_upright, load
from dataset.split import TRAIN, VAL
from tools.prepare.pictures import examine
from tools.prepare.source import Class, Scene
from utils.drawing.palette import make_palette, save_gray_png
from utils.errors import RunError, UsageError
from utils.files import temporary_name, write_file
from utils.progress import Progress
from utils.run_files import CLASSES

#: Threads that draw and write, and scenes that wait for them.
THREADS, AHEAD = 3, 6
#: Quality of pictures that are turned upright.
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass
class Counts:
    """Statistics of a part."""

    pictures: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # pictures by (height, width)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by train id
    containing: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # pictures by train id

    def add(self, label: np.ndarray) -> None:
        """Count a label, uint8 [h, w]."""
        # Part by part, because bincount needs 8 bytes for each pixel.
        parts = np.array_split(label, label.size // 2**24 + 1)
        pixels = np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], 0)
        self.pictures += 1
        self.sizes[label.shape[0], label.shape[1]] += 1
        self.pixels += pixels
        self.containing += pixels > 0


def check_out(out: str, source: str, pictures: str | None = None) -> None:
    """Check the folder of the results.

    Args:
        out: the folder.
        source: the source.
        pictures: folder of --images, or None.

    Raises:
        UsageError: it is not new or empty, can't be created, or lies in a folder that is read, in which the
            next run would find the results.
    """
    try:
        if os.path.lexists(out) and os.listdir(out):
            raise UsageError(f"{out}: is not empty; name a new folder")
    except NotADirectoryError:
        raise UsageError(f"{out}: is a file; name a new folder") from None
    except OSError as error:
        raise UsageError(f"{out}: can't be read ({error.strerror}); name a new folder") from error
    for read in filter(None, (source, pictures)):
        place = os.path.realpath(read)
        if os.path.commonpath([place, os.path.realpath(out)]) == place:
            raise UsageError(
                f"{out}: is in {read}, where the next run would read the results; name a folder outside of it"
            )
    folder = os.path.dirname(os.path.realpath(out))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{out}: can't be created in {folder}; name another folder")


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[str]:
    """Yield a temporary folder, and rename it to `out` at the end; if an exception is raised, remove it.

    Raises:
        OSError: it can't be created or renamed.
    """
    target = os.path.realpath(out)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = temporary_name(target, os.getpid())
    os.mkdir(temporary)
    try:
        yield temporary
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def output_names(scenes: Sequence[Scene]) -> list[str]:
    """Return the path of each scene's files below images/ and labels/, without ending.

    Characters that would end a column or line of a list become "_". Names that occur twice get a number.
    """
    names: list[str] = []
    taken: set[str] = set()
    for scene in scenes:
        parts = [part for part in scene.name.split(os.sep) if part not in ("", ".", "..")]
        name = os.path.join(
            *("".join("_" if c in "\t\r\n\0" else c for c in part) for part in parts or ["_"])
        )
        distinct, number = name, 1
        while distinct in taken:
            number += 1
            distinct = f"{name}_{number}"
        taken.add(distinct)
        names.append(distinct)
    return names


def colors_of(classes: Sequence[Class]) -> list[tuple[int, int, int]]:
    """Return distinct RGB colors: those of the source if they are distinct, else generated ones.

    The background is black if the source does not say otherwise.
    """
    found: list[tuple[int, int, int] | None] = []
    for number, each in enumerate(classes):
        color = (0, 0, 0) if each.color is None and number == 0 else each.color
        found.append(None if color in found else color)
    given = [color for color in found if color is not None]
    # The palette continues the given colors with others.
    palette = np.reshape(make_palette(given), (256, 3)).tolist()
    others = iter(palette[len(given) :])
    colors = [color if color is not None else next(others) for color in found]
    return [(red, green, blue) for red, green, blue in colors]


def class_table(classes: Sequence[Class]) -> ClassTable:
    """Return the class table of the results, in which ids are train ids."""
    colors = colors_of(classes)
    labels = [
        Label(each.name, number, number, "", False, color)
        for number, (each, color) in enumerate(zip(classes, colors, strict=True))
    ]
    void = next(color for color in ((0, 0, 0), (255, 255, 255), (1, 1, 1)) if color not in colors)
    return ClassTable([*labels, Label("void", IGNORE, IGNORE, "", False, void)])


def _encode(ending: str, image: np.ndarray) -> bytes:
    """Return the content of a JPEG or PNG file of a picture, uint8 [h, w, 3] BGR."""
    return cv2.imencode(ending, image, JPEG if ending == ".jpg" else [])[1].tobytes()


class Writer:
    """Write a prepared data set to a folder.

    Args:
        folder: the empty folder.
        copy: whether to copy pictures instead of linking them.
    """

    def __init__(self, folder: str, copy: bool):
        self.folder = folder
        self.copy = copy

    def write(
        self, scenes: Sequence[Scene], parts: Sequence[str], classes: Sequence[Class]
    ) -> dict[str, Counts]:
        """Write all files.

        Args:
            scenes: the pictures and labels.
            parts: train, val or test for each scene.
            classes: the classes.

        Returns:
            The statistics of each part.

        Raises:
            DataError: a picture can't be decoded.
            OSError: a file can't be written.
        """
        names = output_names(scenes)
        lines: dict[str, list[str]] = {TRAIN: [], VAL: []}
        counts = {TRAIN: Counts(), VAL: Counts()}
        progress = Progress(len(scenes))
        waiting: deque[Future[tuple[str, np.ndarray]]] = deque()
        done = iter(zip(names, parts, strict=True))

        def finish() -> None:
            name, part = next(done)
            image, label = waiting.popleft().result()
            lines.setdefault(part, []).append(f"{image}\t{os.path.join(LABELS, name)}.png\n")
            counts.setdefault(part, Counts()).add(label)
            progress.show(sum(each.pictures for each in counts.values()))

        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for name, scene in zip(names, scenes, strict=True):
                    waiting.append(pool.submit(self._write_scene, name, scene))
                    if len(waiting) > AHEAD:
                        finish()
                while waiting:
                    finish()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        for part, listed in lines.items():
            content = "".join(sorted(listed))
            write_file(os.path.join(self.folder, f"{part}.lst"), os.fsencode(content))
        write_file(os.path.join(self.folder, CLASSES), format_table(class_table(classes)))
        return counts

    def _write_scene(self, name: str, scene: Scene) -> tuple[str, np.ndarray]:
        """Write a picture and its label. Return the path of the picture in the folder, and the train ids."""
        label = scene.draw()
        if label.dtype != np.uint8 or label.shape != scene.size:
            raise RunError(
                f"{scene.picture}: its label is {label.dtype} {label.shape}, not uint8 {scene.size}"
            )
        path = os.path.join(self.folder, LABELS, f"{name}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        save_gray_png(path, label)
        return self._write_picture(name, scene), label

    def _write_picture(self, name: str, scene: Scene) -> str:
        """Write a picture, or a link to it. Return its path below the folder."""
        content, ending = None, os.path.splitext(scene.picture)[1]
        if scene.content is not None:
            encoded = check_content(scene.picture, scene.content())
            content = encoded.content
            ending = ".jpg" if encoded.header.format in ("JPEG", "MPO") else ".png"
            if encoded.header.format not in ("JPEG", "MPO", "PNG"):
                content = _encode(ending, decode_image(encoded))
        elif scene.upright and examine(scene.picture).orientation != 1:
            # Training ignores the orientation tag of cameras.
            encoded = load(scene.picture)
            lossy = encoded.header.format in LOSSY
            ending = ".jpg" if lossy else ".png"
            content = _encode(ending, decode_upright(encoded))
        image = os.path.join(IMAGES, name) + ending
        path = os.path.join(self.folder, image)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if content is not None:
            with open(path, "wb") as file:
                file.write(content)
        elif self.copy:
            shutil.copyfile(scene.picture, path)
        else:
            try:
                os.symlink(os.path.realpath(scene.picture), path)
            except OSError as error:
                raise RunError(f"{image}: can't be linked ({error.strerror}); give --copy") from error
        return image
