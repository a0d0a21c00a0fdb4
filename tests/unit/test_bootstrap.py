"""Confidence intervals: how often they hold the true score of simulated data sets, and special cases."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest

from engine.evaluation import bootstrap
from engine.evaluation.bootstrap import Ratios, compare, intervals

CLASSES = 4
#: Of each class: share of the pictures that show it, and mean recall of two networks.
SHOWN, RECALL = np.array([1.0, 0.9, 0.75, 0.6]), np.array([[0.9, 0.8, 0.7, 0.6], [0.92, 0.8, 0.75, 0.62]])
#: Where the wrong pixels of a class go.
WRONG = (1 - np.eye(CLASSES)) / (CLASSES - 1)


def expected_iou(recall):
    """Return the IoU of infinitely many pictures of `simulated`, and the mean."""
    size = SHOWN * 1000 * math.exp(0.5 * 0.8**2)
    confusion = np.diag(size * recall) + (size * (1 - recall))[:, None] * WRONG
    right = np.diag(confusion)
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)
    return np.append(iou, iou.mean())


def simulated(rng, pictures, spread=0.8):
    """Return the IoU of two networks on the same pictures, some of which are difficult for both."""
    size = 1000 * rng.lognormal(0, spread, (pictures, CLASSES)) * (rng.random((pictures, CLASSES)) < SHOWN)
    difficulty = rng.beta(8, 8, (pictures, CLASSES)) - 0.5
    found = []
    for recall in RECALL:
        own = np.clip(recall + 0.4 * difficulty * (1 - recall) + 0.05 * rng.uniform(-1, 1, size.shape), 0, 1)
        right = size * own
        wrong = (size - right)[:, :, None] * WRONG
        found.append(Ratios(right, size + wrong.sum(1)))
    return found


@pytest.fixture
def same_draws(monkeypatch):
    """Draw once for all data sets of a size; the draws are the same in each call anyway."""
    draw = bootstrap._weights
    monkeypatch.setattr(bootstrap, "_weights", lru_cache(lambda *given: list(draw(*given))))


@pytest.mark.slow
@pytest.mark.usefixtures("same_draws")
def test_intervals_hold_the_true_score_in_95_percent_of_the_data_sets():
    rng, sets, pictures = np.random.default_rng(0), 1000, 120
    truth = [expected_iou(recall) for recall in RECALL]
    held, of_difference, pairs = np.zeros(CLASSES + 1), np.zeros(CLASSES + 1), 400
    for number in range(sets):
        first, second = simulated(rng, pictures)
        bounds = np.array(intervals(first))
        held += (bounds[:, 0] <= truth[0]) & (truth[0] <= bounds[:, 1])
        if number >= pairs:
            continue
        bounds = np.array(compare(first, second).intervals)
        of_difference += (bounds[:, 0] <= truth[1] - truth[0]) & (truth[1] - truth[0] <= bounds[:, 1])
    assert (held / sets >= 0.93).all() and (held / sets <= 0.97).all()
    # Of 400 data sets, this share has a standard error of 1.1 %.
    assert (of_difference / pairs >= 0.92).all() and (of_difference / pairs <= 0.98).all()


@pytest.mark.usefixtures("same_draws")
def test_percentiles_of_few_pictures_hold_the_true_score_less_often():
    rng, sets, pictures = np.random.default_rng(0), 400, 40
    truth, held, percentile = expected_iou(RECALL[0])[-1], 0, 0
    for _ in range(sets):
        # As many pixels as expected, in fewer and larger objects.
        first = simulated(rng, pictures, 1.2)[0]
        low, high = intervals(first)[-1]
        held += low <= truth <= high
        low, high = np.quantile(bootstrap._resampled([first], 1000, 0)[1].scores[:, -1], [0.025, 0.975])
        percentile += low <= truth <= high
    assert held / sets > 0.9 and held - percentile > 0.05 * sets


def brute_force(ratios, resamples):
    """Return the intervals by loops: the definition in the docstring of the module."""

    def estimate(pictures):
        numerator, denominator = (part[pictures].astype(float) for part in ratios)
        scores, errors, changes = [], [], []
        for n, d in zip(numerator.T, denominator.T, strict=True):
            if d.sum() == 0:
                scores.append(math.nan)
                errors.append(math.nan)
                continue
            scores.append(n.sum() / d.sum())
            changes.append((n - scores[-1] * d) / d.sum())
            errors.append(math.sqrt((changes[-1] ** 2).sum()))
        errors.append(math.sqrt((np.mean(changes, 0) ** 2).sum()))
        return np.array([*scores, np.nanmean(scores)]), np.array(errors)

    pictures = len(ratios.numerator)
    score, error = estimate(np.arange(pictures))
    draws = np.random.default_rng(bootstrap.SEED).integers(pictures, size=(resamples, pictures))
    several = [estimate(row) for row in draws]
    # A resample with a single picture of a class has no spread.
    deviations = np.array(
        [(scores - score) / np.where(errors > 1e-6 * error, errors, math.nan) for scores, errors in several]
    )
    low, high = np.nanquantile(deviations, [0.025, 0.975], axis=0)
    return np.stack([np.maximum(score - high * error, 0), np.minimum(score - low * error, 1)], 1)


def test_equals_the_definition(monkeypatch):
    rng = np.random.default_rng(3)
    ratios = simulated(rng, 30)[0]
    # A class in three pictures only, so that some resamples lack it.
    ratios = Ratios(*(part.astype(np.int64) for part in ratios))
    for part in ratios:
        part[3:, -1] = 0
    ratios.denominator[:3, -1] += [100, 900, 10]
    expected = brute_force(ratios, 200)
    found = intervals(ratios, resamples=200)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-9)
    monkeypatch.setattr(bootstrap, "MOST_WEIGHTS", 70)  # two resamples at a time
    np.testing.assert_allclose(np.array(intervals(ratios, resamples=200)), expected, rtol=1e-9)


def test_the_same_in_each_call_and_narrower_with_more_pictures():
    few, many = (simulated(np.random.default_rng(0), number)[0] for number in (100, 1600))
    assert intervals(few) == intervals(few)
    widths = [high - low for ratios in (few, many) for low, high in [intervals(ratios)[-1]]]
    assert 3 < widths[0] / widths[1] < 5.5  # the square root of 16, about


def test_scores_and_missing_classes():
    ratios = Ratios(np.array([[1, 0, 0], [3, 5, 0]]), np.array([[2, 0, 0], [4, 5, 0]]))
    np.testing.assert_allclose(ratios.scores(), [4 / 6, 1, math.nan, (4 / 6 + 1) / 2])
    np.testing.assert_allclose(
        ratios.of_pictures(), [[0.5, math.nan, math.nan, 0.5], [0.75, 1, math.nan, 0.875]]
    )
    found = intervals(ratios)
    assert found[1] is None and found[2] is None  # in one picture, and in none
    assert found[0] is not None and found[3] is not None


@pytest.mark.parametrize("pictures", [0, 1])
def test_one_picture_has_no_interval(pictures):
    ratios = Ratios(np.ones((pictures, 2)), 2 * np.ones((pictures, 2)))
    assert intervals(ratios) == [None] * 3
    assert compare(ratios, ratios).intervals == [None] * 3


def test_perfect_predictions():
    ratios = Ratios(np.full((5, 2), 7), np.full((5, 2), 7))
    assert intervals(ratios) == [(1.0, 1.0)] * 3


def test_bounds_are_scores():
    rng = np.random.default_rng(0)
    denominator = rng.integers(1, 100, (4, 6))
    bounds = np.array(intervals(Ratios((denominator * rng.random((4, 6)) ** 0.1).astype(int), denominator)))
    assert (bounds >= 0).all() and (bounds <= 1).all() and (bounds[:, 0] <= bounds[:, 1]).all()


class TestCompare:
    def test_no_difference_of_the_same(self):
        ratios = simulated(np.random.default_rng(0), 40)[0]
        found = compare(ratios, ratios)
        assert (found.difference == 0).all() and found.intervals == [(0.0, 0.0)] * (CLASSES + 1)
        assert (found.second_better == 0.5).all()

    def test_exchanging_both_changes_the_sign(self):
        first, second = simulated(np.random.default_rng(0), 80)
        one, other = compare(first, second), compare(second, first)
        np.testing.assert_allclose(one.difference, -other.difference)
        np.testing.assert_allclose(np.array(one.intervals), -np.array(other.intervals)[:, ::-1], atol=1e-12)
        np.testing.assert_allclose(one.second_better, 1 - other.second_better)

    def test_pairs_are_narrower_than_two_evaluations(self):
        first, second = simulated(np.random.default_rng(0), 200)
        low, high = compare(first, second).intervals[-1]
        widths = [high - low for low, high in (intervals(each)[-1] for each in (first, second))]
        assert high - low < 0.8 * math.hypot(*widths)

    def test_a_class_that_one_of_them_lacks(self):
        first = Ratios(np.ones((6, 2)), np.ones((6, 2)))
        second = Ratios(np.stack([np.zeros(6), np.ones(6)], 1), np.stack([np.zeros(6), 2 * np.ones(6)], 1))
        found = compare(first, second)
        assert math.isnan(found.difference[0]) and found.intervals[0] is None
        np.testing.assert_allclose(found.difference[1:], [-0.5, -0.5])

    def test_other_shapes(self):
        with pytest.raises(ValueError, match="same shape"):
            compare(Ratios(np.ones((6, 2)), np.ones((6, 2))), Ratios(np.ones((5, 2)), np.ones((5, 2))))
