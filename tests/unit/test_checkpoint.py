"""States are complete or absent and checked, the newest good one is found, and no code in them runs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket

import pytest
import torch

from engine.options import TrainOptions
from engine.runtime.distributed import World
from engine.runtime.signals import StopRequest
from engine.training import checkpoint
from engine.training.checkpoint import State, Validation
from engine.training.ema import WeightAverage
from engine.training.run import Data, Parts, Run
from utils.errors import RunError, UsageError
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
    # The resumed run neither counts it nor deletes another state for it.
    for step in (2, 3, 4):
        save(tmp_path, step, parts)
    assert checkpoint.newest_state(str(tmp_path)).step == 4
    assert not (tmp_path / "state_2.pt").exists() and (tmp_path / "state_3.pt").exists()


def edited(content: dict, **values) -> bytes:
    return json.dumps({**content, **values}).encode()


#: Functions that make an invalid JSON file from the content of a valid one.
EDITS = {
    "step of the last": lambda content: edited(content, step=4),
    "step before": lambda content: edited(content, step=1),
    "step 0": lambda content: edited(content, step=0),
    "negative step": lambda content: edited(content, step=-7),
    "step that is a float": lambda content: edited(content, step=2.5),
    "step that is text": lambda content: edited(content, step="2"),
    "step that is nothing": lambda content: edited(content, step=None),
    "huge step": lambda content: edited(content, step=10**400),
    "step of too many digits": lambda content: (
        edited(content, step=0)[:-1] + b', "step": 1%s}' % (b"0" * 5000)
    ),
    "infinite step": lambda content: edited(content, step=float("inf")),
    "step that is nan": lambda content: edited(content, step=float("nan")),
    "recipe": lambda content: edited(content, recipe={"input_size": [33, 33], "ohem": True}),
    "recipe that is a list": lambda content: edited(content, recipe=[]),
    "validation": lambda content: edited(content, validation={**content["validation"], "best_mean_iou": 1.0}),
    "validation that is text": lambda content: edited(content, validation="none"),
    "size": lambda content: edited(content, size=content["size"] + 1),
    "sha256": lambda content: edited(content, sha256="0" * 64),
    "format": lambda content: edited(content, format=1),
    "checksum": lambda content: edited(content, checksum="0" * 64),
    "checksum that is a list": lambda content: edited(content, checksum=[]),
    "another key": lambda content: edited(content, more=1),
    "empty": lambda content: b"",
    "list": lambda content: b"[]",
    "text": lambda content: b'"state"',
    "number": lambda content: b"2",
    "deep": lambda content: b"[" * 100_000,
    "deep within": lambda content: edited(content)[:-1] + b', "more": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "not UTF-8": lambda content: edited(content) + b"\xff",
    "zeros": lambda content: bytes(300),
    "too long": lambda content: edited(content, more="a" * (1 << 21)),
    **{
        f"without {name}": lambda content, name=name: json.dumps(
            {key: value for key, value in content.items() if key != name}
        ).encode()
        for name in ("format", "step", "size", "sha256", "recipe", "validation", "checksum")
    },
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_json_is_not_believed(tmp_path, parts, edit, capsys):
    for step in (1, 2):
        save(tmp_path, step, parts)
    description = tmp_path / "state_2.json"
    content = edit(json.loads(description.read_text()))
    description.write_bytes(content)
    assert checkpoint.newest_state(str(tmp_path)).step == 1
    assert "state_2.pt: damaged, skipped" in capsys.readouterr().out
    assert (tmp_path / "damaged_state_2.json").read_bytes() == content
    assert checkpoint.newest_state(str(tmp_path)).step == 1 and capsys.readouterr().out == ""


def test_layout_of_the_json_does_not_matter(tmp_path, parts):
    save(tmp_path, 2, parts)
    description = tmp_path / "state_2.json"
    content = dict(reversed(json.loads(description.read_text()).items()))
    description.write_text(json.dumps(content, indent=4))
    assert checkpoint.newest_state(str(tmp_path)).step == 2


def test_renamed_state_is_damaged(tmp_path, parts, capsys):
    for step in (1, 2):
        save(tmp_path, step, parts)
    for end in ("pt", "json"):
        (tmp_path / f"state_2.{end}").rename(tmp_path / f"state_9.{end}")
    assert checkpoint.newest_state(str(tmp_path)).step == 1
    assert "state_9.pt: damaged, skipped" in capsys.readouterr().out


def test_state_with_the_json_of_another_is_damaged(tmp_path, parts):
    save(tmp_path, 1, parts)
    with torch.no_grad():
        parts["model"].weight += 1
    save(tmp_path, 2, parts)
    (tmp_path / "state_1.pt").replace(tmp_path / "state_2.pt")
    assert checkpoint.newest_state(str(tmp_path)) is None


def test_damaged_states_do_not_replace_each_other(tmp_path, parts):
    for content in (b"one", b"two"):
        save(tmp_path, 2, parts)
        (tmp_path / "state_2.json").write_bytes(content)
        assert checkpoint.newest_state(str(tmp_path)) is None
    names = ("damaged_state_2.json", "damaged_2_state_2.json")
    assert [(tmp_path / name).read_bytes() for name in names] == [b"one", b"two"]


def make_odd(path, kind: str) -> None:
    """Make something other than a file at `path`."""
    if kind == "folder":
        path.mkdir()
        (path / "content").touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))


KINDS = ["folder", "fifo", "link", "device", "socket"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["pt", "json"])
def test_state_that_is_no_file_is_damaged(tmp_path, parts, kind, end, capsys):
    for step in (1, 2):
        save(tmp_path, step, parts)
    path = tmp_path / f"state_2.{end}"
    path.unlink()
    make_odd(path, kind)
    assert checkpoint.newest_state(str(tmp_path)).step == 1
    assert "state_2.pt: damaged, skipped" in capsys.readouterr().out
    assert os.path.lexists(tmp_path / f"damaged_state_2.{end}")
    # An older one does not disturb the resumed run either.
    make_odd(tmp_path / f"state_0.{end}", kind)
    for step in (3, 4):
        save(tmp_path, step, parts)
    assert checkpoint.newest_state(str(tmp_path)).step == 4 and os.path.lexists(tmp_path / f"state_0.{end}")


def test_disk_that_fails_is_no_damage(tmp_path, parts, monkeypatch):
    save(tmp_path, 1, parts)

    def fails(path, *_, **__):
        raise OSError(5, "Input/output error", path)

    for function in ("open_input", "_is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, function, fails)
            with pytest.raises(RunError, match="state_1.*can't be read .Input/output error"):
                checkpoint.newest_state(str(tmp_path))
    assert checkpoint.newest_state(str(tmp_path)).step == 1


def test_names_of_other_files_are_left_alone(tmp_path):
    for name in (
        "state_.pt",
        "state_x.pt",
        "state_07.pt",
        "state_-1.pt",
        "state_\u0663.pt",
        "state_1.pt.old",
    ):
        (tmp_path / name).touch()
    before = sorted(os.listdir(tmp_path))
    assert checkpoint.newest_state(str(tmp_path)) is None
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("validation", [{}, {"validation": {"step": 0, "best_step": 0, "best_mean_iou": -1}}])
def test_state_of_an_earlier_version_is_refused(tmp_path, parts, validation):
    """Its dropout masks depended on the number of processes, so it is refused."""
    save(tmp_path, 2, parts)
    description = tmp_path / "state_2.json"
    content = json.loads(description.read_text())
    old = {name: content[name] for name in ("step", "size", "sha256", "recipe")}
    description.write_text(json.dumps({**old, **validation}))
    with pytest.raises(UsageError, match="state_2.pt: .*earlier version.*--restore-from.*--start-iters 2"):
        checkpoint.newest_state(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["state_2.json", "state_2.pt"]


def test_state_of_a_later_version_is_refused(tmp_path, parts, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        save(tmp_path, 2, parts)
    with pytest.raises(UsageError, match="state_2.pt: written by another version"):
        checkpoint.newest_state(str(tmp_path))


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


def test_validation_is_not_noted_in_an_edited_state(tmp_path, parts):
    state = save(tmp_path, 9, parts)
    path = tmp_path / "state_9.json"
    path.write_bytes(edited(json.loads(path.read_text()), step=8))
    with pytest.raises(RunError, match="state_9.json: was changed"):
        checkpoint.note_validation(state)


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


def other_entry(change):
    """Return an edit that changes the momentum of the first weight."""

    def edit(content):
        entry = content["optimizer"]["state"][0]
        entry["momentum_buffer"] = change(entry["momentum_buffer"])

    return edit


def other_weight(name, change):
    def edit(content):
        content[name]["weight"] = change(content[name]["weight"])

    return edit


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[1, 2] = float("nan")
    return tensor


def drop(*keys):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


def put(value, *keys):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


#: Functions that damage the content of a state, with words of the error.
MISFITS = {
    "momentum of another shape": (other_entry(lambda m: m[:1]), "momentum_buffer of weight 0 is [1, 3]"),
    "momentum that broadcasts": (other_entry(lambda m: m[0, 0]), "momentum_buffer of weight 0"),
    "momentum of another type": (other_entry(lambda m: m.double()), "momentum_buffer of weight 0"),
    "momentum that is sparse": (other_entry(lambda m: m.to_sparse()), "not a plain tensor"),
    "momentum without content": (other_entry(lambda m: m.to("meta")), "not a plain tensor"),
    "momentum that is a number": (other_entry(lambda m: 1.0), "not a plain tensor"),
    "momentum that is nothing": (other_entry(lambda m: None), "not a plain tensor"),
    "momentum that is nan": (other_entry(with_nan), "not finite"),
    "momentum under another name": (put({"exp_avg": torch.zeros(2, 3)}, "optimizer", "state", 0), "weight 0"),
    "momentum with company": (put(torch.zeros(2), "optimizer", "state", 0, "more"), "weight 0"),
    "momentum of one weight missing": (drop("optimizer", "state", 1), "lacks 1 of 2 weights"),
    "momentum of a third weight": (put({}, "optimizer", "state", 2), "other weights"),
    "momentum of a named weight": (put({}, "optimizer", "state", "weight"), "other weights"),
    "no state": (drop("optimizer", "state"), "it has other entries"),
    "state that is a list": (put([], "optimizer", "state"), "not a state of this network"),
    "entry that is a tensor": (put(torch.zeros(3), "optimizer", "state", 0), "it has other entries"),
    "no groups": (put([], "optimizer", "param_groups"), "other weights"),
    "group of fewer weights": (put([0], "optimizer", "param_groups", 0, "params"), "other weights"),
    "group of tensors": (put([torch.ones(2)], "optimizer", "param_groups", 0, "params"), "not a state"),
    "no optimizer": (drop("optimizer"), "it has other entries"),
    "no model": (drop("model"), "it has other entries"),
    "model that is a list": (put([1], "model"), "it has other entries"),
    "weight missing": (drop("model", "bias"), "other names"),
    "weight more": (put(torch.zeros(1), "model", "more"), "other names"),
    "weight of another shape": (other_weight("model", lambda w: w[:, :1]), "weight is [2, 1]"),
    "weight of another type": (other_weight("model", lambda w: w.half()), "torch.float16"),
    "weight that is nan": (other_weight("model", with_nan), "weight has values that are not finite"),
    "weight that is infinite": (other_weight("model", lambda w: w / 0), "not finite"),
    "weight that is quantized": (
        other_weight("model", lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        "weight is",
    ),
    "average of another shape": (other_weight("average", lambda w: w[0]), "weight is [3]"),
    "average that is nan": (other_weight("average", with_nan), "not finite"),
    "average that is a tensor": (put(torch.zeros(3), "average"), "it has other entries"),
    "loss scale that is nan": (put(float("nan"), "scaler", "scale"), "scale of its loss scale"),
    "loss scale that is text": (put("1", "scaler", "scale"), "scale of its loss scale"),
    "loss scale that is negative": (put(-1.0, "scaler", "scale"), "scale of its loss scale"),
    "loss scale without growth": (drop("scaler", "growth_factor"), "other entries"),
    "loss scale that is a tensor": (put(torch.zeros(3), "scaler"), "it has other entries"),
}


@pytest.fixture
def all_parts(parts):
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=4.0)
    scaler.scale(torch.ones(1))  # makes its tensors
    return {**parts, "scaler": scaler, "average": WeightAverage(parts["model"], 0.9)}


@pytest.mark.parametrize("edit, said", MISFITS.values(), ids=MISFITS)
def test_content_that_does_not_fit_is_refused_before_anything_is_changed(tmp_path, all_parts, edit, said):
    content = {name: copy.deepcopy(part.state_dict()) for name, part in all_parts.items()}
    edit(content)
    state = State(2, checkpoint.state_path(str(tmp_path), 2), RECIPE, Validation())
    checkpoint.save(state, content, 2)
    assert checkpoint.newest_state(str(tmp_path)).step == 2  # its files are as they were written
    with torch.no_grad():
        all_parts["model"].weight += 1
    all_parts["scaler"].update(8.0)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in all_parts.items()}
    with pytest.raises(UsageError, match="state_2.pt: not a state of this network") as error:
        checkpoint.load(state, all_parts)
    assert said in str(error.value) and "\n" not in str(error.value)
    after = {name: part.state_dict() for name, part in all_parts.items()}
    assert repr(after) == repr(before)


def test_all_parts_are_restored(tmp_path, all_parts):
    state = save(tmp_path, 2, all_parts)
    before = repr({name: part.state_dict() for name, part in all_parts.items()})
    with torch.no_grad():
        all_parts["model"].weight += 1
        all_parts["optimizer"].state[all_parts["model"].weight]["momentum_buffer"] += 1
    all_parts["average"].update(1)
    all_parts["scaler"].update(8.0)
    assert repr({name: part.state_dict() for name, part in all_parts.items()}) != before
    checkpoint.load(state, all_parts)
    assert repr({name: part.state_dict() for name, part in all_parts.items()}) == before


def test_momentum_of_weights_without_a_gradient_may_be_missing(tmp_path, parts):
    del parts["optimizer"].state[parts["model"].bias]
    state = save(tmp_path, 2, parts)
    with pytest.raises(UsageError, match="lacks 1 of 2 weights"):
        checkpoint.load(state, parts)
    checkpoint.load(state, parts, partial=True)
    # There is no momentum before the first update, for example after an overflow of float16.
    parts["optimizer"].state.clear()
    checkpoint.load(save(tmp_path, 3, parts), parts)


def test_no_process_goes_on_with_a_state_that_another_can_t_load(tmp_path, parts):
    """All processes check the state before any file of the run changes."""

    class OtherFails(World):
        calls = 0

        def first(self, value):
            self.calls += 1
            return value if self.calls < 5 else UsageError("another process: not a state")

    save(tmp_path, 2, parts)
    options = TrainOptions(data_dir=".", num_classes=19, num_steps=4, snapshot_dir=str(tmp_path), resume=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    world = OtherFails(0, 1, torch.device("cpu"))
    all_parts = Parts(parts["model"], parts["optimizer"], scaler)
    run = Run(options, world, StopRequest(), all_parts, RECIPE, Data(None, lambda *_: {}))
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="another process"), run:
        pass
    assert run.world.calls == 5 and run.state is None and files_of(tmp_path) == before


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["log.jsonl", "args.json", "environment.json", "CS_scenes_best.pth"])
def test_run_file_that_is_no_file_is_named(tmp_path, kind, name):
    checkpoint.check_run_files(str(tmp_path))
    make_odd(tmp_path / name, kind)
    with pytest.raises(UsageError, match=f"{name}: is .*, not a file; move it away"):
        checkpoint.check_run_files(str(tmp_path))


@pytest.mark.parametrize("kind", ["file", *KINDS[1:]])
def test_tensorboard_that_is_no_folder_is_named(tmp_path, kind):
    path = tmp_path / "tensorboard"
    path.touch() if kind == "file" else make_odd(path, kind)
    with pytest.raises(UsageError, match="tensorboard: is .*, not a folder; move it away"):
        checkpoint.check_run_files(str(tmp_path))


@pytest.mark.parametrize("kind", [*KINDS, "victim"])
def test_lock_that_is_no_file_is_refused(tmp_path, kind):
    path, victim = tmp_path / checkpoint.LOCK, tmp_path / "victim"
    victim.write_text("content")
    path.symlink_to(victim) if kind == "victim" else make_odd(path, kind)
    refused = pytest.raises(UsageError, match="--snapshot-dir .*.lock can't be locked")
    with refused, checkpoint.locked(str(tmp_path)):
        pass
    assert victim.read_text() == "content"


class Malicious:
    """An object that makes a folder when an ordinary reader unpickles it."""

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
