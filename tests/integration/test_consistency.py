"""Training with the category-consistent loss: log, resuming, processes, and what reads the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import last_line, run, write_pair

from networks.weights import read_state_dict

TRAIN_PY, EVALUATE_PY = "tests/small/train.py", "tests/small/evaluate.py"
FLAGS = ["--model", "small", "--backbone", "small", "--gpu", "cpu", "--num-workers", "0"]
RUN = [
    *FLAGS,
    "--input-size",
    "33,33",
    "--batch-size",
    "2",
    "--print-frequency",
    "1",
    "--save-pred-every",
    "2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            write_pair(folder, split, number, (48, 64))
    return folder


def train(data: Path, out: Path, *flags: object, steps: int = 4) -> list[dict[str, Any]]:
    """Train with --ccl and return the entries of the log."""
    done = run(
        TRAIN_PY,
        *("--data-dir", data, *RUN, "--num-steps", steps, "--snapshot-dir", out, "--ccl", *flags),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train(data, folder, "--optimizer", "adamw", "--learning-rate", "1e-3", "--warmup", "2")


def test_the_loss_is_the_sum_of_its_parts(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    factors = {
        **{"main_loss": 1, "auxiliary_loss": 0.4},
        **{"ccl_variance": 1, "ccl_distance": 1, "ccl_regularization": 0.001},
    }
    for entry in trained[1]:
        assert entry["loss"] == pytest.approx(sum(w * entry[name] for name, w in factors.items()), rel=1e-5)
        assert entry["ccl_distance"] > 0 and entry["ccl_regularization"] > 0
    assert [entry["lr"] for entry in trained[1][:2]] == pytest.approx([5e-4, 1e-3 * 0.75**0.9])


def test_the_features_are_trained(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    first, last = (read_state_dict(trained[0] / f"CS_scenes_{step}.pth") for step in (2, 4))
    assert first["consistency.weight"].shape[0] == 16
    assert not torch.equal(first["consistency.weight"], last["consistency.weight"])


def test_resumed_run_is_bit_identical(
    data: Path, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    flags = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--warmup", "2", "--save-state-every", "2"]
    run_of_two = tmp_path / "run"
    train(data, run_of_two, *flags)
    for path in (*run_of_two.glob("state_4*"), *run_of_two.glob("*_4.pth")):
        path.unlink()
    train(data, run_of_two, *flags, "--resume")
    one, two = (read_state_dict(folder / "CS_scenes_4.pth") for folder in (trained[0], run_of_two))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(
    data: Path, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    flags = ["--optimizer", "adamw", "--learning-rate", "1e-3", "--warmup", "2", "--nproc", "2"]
    first = train(data, tmp_path / "two", *flags, steps=3)[0]
    for name, value in first.items():
        if name.startswith("ccl") or name in ("loss", "gradient_norm"):
            assert value == pytest.approx(trained[1][0][name], rel=1e-3), name


def test_evaluation_ignores_the_features(
    data: Path, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    checkpoint = trained[0] / "CS_scenes_4.pth"
    flags = ["--gpu", "cpu", "--num-workers", "0", "--data-dir", data, "--restore-from", checkpoint]
    done = run(EVALUATE_PY, *flags, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/result.txt").exists()


def test_a_model_without_attention_has_no_features(data: Path, tmp_path: Path) -> None:
    done = run(
        "train.py",
        *("--model", "fcn", "--gpu", "cpu", "--data-dir", data, "--batch-size", "2", "--ccl"),
        *("--snapshot-dir", tmp_path),
    )
    assert done.returncode == 2 and "--ccl: uses the output of an attention" in last_line(done.stderr)
