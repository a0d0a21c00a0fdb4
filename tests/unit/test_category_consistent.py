"""The category-consistent loss against its formulas, pixel by pixel."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loss import CategoryConsistentLoss
from loss.category_consistent import Parts, nearest

IGNORED = 255


def sample(spread: float = 1.0, n: int = 2, void: float = 0.2, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Return features [n, 4, 6, 7] in float64 and labels."""
    generator = torch.Generator().manual_seed(3)
    features = spread * torch.randn(n, 4, 6, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (n, 6, 7), generator=generator)
    target[torch.rand(target.shape, generator=generator) < void] = IGNORED
    return features, target


def brute_force(
    features: Tensor, target: Tensor, delta_v: float = 0.5, delta_d: float = 1.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the three parts by loops over classes and pixels."""
    pixels: dict[int, list[Tensor]] = {}
    for i, y, x in torch.cartesian_prod(*map(torch.arange, target.shape)):
        label = int(target[i, y, x])
        if label != IGNORED:
            pixels.setdefault(label, []).append(features[i, :, y, x])
    zero = features.sum() * 0
    if not pixels:
        return zero, zero, zero
    means = {label: torch.stack(of_class).mean(0) for label, of_class in pixels.items()}
    variance = distance = regularization = zero
    for label, of_class in pixels.items():
        for feature in of_class:
            d = (feature - means[label]).norm()
            if d > delta_d:
                cost = d - delta_d + (delta_d - delta_v) ** 2
            else:
                cost = (d - delta_v) ** 2 if d > delta_v else zero
            variance = variance + cost / len(of_class) / len(pixels)
        regularization = regularization + means[label].norm() / len(pixels)
        for other in pixels.keys() - {label}:
            d = (means[label] - means[other]).norm()
            if d <= 2 * delta_d:
                distance = distance + (2 * delta_d - d) ** 2 / len(pixels) / (len(pixels) - 1)
    return variance, distance, regularization


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("deltas", [(0.5, 1.5), (0.0, 1.0), (0.3, 0.3)])
def test_equal_to_brute_force(spread: float, deltas: tuple[float, float]) -> None:
    features, target = sample(spread)
    features.requires_grad_()
    found = CategoryConsistentLoss(*deltas)(features, target)
    for part, exact in zip(found, brute_force(features, target, *deltas), strict=True):
        torch.testing.assert_close(part, exact, rtol=0, atol=1e-12)
        if exact.requires_grad:
            ours, theirs = (torch.autograd.grad(x, features, retain_graph=True)[0] for x in (part, exact))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_all_ranges_of_the_variance_occur() -> None:
    features, target = sample(0.5)
    means = {label: features.movedim(1, -1)[target == label].mean(0) for label in range(5)}
    d = torch.cat([(features.movedim(1, -1)[target == k] - mean).norm(dim=-1) for k, mean in means.items()])
    assert (d <= 0.5).any() and ((d > 0.5) & (d <= 1.5)).any() and (d > 1.5).any()


def test_the_cost_is_continuous() -> None:
    loss = CategoryConsistentLoss()
    for d in (0.5, 1.5):
        before, after = loss.variance_cost(torch.tensor([d - 1e-9, d + 1e-9], dtype=torch.float64))
        assert abs(before - after) < 1e-8
    assert loss.variance_cost(torch.tensor([0.2, 1.0, 3.0])).tolist() == [0.0, 0.25, 2.5]


def test_gradcheck() -> None:
    features, target = sample(1.0, n=1)
    torch.autograd.gradcheck(CategoryConsistentLoss(), (features.requires_grad_(), target))


@pytest.mark.parametrize("case", ["one class", "one pixel of each class", "equal features", "all ignored"])
def test_where_a_length_is_zero(case: str) -> None:
    features, target = sample()
    if case == "one class":
        target[target != IGNORED] = 3
    elif case == "one pixel of each class":
        target.fill_(IGNORED)
        target[0, 0, :5] = torch.arange(5)
    elif case == "equal features":
        features.zero_()
    else:
        target.fill_(IGNORED)
        features[0, 0, 0, 0] = torch.nan  # an ignored pixel has no part in the loss
    features.requires_grad_()
    found = CategoryConsistentLoss()(features, target)
    grad = torch.autograd.grad(sum(found), features)[0]
    assert grad.isfinite().all()
    if case == "all ignored":
        assert found == (0, 0, 0) and not grad.any()
        return
    for part, exact in zip(found, brute_force(features, target), strict=True):
        torch.testing.assert_close(part, exact, rtol=0, atol=1e-12)
    if case in ("one class", "all ignored"):
        assert found.distance == 0
    if case == "one pixel of each class":
        assert found.variance == 0 and found.distance > 0


class Threads:
    """Processes of a group, simulated by threads."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.values: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> None:
        self.values.append(tensor.clone())
        self.barrier.wait()
        tensor.copy_(torch.stack(self.values).sum(0))
        self.barrier.wait()
        if self.values:
            self.values = []
        self.barrier.wait()

    def run(self, function: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=function, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_processes_add_up_to_the_loss(size: int) -> None:
    """Classes, means and counts are global, and the gradients are those of the loss over all pictures."""
    features, target = sample(n=4)
    target[:2][target[:2] == 4] = IGNORED  # a class that some processes do not have
    features.requires_grad_()
    whole = CategoryConsistentLoss()(features, target)
    expected = torch.autograd.grad(sum(whole), features)[0]
    group = Threads(size)
    results: dict[int, tuple[Parts, Tensor, Tensor]] = {}

    def process(rank: int) -> None:
        own = slice(rank * 4 // size, (rank + 1) * 4 // size)
        share = features[own].detach().requires_grad_()
        loss = CategoryConsistentLoss()
        loss.group = group
        totals = loss.totals(share, target[own])
        weights = torch.stack([total.weight for total in totals])
        group.all_reduce(weights)
        shares = Parts(*(total.loss / weight for total, weight in zip(totals, weights, strict=True)))
        grad = torch.autograd.grad(sum(shares), share)[0]
        results[rank] = shares, weights, grad

    group.run(process)
    assert len(results) == size
    for part, exact in zip(zip(*(results[rank][0] for rank in range(size)), strict=True), whole, strict=True):
        torch.testing.assert_close(torch.stack(part).sum(), exact, rtol=0, atol=1e-12)
    gradients = torch.cat([results[rank][2] for rank in range(size)])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(results[0][1], torch.ones(3, dtype=torch.float64))


def test_labels_of_another_size() -> None:
    """The corners of labels and features coincide, as in the upsampling of logits."""
    labels = torch.arange(49 * 33).view(1, 49, 33)
    assert torch.equal(nearest(labels, torch.Size([7, 5])), labels[:, ::8, ::8])
    assert nearest(labels, torch.Size([49, 33])) is labels
    assert nearest(labels, torch.Size([1, 1])).tolist() == [[[0]]]


def test_half_precision_is_summed_in_float32() -> None:
    features, target = sample(n=2)
    half = features.half().requires_grad_()
    found = CategoryConsistentLoss()(half, target)
    assert all(part.dtype == torch.float32 for part in found)
    for part, exact in zip(found, brute_force(features.half().double(), target), strict=True):
        torch.testing.assert_close(part.double(), exact, rtol=1e-5, atol=1e-6)
    sum(found).backward()
    assert half.grad is not None and half.grad.dtype == torch.float16


def test_deltas_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="delta_v"):
        CategoryConsistentLoss(delta_v=2.0, delta_d=1.5)
