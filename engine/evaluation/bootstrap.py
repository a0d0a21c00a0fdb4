"""Confidence intervals of scores, and comparison of two evaluations, by resampling the pictures.

Every score here is a ratio of two sums over pictures, such as the intersection and the union of a class, or
the mean of such ratios over the classes. The pictures are the independent units: neighboring pixels are not.
A resample draws as many pictures as there are, with replacement, and gives the score of the drawn pictures.

The intervals are those of the bootstrap-t: with r the score, s its standard error, and r', s' those of a
resample, the quantiles of (r' - r) / s' take the place of the normal distribution's in r +- 1.96 s. Plain
percentiles of r' are too narrow for these ratios: large objects dominate both sums, and a resample that
misses them has a smaller spread as well. In tests/unit/test_bootstrap.py they hold the true score less often.
The standard errors are those of the linearized ratio.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12 (bootstrap-t).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np

#: Share of the intervals that hold the true score, number of resamples, and seed of the draws.
LEVEL, RESAMPLES, SEED = 0.95, 1000, 0
#: Maximum number of weights (resamples x pictures) in memory at once.
MOST_WEIGHTS = 4_000_000
#: Number of pictures that have to show a class for an interval; number below which intervals are too narrow.
FEWEST, FEW = 2, 50
#: Standard error of a resample, as a share of that of all pictures, below which it is 0 up to rounding: the
#: resample has drawn a single picture with the class, and says nothing about the spread.
SMALLEST_ERROR = 1e-6

#: Bounds of an interval; None if there is none.
Interval = tuple[float, float] | None


class Ratios(NamedTuple):
    """Numerators and denominators of scores, for each picture.

    The score of class k is numerator[:, k].sum() / denominator[:, k].sum(). It does not exist if the
    denominator is 0. A class does not occur in a picture if its denominator there is 0.

    Attributes:
        numerator: integers or float64 [P, K].
        denominator: integers or float64 [P, K], not negative.
    """

    numerator: np.ndarray
    denominator: np.ndarray

    def scores(self) -> np.ndarray:
        """Return the K scores and their mean over the existing ones, float64 [K + 1]; nan if none exists."""
        one = np.ones((1, len(self.numerator)))
        return _estimate([self._as_float()], one).scores[0]

    def of_pictures(self) -> np.ndarray:
        """Return the scores of each picture and their means, float64 [P, K + 1], nan as in `scores`."""
        return _with_mean(*self._as_float())

    def _as_float(self) -> Ratios:
        return Ratios(self.numerator.astype(np.float64), self.denominator.astype(np.float64))


class Comparison(NamedTuple):
    """Difference between the second and the first of two evaluations; the last entry is that of the mean.

    Attributes:
        difference: second minus first, float64 [K + 1]; nan if one of them does not exist.
        intervals: interval of each difference.
        second_better: share of the resamples in which the second is better, half of the ties included,
            float64 [K + 1].
    """

    difference: np.ndarray
    intervals: list[Interval]
    second_better: np.ndarray


class _Estimate(NamedTuple):
    """Scores and their standard errors for several sets of weights, float64 [R, K + 1] both."""

    scores: np.ndarray
    errors: np.ndarray


def intervals(
    ratios: Ratios, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Interval]:
    """Return the confidence interval of each score, and last that of their mean.

    The result is the same in each call. Intervals hold the score, and end at 0 and 1. A class that occurs in
    fewer than FEWEST pictures has none, and nothing has one if there are fewer pictures than that. With fewer
    than about FEW pictures that show a class, the intervals are too narrow, because the sample then says
    little about the spread.

    Args:
        ratios: numerators and denominators of K scores, [P, K].
        level: probability with which an interval holds the true score.
        resamples: number of resamples.
        seed: seed of the draws.
    """
    found, drawn = _resampled([ratios], resamples, seed)
    return _bounds(found, drawn, _enough([ratios]), level, 0.0)


def compare(
    first: Ratios, second: Ratios, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> Comparison:
    """Compare two evaluations of the same pictures.

    Each resample draws the same pictures for both, so that what makes a picture difficult for both cancels.

    Args:
        first: numerators and denominators of K scores, [P, K].
        second: those of the other evaluation, with the pictures in the same order.
        level: see `intervals`.
        resamples: see `intervals`.
        seed: see `intervals`.

    Raises:
        ValueError: the shapes differ.
    """
    if first.numerator.shape != second.numerator.shape:
        raise ValueError(f"{first.numerator.shape} and {second.numerator.shape}: same shape expected")
    found, drawn = _resampled([second, first], resamples, seed)
    better = (drawn.scores > 0) + 0.5 * (drawn.scores == 0)
    exists = ~np.isnan(drawn.scores)
    share = np.where(exists, better, 0).sum(0) / np.maximum(exists.sum(0), 1)
    enough = _enough([first]) & _enough([second])
    return Comparison(found.scores[0], _bounds(found, drawn, enough, level, -1.0), share)


def _enough(several: list[Ratios]) -> np.ndarray:
    """Return which scores, and whether the mean, can have an interval, bool [K + 1]."""
    occurs = reduce(np.logical_or, (ratios.denominator > 0 for ratios in several))
    return np.append(occurs.sum(0), occurs.any(1).sum()) >= FEWEST


def _resampled(several: list[Ratios], resamples: int, seed: int) -> tuple[_Estimate, _Estimate]:
    """Return the estimate of all pictures (R = 1), and that of each resample."""
    several = [ratios._as_float() for ratios in several]
    number = len(several[0].numerator)
    parts = [_estimate(several, weights) for weights in _weights(number, resamples, seed)]
    drawn = _Estimate(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    return _estimate(several, np.ones((1, number))), drawn


def _weights(pictures: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each resample draws each picture, float64 [r, P], for some resamples at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(1, MOST_WEIGHTS // max(1, pictures))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(pictures, size=(rows, pictures)) if pictures else np.zeros((rows, 0), np.int64)
        cells = drawn + pictures * np.arange(rows)[:, None]
        yield np.bincount(cells.ravel(), minlength=rows * pictures).reshape(rows, pictures).astype(np.float64)


def _with_mean(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return numerator / denominator [R, K], and as column K their mean over the existing ones."""
    exists = denominator > 0
    scores = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=exists)
    number = exists.sum(1)
    mean = np.full(len(scores), np.nan)
    np.divide(np.where(exists, scores, 0).sum(1), number, out=mean, where=number > 0)
    return np.concatenate([scores, mean[:, None]], 1)


