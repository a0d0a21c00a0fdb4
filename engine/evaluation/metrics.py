"""Scores of a segmentation: confusion matrix, IoU, and the four scores of the Cityscapes benchmark."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
import torch


def confusion_matrix(
    label: torch.Tensor, prediction: torch.Tensor, num_classes: int, ignore_label: int = 255
) -> torch.Tensor:
    """Count the pixels of each pair of true and predicted class.

    Args:
        label: integer tensor of any shape, class of each pixel or `ignore_label`.
        prediction: integer tensor of the same shape and device, classes 0..num_classes-1.
        num_classes: K.
        ignore_label: pixels that carry this label are left out, whatever was predicted there.

    Returns:
        int64 [K, K] on the device of the label, rows = ground truth, columns = prediction.

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
    # Both are widened before any arithmetic: K * K does not fit in the eight bits labels are stored in.
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
    """Intersection over union of each class, float64 [K], of a confusion matrix [K, K] (rows = ground truth).

    A class that occurs neither in the labels nor in the predictions has no score: nan. One that was predicted
    but never occurs in the labels has 0.
    """
    confusion = confusion.to(torch.float64)
    intersection = confusion.diagonal()
    union = confusion.sum(dim=1) + confusion.sum(dim=0) - intersection
    return intersection / union  # 0 / 0 is the wanted nan


def mean_iou(confusion: torch.Tensor) -> float:
    """Mean of `iou_per_class` over the classes that occur in labels or predictions; nan where none does."""
    return torch.nanmean(iou_per_class(confusion)).item()


#: Mean size in pixels of one instance of a class in the Cityscapes training set: the published constants of
#: the official evaluation (evalPixelLevelSemanticLabeling.py of cityscapesScripts). An instance smaller than
#: this counts for more than its pixels, a larger one for less.
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

#: Instance maps hold `label id * 1000 + number` for single objects, and the bare label id for everything
#: else, which includes groups of objects that cannot be told apart.
INSTANCES_PER_LABEL = 1000


class LabelRow(Protocol):
    """What the scores need from one row of the label table (`dataset.labels.Label` has it)."""

    @property
    def name(self) -> str: ...
    @property
    def id(self) -> int: ...
    @property
    def train_id(self) -> int: ...
    @property
    def category(self) -> str: ...
    @property
    def has_instances(self) -> bool: ...


class PictureStatistics(NamedTuple):
    """All that the official scores need to know about one picture, or several together; small and picklable.

    I is the number of label ids (34). A row of `instances` is one object of an evaluated class: its label id,
    its size in pixels, how many of them were predicted as its class, and how many as any of its category.
    """

    confusion: np.ndarray  # int64 [I, I] over label ids, rows = ground truth, columns = prediction
    instances: np.ndarray  # int64 [n, 4]


class PixelScores(TypedDict):
    """Scores in 0..1, or None where there is nothing to score; names as in the official evaluation's file."""

    averageScoreClasses: float | None
    averageScoreCategories: float | None
    classScores: dict[str, float | None]
    categoryScores: dict[str, float | None]


class OfficialScores(PixelScores, total=False):
    """Those of pixels, and those of instances where there are instance ids."""

    averageScoreInstClasses: float | None
    averageScoreInstCategories: float | None
    classInstScores: dict[str, float | None]
    categoryInstScores: dict[str, float | None]


