"""Each --model through the commands: training, resuming, evaluation, and what reads a checkpoint."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import cv2
import numpy as np
import pytest
import torch
from conftest import last_line, mean_of, run, write_pair
from small_network import Narrow, registered

from networks import MODELS
from networks.of_run import Description
from networks.weights import read_state_dict
from segmenter import Segmenter
from utils.errors import UsageError

#: Flags of the smallest run; the model is added.
FLAGS = ["--gpu", "cpu", "--backbone", "small", "--num-workers", "0", "--input-size", "33,33"]
RUN = [*FLAGS, "--batch-size", "2", "--num-steps", "4", "--print-frequency", "1", "--save-pred-every", "2"]
OTHERS = [name for name in MODELS if name != "ccnet"]


@pytest.fixture(scope="module", autouse=True)
def narrow_models() -> Iterator[None]:
    """Give the models an eighth of the channels, under their own names."""
    before = dict(MODELS)
    with registered():
        for name, each in before.items():
            MODELS[name] = each._replace(network=functools.partial(Narrow, each.head))
        yield
    MODELS.update(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            write_pair(folder, split, number, (48, 64))
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return a function that returns the folder of the finished run of a model."""
    parent = tmp_path_factory.mktemp("runs")

    @functools.cache
    def folder(model: str) -> Path:
        succeeded("train.py", "--model", model, "--data-dir", data, *RUN, "--snapshot-dir", parent / model)
        return parent / model

    return folder


def succeeded(script: str, *arguments: object) -> CompletedProcess[str]:
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def refused(words: str, script: str, *arguments: object) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in last_line(done.stderr), done.stderr


def checkpoint_of(folder: Path) -> Path:
    return folder / "CS_scenes_4.pth"


@pytest.mark.slow
@pytest.mark.parametrize("model", OTHERS)
def test_a_run_resumes_to_the_bit_and_is_evaluated(model: str, runs, data: Path, tmp_path: Path) -> None:
    folder = runs(model)
    for name in ("state_2.pt", "state_2.json", "log.jsonl"):
        os.link(folder / name, tmp_path / name)
    flags = ["--model", model, "--data-dir", data, *RUN, "--snapshot-dir", tmp_path]
    assert "step 4/4" in succeeded("train.py", *flags, "--resume").stdout
    whole, resumed = (read_state_dict(checkpoint_of(each)) for each in (folder, tmp_path))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = read_state_dict(folder / "CS_scenes_2.pth")
    assert all(not torch.equal(start[name], value) for name, value in whole.items())
    recorded = json.loads((folder / "args.json").read_text())
    assert (recorded["model"], recorded["recurrence"]) == (model, MODELS[model].recurrence)

    flags = ["--data-dir", data, "--gpu", "cpu", "--num-workers", "0", "--input-size", "33,33"]
    done = succeeded("evaluate.py", *flags, "--restore-from", checkpoint_of(folder))
    noted = json.loads((folder / "result.txt").read_text())
    assert noted["meanIU"] == pytest.approx(mean_of(done.stdout), abs=1e-3)
    assert (noted["arguments"]["model"], noted["arguments"]["recurrence"]) == (model, recorded["recurrence"])
    # The model is that of the weights, also where nothing else says it.
    alone = tmp_path / "alone.pth"
    os.link(checkpoint_of(folder), alone)
    (tmp_path / "args.json").unlink()
    # Only ccnet3d has the weights of another model.
    given = {"model": model} if model == "ccnet3d" else {}
    segmenter = Segmenter.load(alone, device="cpu", say=lambda line: None, **given)
    assert segmenter.description[:2] == (model, "small")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["psp", "nonlocal"])
