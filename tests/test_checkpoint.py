"""States: complete or not there, the newest good one found, another recipe refused, nothing in them run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from engine import checkpoint
from engine.checkpoint import State, Validation
from engine.ema import WeightAverage
from utils.errors import UsageError
from utils.files import replacing, temporary_name

RECIPE = {"input_size": (33, 33), "ohem": False}


@pytest.fixture
def parts():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def save(folder, step, parts, recipe=RECIPE, keep=2, validation=Validation()):  # noqa: B008
    state = State(step, checkpoint.state_path(str(folder), step), recipe, validation)
    checkpoint.save(state, {name: part.state_dict() for name, part in parts.items()}, keep)
    return state


def test_round_trip(tmp_path, parts):
    save(tmp_path, 7, parts)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    state = checkpoint.newest_state(str(tmp_path))
    assert state.step == 7 and state.validation == Validation()
    checkpoint.load(state, {"model": model, "optimizer": optimizer})
    assert torch.equal(model.weight, parts["model"].weight)
    momenta = [
        own.state[m.weight]["momentum_buffer"]
        for m, own in ((parts["model"], parts["optimizer"]), (model, optimizer))
    ]
    assert torch.equal(*momenta)
    assert optimizer.param_groups[0]["lr"] == 0.5  # options are the run's own


def test_average_is_restored_or_starts_from_the_weights(tmp_path, parts):
    model = parts["model"]
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight += 1
    average.update(100)
    expected = {name: value.clone() for name, value in average.state_dict().items()}
    assert not torch.equal(expected["weight"], model.weight)
    for saved in ({**parts, "average": average}, parts):
        state = save(tmp_path, 1, saved)
        fresh = torch.nn.Linear(3, 2)
        new = WeightAverage(fresh, 0.9)
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
        checkpoint.load(state, {"model": fresh, "optimizer": optimizer, "average": new})
        wanted = expected if "average" in saved else model.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in new.state_dict().items())


def test_snapshot_is_a_plain_state_dict(tmp_path, parts):
    path = checkpoint.save_snapshot(str(tmp_path), 7, parts["model"].state_dict())
    assert path.endswith("CS_scenes_7.pth") and set(torch.load(path, weights_only=True)) == {"weight", "bias"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_states_are_kept(tmp_path, parts, keep):
    for step in (9, 10, 11, 100):
        save(tmp_path, step, parts, keep=keep)
    kept = [f"state_{step}.{end}" for step in (100, 11, 10)[:keep] for end in ("json", "pt")]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "undescribed", "garbled"])
def test_damaged_state_is_passed_over_with_a_line(tmp_path, parts, damage, capsys):
    save(tmp_path, 1, parts)
    save(tmp_path, 2, parts)
    path, description = tmp_path / "state_2.pt", tmp_path / "state_2.json"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "undescribed":
        description.unlink()
    else:
        description.write_text("{")
    assert checkpoint.newest_state(str(tmp_path)).step == 1
    said = "incomplete, skipped" if damage == "undescribed" else "damaged, skipped"
    assert f"state_2.pt: {said}" in capsys.readouterr().out
    left = [path.name for path in tmp_path.glob("*state_2*")]
    damaged = ["damaged_state_2.json", "damaged_state_2.pt"]
    assert sorted(left) == (["state_2.pt"] if damage == "undescribed" else damaged)
    # It is out of the way of the run that goes on: neither counted nor in the way of a deletion.
    for step in (2, 3, 4):
        save(tmp_path, step, parts)
    assert checkpoint.newest_state(str(tmp_path)).step == 4
    assert not (tmp_path / "state_2.pt").exists() and (tmp_path / "state_3.pt").exists()


def test_state_without_description_does_not_stop_later_saves(tmp_path, parts):
    (tmp_path / "state_1.pt").write_bytes(b"cut off before its description was written")
    for step in (2, 3, 4):
        save(tmp_path, step, parts)
    assert checkpoint.newest_state(str(tmp_path)).step == 4
    assert not (tmp_path / "state_1.pt").exists()


def test_no_state(tmp_path):
    assert checkpoint.newest_state(str(tmp_path)) is None


def test_validation_is_noted_in_a_saved_state(tmp_path, parts):
    validation = Validation().with_score(3, 0.25).with_score(6, 0.5).with_score(9, 0.4)
    assert validation == Validation(9, 6, 0.5)
    assert Validation().with_score(3, float("nan")) == Validation(3)
    state = save(tmp_path, 9, parts)
    checkpoint.note_validation(state._replace(validation=validation))
    assert checkpoint.newest_state(str(tmp_path)) == state._replace(
        validation=validation, recipe=json.loads(json.dumps(RECIPE))
    )


def test_another_recipe_is_refused(tmp_path, parts):
    save(tmp_path, 1, parts)
    state = checkpoint.newest_state(str(tmp_path))
    checkpoint.check_recipe(state, RECIPE)
    with pytest.raises(UsageError, match="--input-size.*--change-recipe"):
        checkpoint.check_recipe(state, {**RECIPE, "input_size": (33, 65)})


def test_other_pictures_are_refused(tmp_path, parts):
    save(tmp_path, 1, parts, {**RECIPE, "data": "one"})
    state = checkpoint.newest_state(str(tmp_path))
    with pytest.raises(UsageError, match="--data-dir"):
        checkpoint.check_recipe(state, {**RECIPE, "data": "other"})


def test_state_of_another_network_is_refused(tmp_path, parts):
    state = save(tmp_path, 1, parts)
    other = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="state_1.pt: not a state of this network"):
        checkpoint.load(state, {"model": other, "optimizer": optimizer})


class Malicious:
    """Unpickled by an ordinary reader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_file_that_is_no_state_is_refused(tmp_path, parts, content):
    state = save(tmp_path, 1, parts)
    (tmp_path / "state_1.pt").write_bytes(content)
    with pytest.raises(UsageError, match="state_1.pt: not a state"):
        checkpoint.load(state, parts)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_state_that_would_run_code_is_refused_and_runs_nothing(tmp_path, parts, form):
    content = {"model": Malicious(tmp_path / "ran"), "optimizer": {}}
    state = save(tmp_path, 1, parts)
    with open(state.path, "wb") as file:
        (torch.save if form == "torch" else pickle.dump)(content, file)
    with pytest.raises(UsageError, match="state_1.pt: .*refused without running"):
        checkpoint.load(state, parts)
    assert not (tmp_path / "ran").exists()
    function, arguments = Malicious(tmp_path / "ran").__reduce__()
    function(*arguments)
    assert (tmp_path / "ran").exists()  # it would have


