"""The description of a checkpoint's network: from flags, args.json, weights and defaults, in this order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from networks import MODELS, CheckpointError, Seg_Model, make_network
from networks.models import models_of
from networks.of_run import Description, args_file, backbone_of, describe, of_flags
from utils.errors import UsageError


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(Seg_Model(5, backbone="resnet50").state_dict())


def described(folder: Path, state: dict[str, Tensor], run: object = None, **given: object):
    path = str(folder / "CS_scenes_9.pth")
    if run is not None:
        Path(args_file(path)).write_text(json.dumps(run))
    found = describe(path, state, given)
    return found.description, found.notes


def test_weights_alone(tmp_path: Path, state: dict[str, Tensor]) -> None:
    found, (note,) = described(tmp_path, state)
    assert found == Description("ccnet", "resnet50", 2, 5, None)
    assert note.endswith("recurrence 2 is assumed (--recurrence), and the classes have no names (--classes)")
    assert described(tmp_path, state, recurrence=1)[1] == []


def test_the_run_tells_what_the_weights_do_not(tmp_path: Path, state: dict[str, Tensor]) -> None:
    run = {"model": "ccnet", "backbone": "resnet50", "recurrence": 3, "num_classes": 5, "classes": "a.tsv"}
    run["input_size"] = [97, 97]
    table = str(tmp_path / "a.tsv")  # a bare name is that of a file next to args.json
    assert described(tmp_path, state, run) == (Description("ccnet", "resnet50", 3, 5, table), [])


def test_a_flag_goes_before_the_run_with_one_line(tmp_path: Path, state: dict[str, Tensor]) -> None:
    run = {"recurrence": 3, "classes": "a.tsv"}
    found, notes = described(tmp_path, state, run, recurrence=1, classes="b.tsv")
    assert (found.recurrence, found.classes) == (1, "b.tsv")
    assert notes == [
        f"--recurrence 1: used instead of 3, which {tmp_path}/args.json has",
        f"--classes b.tsv: used instead of a.tsv, which {tmp_path}/args.json has",
    ]
    assert described(tmp_path, state, run, recurrence=3)[1] == []  # the same: nothing to say


@pytest.mark.parametrize(
    "name, wrong, right",
    [("model", "psp", "ccnet"), ("backbone", "resnet101", "resnet50"), ("num_classes", 19, 5)],
)
def test_the_weights_go_before_both(tmp_path: Path, state: dict[str, Tensor], name, wrong, right) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{flag} {wrong}: the weights of .* have .* {right}; omit"):
        described(tmp_path, state, **{name: wrong})
    with pytest.raises(UsageError, match=f"args.json: {name} {wrong}: .* {right}; give {flag} {right}"):
        described(tmp_path, state, {name: wrong})
    found, notes = described(tmp_path, state, {name: wrong}, **{name: right})
    assert getattr(found, name) == right and len(notes) == 1


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_that_of_the_weights(tmp_path: Path, model: str) -> None:
    """Nothing but the names of the entries tells it; the recurrence is then the model's default."""
    with torch.device("meta"):
        weights = dict(make_network(model, 5, backbone="resnet50").state_dict())
    assert models_of(weights) == (["ccnet", "ccnet3d"] if model in ("ccnet", "ccnet3d") else [model])
    if model == "ccnet3d":  # whose weights are those of ccnet: the flag or args.json tells it
        found, _ = described(tmp_path, weights, model=model)
        assert found == Description(model, "resnet50", 3, 5, None, 3, 1)
        return
    found, notes = described(tmp_path, weights)
    assert found == Description(model, "resnet50", MODELS[model].recurrence, 5, None)
    assert ("recurrence" in notes[0]) == (model in ("ccnet", "nonlocal"))
    for damaged in (weights.keys() - {"head.bottleneck.0.weight"}, weights.keys() | {"head.other.weight"}):
        assert models_of(dict.fromkeys(damaged, torch.zeros(1))) == []


