"""Compare the speed of this data loader with the plain one of the original code, per core.

    python -m benchmarks.loader [--data-dir CS] [--rounds N] [--out JSON]

Samples of 769x769 pixels, scaled and mirrored at random, are made from pictures of 2048x1024: those of the
train split of --data-dir, or generated street scenes with camera noise, in files as large as those of
Cityscapes. The plain loader decodes picture and label with OpenCV, maps the label id by id, resizes the whole
picture, and works in float32. Both loaders receive the same augmentations, and are checked to give the same
samples. They are then measured alternately: through one worker to tensors on the CPU, and stage by stage in
this process. The exit status is 1 if a ratio is below its limit.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset import IMG_MEAN, CSDataSet, DataError, cache, mini, pictures, transforms
from dataset.labels import LABELS
from engine.data.loader import Loading, SampleStream, train_batches
from engine.data.transfer import subtract_mean
from engine.runtime.distributed import World
from tools.common import end
from utils import args as flags
from utils import timing
from utils.environment import machine
from utils.files import check_output_file, write_file

CROP = (769, 769)
BATCH, SEED = 2, 0
#: Number of generated pictures; number of batches of a measurement, after the first one.
PICTURES, TURN = 8, 12
#: Minimum speedup over the plain loader.
BARS = {"a sample": 2.0, "after decoding": 4.0, "from the cache": 6.0}
CPU = torch.device("cpu")


def imread(path: str, flags: int) -> np.ndarray:
    """Read a picture with OpenCV.

    Raises:
        DataError: it can't be read.
    """
    image = cv2.imread(path, flags)
    if image is None:
        raise DataError(f"{path}: not a readable picture; check the data set")
    return image


class Plain:
    """The plain loader of the samples of a data set."""

    def __init__(self, dataset: CSDataSet):
        self.dataset = dataset
        self.mean = IMG_MEAN

    def __len__(self) -> int:
        return len(self.dataset)

    def decode(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a picture and its label ids."""
        pair = self.dataset.pairs[index]
        image = imread(self.dataset.path(pair.image), cv2.IMREAD_COLOR)
        return image, imread(self.dataset.path(pair.label), cv2.IMREAD_GRAYSCALE)

    def augment(
        self, image: np.ndarray, ids: np.ndarray, augmentation: transforms.Augmentation
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return image float32 [3, h, w] minus mean and label float32 [h, w]."""
        label = ids.copy()
        for row in LABELS:
            label[ids == row.id] = row.train_id
        scale, top, left, mirror, _ = augmentation
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        image = np.asarray(image, np.float32)
        image -= self.mean
        below, beside = max(CROP[0] - label.shape[0], 0), max(CROP[1] - label.shape[1], 0)
        if below or beside:
            padding = (0, below, 0, beside, cv2.BORDER_CONSTANT)
            image = cv2.copyMakeBorder(image, *padding, value=(0.0, 0.0, 0.0))
            label = cv2.copyMakeBorder(label, *padding, value=(255,))
        window = np.s_[top : top + CROP[0], left : left + CROP[1]]
        image, label = np.asarray(image[window], np.float32), np.asarray(label[window], np.float32)
        image = image.transpose(2, 0, 1)
        step = -1 if mirror else 1
        return image[:, :, ::step].copy(), label[:, ::step].copy()

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return a randomly augmented sample."""
        image, ids = self.decode(index)
        return self.augment(image, ids, transforms.draw(rng, ids.shape, CROP, True, True))


def write_frames(folder: Path) -> None:
    """Write street scenes of the size of Cityscapes with smoothed noise, as PNG files of 2.3 to 2.7 MB."""
    mini.write(folder, PICTURES, 1, (1024, 2048), seed=0)
    for number, path in enumerate(sorted(folder.glob("leftImg8bit/train/*/*.png"))):
        image = imread(str(path), cv2.IMREAD_COLOR)
        noise = np.round(np.random.default_rng(number).normal(0, 0.5, image.shape))
        noisy = np.clip(image + noise, 0, 255).astype(np.uint8)
        cv2.imwrite(str(path), cv2.GaussianBlur(noisy, (0, 0), 0.6))


def one_thread(_worker: int) -> None:
    """Make OpenCV of a worker use one thread."""
    cv2.setNumThreads(0)


def plain_batches(plain: Plain) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of the plain loader through one worker, like the DataLoader of the original code."""
    stream = SampleStream(plain, SEED)
    shares = [list(range(first, first + BATCH)) for first in range(0, (TURN + 1) * BATCH, BATCH)]
    loader = DataLoader(stream, batch_sampler=shares, num_workers=1, worker_init_fn=one_thread)
    for images, labels in loader:
        yield images, labels.long()


def our_batches(dataset: CSDataSet) -> Iterator[Any]:
    """Return the batches of this loader through one worker."""
    return train_batches(dataset, SEED, range(TURN + 1), World(0, 1, CPU), Loading(BATCH, workers=1))


def check_same(plain: Plain, dataset: CSDataSet) -> None:
    """Raise AssertionError if the two loaders give different samples."""
    batches = zip(plain_batches(plain), our_batches(dataset), strict=True)
    for _, ((images, labels), ours) in zip(range(4), batches, strict=False):
        off = (images - ours.images).abs()
        assert torch.equal(labels, ours.labels) and off.max() < 1.01 and off.mean() < 0.05


def rate(batches: Iterator[Any]) -> float:
    """Return the samples per second, after the first batch."""
    next(batches)
    begin = time.perf_counter()
    count = sum(BATCH for _ in batches)
    return count / (time.perf_counter() - begin)


class Stopwatch:
    """Measure the milliseconds of stages by name."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


def plain_stages(plain: Plain, index: int, rng: np.random.Generator) -> dict[str, float]:
    """Return the milliseconds of the stages of `Plain.sample`."""
    pair = plain.dataset.pairs[index]
    watch = Stopwatch()
    image = imread(plain.dataset.path(pair.image), cv2.IMREAD_COLOR)
    watch.lap("picture: read and decode")
    ids = imread(plain.dataset.path(pair.label), cv2.IMREAD_GRAYSCALE)
    watch.lap("label: read and decode")
    plain.augment(image, ids, transforms.draw(rng, ids.shape, CROP, True, True))
    watch.lap("after decoding")
    return watch.times


def our_stages(dataset: CSDataSet, index: int, rng: np.random.Generator) -> dict[str, float]:
    """Return the milliseconds of the stages of `CSDataSet.sample`, and of subtracting the mean."""
    pair, reader = dataset.pairs[index], dataset.labels
    mean = torch.from_numpy(dataset.mean)
    watch = Stopwatch()
    picture = pictures.load(dataset.path(pair.image))
    size = picture.height, picture.width
    augmentation = transforms.draw(rng, size, CROP, True, True)
    rows = transforms.rows_needed(size, CROP, augmentation)
    image = pictures.decode_image(picture, rows)
    watch.lap("picture: read and decode")
    encoded = pictures.load(dataset.path(pair.label))
    values = pictures.decode_label(encoded, rows)
    watch.lap("label: read and decode")
    label = reader.train_ids(encoded.path, values)
    image, label, _ = transforms.apply(image, label, size, CROP, augmentation, reader.ignore_label)
    subtract_mean(torch.from_numpy(image[None]), mean)
    watch.lap("after decoding")
    return watch.times


def stages(plain: Plain, dataset: CSDataSet, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each stage: the median over rounds of the mean over samples."""
    turns: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for _ in range(rounds):
        for name in turns:
            total: dict[str, float] = {}
            for k in range(TURN * BATCH):
                rng = np.random.default_rng(k)
                index = k % len(dataset)
                times = (
                    plain_stages(plain, index, rng) if name == "plain" else our_stages(dataset, index, rng)
                )
                total = {stage: total.get(stage, 0.0) + value for stage, value in times.items()}
            turns[name].append({stage: value / (TURN * BATCH) for stage, value in total.items()})
    torch.set_num_threads(threads)
    return {
        name: {stage: statistics.median(turn[stage] for turn in several) for stage in several[0]}
        for name, several in turns.items()
    }


def measured(root: str, rounds: int) -> dict[str, Any]:
    """Return the rates and stages of both loaders."""
    dataset, cached = (CSDataSet(root, crop_size=CROP) for _ in range(2))
    plain = Plain(dataset)
    cached.cache = cache.PictureCache(cache.in_memory(), cache.Plan(cached.sizes(), 32 * cache.GB))
    for index in range(len(cached)):
        cached.sample(index, np.random.default_rng(index))
    check_same(plain, dataset)
    check_same(plain, cached)
    decoder = pictures.pyspng

    def without_libspng() -> Iterator[Any]:
        pictures.pyspng = None
        try:
            yield from our_batches(dataset)
        finally:
            pictures.pyspng = decoder

    runs = {
        "plain": lambda: plain_batches(plain),
        "ours": lambda: our_batches(dataset),
        "ours, OpenCV's decoder": without_libspng,
        "ours, from the cache": lambda: our_batches(cached),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, batches in runs.items():
            rates[name].append(rate(batches()))
        print("  ".join(f"{name} {several[-1]:.1f}" for name, several in rates.items()), flush=True)
    median = {name: statistics.median(several) for name, several in rates.items()}
    times = stages(plain, dataset, rounds)
    ratios = {
        "a sample": median["ours"] / median["plain"],
        "after decoding": times["plain"]["after decoding"] / times["ours"]["after decoding"],
        "from the cache": median["ours, from the cache"] / median["plain"],
        "a sample, OpenCV's decoder": median["ours, OpenCV's decoder"] / median["plain"],
    }
    sizes = [Path(dataset.path(pair.image)).stat().st_size for pair in dataset.pairs]
    return {
        "machine": machine("cpu"),
        "setting": f"{len(dataset)} pictures, PNG of {statistics.mean(sizes) / 1e6:.2f} MB on average, crop "
        f"{CROP[0]}x{CROP[1]}, scale and mirror, one worker, batch {BATCH}",
        "libspng": decoder is not None,
        "samples_per_second": {name: timing.quartiles(several) for name, several in rates.items()},
        "milliseconds": times,
        "ratios": ratios,
        "bars": BARS,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = flags.Parser(prog="python -m benchmarks.loader", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", help="data set in the layout of Cityscapes (default: generated)")
    parser.add_argument(
        "--rounds", type=flags.positive_int, default=7, help="number of measurements (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file to write the results to")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir is None:
            write_frames(Path(folder))
        report = measured(args.data_dir or folder, args.rounds)
    for stage in report["milliseconds"]["plain"]:
        plain, ours = (report["milliseconds"][name][stage] for name in ("plain", "ours"))
        print(f"{stage:<26} plain {plain:6.1f} ms  ours {ours:6.1f} ms  {plain / ours:.2f} times")
    for name, several in report["samples_per_second"].items():
        print(f"{name:<26} {several['median']:.1f} samples/s")
    for name, ratio in report["ratios"].items():
        bar = f" (limit {BARS[name]:g})" if name in BARS else ""
        print(f"{name:<26} {ratio:.2f} times as fast as the plain loader{bar}")
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")
    return int(any(report["ratios"][name] < bar for name, bar in BARS.items()))


if __name__ == "__main__":
    end(main)
