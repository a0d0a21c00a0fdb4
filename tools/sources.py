"""Input files of the tools: pictures, folders, lists, videos and cameras."""

from __future__ import annotations

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from dataset import DataError
from dataset.layout import is_litter
from dataset.pictures import ENDINGS, Encoded
from utils.errors import UsageError
from utils.files import kind_of, open_input
from utils.silence import silence

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
LISTS = (".txt", ".lst")
CAMERA = "camera:"
#: Maximum number of skipped files that are named.
NAMED = 3


class PictureFile(NamedTuple):
    """A picture file, and the name of its results: a path in the output folder without an ending."""

    path: str
    name: str


class Video(NamedTuple):
    """A video file or the number of a camera, and the name of its results."""

    path: str | int
    name: str

    @property
    def is_camera(self) -> bool:
        """Return whether the frames come from a camera."""
        return isinstance(self.path, int)


class Skipped(NamedTuple):
    """Files and folders in an input folder that are not predicted."""

    litter: list[str]  # hidden, or written by the system
    others: list[str]  # without the ending of a picture

    def say(self, folder: str) -> str:
        """Describe them in one line, with paths relative to `folder`."""
        parts = []
        for paths, kind in ((self.litter, "hidden or system"), (self.others, "not pictures")):
            if paths:
                names = first_names([os.path.relpath(path, folder) for path in paths])
                parts.append(f"{len(paths)} {kind} ({names})")
        return f"skipped {count_files(len(self.litter) + len(self.others))}: {', '.join(parts)}"


def count_files(number: int) -> str:
    """Write a number of files: "1 file" or "2 files"."""
    return "1 file" if number == 1 else f"{number} files"


def first_names(names: Sequence[str]) -> str:
    """Join the first of some names, with the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def further_pages(encoded: Encoded) -> int:
    """Return the number of pages or frames of a file after the first one, which is the only one decoded."""
    if encoded.header.format not in ("TIFF", "GIF", "WEBP"):
        return 0
    try:
        with silence, Image.open(io.BytesIO(encoded.content)) as picture:
            return getattr(picture, "n_frames", 1) - 1
    except Exception:  # damaged pages, for which Pillow's parsers raise many types
        return 0


def find(inputs: Sequence[str], leave_out: str) -> tuple[list[PictureFile], list[Video]]:
    """Return the pictures and videos that the command line names.

    Inputs are pictures, videos, folders of pictures, lists of pictures, and cameras. Results keep the path
    that a picture has in its folder or list. Each line of a list holds a path relative to the list; text
    after a tab is ignored. Files of a folder that are not predicted are reported in one line.

    Args:
        inputs: paths, and camera:N.
        leave_out: the output folder. Pictures in it are not inputs if it lies in one of the folders.

    Raises:
        UsageError: an input is missing or not a regular file (a FIFO, socket or device, also in a folder).
    """
    pictures: list[PictureFile] = []
    videos: list[Video] = []
    for text in inputs:
        if text.startswith(CAMERA):
            number = text.removeprefix(CAMERA)
            if not re.fullmatch("[0-9]{1,4}", number):
                raise UsageError(f"{text}: not the number of a camera; give camera:0")
            videos.append(Video(int(number), f"camera{number}"))
        elif os.path.isdir(text):
            if os.path.realpath(text) == leave_out:
                raise UsageError(f"{text}: is also --out; name another folder for the results")
            skipped = Skipped([], [])
            found = list(_walk(text, leave_out, skipped))
            if any(skipped):
                print(f"{text}: {skipped.say(text)}", flush=True)
            if not found:
                raise UsageError(f"{text}: no pictures in it ({' '.join(ENDINGS)}); name another folder")
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
            # The name does not matter: the decoder reports files that are not pictures.
            pictures.append(PictureFile(text, _stem(os.path.basename(text))))
    for path, _ in pictures:
        _check_kind(path)
    names = _distinct([*pictures, *videos])
    pictures = [each._replace(name=name) for each, name in zip(pictures, names, strict=False)]
    videos = [each._replace(name=name) for each, name in zip(videos, names[len(pictures) :], strict=True)]
    return pictures, videos


def _check_kind(path: str) -> bool:
    """Return True for a regular file, and for a missing one, which the decoder reports.

    Raises:
        UsageError: a FIFO, socket, device or folder. Reading some of them would never end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: is {kind_of(mode)}, not a file; remove it, or name other inputs")
    return True


def check_video_name(path: str) -> None:
    """Raise UsageError for a name that is not UTF-8, which would crash OpenCV's reading of videos."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{path}: videos need a path in UTF-8, folders included; rename it, or make a link"
        ) from None


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _walk(folder: str, leave_out: str, skipped: Skipped) -> Iterator[PictureFile]:
    """Yield the pictures of a folder and its subfolders, and add all other files to `skipped`."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(place)
        skipped.litter.extend(os.path.join(root, name) for name in sorted(folders + files) if is_litter(name))
        folders[:] = sorted(
            name
            for name in folders
            if not is_litter(name) and os.path.realpath(os.path.join(root, name)) != leave_out
        )
        for name in sorted(files):
            if is_litter(name):
                continue
            path = os.path.join(root, name)
            if name.lower().endswith(ENDINGS):
                yield PictureFile(path, _stem(os.path.relpath(path, folder)))
            else:
                skipped.others.append(path)


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
            raise UsageError(f"{path}, line {number}: {picture} is not a file; correct the path")
        name = os.path.relpath(picture, folder or ".")
        if name.startswith(os.pardir):  # results stay in the output folder
            name = os.path.basename(picture)
        found.append(PictureFile(picture, _stem(name)))
    if not found:
        raise UsageError(f"{path}: names no picture; write one path in each line")
    return found


def _distinct(found: Sequence[PictureFile | Video]) -> list[str]:
    """Return distinct names: equal names get the ending of the file, or a number if that is not enough.

    The name of a video is also the name of a folder, in which no results of pictures may lie.
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
    """Open a video or a camera.

    Args:
        video: the video or camera.
        most: maximum number of frames; None for all.

    Returns:
        Frames per second, number of frames (None if it is unknown), and the frames, uint8 [h, w, 3] RGB.

    Raises:
        DataError: it can't be opened, has no frame, or ends early.
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
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()
        if done == 0:
            raise DataError(f"{video.path}: no frame could be read; check the file or the device")
        # Frame counts in headers are not exact; a larger difference is an error.
        if not video.is_camera and number is not None and done < number - max(2, number // 50):
            raise DataError(f"{video.path}: ends after {done} of {number} frames; copy it again")

    return rate, number, read()