def test_the_clips_of_a_run_do_not_apply_to_its_weights_in_ccnet(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    run = {"model": "ccnet3d", "recurrence": 3, "clip": 5, "clip_stride": 2}
    assert described(tmp_path, state, run)[0] == Description("ccnet3d", "resnet50", 3, 5, None, 5, 2)
    found, notes = described(tmp_path, state, run, model="ccnet")
    assert found == Description("ccnet", "resnet50", 3, 5, None) and len(notes) == 1
    with pytest.raises(UsageError, match="--clip 5: not an option of --model ccnet"):
        described(tmp_path, state, run, model="ccnet", clip=5)


@pytest.mark.parametrize("where", ["flag", "args.json"])
def test_a_recurrence_only_where_there_is_an_attention(tmp_path: Path, where: str) -> None:
    with torch.device("meta"):
        weights = dict(make_network("fcn", 5, backbone="resnet50").state_dict())
    assert described(tmp_path, weights, {"model": "fcn", "recurrence": None})[0].recurrence is None
    run, given = (
        ({"model": "fcn", "recurrence": 2}, {}) if where == "args.json" else (None, {"recurrence": 2})
    )
    with pytest.raises(
        UsageError, match="--recurrence 2: not an option of --model fcn, only of ccnet, ccnet3d"
    ):
        described(tmp_path, weights, run, **given)
    with pytest.raises(UsageError, match="--recurrence 0: not an option of --model psp"):
        of_flags({"model": "psp", "recurrence": 0})
    assert of_flags({"model": "psp", "recurrence": None}).description.recurrence is None
    assert of_flags({}).description.recurrence == 2


@pytest.mark.parametrize(
    "run",
    [
        {"model": "other"},
        {"model": None},
        {"backbone": 7},
        {"recurrence": "2"},
        {"recurrence": None},
        {"num_classes": None},
        {"classes": ["a"]},
    ],
)
def test_impossible_values_are_named(tmp_path: Path, state: dict[str, Tensor], run: dict) -> None:
    (name,) = run
    with pytest.raises(UsageError, match=f"args.json: {name} is .* give --{name.replace('_', '-')}"):
        described(tmp_path, state, run)


def test_other_weights_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="its layers have"):
        backbone_of("x.pth", {"layer1.0.conv1.weight": torch.zeros(1)})
    many = {**state, "head.bottleneck.3.weight": torch.empty(300, 512, 1, 1, device="meta")}
    with pytest.raises(CheckpointError, match="300 classes; .*255"):
        described(tmp_path, many)


def test_another_network_takes_the_flags_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "plain", MODELS["ccnet"])
    weights = {"head.weight": torch.zeros(4, 3, 1, 1)}
    with pytest.raises(CheckpointError):
        described(tmp_path, weights)
    found, _ = described(tmp_path, weights, {"model": "plain", "num_classes": 4}, backbone="resnet50")
    assert found == Description("plain", "resnet50", 2, 4, None)


def test_args_of_a_shorter_later_run_are_not_used(tmp_path: Path, state: dict[str, Tensor]) -> None:
    run = {"recurrence": 3, "num_steps": 9}
    assert described(tmp_path, state, run)[0].recurrence == 3  # CS_scenes_9.pth
    found, notes = described(tmp_path, state, {**run, "num_steps": 8})
    assert found.recurrence == 2
    assert notes[0] == f"{tmp_path}/args.json: not used, because its run has 8 steps only"


def test_the_class_table_of_a_moved_run(tmp_path: Path, state: dict[str, Tensor]) -> None:
    run = {"classes": "elsewhere/classes.tsv"}
    assert described(tmp_path, state, run)[0].classes == "elsewhere/classes.tsv"
    (tmp_path / "classes.tsv").touch()
    assert described(tmp_path, state, run)[0].classes == str(tmp_path / "classes.tsv")
    (tmp_path / "other.tsv").touch()
    run = {"classes": str(tmp_path / "other.tsv")}
    assert described(tmp_path, state, run)[0].classes == str(tmp_path / "other.tsv")


def test_a_bare_name_is_the_table_of_the_run_itself(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.tsv").touch()  # of somebody else, in the working directory
    run = {"classes": "classes.tsv"}
    assert described(tmp_path / "run", state, run)[0].classes == "classes.tsv"  # as older versions wrote it
    (tmp_path / "run/classes.tsv").touch()
    assert described(tmp_path / "run", state, run)[0].classes == str(tmp_path / "run/classes.tsv")
