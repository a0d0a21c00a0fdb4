"""States: complete or not there, the newest good one found, another recipe refused."""

from __future__ import annotations

import os

import pytest
import torch

from engine import checkpoint
from utils.args import UsageError
from utils.files import replacing

RECIPE = {"input_size": (33, 33), "ohem": False}


@pytest.fixture
def parts():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_round_trip(tmp_path, parts):
    model, optimizer = parts
    path = checkpoint.save(str(tmp_path), 7, model, optimizer, RECIPE)
    assert path.endswith("CS_scenes_7.pth") and set(torch.load(path, weights_only=True)) == {"weight", "bias"}
    other = torch.nn.Linear(3, 2)
    fresh = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    state = checkpoint.newest_state(str(tmp_path))
    assert state.step == 7
    checkpoint.restore(state, other, fresh, RECIPE)
    assert torch.equal(other.weight, model.weight)
    momenta = [
        optimizer.state[m.weight]["momentum_buffer"] for m, optimizer in ((model, optimizer), (other, fresh))
    ]
    assert torch.equal(*momenta)


def test_two_states_are_kept_and_every_snapshot(tmp_path, parts):
    for step in (9, 10, 11, 100):
        checkpoint.save(str(tmp_path), step, *parts, RECIPE)
    names = sorted(os.listdir(tmp_path))
    assert [name for name in names if name.startswith("state")] == [
        "state_100.json", "state_100.pt", "state_11.json", "state_11.pt",
    ]  # fmt: skip
    assert len([name for name in names if name.startswith("CS_scenes")]) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "undescribed", "garbled"])
def test_damaged_state_is_passed_over_with_a_line(tmp_path, parts, damage, capsys):
    checkpoint.save(str(tmp_path), 1, *parts, RECIPE)
    checkpoint.save(str(tmp_path), 2, *parts, RECIPE)
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
    assert "state_2.pt: incomplete or damaged" in capsys.readouterr().out
    # It is out of the way of the run that goes on: neither counted nor in the way of a deletion.
    for step in (2, 3, 4):
        checkpoint.save(str(tmp_path), step, *parts, RECIPE)
    assert checkpoint.newest_state(str(tmp_path)).step == 4
    assert not (tmp_path / "state_2.pt").exists() and (tmp_path / "state_3.pt").exists()


def test_state_without_description_does_not_stop_later_saves(tmp_path, parts):
    (tmp_path / "state_1.pt").write_bytes(b"cut off before its description was written")
    for step in (2, 3, 4):
        checkpoint.save(str(tmp_path), step, *parts, RECIPE)
    assert checkpoint.newest_state(str(tmp_path)).step == 4


def test_no_state(tmp_path):
    assert checkpoint.newest_state(str(tmp_path)) is None


def test_another_recipe_is_refused(tmp_path, parts):
    checkpoint.save(str(tmp_path), 1, *parts, RECIPE)
    state = checkpoint.newest_state(str(tmp_path))
    with pytest.raises(UsageError, match="--input-size"):
        checkpoint.restore(state, *parts, {**RECIPE, "input_size": (33, 65)})


def test_other_pictures_are_refused(tmp_path, parts):
    checkpoint.save(str(tmp_path), 1, *parts, {**RECIPE, "data": "one"})
    state = checkpoint.newest_state(str(tmp_path))
    with pytest.raises(UsageError, match="--data-dir"):
        checkpoint.restore(state, *parts, {**RECIPE, "data": "other"})


def test_earlier_run_is_set_aside(tmp_path, parts):
    assert checkpoint.set_aside(str(tmp_path)) is None
    for number in (1, 2):
        checkpoint.save(str(tmp_path), number, *parts, RECIPE)
        (tmp_path / "log.jsonl").write_text("{}\n")
        (tmp_path / "tensorboard").mkdir()
        target = checkpoint.set_aside(str(tmp_path))
        assert target.endswith(f"earlier_{number}")
        assert {"log.jsonl", "tensorboard", f"state_{number}.pt"} <= set(os.listdir(target))
    assert checkpoint.newest_state(str(tmp_path)) is None
    assert (tmp_path / "CS_scenes_1.pth").exists()


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
