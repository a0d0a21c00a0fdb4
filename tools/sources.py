"""Where pictures come from: files, folders, lists, videos, a camera."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dataset import DataError
from dataset.layout import is_litter, say_skipped
from utils.errors import UsageError
from utils.files import kind_of, open_input

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
LISTS = (".txt", ".lst")
CAMERA = "camera:"


class PictureFile(NamedTuple):
    """A picture's file, and the name of its results: a path below their folder, without an ending."""

    path: str
    name: str


class Video(NamedTuple):
    """A video's file or the number of a camera, and the name of its results."""

    path: str | int
    name: str

    @property
    def is_camera(self) -> bool:
        return isinstance(self.path, int)


def find(inputs: Sequence[str], leave_out: str) -> tuple[list[PictureFile], list[Video]]:
    """What the command line names: pictures, videos, folders of pictures, lists of pictures, cameras.

    Pictures of a folder keep their place in it, those of a list theirs beside the list. A list has a path in
    each line, relative to itself; anything after a tab is left alone.

    Args:
        inputs: paths, and camera:N.
        leave_out: the folder of the results, whose pictures are none of a folder's that it lies in.

    Raises:
        UsageError: one that is missing, or of a kind that is not read: a FIFO, socket or device, a folder's
            among them.
    """
    pictures: list[PictureFile] = []
    videos: list[Video] = []
    for text in inputs:
        if text.startswith(CAMERA):
            number = text.removeprefix(CAMERA)
            if not re.fullmatch("[0-9]{1,4}", number):
                raise UsageError(f"{text}: a camera has a number; give camera:0")
            videos.append(Video(int(number), f"camera{number}"))
        elif os.path.isdir(text):
            if os.path.realpath(text) == leave_out:
                raise UsageError(f"{text}: is --out as well; name another folder for the results")
            skipped: list[str] = []
            found = list(_walk(text, leave_out, skipped))
            if skipped:
                print(f"{text}: {say_skipped(skipped)}", flush=True)
            if not found:
                raise UsageError(f"{text}: no pictures in it ({' '.join(PICTURES)}); name another folder")
            pictures += found
        elif not os.path.exists(text):
            raise UsageError(
                f"{text}: no such file or folder; name a picture, video, folder, list or camera:0"
            )
        elif _check_kind(text) and text.lower().endswith(LISTS):
            pictures += _listed(text)
        elif text.lower().endswith(VIDEOS):
            check_video_name(text)
            videos.append(Video(text, _stem(os.path.basename(text))))
        else:
            # Whatever its name: the decoder says if it is none.
            pictures.append(PictureFile(text, _stem(os.path.basename(text))))
    for path, _ in pictures:
        _check_kind(path)
    names = _distinct([*pictures, *videos])
    pictures = [each._replace(name=name) for each, name in zip(pictures, names, strict=False)]
    videos = [each._replace(name=name) for each, name in zip(videos, names[len(pictures) :], strict=True)]
    return pictures, videos


def _check_kind(path: str) -> bool:
    """Return True for a file, and for what has none, which the decoder names.

    Raises:
        UsageError: a FIFO, socket, device or folder; some would be waited for or read without an end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: is {kind_of(mode)}, not a file; take it away, or name other inputs")
    return True


def check_video_name(path: str) -> None:
    """Raise UsageError where OpenCV, which reads and writes videos, would crash over the name."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{path}: videos need names of UTF-8, folders included; rename it, or make a link"
        ) from None


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _walk(folder: str, leave_out: str, skipped: list[str]) -> Iterator[PictureFile]:
    """Yield the pictures of a folder and those in it; add to `skipped` what is hidden or a system's."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(place)
        skipped += [os.path.join(root, name) for name in sorted(folders + files) if is_litter(name)]
        folders[:] = sorted(
            name
            for name in folders
            if not is_litter(name) and os.path.realpath(os.path.join(root, name)) != leave_out
        )
        for name in sorted(files):
            if name.lower().endswith(PICTURES) and not is_litter(name):
                path = os.path.join(root, name)
                yield PictureFile(path, _stem(os.path.relpath(path, folder)))


def _listed(path: str) -> list[PictureFile]:
    folder = os.path.dirname(path)
    try:
        with open_input(path, "r", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n").split("\t")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read as a list of pictures ({error}); check the file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        picture = os.path.join(folder, line)
        if not os.path.isfile(picture):
            raise UsageError(f"{path}, line {number}: {picture} is no file; correct the path")
        name = os.path.relpath(picture, folder or ".")
        if name.startswith(os.pardir):  # results stay in their folder
            name = os.path.basename(picture)
        found.append(PictureFile(picture, _stem(name)))
    if not found:
        raise UsageError(f"{path}: names no picture; give a line for each")
    return found


def _distinct(found: Sequence[PictureFile | Video]) -> list[str]:
    """Their names, with the ending where names would be equal, and a number where that does not help.

    A video's name is that of a folder as well, which pictures must not lie in.
    """
    times = Counter(each.name for each in found)
    taken: set[str] = set()
    names = []
    for each in found:
        ending = os.path.splitext(str(each.path))[1]
        wanted = each.name + ending if times[each.name] > 1 else each.name
        if isinstance(each, Video) and any(name.startswith(f"{wanted}{os.sep}") for name in taken):
            wanted += ending
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        taken.add(name)
        names.append(name)
    return names


def frames(video: Video, most: int | None) -> tuple[float, int | None, Iterator[np.ndarray]]:
    """Frames a second, how many there are (None where nobody knows), and the frames, uint8 [h, w, 3] BGR.

    Raises:
        DataError: a video or a camera that can't be opened or has no frame.
    """
    capture = cv2.VideoCapture(video.path)
    if not capture.isOpened():
        what = f"{CAMERA}{video.path}" if video.is_camera else video.path
        raise DataError(f"{what}: can't be opened; check the device or the file")
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not 1 <= rate <= 1000:
        rate = 25.0
    number = None if video.is_camera else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None
    if most is not None:
        number = most if number is None else min(most, number)

    def read() -> Iterator[np.ndarray]:
        done = 0
        try:
            while most is None or done < most:
                there, frame = capture.read()
                if not there:
                    break
                done += 1
                yield frame
        finally:
            capture.release()
        if done == 0:
            raise DataError(f"{video.path}: no frame could be read; check the file or the device")
        # Headers are not exact, but this is more than that.
        if not video.is_camera and number is not None and done < number - max(2, number // 50):
            raise DataError(f"{video.path}: ends after {done} of {number} frames; copy it again")

    return rate, number, read()