def test_earlier_run_is_set_aside(tmp_path, parts):
    assert checkpoint.set_aside(str(tmp_path)) is None
    for number in (1, 2):
        checkpoint.save_snapshot(str(tmp_path), number, parts["model"].state_dict())
        checkpoint.save_snapshot(str(tmp_path), "best", parts["model"].state_dict())
        save(tmp_path, number, parts)
        (tmp_path / "log.jsonl").write_text("{}\n")
        (tmp_path / "tensorboard").mkdir()
        target = checkpoint.set_aside(str(tmp_path))
        assert target.endswith(f"earlier_{number}")
        moved = {"log.jsonl", "tensorboard", f"state_{number}.pt", "CS_scenes_best.pth"}
        assert moved <= set(os.listdir(target))
    assert checkpoint.newest_state(str(tmp_path)) is None
    assert (tmp_path / "CS_scenes_1.pth").exists()


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    left = [temporary_name(str(tmp_path / name), 77) for name in ("state_3.pt", "CS_scenes_9.pth")]
    kept = [str(tmp_path / "state_2.pt"), temporary_name(str(tmp_path / "result.txt"), 77)]
    for path in left + kept:
        with open(path, "w"):
            pass
    checkpoint.remove_leftovers(str(tmp_path))
    assert sorted(str(tmp_path / name) for name in os.listdir(tmp_path)) == sorted(kept)


def test_two_runs_do_not_share_a_directory(tmp_path):
    code = "import sys; from engine import checkpoint\nwith checkpoint.locked(sys.argv[1]): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with checkpoint.locked(str(tmp_path)):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and f"process {os.getpid()} on" in done.stderr
        assert "UsageError: --snapshot-dir" in done.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as temporary, open(temporary, "w") as file:
        file.write("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
