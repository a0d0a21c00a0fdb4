"""Optimizers and the learning rate, against their formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.options import TrainOptions
from engine.training import checkpoint
from engine.training.checkpoint import State
from engine.training.optimizer import ENTRIES, make_optimizer
from engine.training.schedule import poly_lr, set_learning_rate, warm_up
from utils.errors import UsageError

LR, DECAY = 0.03, 0.2


def network() -> nn.Module:
    """Return a network with kernels, biases and factors of a norm, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, torch.Tensor]]:
    """Take steps on random pictures; return the gradients of each."""
    generator = torch.Generator().manual_seed(1)
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 2, 5, 5, generator=generator, dtype=torch.float64)).square().sum().backward()
        gradients.append({name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None})
        optimizer.step()
    return gradients


@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_sgd_is_that_of_the_original(in_one_kernel: bool) -> None:
    model, start = network(), dict(network().named_parameters())
    gradients = train(model, make_optimizer("sgd", model, LR, 0.9, DECAY, in_one_kernel), 3)
    for name, weight in model.named_parameters():
        expected, momentum = start[name].detach(), 0.0
        for gradient in gradients:
            momentum = 0.9 * momentum + gradient[name] + DECAY * expected
            expected = expected - LR * momentum
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_adamw_decays_kernels_only(in_one_kernel: bool) -> None:
    model, start = network(), dict(network().named_parameters())
    gradients = train(model, make_optimizer("adamw", model, LR, 0.9, DECAY, in_one_kernel), 3)
    for name, weight in model.named_parameters():
        expected, first, second = start[name].detach(), 0.0, 0.0
        decay = DECAY if name in ("0.weight", "2.weight") else 0.0
        for step, gradient in enumerate(gradients, 1):
            first = 0.9 * first + 0.1 * gradient[name]
            second = 0.999 * second + 0.001 * gradient[name] ** 2
            moved = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            expected = expected - LR * decay * expected - LR * moved
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)


def test_each_group_gets_the_learning_rate() -> None:
    optimizer = make_optimizer("adamw", network(), LR, 0.9, DECAY, False)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_warm_up() -> None:
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, 0) == 1.0
    rates = [poly_lr(1.0, step, 10, 0.9) * warm_up(step, 3) for step in range(10)]
    assert rates.index(max(rates)) == 2 and rates[3:] == sorted(rates[3:], reverse=True)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, edit: object = None) -> State:
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if callable(edit):
        edit(content["optimizer"]["state"][0])
    path = folder / "state_3.pt"
    torch.save(content, path)
    return State(3, str(path), {}, None)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("in_one_kernel", [False, True])
def test_training_continues_from_a_state(tmp_path: Path, name: str, in_one_kernel: bool) -> None:
    whole = network()
    train(whole, make_optimizer(name, whole, LR, 0.9, DECAY, in_one_kernel), 3)
    model = network()
    optimizer = make_optimizer(name, model, LR, 0.9, DECAY, in_one_kernel)
    train(model, optimizer, 3)
    state = save(tmp_path, model, optimizer)
    other = network()
    continued = make_optimizer(name, other, LR, 0.9, DECAY, in_one_kernel)
    checkpoint.load(state, {"model": other, "optimizer": continued})
    train(model, optimizer, 2)
    train(other, continued, 2)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entry: entry.pop("exp_avg"), "other entries for weight 0"),
        (lambda entry: entry.update(step=torch.zeros(2)), r"step of weight 0 is \[2\]"),
        (lambda entry: entry.update(step=torch.tensor(-1.0)), "step of weight 0 is negative"),
        (lambda entry: entry["exp_avg_sq"].neg_(), "exp_avg_sq of weight 0 is negative"),
        (
            lambda entry: entry["exp_avg"].fill_(torch.nan),
            "exp_avg of weight 0 has values that are not finite",
        ),
    ],
)
def test_damaged_moments_are_refused(tmp_path: Path, edit: object, message: str) -> None:
    model = network()
    optimizer = make_optimizer("adamw", model, LR, 0.9, DECAY, False)
    train(model, optimizer, 2)
    state = save(tmp_path, model, optimizer, edit)
    with pytest.raises(UsageError, match=message):
        checkpoint.load(state, {"model": model, "optimizer": optimizer})


def test_a_state_of_the_other_optimizer_is_refused(tmp_path: Path) -> None:
    model = network()
    optimizer = make_optimizer("sgd", model, LR, 0.9, DECAY, False)
    train(model, optimizer, 2)
    state = save(tmp_path, model, optimizer)
    with pytest.raises(UsageError, match="optimizer has other"):
        checkpoint.load(
            state, {"model": model, "optimizer": make_optimizer("adamw", model, LR, 0.9, 0.0, False)}
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 10, "num_steps": 10}, "--warmup 10: must be less than --num-steps 10"),
        ({"optimizer": "adamw", "backend": "apex"}, "--optimizer adamw: not supported by --backend apex"),
    ],
)
def test_flags_that_contradict_each_other(values: dict[str, object], message: str) -> None:
    options = TrainOptions(data_dir=".", num_classes=19, **values)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        options.check(1, "cuda")
