"""Looking at every file of picture-label pairs, in several processes.

Apart from dataset/check.py: its processes import this module before they run the main program again, and
Python warns where both are the same.
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
from dataset.pictures import check_size, darkness, decode_image, decode_label, load, no_label
from utils.errors import DataError, RunError
from utils.progress import Progress
from utils.silence import silence

#: An instance id is the label id * 1000 + a number.
SINGLE = 1000


class Looked(NamedTuple):
    """What was found in the files of one pair."""

    problems: list[str]
    notes: list[str]
    said: list[tuple[str, str]]  # file and line of what a decoder wrote to standard error
    size: tuple[int, int] | None  # (height, width), None where the picture can't be read
    counts: Counts | None  # None where the label can't be read


def look(root: str, pair: Pair, labels: LabelReader) -> Looked:
    """Decode picture, label and instances of a pair; a problem of one does not hide those of the others."""
    problems: list[str] = []
    notes: list[str] = []
    said: list[tuple[str, str]] = []
    size = counts = None
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
    return Looked(problems, notes, said, size, counts)


def has_ids(pair: Pair) -> bool:
    """Return whether the label holds Cityscapes' label ids, which instance ids can belong to."""
    return pair.label.endswith(LABEL_IDS)


def check_instances(path: str, instances: np.ndarray, ids: np.ndarray) -> None:
    """Raise DataError where instance ids [h, w] belong to other labels than the label ids [h, w] say."""
    if instances.ndim != 2:
        raise no_label(path, "RGB")
    values = instances.astype(np.int64)
    of_label = np.where(values < SINGLE, values, values // SINGLE)
    wrong = of_label != ids
    if wrong.any():
        raise DataError(
            f"{path}: instance {values[wrong][0]} where the label id is {ids[wrong][0]}; give the one that "
            "belongs to the label"
        )


_job: tuple[str, LabelReader]


def _begin(root: str, labels: LabelReader) -> None:
    """Prepare a process: OpenCV has one thread, Ctrl-C is the parent's, decoders' messages are kept."""
    global _job
    _job = root, labels
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence.collect()


def _look(pair: Pair) -> Looked:
    return look(_job[0], pair, _job[1])


def look_at_all(root: str, pairs: Sequence[Pair], labels: LabelReader, workers: int) -> Iterator[Looked]:
    """Look at each pair's files, in the order of the pairs, with the progress on standard error.

    Raises:
        RunError: the processes can't be started.
    """
    progress = Progress(len(pairs), interval=10.0, stream=sys.stderr)
    # Not threads, which would wait for each other: the decoder holds Python's lock. And not forks of this
    # process: where it has had threads, a copy without them can wait for one for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(root, labels))
    except OSError as error:
        raise RunError(
            f"/dev/shm: the locks of several processes can't be made there ({error.strerror}); enlarge it "
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
