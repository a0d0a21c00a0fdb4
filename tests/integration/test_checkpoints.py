"""Checkpoints across processes: advice that works as printed, the lock of a run, weights of a library."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fill_library, run
from torch import Tensor, nn

import evaluate
import train
from dataset import IMG_MEAN
from engine.training import checkpoint
from networks import CheckpointError
from networks.convert import IMAGENET_MEAN, IMAGENET_STD, from_batch_norm, imagenet_names, to_our_pictures
from networks.variants import VARIANTS
from networks.weights import load_weights, read_state_dict

pytestmark = pytest.mark.slow


def save(path: Path, what: str) -> dict[str, Tensor]:
    """Write a file with the weights of a module that only an unsafe load opens; return them."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weights = module.state_dict()
    if what == "module":
        torch.save(module, path)
    elif what == "module in a dictionary":
        torch.save({"model": module, "epoch": np.float64(3)}, path, _use_new_zipfile_serialization=False)
    elif what == "arguments":
        torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, path)
    elif what == "flat":
        torch.save({**weights, "args": argparse.Namespace(lr=1)}, path, pickle_protocol=4)
    elif what == "pickle":
        path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in weights.items()}}))
    elif what == "TorchScript":
        torch.jit.script(module).save(path)
    return weights


@pytest.mark.filterwarnings("ignore")  # of TorchScript
@pytest.mark.parametrize(
    "what", ["module", "module in a dictionary", "arguments", "flat", "pickle", "TorchScript"]
)
def test_advice_for_a_pickled_one_works_as_it_stands(what, tmp_path):
    path = tmp_path / "it's one.pth"
    weights = save(path, what)
    with pytest.raises(CheckpointError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert "if you trust" in message and ("TorchScript" in message) == (what == "TorchScript")
    found = re.search(r"extract the weights with (python -c .*) and use (.*)$", message)
    assert found
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", found[1]],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    read = read_state_dict(found[2])
    assert set(read) >= set(weights) and all(torch.equal(read[name], weights[name]) for name in weights)


def test_two_runs_do_not_share_a_directory(tmp_path):
    code = "import sys; from engine.training import checkpoint\nwith checkpoint.locked(sys.argv[1]): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with checkpoint.locked(str(tmp_path)):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and f"process {os.getpid()} on" in done.stderr
        assert "UsageError: --snapshot-dir" in done.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_from_torchvision(scenes, tmp_path, monkeypatch, capsys):
    """The run, two processes that resume it, and the evaluation build the network that fits the weights."""
    models = pytest.importorskip("torchvision").models
    url = models.ResNet50_Weights.IMAGENET1K_V1.url
    cached = tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(fill_library(models.resnet50()).state_dict(), cached)
    arguments = [
        *("--data-dir", scenes, "--snapshot-dir", tmp_path / "run", "--input-size", "17,17"),
        *("--batch-size", 2, "--num-steps", 1, "--learning-rate", 1e-9),
        *("--restore-from", "torchvision", "--backbone", "resnet50", "--num-workers", 0),
    ]
    environment = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), "--gpu", "cpu"])
    assert train.main() == 0
    assert "torchvision: 266 entries loaded, 32 new" in capsys.readouterr().out
    checkpoint = tmp_path / "run/CS_scenes_1.pth"
    state = read_state_dict(checkpoint)
    named = imagenet_names("source", torch.load(cached, weights_only=True))
    expected = from_batch_norm(to_our_pictures(named, IMAGENET_MEAN, IMAGENET_STD, IMG_MEAN.tolist()))
    for name in ("shift", "conv1.weight", "layer4.2.conv3.weight"):
        torch.testing.assert_close(state[name], expected[name], rtol=1e-5, atol=1e-6)
    result = run("train.py", *arguments, "--nproc", 2, "--resume", environment=environment)
    assert result.returncode == 0 and "the run is finished" in result.stdout, result.stderr
    args = evaluate.get_parser().parse_args(["--data-dir", str(scenes), "--restore-from", str(checkpoint)])
    options, _, _ = evaluate.resolve(args, state)
    assert options.backbone == "resnet50"
    model = evaluate.make_model(options, state)
    load_weights(model, checkpoint, complete=True)
    assert model.variant == VARIANTS["torchvision"] and torch.equal(model.shift, state["shift"])
