"""Evaluation of a network on a data set, by one process or several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.data.loader import Loading, PictureSource, evaluation_pictures
from engine.data.transfer import subtract_mean, to_host
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

#: Called with the name of a picture and its prediction, uint8 [h, w]; several threads call it concurrently.
Keep = Callable[[str, np.ndarray], None]
#: Number of threads that score and keep predictions, and maximum number of predictions waiting for them.
THREADS, WAITING = 3, 8


class Result(NamedTuple):
    """Result of an evaluation.

    Attributes:
        confusion: confusion matrix of all pictures in pixels, int64 [K, K]; rows are labels, columns are
            predictions.
        official: the official Cityscapes scores; None if they were not computed.
    """

    confusion: Tensor
    official: OfficialScores | None


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    source: PictureSource,
    world: World,
    loading: Loading,
    official: CityscapesEvaluation | None = None,
    keep: Keep | None = None,
    interrupted: Callable[[], Exception | None] = lambda: None,
) -> Result:
    """Predict every picture of `source` once and score the predictions.

    The result is the same on every process and for any number of processes: counts are integers, and each
    picture is predicted by one process. While a picture is predicted, data workers decode the next pictures,
    and threads score the previous pictures.

    Args:
        predict: function that maps images, float32 [n, 3, h, w] on the device of the process, to classes,
            uint8 [n, h, w].
        source: pictures and labels.
        world: processes that share the pictures.
        loading: maximum number of pictures of equal size to predict together, and number of data workers.
        official: computes the official scores, for which `source` needs label ids and instance ids.
        keep: function that is called with every prediction.
        interrupted: function that is called between pictures. A returned error is raised on every process.

    Raises:
        DataError: a file can't be used; raised on every process.
        RunError: the network returns NaN, `keep` can't write its file, or a data worker was killed.
    """
    device = world.device
    mean = torch.as_tensor(source.mean, dtype=torch.float32, device=device)
    pictures = evaluation_pictures(source, official is not None, world, loading.workers)
    rounds = -(-len(source) // (world.size * loading.batch_size))
    progress = Progress(len(source))
    with ThreadPoolExecutor(THREADS) as threads:
        scoring = _Scoring(threads, source, official, keep)
        for number in range(1, rounds + 1):
            group = [picture for _, picture in zip(range(loading.batch_size), pictures, strict=False)]
            error = next((picture for picture in group if isinstance(picture, Exception)), None)
            try:
                for same_size in _by_size([] if error else group):
                    several = [picture.image for picture in same_size]
                    # torch.stack would copy a single picture out of its pinned memory.
                    images = several[0][None] if len(several) == 1 else torch.stack(several)
                    predictions = predict(subtract_mean(images.to(device, non_blocking=True), mean))
                    scoring.add(same_size, to_host(predictions))
                scoring.collect(WAITING if number < rounds else 0)
            except (DataError, RunError) as found:
                error = found
            except OSError as found:
                error = unwritable(found)
            error = world.first(interrupted() or error)
            if error is not None:
                threads.shutdown(cancel_futures=True)
                raise error
            if world.is_main:
                progress.show(min(number * world.size * loading.batch_size, len(source)))
    confusion = scoring.confusion.to(device)
    world.all_reduce(confusion)
    confusion = confusion.cpu()
    if official is None:
        return Result(confusion, None)
    return Result(confusion, official.scores(world.gather(official.merge(scoring.statistics))))


class _Scoring:
    """Score and keep predictions in threads, while this process predicts the next picture."""

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        source: PictureSource,
        official: CityscapesEvaluation | None,
        keep: Keep | None,
    ):
        self.threads = threads
        self.source = source
        self.official = official
        self.keep = keep
        self.confusion = torch.zeros(source.num_classes, source.num_classes, dtype=torch.int64)
        self.statistics: list[PictureStatistics] = []
        self._waiting: deque[Future] = deque()

    def add(self, pictures: list[Any], arrived: Callable[[], Tensor]) -> None:
        """Queue pictures for scoring. `arrived` blocks until their predictions are on the host."""
        for index, picture in enumerate(pictures):
            self._waiting.append(self.threads.submit(self._score, picture, arrived, index))

    def collect(self, most: int) -> None:
        """Add up scores until at most `most` predictions are waiting."""
        while len(self._waiting) > most:
            counted, of_picture = self._waiting.popleft().result()
            if counted is not None:
                self.confusion.add_(counted)
            if of_picture is not None:
                self.statistics.append(of_picture)

    def _score(
        self, picture: Any, arrived: Callable[[], Tensor], index: int
    ) -> tuple[Tensor | None, PictureStatistics | None]:
        prediction = arrived()[index]
        if (prediction == NO_CLASS).any():
            raise RunError(f"{picture.name}: the network returns NaN; {NAN_ADVICE}")
        if self.keep is not None:
            self.keep(picture.name, prediction.numpy())
        counted = None
        if picture.label is not None:
            counted = confusion_matrix(
                picture.label, prediction, self.source.num_classes, self.source.ignore_label
            )
        if self.official is None:
            return counted, None
        return counted, _count(self.official, picture, prediction.numpy())


def _count(official: CityscapesEvaluation, picture: Any, prediction: np.ndarray) -> PictureStatistics:
    try:
        return official.count(picture.label_ids.numpy(), picture.instance_ids.numpy(), prediction)
    except ValueError as error:
        raise DataError(f"{picture.name}: {error}; correct the label or instance file") from error


def _by_size(pictures: list[Any]) -> Iterator[list[Any]]:
    """Yield the pictures in groups of equal size."""
    sizes = dict.fromkeys(picture.image.shape for picture in pictures)
    for size in sizes:
        yield [picture for picture in pictures if picture.image.shape == size]