def test_the_tools_read_it(model: str, runs, data: Path, tmp_path: Path) -> None:
    folder = runs(model)
    given = ["--restore-from", checkpoint_of(folder), "--gpu", "cpu"]
    picture = data / "leftImg8bit/val/ulm/ulm_000000_000000_leftImg8bit.png"
    succeeded("tools.predict", picture, *given, "--out", tmp_path / "predicted")
    assert cv2.imread(str(next((tmp_path / "predicted").rglob("*.png")))).shape == (48, 64, 3)
    segmenter = Segmenter.load(checkpoint_of(folder), device="cpu")
    logits = segmenter.model(torch.zeros(1, 3, 33, 41))[0]

    attention = ["tools.attention", picture, *given, "--out", tmp_path / "attention"]
    if model == "nonlocal":
        succeeded(*attention, "--pixel", "8,16")
        (maps,) = (np.load(path) for path in (tmp_path / "attention").glob("*.npy"))
        assert maps.shape == (1, 7, 9) and maps.sum() == pytest.approx(1) and (maps > 0).all()
        assert segmenter.attention(str(picture), [(8, 16)])[0] == pytest.approx(maps)
    else:
        refused(f"is of the model {model}, which has no attention", *attention)
        with pytest.raises(UsageError, match=f"attention: the model {model} has none"):
            segmenter.attention(str(picture), [(8, 16)])

    # A file that describes itself gives the same network, without args.json.
    described = tmp_path / "described.safetensors"
    done = succeeded("tools.convert", checkpoint_of(folder), described, "--to", "safetensors")
    assert f"{model} with small" in done.stdout
    other = Segmenter.load(described, device="cpu")
    assert other.description[:4] == (model, "small", MODELS[model].recurrence, 19)
    assert torch.equal(other.model(torch.zeros(1, 3, 33, 41))[0], logits)
    plain, back = tmp_path / "plain.pth", tmp_path / "back.pth"
    succeeded("tools.convert", checkpoint_of(folder), plain, "--to", "batch-norm")
    succeeded("tools.convert", plain, back)
    found = Segmenter.load(back, device="cpu").model(torch.zeros(1, 3, 33, 41))[0]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    refused("--to original", "tools.convert", checkpoint_of(folder), tmp_path / "o.pth", "--to", "original")

    profiled = succeeded("tools.profile", *given, "--input-size", "33,41", "--rounds", "0").stdout
    assert f"prediction of {model} small" in profiled
    assert ("head.psp" if model == "psp" else "head.attention") in profiled


@pytest.mark.slow
def test_a_video_is_predicted_with_the_frames_around(runs, tmp_path: Path) -> None:
    video, rng = tmp_path / "drive.avi", np.random.default_rng(0)
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    for number in range(4):  # dark, bright, dark, bright
        low = 200 * (number % 2)
        writer.write(cv2.resize(rng.integers(low, low + 56, (6, 8, 3), np.uint8), (64, 48)))
    writer.release()
    capture = cv2.VideoCapture(str(video))
    frames = [cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB) for _ in range(4)]
    folder, out = runs("ccnet3d"), tmp_path / "out"
    state, source = read_state_dict(checkpoint_of(folder)), tmp_path / "CS_scenes_4.pth"
    state["head.cca.gamma"].fill_(20.0)  # it is almost 0 after 4 steps
    torch.save(state, source)
    os.link(folder / "args.json", tmp_path / "args.json")
    succeeded(
        "tools.predict", video, "--restore-from", source, "--gpu", "cpu", "--out", out, "--save", "color"
    )

    segmenter = Segmenter.load(source, device="cpu")
    assert segmenter.frames.clip == 3
    result = cv2.VideoCapture(str(next((out / "color").iterdir())))
    assert result.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    for number, frame in enumerate(frames):
        around = [frames[max(0, number - 1)], frame, frames[min(3, number + 1)]]
        right = segmenter.predict(np.concatenate(around, axis=2))
        alone = segmenter.predict(np.concatenate([frame] * 3, axis=2))
        assert (right.classes != alone.classes).any()
        shown = cv2.cvtColor(result.read()[1], cv2.COLOR_BGR2RGB).astype(float)
        errors = [np.abs(shown - each.colors).mean() for each in (right, alone)]
        assert errors[0] < errors[1]


