"""The losses against the algorithm of the original, written with numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from loss import CriterionDSN, CriterionOhemDSN, OhemCrossEntropy2d


def made(height: int, width: int, classes: int = 5, void: float = 0.2, seed: int = 0, dtype=torch.float32):
    """Return logits of moderate confidence, and labels with void blocks."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (2, height, width), generator=generator)
    logits = torch.randn(2, classes, height, width, generator=generator, dtype=dtype)
    logits += (
        3
        * F.one_hot(labels, classes).permute(0, 3, 1, 2)
        * torch.rand(2, 1, height, width, generator=generator)
    )
    labels[torch.rand(2, height, width, generator=generator) < void] = 255
    return logits, labels


def hard_target_by_scipy(logits, labels, thresh, min_kept, factor=8):
    """Select pixels as the original does: threshold from resized probabilities, pixels at full resolution."""
    probability, target = logits.softmax(1).numpy(), labels.numpy()
    coarse = ndimage.zoom(probability, (1.0, 1.0, 1.0 / factor, 1.0 / factor), order=1)
    coarse_target = ndimage.zoom(target, (1.0, 1.0 / factor, 1.0 / factor), order=0)
    valid = coarse_target != 255
    kept = min_kept // factor**2
    if kept >= valid.sum():
        threshold = 1.0
    else:
        true = np.take_along_axis(coarse, np.where(valid, coarse_target, 0)[:, None], 1)[:, 0][valid]
        threshold = max(thresh, np.partition(true, kept - 1)[kept - 1]) if kept else thresh
    true = np.take_along_axis(probability, np.where(target == 255, 0, target)[:, None], 1)[:, 0]
    return np.where((target != 255) & (true <= threshold), target, 255)


#: Sizes, some of which scipy samples outside the picture by rounding (109, 125), and some smaller than
#: the factor.
SIZES = [(97, 97), (129, 65), (109, 125), (33, 12), (12, 9), (5, 5), (3, 40), (769, 33)]

#: Threshold and pixels to keep. At (0.0, 640), zeros of scipy outside the picture decide.
SELECTIONS = [(0.7, 100000), (0.7, 6400), (0.3, 3000), (0.05, 64), (0.6, 63), (0.7, 0), (0.0, 640)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_ohem_keeps_what_the_original_keeps(size, dtype):
    logits, labels = made(*size, dtype=dtype)
    for thresh, min_kept in SELECTIONS:
        ours = OhemCrossEntropy2d(255, thresh, min_kept).hard_target(logits, labels)
        expected = hard_target_by_scipy(logits, labels, thresh, min_kept)
        assert np.array_equal(ours.numpy(), expected), (thresh, min_kept)


def test_ohem_selection_is_not_trivial():
    logits, labels = made(97, 97)
    kept = (OhemCrossEntropy2d(255, 0.3, 3000).hard_target(logits, labels) != 255).sum()
    assert 3000 < kept < (labels != 255).sum() / 2


def test_ohem_loss_is_the_mean_over_the_kept():
    logits, labels = made(97, 65)
    module = OhemCrossEntropy2d(255, 0.5, 2000)
    target = module.hard_target(logits, labels)
    torch.testing.assert_close(module(logits, labels), F.cross_entropy(logits, target, ignore_index=255))


@pytest.mark.parametrize("classes", [2, 19])
def test_criterion_is_main_plus_auxiliary(classes):
    outputs = [torch.randn(2, classes, 9, 11, dtype=torch.float64) for _ in range(2)]
    labels = torch.randint(0, classes, (2, 65, 81))
    labels[0, :20] = 255
    big = [F.interpolate(x, size=(65, 81), mode="bilinear", align_corners=True) for x in outputs]
    losses = [F.cross_entropy(x, labels, ignore_index=255) for x in big]
    criterion = CriterionDSN()
    torch.testing.assert_close(criterion(outputs, labels), losses[0] + 0.4 * losses[1])
    parts = [total.mean() for total in criterion.totals(outputs, labels)]
    torch.testing.assert_close(torch.stack(parts), torch.stack(losses))
    torch.testing.assert_close(criterion(outputs[:1], labels.to(torch.uint8)), losses[0])
    mined = CriterionOhemDSN(thresh=0.4, min_kept=500)
    main = OhemCrossEntropy2d(255, 0.4, 500)(big[0], labels)
    torch.testing.assert_close(mined(outputs, labels), main + 0.4 * losses[1])


@pytest.mark.parametrize("ohem", [False, True])
def test_class_weights_are_those_of_a_weighted_mean(ohem):
    outputs = [made(65, 81, seed=seed, dtype=torch.float64)[0] for seed in (1, 2)]
    _, labels = made(65, 81)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
    criterion = CriterionOhemDSN(255, 0.4, 500, class_weights=weights) if ohem else CriterionDSN(255, weights)
    target = OhemCrossEntropy2d(255, 0.4, 500).hard_target(outputs[0], labels) if ohem else labels
    expected = F.cross_entropy(outputs[0], target, weights, ignore_index=255)
    expected = expected + 0.4 * F.cross_entropy(outputs[1], labels, weights, ignore_index=255)
    torch.testing.assert_close(criterion(outputs, labels), expected)
    assert not criterion.state_dict()


@pytest.mark.parametrize(
    "criterion", [CriterionDSN(), CriterionOhemDSN(), CriterionDSN(255, torch.rand(4) + 0.1)]
)
def test_nothing_to_keep_gives_zero_and_zero_gradients(criterion):
    outputs = [torch.randn(1, 4, 5, 5, requires_grad=True) for _ in range(2)]
    loss = criterion(outputs, torch.full((1, 33, 33), 255))
    loss.backward()
    assert loss == 0 and all((output.grad == 0).all() for output in outputs)


def test_half_precision_logits_are_widened():
    outputs = [torch.randn(1, 4, 9, 9) for _ in range(2)]
    labels = torch.randint(0, 4, (1, 65, 65))
    loss = CriterionOhemDSN()([output.bfloat16() for output in outputs], labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, CriterionOhemDSN()([o.bfloat16().float() for o in outputs], labels))