def _estimate(several: list[Ratios], weights: np.ndarray) -> _Estimate:
    """Return the scores of weighted pictures and their standard errors.

    Of two evaluations, the scores are the first minus the second. The linearized score changes by
    (numerator - score * denominator) / sum of the denominators with one more copy of a picture. The variance
    of the score is the sum of the squares over the drawn pictures.

    Args:
        several: one evaluation or two, [P, K].
        weights: how often each picture is drawn, [R, P].
    """
    total: np.ndarray = np.zeros(())
    values, of_class, of_mean = [], [], []
    for sign, (numerator, denominator) in zip((1, -1), several, strict=False):
        sums = weights @ denominator
        scores = _with_mean(weights @ numerator, sums)
        total = total + sign * scores
        exists = sums > 0
        slope = np.divide(sign, sums, out=np.zeros_like(sums), where=exists)
        share = 1 / np.maximum(exists.sum(1, keepdims=True), 1)
        values += [numerator, denominator]
        for coefficient in (slope, np.where(exists, -slope * scores[:, :-1], 0)):
            of_class.append(coefficient)
            of_mean.append(coefficient * share)
    variance = np.zeros_like(of_class[0])
    for row in range(len(values)):
        for column in range(row + 1):
            product = weights @ (values[row] * values[column])
            variance += (1 + (row != column)) * of_class[row] * of_class[column] * product
    change = np.zeros_like(weights)
    for coefficient, value in zip(of_mean, values, strict=True):
        change += coefficient @ value.T
    of_all = (weights * change**2).sum(1, keepdims=True)
    return _Estimate(total, np.sqrt(np.concatenate([np.maximum(variance, 0), of_all], 1)))


def _bounds(
    found: _Estimate, drawn: _Estimate, enough: np.ndarray, level: float, lowest: float
) -> list[Interval]:
    """Return the bootstrap-t interval of each score, within `lowest` and 1."""
    bounds: list[Interval] = []
    columns = zip(found.scores[0], found.errors[0], drawn.scores.T, drawn.errors.T, enough, strict=True)
    for score, error, scores, errors, can in columns:
        usable = (errors > SMALLEST_ERROR * error) & ~np.isnan(scores)
        if not can or np.isnan(score) or (error > 0 and not usable.any()):
            bounds.append(None)
            continue
        low = high = score
        if error > 0:
            deviations = (scores[usable] - score) / errors[usable]
            least, most = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2])
            # Of few pictures, all resamples may be on one side of the score.
            low, high = score - max(most, 0) * error, score - min(least, 0) * error
        bounds.append((max(lowest, float(low)), min(1.0, float(high))))
    return bounds
