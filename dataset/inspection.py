"""Checks of all files of picture-label pairs, in several processes.

This module is separate from dataset/check.py because its processes import it before they import the main
program. Python warns if both are the same module.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

from dataset.labels import Counts, LabelReader
from dataset.layout import LABEL_IDS, Pair, instances_of
from dataset.pictures import (
    check_size,
    darkness,
    decode_image,
    decode_label,
    fits_both,
    load,
    no_label,
    read_orientation,
)
from utils.errors import DataError, RunError
from utils.progress import Progress
from utils.silence import silence

#: An instance id is label id * 1000 + number; smaller values are label ids without an instance.
SINGLE = 1000


class Looked(NamedTuple):
    """The result of checking one pair."""

    problems: list[str]
    notes: list[str]
    said: list[tuple[str, str]]  # lines that decoders wrote to standard error, as (file, line)
    size: tuple[int, int] | None  # (height, width); None if the picture can't be read
    counts: Counts | None  # None if the label can't be read
    is_turned: bool  # whether the label fits the picture as stored and as an orientation tag turns it


def look(root: str, pair: Pair, labels: LabelReader) -> Looked:
    """Check picture, label and instances of a pair, even if one of them has a problem."""
    problems: list[str] = []
    notes: list[str] = []
    said: list[tuple[str, str]] = []
    size = counts = None
    is_turned = False
    try:
        picture = load(os.path.join(root, pair.image))
        image = decode_image(picture)
        size = picture.height, picture.width
        if dark := darkness(picture, image):
            notes.append(dark)
    except DataError as error:
        problems.append(str(error))
    said += [(pair.image, message) for message in silence.take()]
    if pair.label:
        try:
            label = load(os.path.join(root, pair.label))
            if size is not None:
                check_size(label.path, label, pair.image, picture)
                is_turned = fits_both(read_orientation(picture.path), picture)
            counts = labels.count(label)
        except DataError as error:
            problems.append(str(error))
        said += [(pair.label, message) for message in silence.take()]
    instances = os.path.join(root, instances_of(pair.label))
    if counts is not None and has_ids(pair) and os.path.lexists(instances):
        try:
            found = load(instances)
            check_size(found.path, found, pair.label, label)
            check_instances(instances, decode_label(found), decode_label(label))
        except DataError as error:
            problems.append(str(error))
        silence.take()
    return Looked(problems, notes, said, size, counts, is_turned)


def has_ids(pair: Pair) -> bool:
    """Return whether the label holds label ids of Cityscapes, so that it can have instance ids."""
    return pair.label.endswith(LABEL_IDS)


def check_instances(path: str, instances: np.ndarray, ids: np.ndarray) -> None:
    """Raise DataError if instance ids [h, w] do not match the label ids [h, w]."""
    if instances.ndim != 2:
        raise no_label(path, "RGB")
    values = instances.astype(np.int64)
    of_label = np.where(values < SINGLE, values, values // SINGLE)
    wrong = of_label != ids
    if wrong.any():
        raise DataError(
            f"{path}: instance {values[wrong][0]} where the label id is {ids[wrong][0]}; use the file that "
            "matches the label"
        )


_job: tuple[str, LabelReader]


def _begin(root: str, labels: LabelReader) -> None:
    """Initialize a process: one OpenCV thread, Ctrl-C left to the parent, decoder messages kept."""
    global _job
    _job = root, labels
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence.collect()


def _look(pair: Pair) -> Looked:
    return look(_job[0], pair, _job[1])


def look_at_all(root: str, pairs: Sequence[Pair], labels: LabelReader, workers: int) -> Iterator[Looked]:
    """Check the files of all pairs and yield the results in order, with progress on standard error.

    Args:
        root: the data directory.
        pairs: pairs to check.
        labels: reader of the labels.
        workers: number of processes.

    Raises:
        RunError: the processes can't be started.
    """
    progress = Progress(len(pairs), interval=10.0, stream=sys.stderr)
    # Use processes, since the decoder holds Python's global lock. Do not fork this process: if it has had
    # threads, its copy has their locks but not the threads, and can hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(root, labels))
    except OSError as error:
        raise RunError(
            f"/dev/shm: can't create the locks of several processes ({error.strerror}); enlarge it "
            "(docker run --shm-size)"
        ) from error
    with pool:
        try:
            for done, looked in enumerate(pool.map(_look, pairs, chunksize=4), 1):
                progress.show(done)
                yield looked
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
