"""The cache of decoded pictures returns what was stored, whoever wrote it and however that ended."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from dataset import CSDataSet, DataError, cache
from dataset.cache import PictureCache, Plan
from engine.data.loader import Loading, train_batches
from engine.runtime.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def contents(number, sizes):
    rng = np.random.default_rng(number)
    shapes = (*sizes[number], 3), sizes[number]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


SIZES = [(8, 12), (16, 4), (5, 7), (9, 9)]


@pytest.fixture(params=["ram", "disk"])
def path(request, tmp_path):
    return cache.in_memory() if request.param == "ram" else str(tmp_path / "pictures.cache")


def test_pictures_come_out_as_they_went_in(path):
    writer, reader = (PictureCache(path, Plan(SIZES, 10**6)) for _ in range(2))
    assert reader.get(2) is None
    for number in (2, 0, 3):
        writer.put(number, *contents(number, SIZES))
    for number in (0, 2, 3):
        for found, expected in zip(reader.get(number), contents(number, SIZES), strict=True):
            assert np.array_equal(found, expected) and not found.flags.writeable
    assert reader.get(1) is None
    copied = pickle.loads(pickle.dumps(reader))  # as a worker that is not forked gets it
    assert np.array_equal(copied.get(0)[0], contents(0, SIZES)[0])


def test_budget_keeps_the_first_pictures():
    everything = Plan(SIZES, 10**6)
    table = 8 * len(SIZES)
    assert everything.bytes == table + 4 * sum(height * width for height, width in SIZES)
    assert (everything.number, Plan(SIZES, everything.bytes - 1).number) == (4, 3)
    assert Plan(SIZES, table + 4 * 96).number == 1 and Plan(SIZES, 0).number == 0
    small = PictureCache(cache.in_memory(), Plan(SIZES, table + 4 * 96))
    for number in range(4):
        small.put(number, *contents(number, SIZES))
    assert [small.get(number) is not None for number in range(4)] == [True, False, False, False]
    assert os.stat(small.path).st_size <= table + 4 * 96
    nothing = PictureCache("/nowhere/at all", Plan(SIZES, 3))
    nothing.put(0, *contents(0, SIZES))
    assert nothing.get(0) is None


def test_damaged_picture_is_decoded_again(path):
    plan = Plan(SIZES, 10**6)
    writer = PictureCache(path, plan)
    writer.put(1, *contents(1, SIZES))
    file = os.open(path, os.O_RDWR)
    os.pwrite(file, b"\x00\x01\x02", plan.starts[1] + 20)
    assert PictureCache(path, plan).get(1) is None
    writer.put(1, *contents(1, SIZES))
    assert PictureCache(path, plan).get(1) is not None


def test_picture_that_has_grown_does_not_touch_its_neighbor(path):
    cached = PictureCache(path, Plan(SIZES, 10**6))
    cached.put(1, *contents(1, SIZES))
    cached.put(0, *contents(0, [(20, 20)]))
    assert cached.get(0) is None and np.array_equal(cached.get(1)[0], contents(1, SIZES)[0])


def test_no_cache_where_none_can_be(tmp_path):
    with pytest.raises(DataError, match="the cache can't be opened"):
        PictureCache(str(tmp_path / "none" / "x"), Plan(SIZES, 10**6))


def test_file_on_disk_is_another_one_once_a_picture_or_its_meaning_has_changed(scenes, tmp_path):
    def name(**options):
        return CSDataSet(str(scenes), **options).cache_file(str(tmp_path))

    first = name()
    assert name() == first and os.path.dirname(first) == str(tmp_path)
    assert name(ignore_label=250) != first and name(num_classes=33) != first and name(split="val") != first
    image = scenes / "leftImg8bit/train/ulm/ulm_000000_000003_leftImg8bit.png"
    os.utime(image, ns=(1, 1))
    assert name() != first


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_files(scenes, workers):
    """Every epoch gives the same samples as without a cache, even if the cache holds four of six pictures."""
    plain, cached = (CSDataSet(str(scenes), crop_size=(24, 40)) for _ in range(2))
    plan = Plan(cached.sizes(), 48 + 4 * 4 * 48 * 64)
    assert plan.number == 4
    cached.cache = PictureCache(cache.in_memory(), plan)
    shares = [train_batches(dataset, 3, range(12), ALONE, Loading(3, workers)) for dataset in (plain, cached)]
    for one, other in zip(*shares, strict=True):
        assert one.records == other.records
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert [cached.cache.get(number) is not None for number in range(6)] == [True] * 4 + [False] * 2
    # Cached pictures are no longer read from their files.
    for number in range(4):
        os.unlink(cached.path(cached.pairs[number].image))
    for number in range(4):
        cached.sample(number, np.random.default_rng(0))
    os.unlink(cached.path(cached.pairs[5].image))
    with pytest.raises(DataError):
        cached.sample(5, np.random.default_rng(0))


def test_room_is_that_of_memory_or_disk(tmp_path):
    assert 2**20 < cache.room("ram", "") < 2**50
    path = tmp_path / "pictures.cache"
    before = cache.room("disk", str(path))
    path.write_bytes(b"x" * 2**22)
    assert cache.room("disk", str(path)) == pytest.approx(before, abs=2**30)
