"""The CUDA kernels of the loss on upsampled logits, against plain PyTorch in float64.

They run on a GPU where there is one, and everywhere in the emulator (tests/kernels/emulator), which compiles
the same loss.cu and runs its threads in many orders.
"""

import math
from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulator import COMPILER, SCHEDULES, build
from emulator.fused_loss import (
    FUSED,
    CoarseProbability,
    Logits,
    LossKernels,
    LossSizes,
    SegmentationLoss,
    UpsampledClasses,
)
from torch import Tensor

from loss.ohem import OhemCrossEntropy2d, total_cross_entropy

F32, F64 = torch.float32, torch.float64
IGNORED = 255

# (N, C, H, W, h, w): factors 8, 7.5 and 1, downsampling, a single row or column of nodes or pixels, tails
# of blocks, of strips of node rows and of groups of classes, intervals of many rows.
SHAPES = [
    (2, 19, 13, 9, 97, 65),
    (1, 19, 9, 13, 60, 90),
    (3, 2, 5, 7, 5, 7),
    (1, 1, 4, 3, 25, 17),
    (1, 150, 3, 4, 17, 25),
    (2, 21, 11, 8, 5, 3),
    (1, 4, 1, 5, 9, 33),
    (1, 11, 5, 1, 33, 9),
    (1, 6, 17, 3, 1, 10),
    (1, 3, 3, 17, 10, 1),
    (1, 2, 1, 1, 7, 6),
    (1, 255, 2, 2, 41, 3),
    (1, 5, 2, 3, 67, 100),
    (2, 3, 8, 5, 57, 32),
]


@dataclass
class Backend:
    """The three functions of loss.h, as the class LossKernels has them, on one device."""

    name: str
    device: str
    loss: Callable[..., tuple[Tensor, Tensor]]
    coarse: Callable[..., Tensor]
    classes: Callable[..., Tensor]


@pytest.fixture(scope="session")
def kernels() -> LossKernels:
    if COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    return LossKernels(build(csrc=FUSED))


