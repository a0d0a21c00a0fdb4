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
from engine.evaluation.bootstrap import Ratios
from engine.evaluation.boundary import BoundaryCounts, count_boundary
from engine.evaluation.calibration import count_confidence
from engine.evaluation.metrics import (
    CityscapesEvaluation,
    OfficialScores,
    PictureStatistics,
    confusion_matrix,
)
from engine.evaluation.pictures import BOUNDARY_F, BOUNDARY_IOU, Pictures, cells_of
from engine.inference import NAN_ADVICE, NO_CLASS
from engine.runtime.distributed import World
from utils.errors import DataError, RunError
from utils.files import unwritable
from utils.progress import Progress

#: Called with the name of a picture and its prediction, uint8 [h, w]; several threads call it concurrently.
Keep = Callable[[str, np.ndarray], None]
#: Classes of images, uint8 [n, h, w]; or classes and confidences [n, h, w].
Predicted = Tensor | tuple[Tensor, Tensor]
#: Number of threads that score and keep predictions, and maximum number of predictions waiting for them.
THREADS, WAITING = 3, 8


class Result(NamedTuple):
    """Result of an evaluation.

    Attributes:
        confusion: confusion matrix of all pictures in pixels, int64 [K, K]; rows are labels, columns are
            predictions.
        official: the official Cityscapes scores; None if they were not computed.
        pictures: confusion matrix and other scores of each picture; without pictures, if they have no labels.
        calibration: counts of `calibration.count_confidence` over all pictures, [3, BINS]; None if there are
            no confidences.
    """

    confusion: Tensor
    official: OfficialScores | None
    pictures: Pictures
    calibration: np.ndarray | None = None


class More(NamedTuple):
    """Scores to compute besides the confusion matrices.

    Attributes:
        official: computes the official scores, for which the source needs label ids and instance ids.
        boundary: whether to compute the boundary scores.
    """

    official: CityscapesEvaluation | None = None
    boundary: bool = False


#: The confusion matrices alone.
NOTHING_MORE = More()


