"""Batches for training and pictures for evaluation, read by data workers.

A training batch depends only on the seed and the step (see engine/randomness.py).
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing import connection
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from engine.data.transfer import Batch, Samples, Transfer
from engine.randomness import AUGMENTATION, ORDER
from engine.runtime import signals
from utils.errors import DataError, RunError

#: Parts of the error messages that mean too little shared memory.
SHARED_MEMORY = ("shared memory", "unable to write to file </torch_", "No space left on device")
NO_SHARED_MEMORY = (
    "/dev/shm: too small for the pictures of the data workers; enlarge it (docker run --shm-size), or "
    "lower --num-workers (0 needs no shared memory)"
)


class Loading(NamedTuple):
    """Options for reading pictures.

    Attributes:
        batch_size: in training, the global batch size; in evaluation, the maximum number of pictures of equal
            size to predict together.
        workers: number of data workers per process; 0 reads in the process itself.
    """

    batch_size: int = 1
    workers: int = 0


class Processes(Protocol):
    """Rank, number of processes and device of this process, as in engine.runtime.distributed.World."""

    rank: int
    size: int
    device: torch.device


class SampleSource(Protocol):
    """A data set to train on (dataset.CSDataSet is one)."""

    @property
    def mean(self) -> np.ndarray:
        """BGR mean to subtract, float32 [3]."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Any:
        """Return an augmented sample (dataset.cityscapes.Sample).

        Args:
            index: index of the picture.
            rng: source of all random numbers of the augmentation.

        Raises:
            DataError: a file of the sample can't be used.
        """
        ...


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, ORDER, epoch)).permutation(length)


class SampleStream(Dataset):
    """The samples of a run: sample k, for every k >= 0, depends only on (seed, k).

    Each epoch goes through the data set once, in a new order. Batches continue across epochs, so all batches
    have the same size.

    An item is a sample, or the DataError if a file of the sample can't be used. The data worker returns the
    error and does not raise it, so that the error is raised when the training loop reaches this sample.

    Args:
        source: the data set.
        seed: seed of the order and of the augmentation.
    """

    def __init__(self, source: SampleSource, seed: int):
        self.source = source
        self.seed = seed

    def __getitem__(self, k: int) -> Any:
        epoch, place = divmod(k, len(self.source))
        index = int(_order(self.seed, epoch, len(self.source))[place])
        try:
            return self.source.sample(index, np.random.default_rng((self.seed, AUGMENTATION, k)))
        except DataError as error:
            return error


def _collate(samples: list[Any]) -> Samples | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    try:
        # In a data worker, default_collate stacks the tensors directly in shared memory.
        images = default_collate([torch.from_numpy(sample.image) for sample in samples])
        labels = default_collate([torch.from_numpy(sample.label) for sample in samples])
        contents = _shared(torch.tensor([sample.content for sample in samples]))
    except (OSError, RuntimeError) as error:
        return _no_shared_memory(error)
    return Samples(images, labels, contents, [sample.record() for sample in samples])


def _shared(tensor: Tensor) -> Tensor:
    """Move the tensor of a data worker to shared memory.

    Without this function, a background thread of the worker would move the tensor when the tensor is sent. An
    error in this thread would make the parent process hang.
    """
    return tensor.share_memory_() if get_worker_info() is not None else tensor


def _no_shared_memory(error: Exception) -> RunError:
    """Return a RunError about shared memory if too little of it caused `error`; otherwise raise `error`."""
    if not any(words in str(error) for words in SHARED_MEMORY):
        raise error
    return RunError(NO_SHARED_MEMORY)


def _set_up_worker(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    signals.ignore_interrupts()


def train_batches(
    source: SampleSource,
    seed: int,
    steps: range,
    processes: Processes,
    loading: Loading,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch | Exception]:
    """Yield this process's share of every batch.

    With n samples per process, rank r has samples r * n to (r + 1) * n - 1 of the global batch. The data
    workers start with the first batch and run until the last batch.

    Args:
        source: the data set.
        seed: seed of the order and of the augmentation.
        steps: step numbers to load, counted from 0 (`Run.steps` and `Stepper.step` count steps from 1). A
            resumed run starts at any step without reading the earlier samples.
        processes: the processes that share each batch; their number must divide the batch size.
        loading: batch size and number of data workers.
        memory_format: memory format of the images.

    Yields:
        A batch, the DataError of its first unusable sample, or a RunError if a data worker died.
    """
    share = loading.batch_size // processes.size
    device = processes.device
    loaded = _loaded(
        DataLoader(
            SampleStream(source, seed),
            batch_sampler=_Shares(steps, loading.batch_size, processes.rank * share, share),
            num_workers=loading.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_set_up_worker,
        )
    )
    yield from Transfer(source.mean, device, memory_format)(loaded)


class _Shares:
    """Batch sampler that yields the sample numbers of one process for each step."""

    def __init__(self, steps: range, batch_size: int, offset: int, share: int):
        self.starts = (step * batch_size + offset for step in steps)
        self.share = share

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, start + self.share))


