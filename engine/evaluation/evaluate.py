"""Scoring a network on a data set, over one process or several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data.loader import PictureSource, evaluation_pictures
from engine.data.transfer import subtract_mean
from engine.evaluation.metrics import (
    CityscapesEvaluation,
    OfficialScores,
    PictureStatistics,
    confusion_matrix,
)
from engine.inference import NAN_ADVICE, NO_CLASS
from engine.runtime.distributed import World
from utils.errors import DataError, RunError
from utils.files import unwritable
from utils.progress import Progress

#: Called with a picture's name and its prediction, uint8 [h, w]; several at a time, from threads.
Keep = Callable[[str, np.ndarray], None]
#: Threads that score and keep predictions while the next picture is predicted, and predictions that may wait.
THREADS, WAITING = 3, 8


class Result(NamedTuple):
    """Of all pictures: confusion int64 [K, K] (rows = ground truth), and the official scores if asked for."""

    confusion: Tensor
    official: OfficialScores | None


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    source: PictureSource,
    world: World,
    num_classes: int,
    ignore_label: int,
    official: CityscapesEvaluation | None = None,
    batch_size: int = 1,
    workers: int = 0,
    keep: Keep | None = None,
    interrupted: Callable[[], Exception | None] = lambda: None,
) -> Result:
    """Predict every picture of `source` once and score the predictions.

    The result is the same on every process, and for any number of processes: counts are integers, and each
    picture is predicted by one process alone. While one is predicted, workers decode the next ones, and
    threads score and keep the last ones.

    Args:
        predict: images float32 [n, 3, h, w] on the world's device -> classes uint8 [n, h, w].
        official: computes the official scores from label and instance ids, which `source` then has to have.
        batch_size: pictures of equal size that are predicted together.
        workers: processes that read pictures.
        keep: gets every prediction.
        interrupted: asked now and then; an error that it gives is raised on every process.

    Raises:
        DataError: a file can't be used; raised on every process.
        RunError: the network gives NaN, `keep` met a full disk, or a worker was killed.
    """
    device = world.device
    mean = torch.as_tensor(source.mean, dtype=torch.float32, device=device)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    statistics: list[PictureStatistics] = []
    pictures = evaluation_pictures(
        source,
        official is not None,
        world.rank,
        world.size,
        workers,
        pin_memory=device.type == "cuda",
    )
    rounds = -(-len(source) // (world.size * batch_size))
    progress = Progress(len(source))
    with ThreadPoolExecutor(THREADS) as threads:
        waiting: deque[Future] = deque()

        def finish(
            picture: Any, arrived: Callable[[], Tensor], index: int
        ) -> tuple[Tensor | None, PictureStatistics | None]:
            """Keep and score prediction `index` of those that arrive."""
            prediction = arrived()[index]
            if (prediction == NO_CLASS).any():
                raise RunError(f"{picture.name}: the network gives NaN; {NAN_ADVICE}")
            if keep is not None:
                keep(picture.name, prediction.numpy())
            counted = None
            if picture.label is not None:
                counted = confusion_matrix(picture.label, prediction, num_classes, ignore_label)
            if official is None:
                return counted, None
            return counted, _count(official, picture, prediction.numpy())

        def collect(most: int) -> None:
            """Wait until at most so many predictions wait."""
            while len(waiting) > most:
                counted, of_picture = waiting.popleft().result()
                if counted is not None:
                    confusion.add_(counted)
                if of_picture is not None:
                    statistics.append(of_picture)

        for number in range(1, rounds + 1):
            group = [picture for _, picture in zip(range(batch_size), pictures, strict=False)]
            error = next((picture for picture in group if isinstance(picture, Exception)), None)
            try:
                for same_size in _by_size([] if error else group):
                    several = [picture.image for picture in same_size]
                    # One stays in the pinned memory that it came in.
                    images = several[0][None] if len(several) == 1 else torch.stack(several)
                    predictions = predict(subtract_mean(images.to(device, non_blocking=True), mean))
                    # The threads wait for the device; this one gives it the next picture meanwhile.
                    arrived = _to_host(predictions)
                    for index, picture in enumerate(same_size):
                        waiting.append(threads.submit(finish, picture, arrived, index))
                collect(WAITING if number < rounds else 0)
            except (DataError, RunError) as found:
                error = found
            except OSError as found:
                error = unwritable(found)
            error = world.first(interrupted() or error)
            if error is not None:
                threads.shutdown(cancel_futures=True)
                raise error
            if world.is_main:
                progress.show(min(number * world.size * batch_size, len(source)))
    confusion = confusion.to(device)
    world.all_reduce(confusion)
    confusion = confusion.cpu()
    if official is None:
        return Result(confusion, None)
    return Result(confusion, official.scores(world.gather(official.merge(statistics))))


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy to the host's memory; what is returned waits until the copy is there, and gives it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event(blocking=True)
    there.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait


def _count(official: CityscapesEvaluation, picture: Any, prediction: np.ndarray) -> PictureStatistics:
    try:
        return official.count(picture.label_ids.numpy(), picture.instance_ids.numpy(), prediction)
    except ValueError as error:
        raise DataError(f"{picture.name}: {error}; mend the label or instance file") from error


def _by_size(pictures: list[Any]) -> Iterator[list[Any]]:
    sizes = dict.fromkeys(picture.image.shape for picture in pictures)
    for size in sizes:
        yield [picture for picture in pictures if picture.image.shape == size]
