"""The fused loss and classes of upsampled logits against float64 and against the modules of loss/.

The brute force upsamples with two matrices in float64, and differentiates by hand.
"""

import itertools
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused
from engine.inference import predict_classes
from fused import loss_reference
from loss import CriterionDSN, CriterionOhemDSN, OhemCrossEntropy2d
from loss.criterion import upsample
from loss.ohem import total_cross_entropy

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16


@dataclass
class Backend:
    """The operators of one device, with the arguments of their schemas."""

    segmentation_loss: Callable[..., tuple[Tensor, Tensor]]
    coarse_probability: Callable[..., Tensor]
    upsampled_classes: Callable[..., Tensor]
    device: str = "cpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if request.param not in fused.DEVICE_TYPES:
        pytest.skip(f"fused._C is not built for {request.param}")
    operators = torch.ops.fused
    return Backend(
        operators.segmentation_loss,
        operators.coarse_probability,
        operators.upsampled_classes,
        request.param,
    )


@pytest.fixture
def compiled() -> None:
    if "cpu" not in fused.DEVICE_TYPES:
        pytest.skip("fused._C is not built")


def sample(
    sizes: tuple[int, ...], dtype: torch.dtype = F32, void: float = 0.2, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return logits and a target for sizes (N, C, H, W, h, w); a part `void` of the labels is 255."""
    n, c, low_h, low_w, h, w = sizes
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    logits = scale * torch.randn(n, c, low_h, low_w, generator=generator, dtype=F64)
    target = torch.randint(0, c, (n, h, w), generator=generator)
    target[torch.rand(n, h, w, generator=generator) < void] = 255
    return logits.to(dtype), target


def matrix(lines: int, pixels: int) -> Tensor:
    """Return the matrix [pixels, lines] that interpolates with aligned corners, in float64."""
    result = torch.zeros(pixels, lines, dtype=F64)
    for i in range(pixels):
        position = i * (lines - 1) / (pixels - 1) if pixels > 1 else 0.0
        lower = min(int(position), lines - 1)
        result[i, lower] += 1 - (position - lower)
        if lower + 1 < lines:
            result[i, lower + 1] += position - lower
    return result


def probabilities(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return upsampled logits, their softmax, and the two matrices."""
    rows, columns = matrix(logits.shape[2], size[0]), matrix(logits.shape[3], size[1])
    upsampled = torch.einsum("yi,ncij,xj->ncyx", rows, logits.double().cpu(), columns)
    return upsampled, upsampled.softmax(1), rows, columns


def brute_force(
    logits: Tensor, counts: Tensor, label: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the sum of the weights and the gradient of the loss, in float64."""
    upsampled, probability, rows, columns = probabilities(logits, label.shape[1:])
    label = label.where(counts, 0)
    weight = (torch.ones_like(label, dtype=F64) if weights is None else weights.double()[label]) * counts
    log_probability = torch.log_softmax(upsampled, 1).gather(1, label[:, None])[:, 0]
    one_hot = torch.zeros_like(probability).scatter_(1, label[:, None], 1.0)
    grad = torch.einsum("yi,ncyx,xj->ncij", rows, (probability - one_hot) * weight[:, None], columns)
    return -(weight * log_probability).sum(), weight.sum(), grad


def todays(logits: Tensor, target: Tensor, ignored: int, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Return the loss, the sum of the weights and the gradient of the modules of loss/."""
    leaf = logits.clone().requires_grad_()
    total = total_cross_entropy(upsample(leaf, target.shape[1:]), target, ignored, weights)
    return total.loss.detach(), total.weight, torch.autograd.grad(total.loss, leaf)[0]


def check(
    results: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, ...], pixels: int
) -> None:
    """Check that errors are at most twice those of today's modules plus one rounding; 1e-12 in float64."""
    for name, ours, other, truth in zip(("loss", "weight", "grad"), results, theirs, exact, strict=True):
        assert ours.dtype == other.dtype and ours.shape == other.shape, name
        magnitude = truth.abs().max()
        if name == "grad":  # terms that cancel, of magnitude 1
            magnitude = magnitude.clamp(min=1.0)
        error = (ours.double().cpu() - truth).abs().max()
        if ours.dtype == F64:
            bound = 1e-12 * magnitude
        else:
            bound = 2 * (other.double().cpu() - truth).abs().max() + torch.finfo(ours.dtype).eps * magnitude
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


# (N, C, H, W, h, w)
SIZES = [
    (2, 19, 9, 17, 65, 129),  # the factor of training, 8
    (1, 19, 7, 5, 33, 50),
    (1, 2, 9, 9, 65, 65),
    (2, 3, 6, 19, 6, 19),  # no upsampling
    (1, 4, 5, 20, 5, 33),  # of one axis
    (1, 4, 12, 5, 40, 5),
    (2, 3, 4, 5, 1, 9),
    (1, 3, 4, 5, 9, 1),
    (1, 3, 4, 5, 1, 1),
    (1, 5, 1, 4, 9, 9),
    (1, 5, 4, 1, 9, 9),
    (1, 5, 1, 1, 33, 17),
    (1, 6, 20, 22, 7, 9),  # downsampling
    (1, 6, 20, 4, 7, 30),
    (1, 1, 3, 3, 17, 17),
    (1, 150, 4, 5, 25, 33),
    (5, 3, 2, 2, 3, 3),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_loss_and_gradient(backend, dtype, weighted, sizes):
    logits, target = sample(sizes, dtype)
    weights = torch.rand(sizes[1], dtype=dtype) + 0.1 if weighted else None
    on = [t if t is None else t.to(backend.device) for t in (logits, target, weights)]
    totals, grad = backend.segmentation_loss(*on[:2], 255, on[2], None, True)
    exact = brute_force(logits, target != 255, target, weights)
    check((*totals, grad), todays(logits, target, 255, weights), exact, target.numel())
    without, nothing = backend.segmentation_loss(*on[:2], 255, on[2], None, False)
    assert torch.equal(without, totals) and nothing.shape == (0,)


@pytest.mark.parametrize("ignored", [0, 1, 255, -100])
def test_any_label_can_be_ignored(backend, ignored):
    logits, target = sample((2, 3, 5, 6, 33, 41), F64)
    target = target.where(target != 255, ignored)
    totals, grad = backend.segmentation_loss(
        logits.to(backend.device), target.to(backend.device), ignored, None, None, True
    )
    exact = brute_force(logits, target != ignored, target, None)
    check((*totals, grad), exact, exact, target.numel())


def test_if_all_is_ignored_loss_and_gradient_are_0(backend):
    logits, target = sample((2, 3, 5, 6, 33, 41), void=1.1)
    logits[0, 0, 0, 0] = torch.nan
    totals, grad = backend.segmentation_loss(
        logits.to(backend.device), target.to(backend.device), 255, None, None, True
    )
    assert (totals == 0).all() and (grad == 0).all()


def test_nan_of_ignored_pixels_adds_nothing(backend):
    logits, target = sample((1, 3, 6, 41, 6, 41), void=0.0)
    target[..., ::2] = 255
    results = []
    for value in (0.0, torch.nan):
        logits[..., ::2] = value
        operands = [logits.to(backend.device), target.to(backend.device)]
        results.append(backend.segmentation_loss(*operands, 255, None, None, True))
    assert results[0][0][0] > 0
    assert all(map(torch.equal, *results))


def kept_pixels(
    backend: Backend, logits: Tensor, target: Tensor, threshold: Tensor, ignored: int = 255
) -> Tensor:
    """Return which pixels the operator counts: their probabilities are those of a grid of all pixels."""
    probability = backend.coarse_probability(logits, target, ignored, *target.shape[1:])
    return (target != ignored) & (probability <= threshold)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_threshold(backend, dtype, sizes):
    """Thresholds are probabilities of pixels, so that a difference of one bit would be seen."""
    logits, target = sample(sizes, dtype, void=0.1)
    logits, target = logits.to(backend.device), target.to(backend.device)
    probability = backend.coarse_probability(logits, target, 255, *target.shape[1:])
    of_pixels = probability[target != 255].unique()
    _, exact, _, _ = probabilities(logits, target.shape[1:])
    truth = exact.gather(1, target.cpu().where(target.cpu() != 255, 0)[:, None])[:, 0]
    error = (probability.double().cpu() - truth).where(target.cpu() != 255, 0).abs().max()
    assert error < (1e-12 if dtype == F64 else 1e-5)
    for threshold in of_pixels[:: max(1, len(of_pixels) // 5)]:
        counts = (target != 255) & (probability <= threshold)
        totals, grad = backend.segmentation_loss(logits, target, 255, None, threshold, True)
        assert totals[1] == counts.sum() > 0
        masked = target.where(counts, 255)
        selected, selected_grad = backend.segmentation_loss(logits, masked, 255, None, None, True)
        assert torch.equal(totals, selected) and torch.equal(grad, selected_grad)


def smooth(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Return logits and labels like those of a trained network: areas of one class, confident inside."""
    n, c, low_h, low_w, h, w = sizes
    generator = torch.Generator().manual_seed(seed)
    logits = upsample(5 * torch.randn(n, c, 4, 4, generator=generator, dtype=F64), (low_h, low_w))
    target = upsample(logits, (h, w)).argmax(1)
    wrong = torch.rand(n, h, w, generator=generator) < 0.05
    target = target.where(~wrong, torch.randint(0, c, (n, h, w), generator=generator))
    target[:, : h // 6] = 255
    return logits.to(dtype), target


#: Threshold and pixels to keep: none, too many, and numbers in between. At (0.0, 640), zeros of scipy outside
#: the picture decide.
SELECTIONS = [
    (0.7, 100000),
    (0.7, 6400),
    (0.3, 3000),
    (0.05, 64),
    (0.6, 63),
    (0.7, 0),
    (0.0, 640),
    (0.0, 4000),
]

# In the second and the third, the coarse grid hits pixels, so that the threshold is the probability of a
# pixel. At 109 and 125, rounding moves a grid point beyond the picture. The last two are hardly larger than
# the factor of the grid, or smaller.
OHEM_SIZES = [
    (2, 19, 9, 9, 65, 65),
    (2, 5, 6, 6, 41, 41),
    (2, 5, 6, 6, 21, 17),
    (1, 4, 8, 9, 109, 125),
    (2, 3, 9, 5, 129, 33),
    (2, 3, 5, 5, 12, 9),
    (2, 3, 2, 8, 3, 40),
]


@pytest.mark.parametrize("sizes", OHEM_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("made", [sample, smooth])
def test_ohem_keeps_the_same_pixels(backend, made, seed, dtype, sizes):
    logits, target = made(sizes, dtype, seed=seed)
    for (thresh, min_kept), ignored in itertools.product(SELECTIONS, (255, 0)):
        labels = target if ignored == 255 else target.where(target != 255, 0)
        ohem = OhemCrossEntropy2d(ignored, thresh, min_kept)
        upsampled = upsample(logits, labels.shape[1:])
        expected = ohem.hard_target(upsampled, labels) != ignored
        grid = [round(size / 8) for size in labels.shape[1:]]
        operands = [logits.to(backend.device), labels.to(backend.device)]
        threshold = ohem._threshold(backend.coarse_probability(*operands, ignored, *grid))
        kept = kept_pixels(backend, *operands, threshold, ignored).cpu()
        totals, _ = backend.segmentation_loss(*operands, ignored, None, threshold, False)
        assert totals[1] == kept.sum()
        different = kept != expected
        if dtype == F32:  # there the probabilities of today's softmax differ by rounding
            probability = upsampled.softmax(1).gather(1, labels.where(labels != ignored, 0)[:, None])[:, 0]
            assert different.sum() <= 1
            assert ((probability[different] - threshold.cpu()).abs() < 1e-6).all()
        else:
            assert not different.any(), (thresh, min_kept)


@pytest.mark.parametrize("sizes", OHEM_SIZES, ids=str)
@pytest.mark.parametrize("grid", [(8, 8), (1, 1), (3, 1), (5, 16), (0, 4)], ids=str)
def test_coarse_probability(backend, grid, sizes):
    logits, target = sample(sizes, F64)
    result = backend.coarse_probability(logits.to(backend.device), target.to(backend.device), 255, *grid)
    expected = loss_reference.coarse_probability(logits, target, grid)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_nan_and_large_logits(backend):
    sizes = (1, 4, 5, 6, 33, 41)
    logits, target = sample(sizes, void=0.0)
    operands = [logits.to(backend.device), target.to(backend.device)]
    for bad in (torch.nan, torch.inf):
        spoiled = operands[0].clone()
        spoiled[0, 2, 3, 3] = bad
        for threshold in (None, torch.tensor(0.1, device=backend.device)):
            totals, _ = backend.segmentation_loss(spoiled, operands[1], 255, None, threshold, True)
            assert totals[0].isnan()
    for dtype in (F32, F64):
        large = sample(sizes, dtype, void=0.0, scale=1e4)[0]
        totals, grad = backend.segmentation_loss(large.to(backend.device), operands[1], 255, None, None, True)
        exact = brute_force(large, target != 255, target, None)
        check((*totals, grad), todays(large, target, 255, None), exact, target.numel())


def test_channels_last_and_strided_operands(backend):
    logits, target = sample((2, 5, 6, 7, 33, 41))
    weights = torch.rand(10)

    def results(logits: Tensor, target: Tensor, weights: Tensor) -> list[Tensor]:
        logits, target, weights = (t.to(backend.device) for t in (logits, target, weights))
        loss = backend.segmentation_loss(logits, target, 255, weights, None, True)
        return [*loss, backend.upsampled_classes(logits, 20, 30)]

    expected = results(logits, target, weights[::2].contiguous())
    for other in (
        logits.to(memory_format=torch.channels_last),
        logits.repeat_interleave(2, 3)[..., ::2],
        logits.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        labels = target.to(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2)
        for ours, theirs in zip(results(other, labels, weights[::2]), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.is_contiguous()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_classes(backend, dtype, sizes):
    logits, _ = sample(sizes, dtype)
    classes = backend.upsampled_classes(logits.to(backend.device), *sizes[4:]).cpu()
    assert classes.dtype == torch.uint8 and classes.shape == (sizes[0], *sizes[4:])
    exact, *_ = probabilities(logits, sizes[4:])
    chosen = exact.gather(1, classes.long()[:, None])[:, 0]
    lost = exact.amax(1) - chosen
    assert (lost > 0).sum() <= 1e-4 * lost.numel()
    assert lost.max() <= (1e-13 if dtype == F64 else 1e-5)


def test_classes_of_ties_nan_and_many_classes(backend):
    logits = torch.zeros(2, 255, 4, 5, device=backend.device)
    assert (backend.upsampled_classes(logits, 9, 33) == 0).all()
    logits[:, 7:] = 1
    assert (backend.upsampled_classes(logits, 9, 33) == 7).all()
    logits[:, 254] = 2
    assert (backend.upsampled_classes(logits, 9, 33) == 254).all()
    for bad in (0, 100, 254):
        spoiled = logits.clone()
        spoiled[1, bad, 2, 3] = torch.nan
        spoiled[0, :, 0, 0] = -torch.inf
        for size in ((4, 5), (9, 33), (25, 33)):
            expected = loss_reference.upsampled_classes(spoiled, size)
            assert torch.equal(backend.upsampled_classes(spoiled, *size), expected)
    with pytest.raises(RuntimeError, match=r"upsampled_classes: logits must have at most 255 classes"):
        backend.upsampled_classes(logits.new_zeros(1, 256, 4, 4), 9, 9)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sizes", [(2, 19, 33, 33, 129, 129), (1, 7, 1, 40, 300, 300)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(compiled, sizes, dtype):
    logits, target = sample(sizes, dtype)
    threads, results = torch.get_num_threads(), []
    threshold = torch.tensor(0.3)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(
                [
                    *torch.ops.fused.segmentation_loss(logits, target, 255, None, threshold, True),
                    torch.ops.fused.coarse_probability(logits, target, 255, 16, 16),
                    torch.ops.fused.upsampled_classes(logits, 200, 300),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_differentiable_loss(compiled, sizes, dtype):
    logits, target = sample(sizes, dtype)
    weights = torch.rand(sizes[1])
    leaf = logits.clone().requires_grad_()
    loss, weight = fused.segmentation_loss(leaf, target, class_weights=weights)
    assert loss.requires_grad and not weight.requires_grad
    (grad,) = torch.autograd.grad(loss, leaf)
    if dtype in (F16, BF16):
        exact = brute_force(logits, target != 255, target, weights)
    else:
        exact = brute_force(logits, target != 255, target, weights.to(dtype))
    check((loss.detach(), weight, grad), todays(logits, target, 255, weights), exact, target.numel())
    assert [t.requires_grad for t in fused.segmentation_loss(logits, target)] == [False, False]


@pytest.mark.parametrize("scale", [1e-6, 3e5])
def test_half_precision_gradient_is_scaled_before_it_is_rounded(compiled, scale):
    """Sums over 600 pixels in fp16: the unscaled gradient overflows, or its rounded product underflows."""
    logits = torch.zeros(1, 2, 2, 2, dtype=F16)
    logits[:, 0] = 8
    target = torch.ones(1, 512, 1024, dtype=torch.int64)
    grads = []
    for total in (fused.segmentation_loss, loss_reference.segmentation_loss):
        leaf = logits.clone().requires_grad_()
        loss, weight = total(leaf, target)
        grads.append(torch.autograd.grad(loss * scale / weight, leaf)[0])
    assert (grads[0].isfinite().all() and (grads[0] != 0).all()) or scale > 1
    torch.testing.assert_close(grads[0], grads[1])


def test_gradcheck(compiled):
    logits, target = sample((1, 3, 3, 4, 10, 9), F64, scale=1.0)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=F64)
    leaf = logits.requires_grad_()
    for options in ({}, {"class_weights": weights}, {"threshold": torch.tensor(0.4)}):
        assert torch.autograd.gradcheck(
            lambda x, options=options: fused.segmentation_loss(x, target, **options)[0] * 0.3, leaf
        )
    loss, _ = fused.segmentation_loss(leaf, target)
    with pytest.raises(RuntimeError, match=r"^segmentation_loss: a backward pass with create_graph=True"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_autocast_changes_nothing(compiled):
    logits, target = sample((1, 5, 6, 7, 33, 41))

    def results() -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        loss, weight = fused.segmentation_loss(leaf, target)
        (grad,) = torch.autograd.grad(loss, leaf)
        coarse = fused.coarse_probability(logits, target, (4, 5))
        return [loss.detach(), weight, grad, coarse, fused.upsampled_classes(logits, (33, 41))]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(results(), expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "message, change",
    [
        ("logits must be [N, C, H, W]", {"logits": torch.zeros(5, 4, 4)}),
        ("logits must be [N, C, H, W]", {"logits": torch.zeros(2, 0, 4, 4)}),
        ("needs float32, float64, float16 or bfloat16", {"logits": torch.zeros(2, 5, 4, 4).long()}),
        ("target must be [N, h, w]", {"target": torch.zeros(1, 9, 9).long()}),
        ("target must be [N, h, w]", {"target": torch.zeros(2, 1, 9, 9).long()}),
        ("class_weights must have 5 elements, got shape [4]", {"class_weights": torch.ones(4)}),
        ("threshold must have 1 element, got shape [2]", {"threshold": torch.ones(2)}),
        ("the target has the label 5, but the logits have 5 classes", {"target": torch.full((2, 9, 9), 5)}),
        ("the target has the label -1, but", {"target": torch.full((2, 9, 9), -1)}),
    ],
)
def test_wrong_operands(compiled, message, change):
    operands = {"logits": torch.zeros(2, 5, 4, 4), "target": torch.zeros(2, 9, 9).long(), **change}
    with pytest.raises(RuntimeError, match=f"segmentation_loss: .*{re.escape(message)}"):
        fused.segmentation_loss(**operands)
    valid = torch.full((2, 9, 9), 200)
    assert fused.segmentation_loss(torch.zeros(2, 5, 4, 4), valid, ignore_index=200)[1] == 0


def test_opcheck(compiled):
    logits, target = sample((2, 3, 4, 5, 17, 19))
    operators, threshold = torch.ops.fused, torch.tensor(0.5)
    for needs_grad in (False, True):
        for dtype in (F32, F64, BF16):
            torch.library.opcheck(
                operators.segmentation_loss.default,
                (logits.to(dtype), target, 255, torch.ones(3), threshold, needs_grad),
            )
    torch.library.opcheck(operators.coarse_probability.default, (logits, target, 255, 3, 4))
    torch.library.opcheck(operators.upsampled_classes.default, (logits, 20, 21))


@pytest.mark.slow
def test_compiled_criterion(compiled):
    outputs = [sample((2, 5, 6, 7, 33, 41), seed=seed)[0].requires_grad_() for seed in (0, 1)]
    _, target = sample((2, 5, 6, 7, 33, 41))
    for criterion in (CriterionDSN(class_weights=torch.rand(5)), CriterionOhemDSN(thresh=0.3, min_kept=200)):
        expected = criterion(outputs, target)
        loss = torch.compile(criterion, fullgraph=True, backend="aot_eager")(outputs, target)
        assert torch.equal(loss, expected)
        for ours, theirs in zip(
            torch.autograd.grad(loss, outputs), torch.autograd.grad(expected, outputs), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.fixture
def modes() -> list[str]:
    """Return the modes that turn the operators on and off; restore the mode afterwards."""
    with fused.using("auto"):
        yield ["on", "off"]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ohem", [False, True])
@pytest.mark.parametrize("made", [sample, smooth])
def test_criterion(compiled, modes, made, ohem, weighted, dtype):
    sizes = (2, 19, 9, 9, 65, 65)
    target = made(sizes, dtype, seed=0)[1]
    weights = torch.rand(19) + 0.1 if weighted else None
    criterion = CriterionOhemDSN(255, 0.4, 1500, weights) if ohem else CriterionDSN(255, weights)
    results = []
    for mode in modes:
        fused.use(mode)
        outputs = [made(sizes, dtype, seed=seed)[0].requires_grad_() for seed in (0, 1)]
        totals = criterion.totals(outputs, target)
        loss = criterion(outputs, target)
        results.append([*itertools.chain(*totals), loss, *torch.autograd.grad(loss, outputs)])
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 1e-2, F16: 1e-3}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("made", [CriterionDSN(), CriterionOhemDSN(255, 0.4, 20)], ids=["plain", "ohem"])
@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_the_criterion_in_a_transform(compiled, modes, transform, made):
    logits, target = sample((1, 3, 4, 5, 17, 19), F64)
    results = []
    for mode in modes:
        fused.use(mode)

        def loss(z: Tensor) -> Tensor:
            return made([z], target)

        if transform == "jvp":
            results.append(torch.func.jvp(loss, (logits,), (logits.square(),))[1])
        else:
            results.append(torch.func.grad(loss)(logits))
    assert results[0].abs().max() > 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_the_main_head_is_finished_before_the_auxiliary_head_begins(compiled, modes, monkeypatch, mode):
    """Then only one head at a time needs memory for upsampled logits."""
    fused.use(mode)
    criterion, heads = CriterionDSN(), []
    one_head = criterion.total
    monkeypatch.setattr(
        criterion, "total", lambda logits, target: heads.append(logits) or one_head(logits, target)
    )
    outputs = [sample((1, 3, 4, 5, 17, 19), seed=seed)[0] for seed in (0, 1)]
    criterion.totals(outputs, torch.zeros(1, 17, 19).long())
    assert heads[0] is outputs[0] and heads[1] is outputs[1]


@pytest.mark.parametrize("tile", [None, (80, 120), (90, 130)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_predicted_classes(compiled, modes, dtype, tile):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(19, 3, 8, 8, generator=generator)
    images = torch.randn(3, 3, 80, 120, generator=generator, dtype=F64).to(dtype)

    def model(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image, weight.to(image.dtype), stride=8)

    used, results = [], []
    operator = fused.upsampled_classes
    for mode in modes:
        fused.use(mode)
        fused.upsampled_classes = lambda *args: used.append(args) or operator(*args)
        try:
            results.append(predict_classes(model, images, [1.0], False, tile, 19, 2))
        finally:
            fused.upsampled_classes = operator
        assert len(used) == 1  # used with "on", not with "off"
    assert results[0].is_contiguous() and results[0].shape == results[1].shape == (3, 80, 120)
    different = results[0] != results[1]
    assert different.sum() <= 1e-4 * different.numel()
    padded = images if tile is None else torch.nn.functional.pad(images, (0, tile[1] - 120, 0, tile[0] - 80))
    logits, *_ = probabilities(model(padded), padded.shape[2:])
    largest, second = logits[:, :, :80, :120].topk(2, dim=1).values.unbind(1)
    assert ((largest - second)[different] < 1e-5 * largest.abs()[different]).all()


def test_other_predictions_do_not_use_the_operator(compiled, monkeypatch):
    def refuse(*_: object) -> Tensor:
        raise AssertionError("used")

    monkeypatch.setattr(fused, "upsampled_classes", refuse)
    images = torch.randn(1, 3, 40, 60)
    for scales, flip, tile in [
        ([1.0], True, None),
        ([1.0, 0.5], False, None),
        ([0.5], False, None),
        ([1.0], False, (40, 59)),
        ([1.0], False, (33, 60)),
    ]:
        predict_classes(lambda x: x[:, :, ::4, ::4], images, scales, flip, tile, 3)


def peak_of(function: Callable[[], object]) -> int:
    """Return the growth of the largest resident memory of this process, in bytes."""

    def value(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from the present value
    except OSError:
        pytest.skip("this system can't measure the peak again")
    before = value("VmRSS")
    function()
    return value("VmHWM") - before


def peaks() -> list[int]:
    """Return the peaks of the loss, the reference of the loss, the coarse probability and the classes."""
    logits, target = sample((1, 19, 33, 33, 1025, 1025))

    def loss(total: Callable[..., tuple[Tensor, Tensor]]) -> None:
        leaf = logits.clone().requires_grad_()
        total(leaf, target, threshold=torch.tensor(0.5))[0].backward()

    loss(fused.segmentation_loss)  # loads what the first backward needs
    return [
        peak_of(lambda: loss(fused.segmentation_loss)),
        peak_of(lambda: loss(loss_reference.segmentation_loss)),
        peak_of(lambda: fused.coarse_probability(logits, target, (128, 128))),
        peak_of(lambda: fused.upsampled_classes(logits, (1025, 1025))),
    ]


@pytest.mark.slow
def test_no_upsampled_logits_are_stored(compiled):
    # In a process of its own, where nothing else takes or returns memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        loss, reference, coarse, classes = pool.submit(peaks).result()
    all_logits = 4 * 19 * 1025 * 1025
    assert reference > all_logits
    assert max(loss, coarse, classes) < all_logits / 8