@pytest.mark.slow
def test_clips_are_not_for_the_original(runs, tmp_path: Path) -> None:
    """The weights of ccnet3d have the names of those of ccnet; args.json tells them apart."""
    source = checkpoint_of(runs("ccnet3d"))
    refused(" is ccnet3d, ", "tools.convert", source, tmp_path / "o.pth", "--to", "original")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["psp", "nonlocal"])
def test_the_report_of_a_run(model: str, runs, data: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", data, "--gpu", "cpu", "--num-workers", "0", "--output-dir", tmp_path]
    succeeded("evaluate.py", *flags, "--restore-from", checkpoint_of(runs(model)))
    page = tmp_path / "report.html"
    succeeded("tools.report", runs(model), "--results", tmp_path, "--gpu", "cpu", "--out", page)
    text = page.read_text()
    # The reader can see the confidence with and without attention, and choose pixels with it.
    assert "Without a layer of confidence" not in text and '"confidence":"data:image/png' in text
    assert ('class="explorer"' in text) == (model == "nonlocal")
    assert f"--model {model}" in text and "--recurrence" not in text.split("</pre>")[0]
    assert ("<h2>Attention</h2>" in text) == (model == "nonlocal")
    assert f"{model}, small{', recurrence 1' if model == 'nonlocal' else ''}</td>" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, ending",
    [*((name, ".pt2") for name in OTHERS if name != "ccnet3d"), ("psp", ".onnx"), ("nonlocal", ".onnx")],
)
def test_exports_agree_with_the_network(model: str, ending: str, runs, tmp_path: Path) -> None:
    """The command itself compares the outputs at several sizes."""
    if ending == ".onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name)
    out = tmp_path / f"network{ending}"
    done = succeeded(
        "tools.export", "--restore-from", checkpoint_of(runs(model)), "--out", out, "--output", "logits"
    )
    assert "largest difference from the network" in done.stdout and out.exists()


