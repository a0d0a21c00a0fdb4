"""The stream of samples is a pure function of seed and position."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dataset import IMG_MEAN, CSDataSet, DataError, transforms
from engine.data import loader
from engine.data.loader import Loading, evaluation_pictures, train_batches
from utils.errors import RunError

CPU = torch.device("cpu")


class Process(NamedTuple):
    """One of the processes of a run."""

    rank: int
    size: int
    device: torch.device = CPU


ALONE = Process(0, 1)


def records(dataset, batch_size, steps, processes=1, workers=0, seed=3):
    """Return the records of every global batch, joined from the shares of all processes."""
    shares = [
        train_batches(dataset, seed, steps, Process(rank, processes), Loading(batch_size, workers))
        for rank in range(processes)
    ]
    return [[record for batch in parts for record in batch.records] for parts in zip(*shares, strict=True)]


@pytest.fixture
def dataset(scenes):
    return CSDataSet(str(scenes), crop_size=(24, 24))


def test_processes_workers_and_restarts_change_nothing(dataset):
    expected = records(dataset, 4, range(9))
    assert records(dataset, 4, range(9), processes=2) == expected
    assert records(dataset, 4, range(9), processes=4, workers=2) == expected
    assert records(dataset, 4, range(5, 9), workers=1) == expected[5:]
    assert records(dataset, 4, range(9), seed=4) != expected


def test_each_epoch_has_every_picture_once_in_its_own_order(dataset):
    names = [record.split()[0] for batch in records(dataset, 3, range(6)) for record in batch]
    epochs = [names[start : start + 6] for start in range(0, 18, 6)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_pixels_are_those_of_the_record(dataset):
    first, second = (next(train_batches(dataset, 3, range(2, 3), ALONE, Loading(4, w))) for w in (0, 2))
    assert first.images.shape == (4, 3, 24, 24) and first.labels.shape == (4, 24, 24)
    assert np.array_equal(first.images, second.images) and np.array_equal(first.labels, second.labels)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_are_the_samples_minus_the_mean_with_zero_padding(scenes, layout, kind):
    """Crops that exceed the picture, mirrored or not, equal the items of the data set."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    dataset = CSDataSet(str(scenes), crop_size=(56, 80))
    padded = set()
    workers = 2 if kind == "cuda" else 0
    for batch in train_batches(
        dataset, 3, range(6), Process(0, 1, torch.device(kind)), Loading(4, workers), layout
    ):
        batch = batch._replace(images=batch.images.cpu(), labels=batch.labels.cpu())
        assert batch.images.dtype == torch.float32 and batch.labels.dtype == torch.int64
        assert batch.images.is_contiguous(memory_format=layout)
        for image, label, record in zip(batch.images, batch.labels, batch.records, strict=True):
            name, scale, crop, mirror = record.split()
            index = [pair.name for pair in dataset.pairs].index(name)
            top, left = map(int, crop.removeprefix("crop=").split(","))
            augmentation = transforms.Augmentation(
                float(scale.removeprefix("scale=")), top, left, mirror == "mirror=1"
            )
            picture = dataset.picture(index, False)
            pixels, expected, content = transforms.apply(
                picture.image, picture.label, (48, 64), (56, 80), augmentation, 255
            )
            planes = pixels.transpose(2, 0, 1).astype(np.float32) - IMG_MEAN[:, None, None]
            inside = np.zeros((56, 80), bool)
            inside[: content.bottom, content.left : content.right] = True
            assert np.array_equal(image.numpy(), np.where(inside, planes, 0))
            assert np.array_equal(label, expected) and (expected[~inside] == 255).all()
            padded |= {
                ("below", content.bottom < 56),
                ("left", content.left > 0),
                ("right", content.right < 80),
            }
    assert {("below", True), ("left", True), ("right", True), ("below", False)} <= padded


def test_augmentation_varies_over_epochs(dataset):
    seen = Counter(record.split(maxsplit=1)[1] for batch in records(dataset, 6, range(8)) for record in batch)
    assert len(seen) > 30


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_picture_arrives_as_its_error(dataset, scenes, workers):
    for path in (scenes / "leftImg8bit/train/ulm").iterdir():
        path.write_bytes(b"broken")
    batch = next(train_batches(dataset, 3, range(1), ALONE, Loading(2, workers)))
    assert isinstance(batch, DataError) and "not a readable picture" in str(batch)


class TestSharedMemory:
    """Too little shared memory is a RunError that names it, wherever it occurs."""

    def expect_one_line(self, dataset, scenes):
        whole = CSDataSet(str(scenes), crop_size=None, split="val")
        for found in (
            next(train_batches(dataset, 3, range(1), ALONE, Loading(2, 2))),
            next(evaluation_pictures(whole, False, ALONE, 2)),
        ):
            assert isinstance(found, RunError)
            assert str(found).startswith("/dev/shm: ") and "--num-workers" in str(found)

    def test_no_room_for_pictures(self, dataset, scenes, monkeypatch):
        def full(*_):
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left")

        monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the workers are forks
        self.expect_one_line(dataset, scenes)

    @pytest.mark.slow
    def test_worker_that_met_a_bus_error(self, dataset, scenes, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: os.kill(os.getpid(), signal.SIGBUS))
        self.expect_one_line(dataset, scenes)

    def test_no_room_for_locks(self, dataset, scenes, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(multiprocessing, "Lock", full)
        self.expect_one_line(dataset, scenes)
        assert len(next(train_batches(dataset, 3, range(1), ALONE, Loading(2, 0))).records) == 2  # needs none

    def test_other_errors_stay(self, dataset, monkeypatch):
        def broken(*_):
            raise RuntimeError("something else")

        monkeypatch.setattr(torch.Tensor, "share_memory_", broken)
        with pytest.raises(RuntimeError, match="something else"):
            next(train_batches(dataset, 3, range(1), ALONE, Loading(2, 1)))


class Receiving:
    """An iterator of batches, in which receiving one from a worker fails."""

    def __init__(self, error: Exception, sentinel: int):
        self.error = error
        self._workers = [SimpleNamespace(sentinel=sentinel, exitcode=-9)]

    def __next__(self):
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), ConnectionRefusedError(), EOFError()])
def test_worker_that_was_killed_while_a_batch_was_received(error, monkeypatch):
    monkeypatch.setattr(loader, "END_OF_WORKER", 0.01)
    sentinel, of_worker = os.pipe()  # a process that ends closes it
    try:
        with pytest.raises(type(error)):
            next(loader._until_a_worker_dies(Receiving(error, sentinel)))
    finally:
        os.close(of_worker)
    found = next(loader._until_a_worker_dies(Receiving(error, sentinel)))
    os.close(sentinel)
    assert isinstance(found, RunError) and "a data worker was killed" in str(found)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_evaluation_has_every_picture_once(scenes, processes):
    dataset = CSDataSet(str(scenes), crop_size=None, split="val")
    names = [
        picture.name
        for rank in range(processes)
        for picture in evaluation_pictures(dataset, False, Process(rank, processes), 0)
    ]
    assert sorted(names) == [pair.name for pair in dataset.pairs]
