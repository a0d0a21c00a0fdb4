"""Networks of timm through the commands: training, resuming, evaluation, and what reads a checkpoint."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import last_line, run, write_pair

from networks import MODELS
from networks.weights import read_state_dict
from segmenter import Segmenter

pytest.importorskip("timm")

#: The smallest one with batch norm and activation in one layer, and a plain transformer.
CNN, TRANSFORMER = "timm:mobilenetv3_small_050", "timm:vit_tiny_patch16_224"
RUN = ["--gpu", "cpu", "--num-workers", "0", "--input-size", "33,41", "--batch-size", "2", "--num-steps", "4"]
EVERY = ["--print-frequency", "1", "--save-pred-every", "2", "--save-state-every", "2"]


@pytest.fixture(scope="module", autouse=True)
def narrow_heads() -> Iterator[None]:
    """Give the heads an eighth of the channels."""
    before = dict(MODELS)
    for name, each in before.items():
        MODELS[name] = each._replace(head=functools.partial(each.head, channels=64))
    yield
    MODELS.update(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for number in range(2):
            write_pair(folder, split, number, (48, 64))
    return folder


def succeeded(script: str, *arguments: object) -> str:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(words: str, script: str, *arguments: object) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in last_line(done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, model, flags",
    [
        (CNN, "nonlocal", ["--ema", "0.9"]),
        (TRANSFORMER, "fcn", ["--optimizer", "adamw", "--learning-rate", "1e-4", "--warmup", "2"]),
    ],
)
def test_a_run_and_what_reads_it(
    backbone: str, model: str, flags: list[str], data: Path, tmp_path: Path
) -> None:
    folder, again = tmp_path / "run", tmp_path / "again"
    train = ["train.py", "--model", model, "--backbone", backbone, "--data-dir", data, *RUN, *EVERY, *flags]
    succeeded(*train, "--snapshot-dir", folder)
    again.mkdir()
    for name in ("state_2.pt", "state_2.json", "log.jsonl"):
        os.link(folder / name, again / name)
    assert "step 4/4" in succeeded(*train, "--snapshot-dir", again, "--resume")
    checkpoint = folder / "CS_scenes_4.pth"
    whole, resumed = read_state_dict(checkpoint), read_state_dict(again / "CS_scenes_4.pth")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((folder / "args.json").read_text())["backbone"] == backbone

    given = ["--restore-from", checkpoint, "--gpu", "cpu"]
    flags = ["--data-dir", data, "--num-workers", "0", "--whole"]
    succeeded("evaluate.py", *given, *flags)
    noted = json.loads((folder / "result.txt").read_text())["arguments"]
    assert (noted["model"], noted["backbone"]) == (model, backbone)
    picture = data / "leftImg8bit/val/ulm/ulm_000000_000000_leftImg8bit.png"
    succeeded("tools.predict", picture, *given, "--out", tmp_path / "predicted")
    assert cv2.imread(str(next((tmp_path / "predicted").rglob("*.png")))).shape == (48, 64, 3)
    if model == "nonlocal":
        succeeded("tools.attention", picture, *given, "--out", tmp_path / "attention", "--pixel", "8,16")
        (maps,) = (np.load(path) for path in (tmp_path / "attention").glob("*.npy"))
        assert maps.shape == (1, 6, 8) and maps.sum() == pytest.approx(1)
        out = tmp_path / "network.pt2"
        exported = succeeded("tools.export", *given[:2], "--out", out, "--output", "logits")
        assert "largest difference from the network" in exported

    page = tmp_path / "report.html"
    succeeded("tools.report", folder, "--gpu", "cpu", "--out", page)
    text = page.read_text()
    assert f"--backbone {backbone}" in text and ("<h2>Attention</h2>" in text) == (model == "nonlocal")

    # A file that describes itself is enough; the weights alone are not.
    described, alone = tmp_path / "described.safetensors", tmp_path / "alone.pth"
    assert f"{model} with {backbone}" in succeeded(
        "tools.convert", checkpoint, described, "--to", "safetensors"
    )
    images = torch.randn(1, 3, 33, 41)
    one, two = (Segmenter.load(path, device="cpu").model(images)[0] for path in (checkpoint, described))
    assert torch.equal(one, two)
    os.link(checkpoint, alone)
    refused("give --backbone timm:NAME", "evaluate.py", *flags, "--gpu", "cpu", "--restore-from", alone)
    refused("--to batch-norm", "tools.convert", checkpoint, tmp_path / "p.pth", "--to", "batch-norm")
    profiled = succeeded("tools.profile", *given, "--input-size", "33,41", "--rounds", "0")
    assert f"prediction of {model} {backbone}" in profiled and "backbone  " in profiled
