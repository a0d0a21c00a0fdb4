"""Scores against nested loops, values by hand, and the official Cityscapes evaluation."""

import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.official_scores import official_scores
from dataset.labels import CITYSCAPES, LABELS, Label
from engine.evaluation.metrics import (
    AVERAGE_INSTANCE_SIZE,
    CityscapesEvaluation,
    confusion_matrix,
    format_table,
    iou_per_class,
    mean_iou,
)
from engine.evaluation.pictures import CATEGORY_INSTANCE_IOU, CATEGORY_IOU, INSTANCE_IOU

ID = {label.name: label.id for label in LABELS}
CATEGORY = {label.id: label.category for label in LABELS}
EVALUATED = [label.id for label in LABELS if label.train_id != 255]


# --- confusion matrix and IoU


def confusion_by_loops(label, prediction, num_classes, ignore_label):
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for truth, predicted in zip(label.ravel(), prediction.ravel(), strict=True):
        if truth != ignore_label:
            confusion[truth, predicted] += 1
    return confusion


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_label", [255, 0])
def test_confusion_matrix_equals_nested_loops(dtype, ignore_label):
    rng = np.random.default_rng(1)
    label = rng.integers(0, 19, (2, 17, 23))
    label[rng.random(label.shape) < 0.2] = ignore_label
    prediction = rng.integers(0, 19, label.shape)
    confusion = confusion_matrix(
        torch.from_numpy(label).to(dtype), torch.from_numpy(prediction).to(dtype), 19, ignore_label
    )
    assert confusion.dtype == torch.int64
    assert confusion.shape == (19, 19)
    np.testing.assert_array_equal(confusion.numpy(), confusion_by_loops(label, prediction, 19, ignore_label))


def test_confusion_matrix_rows_are_ground_truth():
    confusion = confusion_matrix(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 2, 2, 1]]), 3)
    assert confusion.tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_confusion_matrix_of_nothing_but_ignored_pixels_is_zero():
    confusion = confusion_matrix(torch.full((4, 5), 255), torch.zeros(4, 5, dtype=torch.int64), 3)
    assert confusion.tolist() == [[0] * 3] * 3
    assert math.isnan(mean_iou(confusion))


