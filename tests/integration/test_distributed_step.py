"""A training step in float64: the same loss, gradient and masks for any number of processes."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import ROOT, run

pytestmark = pytest.mark.slow


def take_steps(out, processes: int, *more):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return run("tests/float64_steps.py", out, "--nproc", processes, *more, environment={"PYTHONPATH": path})


def content(out, processes: int, *more) -> dict:
    done = take_steps(out, processes, *more)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return content(tmp_path_factory.mktemp("step") / "1.pt", 1)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return content(tmp_path_factory.mktemp("step") / "4.pt", 4)


def test_loss_and_gradient_are_the_same_for_any_number_of_processes(alone, four):
    alone, several = alone["real"], four["real"]
    assert several["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    assert several["norm"] == pytest.approx(alone["norm"], rel=1e-9)
    scale = max(gradient.abs().max() for gradient in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        error = (several["gradients"][name] - gradient).abs().max()
        assert error <= 1e-6 * gradient.abs().max() + 1e-12 * scale, name


@pytest.mark.parametrize("processes", [2, 4])
def test_masks_and_losses_of_twenty_steps_are_the_same_for_any_number_of_processes(
    alone, four, processes, tmp_path
):
    alone = alone["small"]
    several = (four if processes == 4 else content(tmp_path / "2.pt", 2, "--small"))["small"]
    assert len(set(several["losses"])) == 20
    assert several["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    assert [mask.shape for mask in several["masks"]] == [(20, 4, 32), (20, 4, 16)]
    assert all(map(torch.equal, several["masks"], alone["masks"]))
    # Each sample of each step has its own mask, except for a few in which nothing is dropped.
    assert len(several["masks"][0].flatten(0, 1).unique(dim=0)) > 70


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_not_finite_is_named_and_changes_nothing(tmp_path, processes):
    done = take_steps(tmp_path / "out.pt", processes, "--small", "--nan", 3)
    assert done.returncode == 1 and done.stdout.count("unchanged") == processes
    last = done.stderr.splitlines()[-1]
    assert "step 7: the loss is nan" in last and "picture 3" in last and "Traceback" not in done.stderr
    # The statistics are common, so nan reaches the loss of every process.
    assert f"on process {'0, 1' if processes == 2 else '0'}" in last
