"""Clips: a picture together with the frames before and after it, found by their names.

The frames of a picture are those of leftImg8bit_sequence, for a picture in leftImg8bit, and otherwise the
pictures in the same folder. Their names differ from that of the picture in the last number only, as
aachen_000000_000018 and aachen_000000_000020 from aachen_000000_000019.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dataset.layout import PICTURE
from dataset.pictures import decode_upright, load
from utils.errors import DataError

#: Folder of the labeled pictures of Cityscapes, and the folder of all frames next to it.
PICTURES, SEQUENCE = "leftImg8bit", "leftImg8bit_sequence"
#: A name: what precedes the last number, the number, and the rest.
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)


class Clip(NamedTuple):
    """The frames of a picture.

    Attributes:
        files: paths of the frames in order; the picture itself is the middle one.
        missing: number of frames that do not exist. Each is replaced by the nearest existing one toward the
            middle.
    """

    files: tuple[str, ...]
    missing: int


class Frames:
    """Find the frames of pictures.

    Args:
        clip: number of frames T, odd.
        stride: distance of the frames of a clip, in frames of the video.
        root: the data directory, to which paths are relative.
    """

    def __init__(self, clip: int, stride: int, root: str = ""):
        self.clip, self.stride, self.root = clip, stride, root
        self._folders: dict[str, frozenset[str]] = {}

    def of(self, picture: str) -> Clip:
        """Return the frames of a picture.

        Raises:
            DataError: a folder can't be read.
        """
        folder, name = os.path.split(picture)
        stem, extension = os.path.splitext(name)
        suffix = (PICTURE if stem.endswith(PICTURE) else "") + extension
        found = NUMBERED.fullmatch(name.removesuffix(suffix))
        folder = self._sequence(folder)
        present = self._names(folder) if found else frozenset()

        def existing(offset: int) -> str | None:
            if found is None:
                return None
            before, digits, after = found.groups()
            number = int(digits) + offset * self.stride
            # Numbers have as many digits as that of the picture or, without leading zeros, as they need.
            for text in (f"{number:0{len(digits)}d}", str(number)) if number >= 0 else ():
                if (other := f"{before}{text}{after}{suffix}") in present:
                    return os.path.join(folder, other)
            return None

        files, missing = [picture], 0
        for offset in range(1, self.clip // 2 + 1):
            earlier, later = existing(-offset), existing(offset)
            missing += (earlier is None) + (later is None)
            files = [earlier or files[0], *files, later or files[-1]]
        return Clip(tuple(files), missing)

    def _sequence(self, folder: str) -> str:
        """Return the folder of the frames of the pictures in a folder."""
        parts = folder.split(os.sep)
        if PICTURES in parts:
            place = len(parts) - 1 - parts[::-1].index(PICTURES)
            other = os.sep.join([*parts[:place], SEQUENCE, *parts[place + 1 :]])
            if os.path.isdir(os.path.join(self.root, other)):
                return other
        return folder

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._folders:
            path = os.path.join(self.root, folder)
            try:
                self._folders[folder] = frozenset(os.listdir(path or os.curdir))
            except OSError as error:
                raise DataError(f"{path}: can't be read ({error.strerror}); check the folder") from error
        return self._folders[folder]


def say_missing(source: str, clips: Sequence[Clip]) -> str:
    """Return the line about missing frames.

    Args:
        source: name of the data set, for the message.
        clips: the clips of all pictures.

    Raises:
        DataError: clips have more than one frame, and no picture has a neighbor.
    """
    frames = len(clips[0].files)
    neighbors, missing = (frames - 1) * len(clips), sum(each.missing for each in clips)
    if neighbors and missing == neighbors:
        raise DataError(
            f"{source}: no picture has another frame next to it, such as {_expected(clips[0].files[0])}; "
            "unpack leftImg8bit_sequence_trainvaltest.zip, check --clip-stride, or give --clip 1"
        )
    line = f"clips of {frames} frames: {missing} of {neighbors} neighbors are missing"
    return f"{line} and replaced by the nearest frame toward the middle" if missing else line


def _expected(picture: str) -> str:
    """Return a name that the next frame of a picture could have."""
    stem, extension = os.path.splitext(os.path.basename(picture))
    suffix = (PICTURE if stem.endswith(PICTURE) else "") + extension
    found = NUMBERED.fullmatch(os.path.basename(picture).removesuffix(suffix))
    if found is None:
        return f"{stem}_000001{extension}"
    before, digits, after = found.groups()
    return f"{before}{int(digits) + 1:0{len(digits)}d}{after}{suffix}"


def read_rgb(clip: Clip) -> np.ndarray:
    """Read the frames of a clip as one picture, uint8 [h, w, 3 * T], RGB, upright.

    Raises:
        DataError: a file can't be read, or the frames have different sizes.
    """

    def read(file: str) -> np.ndarray:
        return cv2.cvtColor(decode_upright(load(file)), cv2.COLOR_BGR2RGB)

    middle = clip.files[len(clip.files) // 2]
    frames = {file: read(file) for file in dict.fromkeys(clip.files)}
    for file, frame in frames.items():
        if frame.shape != frames[middle].shape:
            sizes = " but ".join(f"{each.shape[1]}x{each.shape[0]}" for each in (frame, frames[middle]))
            raise DataError(f"{file}: has {sizes} in {middle}; move frames of other videos elsewhere")
    return stack(clip.files, frames.__getitem__)


def of_video(frames: Iterable[np.ndarray], clip: int, stride: int) -> Iterator[np.ndarray]:
    """Yield the clip of each frame of a video, like `Frames`; the first frame is yielded late.

    Args:
        frames: the frames in order, [h, w, 3].
        clip: number of frames T, odd.
        stride: distance of the frames of a clip.

    Yields:
        Arrays [h, w, 3 * T].
    """
    held: dict[int, np.ndarray] = {}
    reach, number = clip // 2 * stride, 0

    def around(index: int) -> np.ndarray:
        found = [held[index]]
        for offset in range(stride, reach + 1, stride):
            found = [held.get(index - offset, found[0]), *found, held.get(index + offset, found[-1])]
        held.pop(index - reach, None)  # no later clip needs it
        return np.concatenate(found, axis=2)

    for frame in frames:
        held[number] = frame
        number += 1
        if number > reach:
            yield around(number - 1 - reach)
    for index in range(max(0, number - reach), number):
        yield around(index)


def stack(files: Sequence[str], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the frames of a clip as one picture, uint8 [h, w, 3 * T].

    Args:
        files: paths of the frames. Repeated ones are read once.
        read: function that returns a frame, uint8 [h, w, 3]. Rows that not all frames have are cut off.
    """
    frames = {file: read(file) for file in dict.fromkeys(files)}
    rows = min(len(frame) for frame in frames.values())
    return np.concatenate([frames[file][:rows] for file in files], axis=2)
