"""Confusion matrix, intersection over union (IoU), and the four scores of the Cityscapes benchmark.

The benchmark scores classes and categories (groups of classes), each by IoU and by instance-level IoU (iIoU).
In the iIoU, small and large objects of a class have equal weight.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
import torch

from engine.evaluation.bootstrap import Ratios
from engine.evaluation.pictures import CATEGORY_INSTANCE_IOU, CATEGORY_IOU, INSTANCE_IOU


def confusion_matrix(
    label: torch.Tensor, prediction: torch.Tensor, num_classes: int, ignore_label: int = 255
) -> torch.Tensor:
    """Count the pixels of each pair of true and predicted class.

    Args:
        label: integer tensor of any shape, class of each pixel or `ignore_label`.
        prediction: integer tensor of the same shape and device, classes 0..num_classes-1.
        num_classes: number of classes, K.
        ignore_label: label of the pixels that are not counted.

    Returns:
        int64 [K, K] on the device of the label; rows are ground truth, columns are predictions.

    Raises:
        ValueError: the shapes differ, a tensor is not of an integer type, or a value is out of range.
    """
    if label.shape != prediction.shape:
        raise ValueError(
            f"label is {tuple(label.shape)} and prediction is {tuple(prediction.shape)}; same shape expected"
        )
    for name, tensor in (("label", label), ("prediction", prediction)):
        if tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; class indices of an integer type expected")
    # Convert before any arithmetic: labels have eight bits, and K * K does not fit in them.
    label, prediction = label.to(torch.int64).flatten(), prediction.to(torch.int64).flatten()
    if ((prediction < 0) | (prediction >= num_classes)).any():
        raise ValueError(f"the prediction holds values outside of 0..{num_classes - 1}")
    kept = label != ignore_label
    label, prediction = label[kept], prediction[kept]
    if ((label < 0) | (label >= num_classes)).any():
        raise ValueError(
            f"the label holds values that are neither in 0..{num_classes - 1} nor {ignore_label} (ignored)"
        )
    pairs = torch.bincount(label * num_classes + prediction, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def iou_per_class(confusion: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union of each class.

    Args:
        confusion: [K, K]; rows are ground truth, columns are predictions.

    Returns:
        float64 [K]. A class that occurs neither in the labels nor in the predictions has nan. A class that
        was predicted but does not occur in the labels has 0.
    """
    confusion = confusion.to(torch.float64)
    intersection = confusion.diagonal()
    union = confusion.sum(dim=1) + confusion.sum(dim=0) - intersection
    return intersection / union  # 0 / 0 is nan, as documented


def mean_iou(confusion: torch.Tensor) -> float:
    """Return the mean IoU over the classes that occur in labels or predictions; nan if there are none.

    Args:
        confusion: [K, K]; rows are ground truth, columns are predictions.
    """
    return torch.nanmean(iou_per_class(confusion)).item()


#: Mean size in pixels of one instance of each class in the Cityscapes training set. The pixels of a smaller
#: instance weigh more than 1, those of a larger one less.
#: Source: constants of the official evaluation, evalPixelLevelSemanticLabeling.py of cityscapesScripts.
AVERAGE_INSTANCE_SIZE = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "caravan": 36771.8241758242,
    "trailer": 16926.9763313609,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}

#: Instance maps hold `label id * 1000 + number` for single objects. Everything else has the plain label id,
#: including groups of objects that can't be told apart.
INSTANCES_PER_LABEL = 1000


class LabelRow(Protocol):
    """A row of the label table, with the columns that the scores need (dataset.labels.Label is one)."""

    @property
    def name(self) -> str:
        """Name of the label."""
        ...

    @property
    def id(self) -> int:
        """Value in the label pictures."""
        ...

    @property
    def train_id(self) -> int:
        """Class index that the network is trained with, or the ignore label."""
        ...

    @property
    def category(self) -> str:
        """Name of the category, a group of labels."""
        ...

    @property
    def has_instances(self) -> bool:
        """Whether instance maps give each single object of this label its own id."""
        ...


