"""A training step: in parts, in mixed precision, undone if not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.data.transfer import Batch
from engine.runtime.distributed import World
from engine.training.ema import WeightAverage
from engine.training.step import Diverged, StepOptions, Stepper
from loss import CriterionDSN

CLASSES = 3


class Small(nn.Module):
    """Two heads and a running statistic."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2, CLASSES, 3, 1, 1, generator=generator))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images):
        with torch.no_grad():
            self.mean += images.float().mean()
        return [F.conv2d(images, weight) for weight in self.weight]


class Exploding(Small):
    """A network with a finite loss and an infinite gradient."""

    def forward(self, images):
        outputs = super().forward(images)
        outputs[0].register_hook(lambda gradient: gradient * float("inf"))
        return outputs


def made(model, fused: bool = False, **options) -> Stepper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    return Stepper(model, CriterionDSN(), optimizer, World(0, 1, torch.device("cpu")), StepOptions(**options))


def samples(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, 5, 5, generator=generator)
    labels = torch.randint(0, CLASSES, (count, 5, 5), generator=generator)
    labels[0, :3] = 255
    return Batch(images, labels, [f"sample {number}" for number in range(count)])


def test_a_batch_in_parts_has_the_mean_gradient_of_the_parts():
    images, labels, _ = batch = samples()
    model, expected = Small(), torch.zeros(2, CLASSES, 3, 1, 1)
    losses = []
    for part in (slice(0, 2), slice(2, 4)):
        loss = CriterionDSN()(model(images[part]), labels[part])
        losses.append(loss.item())
        expected += torch.autograd.grad(loss, model.weight)[0] / 2
    stepper = made(model, accumulate=2)
    report = stepper.step(1, batch).numbers()
    torch.testing.assert_close(model.weight.grad, expected)
    assert report.loss == pytest.approx(sum(losses) / 2) and len(report.parts) == 2
    assert report.gradient_norm == pytest.approx(expected.norm().item())


def test_bfloat16_is_close_and_not_the_same():
    reports = []
    for precision in (None, "bf16"):
        reports.append(made(Small(), precision=precision).step(1, samples()).numbers())
    assert reports[0].loss != reports[1].loss == pytest.approx(reports[0].loss, rel=2e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_of_float16_skips_the_step_and_halves_the_scale(fused):
    model = Exploding()
    before = model.weight.detach().clone()
    stepper = made(model, fused, precision="fp16")
    report = stepper.step(1, samples()).numbers()
    assert torch.equal(model.weight, before) and model.mean != 0
    assert stepper.scaler.get_scale() == report.scale / 2
    assert not stepper.optimizer.state  # the fused one would begin with a momentum of chance
    stepper.scaler.update(0.5)
    with pytest.raises(Diverged):
        stepper.step(2, samples())


@pytest.mark.parametrize("case", ["image", "gradient"])
def test_what_is_not_finite_leaves_weights_statistics_and_momentum(case):
    batch = samples()
    model = Exploding() if case == "gradient" else Small()
    if case == "image":
        batch.images[2, 0, 0, 0] = float("inf")
    stepper = made(model)
    model.mean += 5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Diverged, match="step 9.*sample 2"):
        stepper.step(9, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.weight.grad is None and not stepper.optimizer.state


def test_waiting_late_takes_the_same_steps():
    models = [Small(), Small()]
    for model, late in zip(models, (False, True), strict=True):
        stepper = made(model, fused=True, late=late)
        results = [stepper.step(number, samples()) for number in range(1, 5)]
        model.losses = [result.numbers().loss for result in results]
    assert models[0].losses == models[1].losses and len(set(models[0].losses)) == 4
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("case", ["image", "gradient"])
def test_waiting_late_changes_no_weights_after_a_step_that_is_not_finite(case):
    model = Small()
    stepper = made(model, fused=True, late=True)
    stepper.step(1, samples())
    before = model.weight.detach().clone()
    bad = samples()
    if case == "image":
        bad.images[2, 0, 0, 0] = float("inf")
    else:
        model.__class__ = Exploding
    result = stepper.step(2, bad)
    model.__class__ = Small
    with pytest.raises(Diverged, match=r"step 2: .*sample 2") as error:
        stepper.step(3, samples())
    assert error.value.late and torch.equal(model.weight, before)
    with pytest.raises(Diverged, match=r"step 2: "):
        result.numbers()


def test_average_follows_its_definition_and_changes_places():
    model = Small()
    average = WeightAverage(model, 0.75)
    expected = model.weight.detach().double()
    for step in range(1, 60):
        with torch.no_grad():
            model.weight.mul_(0.9).add_(0.01 * step)
        average.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-6)
    own, averaged = model.weight.detach().clone(), average.state_dict()["weight"].clone()
    with average.in_model():
        assert torch.equal(model.weight, averaged)
    assert torch.equal(model.weight, own) and torch.equal(average.state_dict()["weight"], averaged)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_is_the_same_step():
    gpu = torch.device("cuda")
    models = [Small().to(gpu) for _ in range(2)]
    losses = []
    for model, graph in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        stepper = Stepper(model, CriterionDSN(), optimizer, World(0, 1, gpu), StepOptions(graph=graph))
        images, labels, records = samples()
        losses.append([])
        for number in range(1, 5):
            batch = Batch(images.to(gpu) * number, labels.to(gpu), records)
            losses[-1].append(stepper.step(number, batch).numbers().loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(models[0].mean, models[1].mean, rtol=1e-4, atol=1e-5)