class _Counts(NamedTuple):
    """Counts of one picture, whose index in the data set is `number`."""

    number: int
    name: str
    cells: tuple[np.ndarray, np.ndarray]  # of the confusion matrix (see `cells_of`)
    statistics: PictureStatistics | None
    boundary: BoundaryCounts | None
    calibration: np.ndarray | None


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Predicted],
    source: PictureSource,
    world: World,
    loading: Loading,
    more: More = NOTHING_MORE,
    keep: Keep | None = None,
    interrupted: Callable[[], Exception | None] = lambda: None,
) -> Result:
    """Predict every picture of `source` once and score the predictions.

    The result is the same on every process and for any number of processes: each picture is predicted by one
    process, and the pictures are added up in the order of the data set. While a picture is predicted, data
    workers decode the next pictures, and threads score the previous pictures.

    Args:
        predict: function that maps images, float32 [n, 3, h, w] on the device of the process, to classes,
            uint8 [n, h, w], or to classes and their probabilities [n, h, w], from which the calibration is
            computed.
        source: pictures and labels.
        world: processes that share the pictures.
        loading: maximum number of pictures of equal size to predict together, and number of data workers.
        more: scores to compute besides the confusion matrices.
        keep: function that is called with every prediction.
        interrupted: function that is called between pictures. A returned error is raised on every process.

    Raises:
        DataError: a file can't be used; raised on every process.
        RunError: the network returns NaN, `keep` can't write its file, or a data worker was killed.
    """
    device = world.device
    mean = torch.as_tensor(source.mean, dtype=torch.float32, device=device)
    loaded = evaluation_pictures(source, more.official is not None, world, loading.workers)
    pictures = zip(range(world.rank, len(source), world.size), loaded, strict=False)
    rounds = -(-len(source) // (world.size * loading.batch_size))
    progress = Progress(len(source))
    with ThreadPoolExecutor(THREADS) as threads:
        scoring = _Scoring(threads, source, more, keep)
        for number in range(1, rounds + 1):
            group = [picture for _, picture in zip(range(loading.batch_size), pictures, strict=False)]
            error = next((picture for _, picture in group if isinstance(picture, Exception)), None)
            try:
                for same_size in _by_size([] if error else group):
                    several = [picture.image for _, picture in same_size]
                    # torch.stack would copy a single picture out of its pinned memory.
                    images = several[0][None] if len(several) == 1 else torch.stack(several)
                    predicted = predict(subtract_mean(images.to(device, non_blocking=True), mean))
                    parts = predicted if isinstance(predicted, tuple) else (predicted,)
                    scoring.add(same_size, [to_host(part) for part in parts])
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
    counted = [counts for share in world.gather(scoring.counted) for counts in share]
    return _result(sorted(counted, key=lambda counts: counts.number), source.num_classes, more.official)


def _result(counted: list[_Counts], num_classes: int, official: CityscapesEvaluation | None) -> Result:
    """Add up what was counted in the pictures of all processes."""
    others: dict[str, Ratios] = {}
    boundary = [counts.boundary for counts in counted if counts.boundary is not None]
    if boundary:
        intersection, union, f, scored = (np.stack(part) for part in zip(*boundary, strict=True))
        others |= {
            BOUNDARY_IOU: Ratios(intersection, union),
            BOUNDARY_F: Ratios(f, scored.astype(np.int64)),
        }
    scores = None
    statistics = [counts.statistics for counts in counted if counts.statistics is not None]
    if official is not None:
        scores = official.scores(statistics)
        others |= official.ratios(statistics)
    names, cells = [counts.name for counts in counted], [counts.cells for counts in counted]
    pictures = Pictures.of_cells(names, num_classes, cells, others)
    calibration = [counts.calibration for counts in counted if counts.calibration is not None]
    return Result(pictures.confusion(), scores, pictures, np.sum(calibration, 0) if calibration else None)


class _Scoring:
    """Score and keep predictions in threads, while this process predicts the next picture."""

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        source: PictureSource,
        more: More,
        keep: Keep | None,
    ):
        self.threads = threads
        self.source = source
        self.more = more
        self.keep = keep
        self.counted: list[_Counts] = []
        self._waiting: deque[Future] = deque()

    def add(self, pictures: list[tuple[int, Any]], arrived: list[Callable[[], Tensor]]) -> None:
        """Queue pictures for scoring.

        Args:
            pictures: index in the data set, and picture.
            arrived: functions that block until the classes, and the confidences if there are some, are on the
                host.
        """
        for index, (number, picture) in enumerate(pictures):
            self._waiting.append(self.threads.submit(self._score, number, picture, arrived, index))

    def collect(self, most: int) -> None:
        """Collect counts until at most `most` predictions are waiting."""
        while len(self._waiting) > most:
            counts = self._waiting.popleft().result()
            if counts is not None:
                self.counted.append(counts)

    def _score(
        self, number: int, picture: Any, arrived: list[Callable[[], Tensor]], index: int
    ) -> _Counts | None:
        prediction, *confidences = (part()[index] for part in arrived)
        if (prediction == NO_CLASS).any():
            raise RunError(f"{picture.name}: the network returns NaN; {NAN_ADVICE}")
        if any(each.isnan().any() for each in confidences):
            raise RunError(f"{picture.name}: the network returns infinite logits; {NAN_ADVICE}")
        if self.keep is not None:
            self.keep(picture.name, prediction.numpy())
        if picture.label is None:
            return None
        num_classes, ignore_label = self.source.num_classes, self.source.ignore_label
        confusion = confusion_matrix(picture.label, prediction, num_classes, ignore_label)
        label, classes = picture.label.numpy(), prediction.numpy()
        official, boundary = self.more
        return _Counts(
            number,
            picture.name,
            cells_of(confusion),
            None if official is None else _count(official, picture, classes),
            count_boundary(label, classes, num_classes, ignore_label) if boundary else None,
            next(
                (count_confidence(label, classes, each.numpy(), ignore_label) for each in confidences), None
            ),
        )


def _count(official: CityscapesEvaluation, picture: Any, prediction: np.ndarray) -> PictureStatistics:
    try:
        return official.count(picture.label_ids.numpy(), picture.instance_ids.numpy(), prediction)
    except ValueError as error:
        raise DataError(f"{picture.name}: {error}; correct the label or instance file") from error


def _by_size(pictures: list[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Yield the pictures, with their indices, in groups of equal size."""
    sizes = dict.fromkeys(picture.image.shape for _, picture in pictures)
    for size in sizes:
        yield [each for each in pictures if each[1].image.shape == size]