@pytest.mark.parametrize(
    ("label", "prediction", "message"),
    [
        (torch.tensor([0, 1]), torch.tensor([0, 3]), "prediction"),
        (torch.tensor([0, 255]), torch.tensor([0, 255]), "prediction"),
        (torch.tensor([0, 1]), torch.tensor([0, -1]), "prediction"),
        (torch.tensor([0, 3]), torch.tensor([0, 1]), "label"),
        (torch.tensor([0, -1]), torch.tensor([0, 1]), "label"),
        (torch.tensor([0, 1]), torch.tensor([[0, 1]]), "same shape"),
        (torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), "integer"),
    ],
)
def test_confusion_matrix_rejects(label, prediction, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(label, prediction, 3)


def test_iou_equals_set_arithmetic():
    rng = np.random.default_rng(2)
    label, prediction = rng.integers(0, 5, (2, 30, 40))
    iou = iou_per_class(confusion_matrix(torch.from_numpy(label), torch.from_numpy(prediction), 5))
    assert iou.dtype == torch.float64
    for c in range(5):
        union = np.count_nonzero((label == c) | (prediction == c))
        assert iou[c].item() == np.count_nonzero((label == c) & (prediction == c)) / union


def test_absent_class_has_no_score_and_wrongly_predicted_class_has_zero():
    # Class 0 is right in 2 of 3 pixels, class 1 occurs only in predictions, class 2 does not occur.
    confusion = torch.tensor([[2, 1, 0], [0, 0, 0], [0, 0, 0]])
    iou = iou_per_class(confusion)
    assert iou[:2].tolist() == [2 / 3, 0]
    assert torch.isnan(iou[2])
    assert mean_iou(confusion) == pytest.approx(1 / 3, abs=1e-15)


def test_iou_is_exact_beyond_single_precision():
    confusion = torch.tensor([[2**40, 1], [0, 2**40]])
    assert iou_per_class(confusion)[0].item() == 2**40 / (2**40 + 1)


# --- the official scores, by hand


def picture(**regions):
    """Return arrays [1, w] of label, instance and predicted ids, from regions (these three, pixels)."""
    columns = np.concatenate([np.tile([region[:3]], (region[3], 1)) for region in regions.values()])
    return tuple(columns.T[:, None, :])


def test_small_instances_weigh_more_and_false_positives_are_plain_pixels():
    car, road = ID["car"], ID["road"]
    statistics = CityscapesEvaluation(LABELS).count_label_ids(
        *picture(
            large_hit=(car, 26000, car, 6),
            large_missed=(car, 26000, road, 2),
            small_missed=(car, 26001, road, 4),
            group=(car, car, car, 100),
            false_positive=(road, road, car, 5),
            not_counted=(ID["static"], ID["static"], car, 50),
        )
    )
    scores = CityscapesEvaluation(LABELS).scores([statistics])
    size = AVERAGE_INSTANCE_SIZE["car"]
    hit, missed = size / 8 * 6, size / 8 * 2 + size / 4 * 4
    assert scores["classInstScores"]["car"] == pytest.approx(hit / (hit + missed + 5), abs=1e-12)
    assert scores["classScores"]["car"] == 106 / (106 + 6 + 5)
    assert scores["averageScoreInstClasses"] == scores["classInstScores"]["car"]


def test_caravan_is_a_vehicle_for_instances_only():
    car, road, caravan = ID["car"], ID["road"], ID["caravan"]
    evaluation = CityscapesEvaluation(LABELS)
    on_car = evaluation.count_label_ids(*picture(a=(car, 26001, caravan, 10), b=(car, 26001, road, 10)))
    on_road = evaluation.count_label_ids(*picture(a=(car, 26001, car, 10), b=(road, road, caravan, 10)))
    scores = evaluation.scores([on_car])
    assert scores["categoryScores"]["vehicle"] == 0
    assert scores["categoryInstScores"]["vehicle"] == pytest.approx(0.5, abs=1e-12)
    assert scores["classInstScores"]["caravan"] is None
    scores = evaluation.scores([on_road])
    assert scores["categoryScores"]["vehicle"] == 1
    size = AVERAGE_INSTANCE_SIZE["car"]
    assert scores["categoryInstScores"]["vehicle"] == pytest.approx(size / (size + 10), abs=1e-12)


def test_a_class_without_pixels_has_no_score():
    evaluation = CityscapesEvaluation(LABELS)
    scores = evaluation.scores([evaluation.count_label_ids(*picture(a=(7, 7, 7, 3), b=(7, 7, ID["bus"], 1)))])
    assert scores["classScores"]["sky"] is None
    assert scores["classScores"]["bus"] == scores["classInstScores"]["bus"] == 0
    assert scores["classInstScores"]["train"] is None
    assert scores["averageScoreClasses"] == 0.75 / 2
    assert scores["categoryScores"]["void"] is None
    json.dumps(scores, allow_nan=False)


def test_no_pictures_give_no_scores():
    evaluation = CityscapesEvaluation(LABELS)
    scores = evaluation.scores([])
    assert scores == evaluation.scores([evaluation.merge([])])
    assert {scores[key] for key in scores if key.startswith("average")} == {None}


def test_license_plate_stored_in_eight_bits_is_ignored():
    evaluation = CityscapesEvaluation(LABELS)
    with_plate = evaluation.count_label_ids(*picture(a=(26, 26001, 26, 9), b=(255, 255, 7, 5)))
    without = evaluation.count_label_ids(*picture(a=(26, 26001, 26, 9)))
    assert evaluation.scores([with_plate]) == evaluation.scores([without])


def test_instances_of_ignored_classes_are_left_out():
    statistics = CityscapesEvaluation(LABELS).count_label_ids(
        *picture(a=(ID["trailer"], 30001, 26, 9), b=(ID["bus"], 28000, 26, 4), c=(1, 1001, 7, 2))
    )
    assert statistics.instances.tolist() == [[28, 4, 0, 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 34}, "34"),
        ({"label": -1}, "label picture"),
        ({"instance": 34000}, "34000"),
        ({"instance": 7001}, "7001"),
        ({"instance": 70000}, "instance picture"),
        ({"prediction": 19}, "prediction"),
        ({"prediction": 255}, "prediction"),
        ({"prediction": -1}, "prediction"),
        ({"prediction": 1.5}, "integers"),
    ],
)
def test_values_of_no_class_are_rejected(change, message):
    values = {"label": 26, "instance": 26001, "prediction": 13} | change
    arrays = [np.full((3, 4), value) for value in values.values()]
    with pytest.raises(ValueError, match=message):
        CityscapesEvaluation(LABELS).count(*arrays)