class CityscapesEvaluation:
    """The official Cityscapes scores: of classes and of categories, by pixels (IoU) and by instances (iIoU).

    The rules are those of evalPixelLevelSemanticLabeling.py (cityscapesScripts 2.3.0). Per class or category
    the score is TP / (TP + FN + FP), where

    - ground truth of an ignored class counts nowhere; a prediction of an ignored class elsewhere is an FN;
    - the members of a category are, for the IoU, its evaluated classes;
    - for the iIoU, TP and FN are summed over single instances, each weighted with the average size of its
      class / its own size, while FP stays a plain number of pixels. Groups of objects give neither TP nor FN.
      Only categories all of whose classes have instances are scored, and here their ignored classes do count
      as predictions: a caravan predicted on a car is right for `vehicle`, on a road it is an FP;
    - a score with an empty denominator does not exist, and averages go over those that do.

    Statistics may be taken in any order and by any number of processes: the scores are the same to the last
    bit, since pixels are summed as integers and weighted pixels with `math.fsum`, which rounds once.

    Args:
        labels: the label table, ids 0..I-1 in any order; train ids of the evaluated classes are 0..K-1.
        ignore_label: the train id of the classes that are not evaluated.

    Raises:
        ValueError: the table has gaps, or an evaluated class with instances has no published average size.
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
        # nan for the classes without instances, none of which is ever weighted
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
        """Statistics of one picture whose prediction is in train ids (what the network gives).

        Args:
            label_ids: [h, w] integers, ground truth label ids (`*_labelIds.png`). 255 is read as the license
                plate (id -1 in eight bits), which is ignored.
            instance_ids: [h, w] integers, ground truth instances (`*_instanceIds.png`).
            prediction: [h, w] integers, train ids 0..K-1.

        Raises:
            ValueError: the shapes differ, or a value is out of range or of no known class.
        """
        _check_range("prediction", prediction, len(self._id_of_train_id))
        return self.count_label_ids(label_ids, instance_ids, self._id_of_train_id[prediction])

    def count_label_ids(
        self, label_ids: np.ndarray, instance_ids: np.ndarray, predicted_ids: np.ndarray
    ) -> PictureStatistics:
        """`count` for a prediction in label ids 0..I-1 (the form that is handed to the benchmark server)."""
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

        # One histogram of predictions for each instance tells its size and its hits, without a loop.
        single = np.flatnonzero(instance_ids > INSTANCES_PER_LABEL)
        instance_of_pixel, predicted_ids = instance_ids[single], predicted_ids[single]
        present = np.flatnonzero(np.bincount(instance_of_pixel))
        position = np.zeros(1 << 16, dtype=np.intp)
        position[present] = np.arange(len(present))
        histogram = np.bincount(
            position[instance_of_pixel] * num_ids + predicted_ids, minlength=len(present) * num_ids
        ).reshape(len(present), num_ids)
        label_of = present // INSTANCES_PER_LABEL
        # Pixels of an instance are pixels of a known class: of one with instances, or of one that is ignored.
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
        """The statistics of several pictures as one (of none: all zero), such as all those of one process."""
        confusion = np.zeros((len(self._names),) * 2, dtype=np.int64)
        instances = [np.zeros((0, 4), dtype=np.int64)]
        for picture in statistics:
            confusion += picture.confusion
            instances.append(picture.instances)
        return PictureStatistics(confusion, np.concatenate(instances))

    def scores(self, statistics: Iterable[PictureStatistics]) -> OfficialScores:
        """Return the scores over all pictures together, ready for JSON; those of ignored labels are None."""
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

    def pixel_scores(self, confusion: torch.Tensor) -> PixelScores:
        """Return the scores that need no instances, of a confusion matrix [K, K] over train ids.

        They are those of `scores`: a prediction has train ids alone, and ignored ground truth counts nowhere.
        """
        ids = self._id_of_train_id
        of_ids = np.zeros((len(self._names),) * 2, dtype=np.int64)
        of_ids[np.ix_(ids, ids)] = confusion.numpy()
        return self._scores_of_pixels(of_ids)

    def _scores_of_pixels(self, confusion: np.ndarray) -> PixelScores:
        """confusion: int64 [I, I] over label ids."""

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
    """A confusion matrix [K, K] as text: of each row's true class, the per cent predicted as each column's.

    Columns are numbered as the rows; a class that occurs in no label has no numbers, and 0 is a dot.
    """
    width = max(len(name) for name in names)
    shares = 100 * confusion.to(torch.float64) / confusion.sum(1, keepdim=True)
    lines = [
        "of the pixels of each true class (rows), per cent predicted as each class (columns)",
        " " * (width + 4) + "".join(f"{number:>6}" for number in range(len(names))),
    ]
    for number, (name, row) in enumerate(zip(names, shares.tolist(), strict=True)):
        cells = ("-" if math.isnan(share) else f"{share:.1f}" if share >= 0.05 else "." for share in row)
        lines.append(f"{number:>3} {name:<{width}}" + "".join(f"{cell:>6}" for cell in cells))
    return "\n".join(lines)


def format_table(
    names: Sequence[str], iou: Iterable[float | None], instance_iou: Iterable[float | None] | None = None
) -> str:
    """Scores as text in per cent: one line a class, then the mean over the classes that have a score.

    Args:
        names: the classes, K of them.
        iou: K scores in 0..1; nan or None, where there is none, is shown as "-".
        instance_iou: K instance scores likewise (column iIoU), or None for a table without them.

    Raises:
        ValueError: the columns differ in length.
    """
    columns = {"IoU": list(iou)}
    if instance_iou is not None:
        columns["iIoU"] = list(instance_iou)
    for title, values in columns.items():
        if len(values) != len(names):
            raise ValueError(f"{len(values)} values of {title} for {len(names)} classes")
    width = max(len(name) for name in (*names, "class"))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<{width}}" + "".join(f"  {cell:>6}" for cell in cells)

    def percent(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"

    lines = [line("class", columns)]
    lines += [line(name, map(percent, row)) for name, *row in zip(names, *columns.values(), strict=True)]
    lines.append(line("mean", (percent(_mean_of_existing(values)) for values in columns.values())))
    return "\n".join(lines)