def test_wrong_models_take_one_line(runs, data: Path, tmp_path: Path) -> None:
    train = ["train.py", "--data-dir", data, *RUN, "--snapshot-dir", tmp_path]
    refused("--model: invalid choice: 'pspnet'", *train, "--model", "pspnet")
    refused("--recurrence 2: not an option of --model fcn", *train, "--model", "fcn", "--recurrence", 2)
    refused("--batch-size: --model aspp averages", *train, "--model", "aspp", "--batch-size", 1)
    refused("--batch-size: --model psp averages", *train, "--model", "psp", "--grad-accum", 2)
    of_fcn = checkpoint_of(runs("fcn"))
    refused("check --backbone and --model", *train, "--model", "psp", "--restore-from", of_fcn)
    evaluate = ["evaluate.py", "--data-dir", data, "--gpu", "cpu", "--restore-from", of_fcn]
    refused(
        f"--model gcn: the weights of {of_fcn} have model fcn; omit the flag", *evaluate, "--model", "gcn"
    )
    refused("--recurrence 1: not an option of --model fcn", *evaluate, "--recurrence", 1)
    predict = ["tools.predict", data, "--restore-from", of_fcn, "--model", "psp", "--out", tmp_path / "out"]
    refused("have model fcn", *predict)
    recorded = json.loads((of_fcn.parent / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps({**recorded, "model": "psp"}))
    os.link(of_fcn, tmp_path / of_fcn.name)
    refused("args.json: model psp: the weights", *evaluate[:-1], tmp_path / of_fcn.name)


def test_random_weights_of_a_model(data: Path, tmp_path: Path) -> None:
    flags = [
        "--data-dir",
        data,
        "--gpu",
        "cpu",
        "--num-workers",
        "0",
        "--backbone",
        "small",
        "--model",
        "aspp",
    ]
    succeeded("evaluate.py", *flags, "--input-size", "33,33", "--output-dir", tmp_path)
    segmenter = Segmenter.load(None, device="cpu", model="nonlocal", backbone="small")
    assert segmenter.description == Description("nonlocal", "small", 1, 19, None)
    with pytest.raises(UsageError, match="--recurrence 2: not an option of --model gcn"):
        Segmenter.load(None, device="cpu", model="gcn", backbone="small", recurrence=2)


def test_recurrence_of_nonlocal_is_a_flag(data: Path, runs, tmp_path: Path) -> None:
    """The run records it, --recurrence 0 leaves the attention out, and R = 2 differs from R = 1."""
    flags = ["--model", "nonlocal", "--data-dir", data, *RUN, "--recurrence", 0, "--snapshot-dir", tmp_path]
    succeeded("train.py", *flags)
    state = read_state_dict(checkpoint_of(tmp_path))
    assert state["head.attention.gamma"].item() == 0  # no gradient
    picture = data / "leftImg8bit/val/ulm/ulm_000000_000000_leftImg8bit.png"
    given = ["tools.attention", picture, "--restore-from", checkpoint_of(tmp_path), "--gpu", "cpu"]
    refused("--recurrence 0: there is no attention to draw", *given, "--out", tmp_path)
    trained = checkpoint_of(runs("nonlocal"))
    images = torch.randn(1, 3, 33, 41)
    one, two = (
        Segmenter.load(trained, device="cpu", recurrence=number, say=lambda line: None).model(images)[0]
        for number in (1, 2)
    )
    assert not torch.equal(one, two)


def test_clips_in_the_tools(runs, data: Path, tmp_path: Path) -> None:
    """A folder of frames is predicted with its neighbors; what does not take clips says so."""
    given = ["--restore-from", checkpoint_of(runs("ccnet3d")), "--gpu", "cpu"]
    folder = data / "leftImg8bit/train/ulm"
    done = succeeded("tools.predict", folder, *given, "--out", tmp_path / "out", "--save", "labelIds")
    assert "clips of 3 frames: 2 of 8 neighbors are missing" in done.stdout
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4
    picture = folder / "ulm_000000_000001_leftImg8bit.png"
    refused("--clip 3: maps over several frames", "tools.attention", picture, *given, "--out", tmp_path)
    advised = ["--model", "ccnet", "--recurrence", 3]  # by this message
    drawn = succeeded("tools.attention", picture, *given, *advised, "--out", tmp_path / "maps")
    assert "--model ccnet: used instead of ccnet3d" in drawn.stdout + drawn.stderr
    assert list((tmp_path / "maps").iterdir())
    load = functools.partial(Segmenter.load, given[1], device="cpu", say=lambda line: None)
    with pytest.raises(UsageError, match='load the network with model="ccnet", recurrence=3, which'):
        load().attention(str(picture), [(0, 0)])
    (maps,) = load(model="ccnet", recurrence=3).attention(str(picture), [(0, 0)])
    assert len(maps) == 3
    refused("which can't be exported", "tools.export", *given[:2], "--out", tmp_path / "a.pt2")
    profiled = succeeded("tools.profile", *given, "--input-size", "33,41", "--rounds", "0").stdout
    assert "ccnet3d small, R=3" in profiled and "clips of 3 frames" in profiled
    train = ["train.py", "--data-dir", data, *RUN, "--snapshot-dir", tmp_path]
    refused("2 is even", *train, "--model", "ccnet3d", "--clip", 2)
    refused("--clip 3: not an option of --model fcn", *train, "--model", "fcn", "--clip", 3)
    refused("--cache ram: not supported by --model ccnet3d", *train, "--model", "ccnet3d", "--cache", "ram")
    refused("no picture has another frame", *train, "--model", "ccnet3d", "--clip-stride", 50)