def _loaded(loader: DataLoader) -> Iterator[Any]:
    if loader.num_workers:
        try:
            # The queues of the workers need this many locks in shared memory. Allocate them here first: if
            # there is no room, the DataLoader would leave a partial iterator that prints a traceback when
            # it is deleted.
            locks = [multiprocessing.Lock() for _ in range(4 * (loader.num_workers + 2))]
        except OSError as error:
            return iter([_no_shared_memory(error)])
        del locks
    batches = iter(loader)
    # When a worker dies, the signal handler of the DataLoader raises an error at any point of the program,
    # even during a weight update. Without the handler, reading the next batch fails within seconds.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return _until_a_worker_dies(batches)


#: Seconds until a worker that closed its connection is seen to have ended.
END_OF_WORKER = 5.0


def _is_of_dead_worker(error: Exception, batches: Iterator[Any]) -> bool:
    """Return whether a DataLoader raised `error` because one of its workers was killed."""
    if isinstance(error, RuntimeError):
        return str(error).startswith(("DataLoader worker", "Pin memory thread"))
    # PyTorch raises the error of the connection itself if the worker is killed while a batch is received and
    # still counts as alive.
    workers = [worker.sentinel for worker in getattr(batches, "_workers", ())]
    return bool(connection.wait(workers, timeout=END_OF_WORKER))


def _until_a_worker_dies(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _is_of_dead_worker(error, batches):
                raise
            if any(worker.exitcode == -signal.SIGBUS for worker in getattr(batches, "_workers", ())):
                yield RunError(NO_SHARED_MEMORY)
            yield RunError(
                "a data worker was killed, perhaps because the machine ran out of memory; lower "
                "--num-workers and run the command again (train.py with --resume)"
            )


class PictureSource(Protocol):
    """A data set to evaluate on (dataset.CSDataSet is one)."""

    @property
    def mean(self) -> np.ndarray:
        """BGR mean to subtract, float32 [3]."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...

    @property
    def ignore_label(self) -> int:
        """Train id of the pixels that are not scored."""
        ...

    def __len__(self) -> int: ...

    def picture(self, index: int, instances: bool) -> Any:
        """Return a whole picture (dataset.cityscapes.Picture).

        Args:
            index: index of the picture.
            instances: whether to read label ids and instance ids too.

        Raises:
            DataError: a file of the picture can't be used.
        """
        ...


class _Pictures(Dataset):
    """Data set of whole pictures.

    An item is a picture, or the error if the picture can't be used (see `SampleStream`).
    """

    def __init__(self, source: PictureSource, instances: bool):
        self.source = source
        self.instances = instances

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            picture = self.source.picture(index, self.instances)
        except DataError as error:
            return error
        # A worker passes tensors to the process in shared memory, but arrays through a pipe.
        arrays = {name: value for name, value in picture._asdict().items() if isinstance(value, np.ndarray)}
        try:
            tensors = {name: _shared(torch.from_numpy(value)) for name, value in arrays.items()}
        except (OSError, RuntimeError) as error:
            return _no_shared_memory(error)
        return picture._replace(**tensors)


def evaluation_pictures(
    source: PictureSource, instances: bool, processes: Processes, workers: int
) -> Iterator[Any]:
    """Return the pictures of this process; each picture belongs to exactly one process.

    Yields:
        A picture as `source.picture` returns it, but with tensors instead of arrays, or the error if the
        picture can't be used.
    """
    pictures = DataLoader(
        _Pictures(source, instances),
        sampler=range(processes.rank, len(source), processes.size),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=processes.device.type == "cuda",
        worker_init_fn=_set_up_worker,
    )
    return _loaded(pictures)


def _unchanged(picture: Any) -> Any:
    return picture