class PictureStatistics(NamedTuple):
    """Statistics of one or more pictures for the official scores; small and picklable.

    Attributes:
        confusion: int64 [I, I] over the I label ids (34 in Cityscapes); rows are ground truth, columns are
            predictions.
        instances: int64 [n, 4], one row for each object of an evaluated class. Columns 0 and 1 are the label
            id and the size in pixels. Column 2 is the number of pixels predicted as the class of the object,
            column 3 the number of pixels predicted as any class of its category.
    """

    confusion: np.ndarray
    instances: np.ndarray


class PixelScores(TypedDict):
    """Pixel scores in 0..1, named as in the result file of the official evaluation.

    The score is None for a class or category without any pixel to score.
    """

    averageScoreClasses: float | None
    averageScoreCategories: float | None
    classScores: dict[str, float | None]
    categoryScores: dict[str, float | None]


class OfficialScores(PixelScores, total=False):
    """Pixel scores and, if there are instance ids, instance scores (iIoU)."""

    averageScoreInstClasses: float | None
    averageScoreInstCategories: float | None
    classInstScores: dict[str, float | None]
    categoryInstScores: dict[str, float | None]


class CityscapesEvaluation:
    """Compute the official Cityscapes scores: IoU and iIoU of classes and of categories.

    The score of a class or category is TP / (TP + FN + FP): the numbers of true positive, false negative and
    false positive pixels. These rules apply:

    - Pixels whose ground truth is an ignored class are not counted. Where the ground truth is an evaluated
      class, the prediction of an ignored class is an FN.
    - For the IoU, a category consists of its evaluated classes.
    - For the iIoU, TP and FN are summed over single instances. The weight of an instance is the average size
      of instances of its class, divided by the size of the instance. FP is an unweighted number of pixels.
      Groups of objects give neither TP nor FN.
    - A category has an iIoU only if all its classes have instances. In this iIoU, the prediction of an
      ignored class counts for its category. For example, `caravan` is an ignored class of `vehicle`. A pixel
      predicted as `caravan` is a TP of `vehicle` if its label is `car`, and an FP if its label is `road`.
    - A score whose denominator is 0 does not exist. Averages are over the scores that exist.

    Statistics may be collected in any order and by any number of processes. The scores are bit-identical,
    because pixels are summed as integers, and weighted pixels by `math.fsum`, which rounds once.

    Source: evalPixelLevelSemanticLabeling.py of cityscapesScripts 2.3.0.

    Args:
        labels: the label table, ids 0..I-1 in any order; train ids of the evaluated classes are 0..K-1.
        ignore_label: train id of the classes that are not evaluated.

    Raises:
        ValueError: the ids or train ids are not consecutive from 0, or an evaluated class with instances has
            no published average size.
    """

    def __init__(self, labels: Sequence[LabelRow], ignore_label: int = 255) -> None:
        labels = sorted(labels, key=lambda row: row.id)
        trained = sorted(
            (row for row in labels if row.train_id != ignore_label), key=lambda row: row.train_id
        )
        if [row.id for row in labels] != list(range(len(labels))):
            raise ValueError("the label table has to hold each id from 0 on exactly once")
        if [row.train_id for row in trained] != list(range(len(trained))):
            raise ValueError("the label table has to hold each train id from 0 on exactly once")
        self._names = [row.name for row in labels]
        self._id_of_train_id = np.array([row.id for row in trained], dtype=np.uint8)  # [K]
        self._evaluated = np.array([row.train_id != ignore_label for row in labels])  # bool [I]
        self._scored_instances = self._evaluated & np.array([row.has_instances for row in labels])  # bool [I]
        # nan for the classes without instances, which have no weights
        self._average_size = np.array([AVERAGE_INSTANCE_SIZE.get(name, math.nan) for name in self._names])
        if np.isnan(self._average_size[self._scored_instances]).any():
            raise ValueError(f"average instance sizes are known for {', '.join(AVERAGE_INSTANCE_SIZE)} only")
        self._only = dict(zip(self._names, np.eye(len(labels), dtype=bool), strict=True))  # bool [I] each
        category = np.array([row.category for row in labels])
        self._same_category = category[:, None] == category  # bool [I, I]
        self._members = {str(name): category == name for name in dict.fromkeys(category)}  # bool [I] each
        without_instances = {row.category for row in labels if not row.has_instances}
        self._instance_categories = self._members.keys() - without_instances

    def count(
        self, label_ids: np.ndarray, instance_ids: np.ndarray, prediction: np.ndarray
    ) -> PictureStatistics:
        """Return the statistics of one picture, from a prediction of train ids.

        Args:
            label_ids: ground truth label ids (`*_labelIds.png`), integers [h, w]. 255 stands for the license
                plate (id -1 in eight bits), which is ignored.
            instance_ids: ground truth instances (`*_instanceIds.png`), integers [h, w].
            prediction: train ids 0..K-1, integers [h, w], as the network predicts them.

        Raises:
            ValueError: the shapes differ, a value is out of range, or a label id or instance id belongs to no
                class of the label table.
        """
        _check_range("prediction", prediction, len(self._id_of_train_id))
        return self.count_label_ids(label_ids, instance_ids, self._id_of_train_id[prediction])

    def count_label_ids(
        self, label_ids: np.ndarray, instance_ids: np.ndarray, predicted_ids: np.ndarray
    ) -> PictureStatistics:
        """Return the statistics of one picture, from a prediction of label ids.

        Args:
            label_ids: see `count`.
            instance_ids: see `count`.
            predicted_ids: label ids 0..I-1, integers [h, w], as submitted to the benchmark server.

        Raises:
            ValueError: see `count`.
        """
        shapes = [picture.shape for picture in (label_ids, instance_ids, predicted_ids)]
        if len(set(shapes)) != 1:
            raise ValueError(f"label, instance and prediction picture differ in size: {shapes}")
        num_ids = len(self._names)
        _check_range("label picture", label_ids, 256)
        _check_range("instance picture", instance_ids, 1 << 16)
        _check_range("prediction", predicted_ids, num_ids)
        label_ids, instance_ids, predicted_ids = (
            np.ravel(p) for p in (label_ids, instance_ids, predicted_ids)
        )

        pairs = np.bincount(label_ids.astype(np.intp) * num_ids + predicted_ids, minlength=256 * num_ids)
        pairs = pairs.reshape(256, num_ids)
        unknown = num_ids + np.flatnonzero(pairs[num_ids:255].any(axis=1))
        if unknown.size:
            raise ValueError(f"the label picture holds {unknown.tolist()}, which are no label ids")

        # A histogram of the predictions of each instance gives its size and its hits without a loop.
        single = np.flatnonzero(instance_ids > INSTANCES_PER_LABEL)
        instance_of_pixel, predicted_ids = instance_ids[single], predicted_ids[single]
        present = np.flatnonzero(np.bincount(instance_of_pixel))
        position = np.zeros(1 << 16, dtype=np.intp)
        position[present] = np.arange(len(present))
        histogram = np.bincount(
            position[instance_of_pixel] * num_ids + predicted_ids, minlength=len(present) * num_ids
        ).reshape(len(present), num_ids)
        label_of = present // INSTANCES_PER_LABEL
        # An instance must be of a known class that has instances or is ignored.
        unscorable = np.append(self._evaluated & ~self._scored_instances, True)
        unknown = present[unscorable[np.minimum(label_of, num_ids)]]
        if unknown.size:
            raise ValueError(f"the instance picture holds {unknown.tolist()}, of no class that has instances")
        kept = self._scored_instances[label_of]
        histogram, label_of = histogram[kept], label_of[kept]
        hits = histogram[np.arange(len(label_of)), label_of]
        category_hits = (histogram * self._same_category[label_of]).sum(axis=1)
        instances = np.stack([label_of, histogram.sum(axis=1), hits, category_hits], axis=1)
        return PictureStatistics(pairs[:num_ids].astype(np.int64), instances.astype(np.int64))

    def merge(self, statistics: Iterable[PictureStatistics]) -> PictureStatistics:
        """Return the statistics of several pictures together; all zero if there are none."""
        confusion = np.zeros((len(self._names),) * 2, dtype=np.int64)
        instances = [np.zeros((0, 4), dtype=np.int64)]
        for picture in statistics:
            confusion += picture.confusion
            instances.append(picture.instances)
        return PictureStatistics(confusion, np.concatenate(instances))

    def scores(self, statistics: Iterable[PictureStatistics]) -> OfficialScores:
        """Return the scores over all pictures together, as a JSON-serializable dict.

        The score is None for an ignored label.
        """
        confusion, instances = self.merge(statistics)
        label_of, size, hits, category_hits = instances.T
        weight = self._average_size[label_of] / size

        def instance_score(members: np.ndarray, hits: np.ndarray) -> float | None:
            of_members = members[label_of]
            hit = math.fsum((weight * hits)[of_members].tolist())
            missed = math.fsum((weight * (size - hits))[of_members].tolist())
            return _ratio(hit, missed, self._false_positives(confusion, members))

        with_instances = [self._names[i] for i in np.flatnonzero(self._scored_instances)]
        class_instances = dict.fromkeys(self._names) | {
            name: instance_score(self._only[name], hits) for name in with_instances
        }
        category_instances = dict.fromkeys(self._members) | {
            name: instance_score(self._members[name], category_hits) for name in self._instance_categories
        }
        return {
            **self._scores_of_pixels(confusion),
            "averageScoreInstClasses": _mean_of_existing(class_instances.values()),
            "averageScoreInstCategories": _mean_of_existing(category_instances.values()),
            "classInstScores": class_instances,
            "categoryInstScores": category_instances,
        }

    def ratios(self, statistics: Sequence[PictureStatistics]) -> dict[str, Ratios]:
        """Return numerators and denominators of official scores for each picture.

        Those of INSTANCE_IOU, float64 [P, K], are in the order of the train ids; the denominators of classes
        without instances are 0. Those of CATEGORY_IOU and CATEGORY_INSTANCE_IOU are in the order of the
        categories with such a score. Summed over the pictures, they give the values of `scores` up to
        rounding.
        """
        confusions = np.array([picture.confusion for picture in statistics], np.int64)
        confusions = confusions.reshape(-1, len(self._names), len(self._names))
        counts = [len(picture.instances) for picture in statistics]
        instances = np.concatenate([np.zeros((0, 4), np.int64), *(each.instances for each in statistics)])
        label_of, size, hits, category_hits = instances.T
        weight = self._average_size[label_of] / size
        picture = np.repeat(np.arange(len(statistics)), counts)

        def false_positives(members: np.ndarray) -> np.ndarray:
            return confusions[:, self._evaluated & ~members][:, :, members].sum((1, 2))

        def of_instances(members: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            chosen = members[label_of]
            values = (weight * hits)[chosen], (weight * size)[chosen]
            hit, total = (np.bincount(picture[chosen], value, len(statistics)) for value in values)
            return hit, total + false_positives(members)

        def of_pixels(members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            members = members & self._evaluated
            hit = confusions[:, members][:, :, members].sum((1, 2))
            return hit, confusions[:, members].sum((1, 2)) + false_positives(members)

        def together(several: list[tuple[np.ndarray, np.ndarray]]) -> Ratios:
            numerators, denominators = zip(*several, strict=True)
            return Ratios(np.stack(numerators, 1), np.stack(denominators, 1))

        nothing = np.zeros(len(statistics)), np.zeros(len(statistics))
        return {
            INSTANCE_IOU: together(
                [
                    of_instances(self._only[self._names[index]], hits)
                    if self._scored_instances[index]
                    else nothing
                    for index in self._id_of_train_id
                ]
            ),
            CATEGORY_IOU: together([of_pixels(members) for members in self._members.values()]),
            CATEGORY_INSTANCE_IOU: together(
                [
                    of_instances(self._members[name], category_hits)
                    for name in sorted(self._instance_categories)
                ]
            ),
        }

    def pixel_scores(self, confusion: torch.Tensor) -> PixelScores:
        """Return the scores that need no instances.

        The scores equal those that `scores` returns, because the network predicts train ids only, and pixels
        of ignored ground truth are not counted.

        Args:
            confusion: [K, K] over train ids; rows are ground truth, columns are predictions.
        """
        ids = self._id_of_train_id
        of_ids = np.zeros((len(self._names),) * 2, dtype=np.int64)
        of_ids[np.ix_(ids, ids)] = confusion.numpy()
        return self._scores_of_pixels(of_ids)

    def _scores_of_pixels(self, confusion: np.ndarray) -> PixelScores:
        """Return the pixel scores of a confusion matrix int64 [I, I] over label ids."""

        def score(members: np.ndarray) -> float | None:
            members = members & self._evaluated
            hit = int(confusion[members][:, members].sum())
            missed = int(confusion[members].sum()) - hit
            return _ratio(hit, missed, self._false_positives(confusion, members))

        classes = {name: score(self._only[name]) for name in self._names}
        categories = {name: score(members) for name, members in self._members.items()}
        return {
            "averageScoreClasses": _mean_of_existing(classes.values()),
            "averageScoreCategories": _mean_of_existing(categories.values()),
            "classScores": classes,
            "categoryScores": categories,
        }

    def _false_positives(self, confusion: np.ndarray, members: np.ndarray) -> int:
        return int(confusion[self._evaluated & ~members][:, members].sum())


def _check_range(name: str, values: np.ndarray, upper: int) -> None:
    if values.dtype.kind not in "iu":
        raise ValueError(f"the {name} is {values.dtype}; integers expected")
    if values.size and (values.min() < 0 or values.max() >= upper):
        raise ValueError(f"the {name} holds values {values.min()}..{values.max()}; 0..{upper - 1} expected")


def _ratio(hit: float, missed: float, false_positive: int) -> float | None:
    denominator = hit + missed + false_positive
    return hit / denominator if denominator > 0 else None


def _mean_of_existing(values: Iterable[float | None]) -> float | None:
    existing = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(existing) / len(existing) if existing else None


def format_confusion(names: Sequence[str], confusion: torch.Tensor) -> str:
    """Format a confusion matrix as text, in percent of the pixels of each true class.

    Rows are true classes, and columns are predicted classes; both have the class index as a heading. A class
    that occurs in no label has "-" in its row. Values that round to 0 are dots.

    Args:
        names: names of the K classes.
        confusion: [K, K]; rows are ground truth, columns are predictions.
    """
    width = max(len(name) for name in names)
    shares = 100 * confusion.to(torch.float64) / confusion.sum(1, keepdim=True)
    lines = [
        "percent of the pixels of each true class (rows) that were predicted as each class (columns)",
        " " * (width + 4) + "".join(f"{number:>6}" for number in range(len(names))),
    ]
    for number, (name, row) in enumerate(zip(names, shares.tolist(), strict=True)):
        cells = ("-" if math.isnan(share) else f"{share:.1f}" if share >= 0.05 else "." for share in row)
        lines.append(f"{number:>3} {name:<{width}}" + "".join(f"{cell:>6}" for cell in cells))
    return "\n".join(lines)


def format_table(
    names: Sequence[str],
    iou: Iterable[float | None],
    instance_iou: Iterable[float | None] | None = None,
    intervals: Sequence[tuple[float, float] | None] | None = None,
    others: Mapping[str, Iterable[float | None]] = MappingProxyType({}),
) -> str:
    """Format scores as text in percent: one line per class, then the mean over the classes with a score.

    Args:
        names: names of the K classes.
        iou: K scores in 0..1; nan or None (no score) is shown as "-".
        instance_iou: K instance scores for a column iIoU, or None for a table without this column.
        intervals: K + 1 intervals of the IoU and of its mean for a column, or None for a table without it.
        others: K scores of further columns by their titles.

    Raises:
        ValueError: a column does not have K scores.
    """
    columns = {"IoU": list(iou)}
    if instance_iou is not None:
        columns["iIoU"] = list(instance_iou)
    columns |= {title: list(values) for title, values in others.items()}
    for title, values in columns.items():
        if len(values) != len(names):
            raise ValueError(f"{len(values)} values of {title} for {len(names)} classes")

    def percent(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"

    cells = {
        title: [title, *map(percent, values), percent(_mean_of_existing(values))]
        for title, values in columns.items()
    }
    if intervals is not None:
        texts = ["-" if each is None else f"{100 * each[0]:.2f} - {100 * each[1]:.2f}" for each in intervals]
        # Next to the score that the intervals are about.
        cells = {"IoU": cells.pop("IoU"), "interval": ["95 % interval", *texts], **cells}
    width = max(len(name) for name in (*names, "class"))
    lines = [f"{name:<{width}}" for name in ("class", *names, "mean")]
    for column in cells.values():
        extent = max(6, *map(len, column))
        lines = [f"{line}  {cell:>{extent}}" for line, cell in zip(lines, column, strict=True)]
    return "\n".join(lines)