def test_pictures_of_different_size_are_rejected():
    zeros = np.zeros((3, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="size"):
        CityscapesEvaluation(LABELS).count(zeros, zeros, zeros.T)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[1:], "each id"),
        ([label for label in LABELS if label.id < 33] + [LABELS[33]._replace(train_id=3)], "train id"),
        ([Label("ship", 0, 0, "vehicle", True, (0, 0, 0))], "average instance sizes"),
    ],
)
def test_unusable_label_table_is_rejected(labels, message):
    with pytest.raises(ValueError, match=message):
        CityscapesEvaluation(labels)


# --- the official scores, against the official evaluation


def made_picture(rng, ids=range(34), predicted=EVALUATED, size=(48, 80)):
    """Draw overlapping rectangles (instances, groups, stuff, ignored), and a shifted and noisy prediction.

    Returns label ids uint8, instance ids int32 and predicted label ids uint8, each [h, w].
    """
    h, w = size
    ids, predicted = np.array(ids), np.array(predicted)
    label_ids = np.full(size, ids[0], dtype=np.uint8)
    instance_ids = label_ids.astype(np.int32)
    has_instances = {label.id for label in LABELS if label.has_instances}
    for number in range(60):
        label_id = rng.choice(ids)
        y, x = rng.integers(0, h), rng.integers(0, w)
        region = (slice(y, y + rng.integers(1, h // 3)), slice(x, x + rng.integers(1, w // 3)))
        group = label_id not in has_instances or rng.random() < 0.2
        label_ids[region] = label_id
        instance_ids[region] = label_id if group else label_id * 1000 + number
    prediction = np.roll(label_ids, rng.integers(-3, 4, 2), (0, 1))
    wrong = (rng.random(size) < 0.3) | ~np.isin(prediction, predicted)
    prediction[wrong] = rng.choice(predicted, np.count_nonzero(wrong))
    return label_ids, instance_ids, prediction


def made_pictures(seed, count=4, **kind):
    rng = np.random.default_rng(seed)
    return [made_picture(rng, **kind) for _ in range(count)]


@pytest.fixture
def official(tmp_path):
    """Return the official evaluation, a function of a list of (label, instance, predicted label ids)."""
    pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="the official evaluation is not installed (cityscapesscripts and its pyquaternion)",
    )

    def evaluate(pictures):
        truths, predictions = [], []
        for i, (label_ids, instance_ids, prediction) in enumerate(pictures):
            truths.append(str(tmp_path / f"town_{i:06}_000019_gtFine_labelIds.png"))
            predictions.append(str(tmp_path / f"town_{i:06}_000019_pred.png"))
            Image.fromarray(label_ids).save(truths[-1])
            Image.fromarray(instance_ids.astype(np.uint16)).save(
                truths[-1].replace("labelIds", "instanceIds")
            )
            Image.fromarray(prediction).save(predictions[-1])
        return official_scores(truths, predictions)

    return evaluate


def assert_same_scores(ours, theirs):
    """Check that all our scores equal the official ones to 1e-12, with None for NaN."""
    for key, value in ours.items():
        expected = theirs[key]
        if not isinstance(value, dict):
            value, expected = {key: value}, {key: expected}
        assert value.keys() == expected.keys()
        for name in value:
            numbers = math.nan if value[name] is None else value[name]
            assert numbers == pytest.approx(expected[name], rel=0, abs=1e-12, nan_ok=True), (key, name)


KINDS = {
    "all classes": {},
    "void, caravans and trailers predicted": {"predicted": range(34)},
    "few classes": {"ids": [0, 7, 11, 24, 26, 29, 30], "predicted": [7, 11, 24, 26, 28]},
    "no instances": {"ids": [3, 7, 8, 21], "predicted": [7, 8, 21, 23]},
    "only ignored": {"ids": [0, 9, 29]},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("seed", [3, 4])
def test_scores_equal_the_official_evaluation(official, kind, seed):
    pictures = made_pictures(seed, **kind)
    evaluation = CityscapesEvaluation(LABELS)
    ours = evaluation.scores([evaluation.count_label_ids(*p) for p in pictures])
    theirs = official(pictures)
    assert_same_scores(ours, theirs)
    assert len(ours["classScores"]) == 34
    assert len(ours["categoryInstScores"]) == 8


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_ratios_of_pictures_add_up_to_the_scores(kind):
    """And those of one picture give the scores of an evaluation of this picture alone."""
    evaluation = CityscapesEvaluation(LABELS)
    statistics = [evaluation.count_label_ids(*p) for p in made_pictures(3, **kind)]
    for several in (statistics, statistics[:1], []):
        scores, ratios = evaluation.scores(several), evaluation.ratios(several)
        expected = {
            INSTANCE_IOU: [scores["classInstScores"][name] for name in CITYSCAPES.names],
            CATEGORY_IOU: [*scores["categoryScores"].values()],
            CATEGORY_INSTANCE_IOU: [
                score for score in scores["categoryInstScores"].values() if score is not None
            ],
        }
        means = ("averageScoreInstClasses", "averageScoreCategories", "averageScoreInstCategories")
        for (name, values), mean in zip(expected.items(), means, strict=True):
            found = ratios[name].scores()
            numbers = np.array([math.nan if value is None else value for value in values])
            if name == CATEGORY_INSTANCE_IOU:
                np.testing.assert_allclose(
                    sorted(found[:-1][~np.isnan(found[:-1])]), sorted(numbers), rtol=1e-12
                )
            else:
                np.testing.assert_allclose(found[:-1], numbers, rtol=1e-12)
            expected_mean = math.nan if scores[mean] is None else scores[mean]
            assert found[-1] == pytest.approx(expected_mean, rel=1e-12, nan_ok=True)


def test_train_ids_are_scored_as_their_label_ids(official):
    pictures = made_pictures(5)
    to_train_id = np.zeros(34, dtype=np.int64)
    to_train_id[CITYSCAPES.label_ids()] = np.arange(19)
    evaluation = CityscapesEvaluation(LABELS)
    statistics = [evaluation.count(labels, instances, to_train_id[p]) for labels, instances, p in pictures]
    assert set(np.unique([p for _, _, p in pictures])) == set(EVALUATED)
    assert_same_scores(evaluation.scores(statistics), official(pictures))


def test_mean_iou_over_train_ids_is_the_official_class_average(official):
    """If only trained classes are predicted, the matrix over train ids gives the official average."""
    pictures = made_pictures(6)
    to_train_id = np.full(34, 255)
    to_train_id[CITYSCAPES.label_ids()] = np.arange(19)
    confusion = sum(
        confusion_matrix(torch.from_numpy(to_train_id[labels]), torch.from_numpy(to_train_id[p]), 19)
        for labels, _, p in pictures
    )
    theirs = official(pictures)
    assert mean_iou(confusion) == pytest.approx(theirs["averageScoreClasses"], abs=1e-12)
    for name, iou in zip(CITYSCAPES.names, iou_per_class(confusion).tolist(), strict=True):
        assert iou == pytest.approx(theirs["classScores"][name], abs=1e-12)


# --- bit-identical for any distribution of the pictures


def test_scores_depend_neither_on_order_nor_on_the_number_of_processes():
    evaluation = CityscapesEvaluation(LABELS)
    statistics = [evaluation.count_label_ids(*p) for p in made_pictures(7, count=24)]
    expected = evaluation.scores(statistics)
    shuffle = random.Random(8)
    for processes in (1, 2, 3, 7, 30):
        shuffled = shuffle.sample(statistics, len(statistics))
        shares = [evaluation.merge(shuffled[rank::processes]) for rank in range(processes)]
        received = pickle.loads(pickle.dumps(shares))
        assert evaluation.scores(received) == expected  # no tolerance


def test_statistics_are_small():
    evaluation = CityscapesEvaluation(LABELS)
    statistics = evaluation.count_label_ids(*made_pictures(9, count=1, size=(256, 512))[0])
    assert len(pickle.dumps(statistics)) < 20_000


# --- the table


def test_table_shows_per_cent_and_ends_with_the_mean():
    table = format_table(["road", "traffic light", "car"], [0.5, math.nan, 1.0], [None, None, 0.12345])
    assert [line.split() for line in table.splitlines()] == [
        ["class", "IoU", "iIoU"],
        ["road", "50.00", "-"],
        ["traffic", "light", "-", "-"],
        ["car", "100.00", "12.35"],
        ["mean", "75.00", "12.35"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_takes_a_tensor_and_no_instance_scores():
    table = format_table(["a", "b"], torch.tensor([0.25, math.nan], dtype=torch.float64))
    assert table.splitlines()[-1].split() == ["mean", "25.00"]
    assert format_table(["a"], [None]).splitlines()[-1].split() == ["mean", "-"]


def test_table_rejects_columns_of_other_lengths():
    with pytest.raises(ValueError, match="iIoU"):
        format_table(["a", "b"], [0.1, 0.2], [0.1])
