"""From data set to device: which samples, in what order, with what randomness, for any step of a run."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from engine.data.transfer import Batch, Samples, Transfer
from engine.runtime import signals
from utils.errors import DataError, RunError

#: What errors of shared memory say: too little of it, or none.
SHARED_MEMORY = ("shared memory", "unable to write to file </torch_", "No space left on device")
NO_SHARED_MEMORY = (
    "/dev/shm: too small for the pictures that the readers pass on; enlarge it (docker run --shm-size), or "
    "lower --num-workers (0 needs no shared memory)"
)
#: Keep the random streams of the order, the augmentation and the dropout masks apart.
ORDER, AUGMENTATION, DROPOUT = range(3)


class SampleSource(Protocol):
    """What a data set offers to the stream (dataset.CSDataSet does)."""

    @property
    def mean(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Any: ...


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, ORDER, epoch)).permutation(length)


class SampleStream(Dataset):
    """Sample k of a run, for every k >= 0: a pure function of (seed, k).

    Each epoch goes through the data set once, in an order of its own; the batches run on across epochs, so
    none is partial. Whatever the number of processes, workers or restarts, sample k is the same.

    Args:
        source: the data set.
        seed: of the order and of the augmentation.

    A sample whose files can't be used is the DataError itself, so that it reaches the training loop as it was
    raised, with its place in the order.
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
        # torch's own puts them together in the memory that the worker shares with the training process.
        images = default_collate([torch.from_numpy(sample.image) for sample in samples])
        labels = default_collate([torch.from_numpy(sample.label) for sample in samples])
        contents = _shared(torch.tensor([sample.content for sample in samples]))
    except (OSError, RuntimeError) as error:
        return _no_shared_memory(error)
    return Samples(images, labels, contents, [sample.record() for sample in samples])


def _shared(tensor: Tensor) -> Tensor:
    """Move a worker's tensor to memory that it shares with its parent.

    Sending the tensor would do so as well, but in a thread whose errors leave the parent waiting for ever.
    """
    return tensor.share_memory_() if get_worker_info() is not None else tensor


def _no_shared_memory(error: Exception) -> RunError:
    """Return the error for too little shared memory; raises `error` where it is another one."""
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
    batch_size: int,
    steps: range,
    rank: int,
    processes: int,
    workers: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch | Exception]:
    """This process's share of every batch of `steps`: rank r of n takes the r-th n-th of the global batch.

    Args:
        batch_size: of all processes together; `processes` divides it.
        steps: from 0; a resumed run starts at any step without touching the samples before.
        workers: processes that read pictures, for as long as the steps last; 0 reads in this one.
        device, memory_format: where and how the network wants its images.

    Yields:
        A batch, or the error of the first of its samples that can't be used, or a RunError when a worker
        died.
    """
    share = batch_size // processes
    loaded = _loaded(
        DataLoader(
            SampleStream(source, seed),
            batch_sampler=_Shares(steps, batch_size, rank * share, share),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=_set_up_worker,
        )
    )
    return Transfer(source.mean, device, memory_format)(loaded)


class _Shares:
    """The numbers of a process's samples, step by step."""

    def __init__(self, steps: range, batch_size: int, offset: int, share: int):
        self.starts = (step * batch_size + offset for step in steps)
        self.share = share

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, start + self.share))


def _loaded(loader: DataLoader) -> Iterator[Any]:
    if loader.num_workers:
        try:
            # As many as the workers' queues have, which are in shared memory too. Where there is no room for
            # them, the DataLoader leaves an iterator half made, whose destructor prints a traceback.
            locks = [multiprocessing.Lock() for _ in range(4 * (loader.num_workers + 2))]
        except OSError as error:
            return iter([_no_shared_memory(error)])
        del locks
    batches = iter(loader)
    # The DataLoader's own handler raises wherever the process is when a worker dies, in the midst of an
    # update too. Without it the next batch fails, within seconds.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return _until_a_worker_dies(batches)


def _until_a_worker_dies(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith(("DataLoader worker", "Pin memory thread")):
                raise
            if any(worker.exitcode == -signal.SIGBUS for worker in getattr(batches, "_workers", ())):
                yield RunError(NO_SHARED_MEMORY)
            yield RunError(
                "a process that reads pictures was killed (for want of memory, perhaps: --num-workers says "
                "how many there are); run it again, train.py with --resume"
            )


class PictureSource(Protocol):
    """What a data set offers to the evaluation (dataset.CSDataSet does)."""

    @property
    def mean(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def picture(self, index: int, instances: bool) -> Any: ...


class _Pictures(Dataset):
    """Whole pictures; one that can't be used is the error itself, as in SampleStream."""

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
        # Tensors go from a worker to this process in shared memory, arrays through a pipe.
        arrays = {name: value for name, value in picture._asdict().items() if isinstance(value, np.ndarray)}
        try:
            tensors = {name: _shared(torch.from_numpy(value)) for name, value in arrays.items()}
        except (OSError, RuntimeError) as error:
            return _no_shared_memory(error)
        return picture._replace(**tensors)


def evaluation_pictures(
    source: PictureSource,
    instances: bool,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Every `processes`-th picture from the `rank`-th on: all processes together have each picture once.

    Yields:
        What `source.picture` gives, its arrays as tensors, or its error.
    """
    pictures = DataLoader(
        _Pictures(source, instances),
        sampler=range(rank, len(source), processes),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_set_up_worker,
    )
    return _loaded(pictures)


def _unchanged(picture: Any) -> Any:
    return picture