@pytest.fixture(
    params=[
        pytest.param("emulator", marks=pytest.mark.build),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "emulator":
        return on_emulator(request.getfixturevalue("kernels"))
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if not hasattr(torch.ops.fused, "segmentation_loss"):
        pytest.skip("fused._C is not built")
    operators = torch.ops.fused

    def loss(
        logits: Tensor,
        target: Tensor,
        ignored: int,
        class_weights: Tensor | None = None,
        threshold: Tensor | None = None,
        **_: int,
    ) -> tuple[Tensor, Tensor]:
        return operators.segmentation_loss(logits, target, ignored, class_weights, threshold, True)

    def coarse(*arguments: Any, **_: int) -> Tensor:
        return operators.coarse_probability(*arguments)

    def classes(*arguments: Any, **_: int) -> Tensor:
        return operators.upsampled_classes(*arguments)

    return Backend("cuda", "cuda", loss, coarse, classes)


def on_emulator(kernels: LossKernels) -> Backend:
    return Backend(
        "emulator", "cpu", kernels.segmentation_loss, kernels.coarse_probability, kernels.upsampled_classes
    )


def sample(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", ignored: int = IGNORED
) -> tuple[Tensor, Tensor]:
    """Return logits [N,C,H,W] and target [N,h,w], a fifth of it ignored, for shape (N, C, H, W, h, w)."""
    n, channels, rows, columns, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 3 * torch.randn(n, channels, rows, columns, generator=generator, dtype=F64)
    target = torch.randint(channels, (n, height, width), generator=generator)
    target[torch.rand(n, height, width, generator=generator) < 0.2] = ignored
    return logits.to(device, dtype), target.to(device)


def upsample(logits: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


def plain(
    logits: Tensor,
    target: Tensor,
    ignored: int,
    class_weights: Tensor | None = None,
    threshold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the totals and the gradient in plain PyTorch, in the dtype of the logits."""
    logits = logits.detach().requires_grad_()
    upsampled = upsample(logits, target.shape[1:])
    target = hard_target(upsampled.detach(), target, ignored, threshold)
    totals = torch.stack(total_cross_entropy(upsampled, target, ignored, class_weights))
    (grad,) = torch.autograd.grad(totals[0], logits)
    return totals.detach(), grad


def pixel_losses(
    logits: Tensor,
    target: Tensor,
    ignored: int,
    class_weights: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """Compute the weighted loss of each pixel in plain PyTorch, in the dtype of the logits."""
    upsampled = upsample(logits, target.shape[1:])
    target = hard_target(upsampled, target, ignored, threshold)
    return F.cross_entropy(upsampled, target, class_weights, ignore_index=ignored, reduction="none")


def hard_target(upsampled: Tensor, target: Tensor, ignored: int, threshold: Tensor | None) -> Tensor:
    """Return `target` with `ignored` where the probability of the true class is above the threshold."""
    if threshold is None:
        return target
    index = target.where(target != ignored, 0).unsqueeze(1)
    probability = upsampled.softmax(1).gather(1, index).squeeze(1)
    return target.where(probability <= threshold, ignored)


def separated_threshold(logits: Tensor, target: Tensor, ignored: int) -> Tensor:
    """Return a probability far from those of all pixels, so that rounding does not move a pixel over it."""
    upsampled = upsample(logits.to(F64), target.shape[1:])
    index = target.where(target != ignored, 0).unsqueeze(1)
    values = upsampled.softmax(1).gather(1, index).flatten().sort().values
    middle = values[len(values) // 4 : len(values) * 3 // 4]
    widest = middle.diff().argmax()
    assert middle.diff()[widest] > 1e-5 * middle[widest]
    return (middle[widest] + middle[widest + 1])[None] / 2


def check(
    results: tuple[Tensor, Tensor], operands: tuple[Any, ...], optional: dict[str, Any] | None = None
) -> None:
    """Compare the totals and the gradient with float64.

    float64: to 1e-12 of the largest element. float32: the error is at most twice that of plain PyTorch, plus
    one rounding. The error of a sum of pixels may be small by luck; so that of PyTorch counts as at least
    what the errors of its pixels would give with random signs.
    """
    optional = optional or {}
    dtype = operands[0].dtype
    wide = (operands[0].to(F64), *operands[1:])
    wide_optional: dict[str, Any] = {name: tensor.to(F64) for name, tensor in optional.items()}
    exact, theirs = plain(*wide, **wide_optional), plain(*operands, **optional)
    pixels = pixel_losses(*wide, **wide_optional) - pixel_losses(*operands, **optional).to(F64)
    for name, ours, other, truth in zip(("totals", "grad"), results, theirs, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        error, their_error = (ours.to(F64) - truth).abs(), (other.to(F64) - truth).abs()
        # The totals are two numbers of their own; the gradient has the rounding of its largest element.
        magnitude = truth.abs()
        if name == "totals":
            their_error[0] = torch.maximum(their_error[0], pixels.norm())
        else:
            their_error, magnitude = their_error.max(), magnitude.max()
        rounding = torch.finfo(dtype).eps
        bound = 1e-12 * magnitude if dtype == F64 else 2 * their_error + rounding * magnitude
        assert (error <= bound).all(), f"{name}: error {error.max():.2e}, bound {bound.max():.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_as_exact_as_pytorch(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operands = (*sample(shape, dtype, backend.device), IGNORED)
    check(backend.loss(*operands), operands)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_class_weights_and_threshold(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operands = (*sample(shape, dtype, backend.device), IGNORED)
    weights = torch.linspace(0, 2, shape[1], dtype=dtype, device=backend.device)  # one of them is 0
    threshold = separated_threshold(*operands).to(dtype)
    for optional in (
        {"class_weights": weights},
        {"threshold": threshold},
        {"class_weights": weights, "threshold": threshold},
    ):
        check(backend.loss(*operands, **optional), operands, optional)


@pytest.mark.parametrize("ignored", [0, -100, 3])
def test_ignored_may_be_any_number(backend: Backend, ignored: int) -> None:
    operands = (*sample((2, 4, 5, 6, 33, 41), F64, backend.device, ignored), ignored)
    check(backend.loss(*operands), operands)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_large_logits(backend: Backend, dtype: torch.dtype) -> None:
    """Logits whose exponentials overflow, also by a common offset."""
    logits, target = sample((1, 7, 5, 6, 33, 41), dtype, backend.device)
    for changed in (1000 * logits, logits + 300, logits - 300):
        operands = (changed, target, IGNORED)
        check(backend.loss(*operands), operands)


def test_no_images(backend: Backend) -> None:
    logits, target = torch.ones(0, 3, 2, 2), torch.zeros(0, 5, 5, dtype=torch.int64)
    logits, target = logits.to(backend.device), target.to(backend.device)
    totals, grad = backend.loss(logits, target, IGNORED)
    assert totals.tolist() == [0, 0] and grad.shape == logits.shape
    assert backend.coarse(logits, target, IGNORED, 2, 2).numel() == 0
    assert backend.classes(logits, 5, 5).numel() == 0


def test_all_ignored(backend: Backend) -> None:
    logits, target = sample(SHAPES[0], F32, backend.device)
    totals, grad = backend.loss(logits, torch.full_like(target, IGNORED), IGNORED)
    assert totals.tolist() == [0, 0] and (grad == 0).all()


@pytest.mark.build
def test_gradient_is_optional(kernels: LossKernels) -> None:
    operands = (*sample(SHAPES[0], F32), IGNORED)
    totals, grad = kernels.segmentation_loss(*operands, needs_grad=False)
    assert grad.numel() == 0 and torch.equal(totals, kernels.segmentation_loss(*operands)[0])


@pytest.mark.parametrize("optional", ["", "class_weights", "threshold"])
@pytest.mark.parametrize("wrong", [19, -1, -100, 2**32 + 1, 2**63 - 1])
def test_target_that_is_no_class_gives_nan(backend: Backend, wrong: int, optional: str) -> None:
    logits, target = sample(SHAPES[0], F32, backend.device)
    values = {"class_weights": torch.ones(19), "threshold": torch.tensor([1e-30])}
    arguments = {optional: values[optional].to(backend.device)} if optional else {}
    assert backend.loss(logits, target, IGNORED, **arguments)[0][0].isfinite()
    target[1, 40, 50] = wrong
    totals, grad = backend.loss(logits, target, IGNORED, **arguments)
    assert totals[0].isnan() and grad[1].isnan().any() and grad[0].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [(41, 49), (6, 7)], ids=str)
def test_logits_that_are_not_finite(backend: Backend, size: tuple[int, int], value: float) -> None:
    """The loss is NaN or infinite as in PyTorch. Pixels that do not count add nothing, not even NaN."""
    logits, target = sample((1, 5, 6, 7, *size), F64, backend.device)
    finite = logits.clone()
    logits[0, 2, 3, 4] = value
    near = upsample(logits, size).isfinite().logical_not().any(1)
    assert 0 < near.sum() < near.numel()
    target[near] = 2
    totals, grad = backend.loss(logits, target, IGNORED)
    expected = plain(logits, target, IGNORED)
    assert torch.allclose(totals, expected[0], rtol=1e-12, equal_nan=True) and not totals[0].isfinite()
    assert torch.equal(grad.isnan().any(), expected[1].isnan().any())
    if math.isnan(value):
        threshold = torch.full((1,), 0.5, dtype=F64, device=backend.device)
        totals, grad = backend.loss(logits, target, IGNORED, threshold=threshold)
        assert totals[0].isnan() and grad.isnan().any()
    hidden = target.where(~near, IGNORED)
    expected = plain(finite, hidden, IGNORED)
    for ours, theirs in zip(backend.loss(logits, hidden, IGNORED), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_coarse_probability(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, target = sample(shape, dtype, backend.device)
    for factor in (1, 2, 3):
        rows, columns = (max(1, round(size / factor)) for size in shape[4:])
        ohem = OhemCrossEntropy2d(IGNORED, factor=factor)
        if (rows, columns) != tuple(round(size / factor) for size in shape[4:]):
            continue  # too small for this factor

        def expected(t: Tensor, ohem: OhemCrossEntropy2d = ohem) -> Tensor:
            return ohem._coarse_probability(upsample(t, target.shape[1:]).softmax(1), target)

        exact, ours = expected(logits.to(F64)), backend.coarse(logits, target, IGNORED, rows, columns)
        assert ours.dtype == dtype and ours.shape == exact.shape
        counted = exact.isfinite()
        assert torch.equal(ours.isinf(), ~counted)
        error = (ours.to(F64) - exact).abs()[counted]
        bound = 1e-12
        if dtype == F32:
            theirs = (expected(logits).to(F64) - exact).abs()[counted].max().item()
            bound = 2 * theirs + torch.finfo(F32).eps
        assert (error <= bound).all()


# (h, factor) whose last sample is outside by rounding: 55 and 58 with 4, 115 and 117 with 8.
@pytest.mark.parametrize(
    ("size", "factor"), [((55, 58), 4), ((115, 30), 8), ((30, 117), 8), ((40, 48), 8), ((5, 6), 5)], ids=str
)
@pytest.mark.parametrize("ignored", [0, IGNORED])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_ohem_with_the_same_bits(
    backend: Backend, dtype: torch.dtype, size: tuple[int, int], factor: int, ignored: int
) -> None:
    """From the same probabilities, loss/ohem.py has the same threshold and pixels, to the last bit."""
    logits, target = sample((2, 4, 7, 8, *size), dtype, backend.device, ignored)
    # On a grid as fine as the pixels, the coarse probabilities are those of the pixels.
    every = [backend.coarse(logits, torch.full_like(target, c), -1, *size) for c in range(4)]
    probability = torch.stack(every, 1)
    truth = upsample(logits.to(F64), size).softmax(1)
    assert torch.allclose(probability.to(F64), truth, rtol=0, atol=1e-5 if dtype == F32 else 1e-13)

    ohem = OhemCrossEntropy2d(ignored, factor=factor)
    rows, columns = (round(s / factor) for s in size)
    coarse = backend.coarse(logits, target, ignored, rows, columns)
    assert torch.equal(coarse, ohem._coarse_probability(probability, target))

    # Thresholds of the coarse grid, and probabilities of pixels, which count at their own.
    valid = target != ignored
    of_true_class = probability.gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)
    finite, pixels = coarse[coarse.isfinite()].sort().values, of_true_class[valid]
    for threshold in (finite[0], finite[-1], *pixels[:: len(pixels) // 10]):
        for chosen in (threshold, torch.nextafter(threshold, torch.zeros_like(threshold))):
            totals, _ = backend.loss(logits, target, ignored, threshold=chosen[None])
            assert totals[1] == (pixels <= chosen).sum()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_each_hard_pixel_is_kept(backend: Backend, dtype: torch.dtype) -> None:
    """Without upsampling, the gradient shows which pixels count: those of hard_target."""
    shape = (2, 5, 24, 31, 24, 31)
    logits, target = sample(shape, dtype, backend.device)
    ohem = OhemCrossEntropy2d(IGNORED, thresh=0.01, min_kept=400, factor=2)
    hard = ohem.hard_target(logits, target)
    coarse = backend.coarse(logits, target, IGNORED, 12, 16)
    kept = 400 // 4
    threshold = coarse.flatten().sort().values[kept - 1].clamp(min=0.01)[None]
    totals, grad = backend.loss(logits, target, IGNORED, threshold=threshold)
    assert torch.equal((grad != 0).any(1), hard != IGNORED)
    assert 0 < totals[1] < (target != IGNORED).sum()


def test_coarse_target_that_is_no_class_gives_nan(backend: Backend) -> None:
    logits, target = sample((1, 4, 5, 6, 17, 21), F32, backend.device)
    for wrong in (4, -1, 2**32):
        target[0, 8, 20] = wrong
        result = backend.coarse(logits, target, IGNORED, 17, 21)
        assert result[0, 8, 20].isnan() and result.isnan().sum() == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_upsampled_classes(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, _ = sample(shape, dtype, backend.device)
    classes = backend.classes(logits, *shape[4:])
    expected = upsample(logits.to(F64), shape[4:])
    assert classes.dtype == torch.uint8 and classes.shape == expected[:, 0].shape
    chosen = expected.gather(1, classes.long()[:, None])[:, 0]
    # Where rounding decides between two classes, either is right.
    assert (chosen >= expected.amax(1) - (1e-4 if dtype == F32 else 1e-12)).all()
    assert (classes == expected.argmax(1)).float().mean() > 0.99


def test_classes_of_equal_and_of_missing_logits(backend: Backend) -> None:
    logits, _ = sample((1, 3, 5, 6, 33, 41), F64, backend.device)
    twice = torch.cat([logits, logits], 1)
    assert backend.classes(twice, 33, 41).max() == 2  # the lowest of equal classes
    assert torch.equal(backend.classes(logits - 3e4, 33, 41), backend.classes(logits, 33, 41))
    for c in range(3):
        missing = logits.clone()
        missing[0, c, 2, 3] = math.nan
        for size in ((33, 41), (5, 6)):
            classes = backend.classes(missing, *size)
            where_nan = upsample(missing, size).isnan().any(1)
            assert torch.equal(classes == 255, where_nan) and 0 < where_nan.sum() < where_nan.numel()


@pytest.mark.build
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[5], SHAPES[12]], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_same_bits_in_every_order_of_threads(
    kernels: LossKernels, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    logits, target = sample(shape, dtype)
    results = []
    for schedule in SCHEDULES:
        totals, grad = kernels.segmentation_loss(logits, target, IGNORED, schedule=schedule)
        coarse = kernels.coarse_probability(logits, target, IGNORED, 3, 2, schedule=schedule)
        classes = kernels.upsampled_classes(logits, *shape[4:], schedule=schedule)
        results.append([totals, grad, coarse, classes])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.build
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 70_000, 1, 1, 70_000),
        (1, 1, 1, 1, 70_000, 70_000),
        (1, 255, 3000, 3000, 1, 1),
        (1, 1, 2**23, 1, 1, 1),
    ],
    ids=str,
)
def test_sizes_beyond_the_limits_are_refused(kernels: LossKernels, sizes: tuple[int, ...]) -> None:
    """The kernels number the elements of an image with 32 bits. Nothing is launched: no memory is needed."""
    logits, small = Logits(False, LossSizes(*sizes), None), Logits(False, LossSizes(*[1] * 6), None)
    for name, arguments in (
        ("segmentation_loss", SegmentationLoss(logits)),
        ("coarse_probability", CoarseProbability(logits)),
        ("coarse_probability", CoarseProbability(small, rows=2**16, columns=2**16)),
        ("upsampled_classes", UpsampledClasses(logits)),
    ):
        with pytest.raises(RuntimeError, match="code 9"):
            kernels.call(f"emulated_{name}", byref(arguments))
