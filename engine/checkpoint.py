"""Snapshots of a run, the states that it continues from, and the lock on their directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pickle
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.errors import RunError, UsageError
from utils.files import replacing, temporary_name, writing

#: What a run leaves beside snapshots and states.
RUN_FILES = ("args.json", "environment.json", "log.jsonl", "tensorboard", "CS_scenes_best.pth")
LOCK = ".lock"


class Validation(NamedTuple):
    """What the validations so far have given; steps count from 1, 0 is none."""

    step: int = 0  # of the newest
    best_step: int = 0
    best_mean_iou: float = -1.0

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Validation:
        kinds = {"step": int, "best_step": int, "best_mean_iou": float}
        return cls(**{name: kinds[name](value) for name, value in fields.items()})

    def with_score(self, step: int, mean_iou: float) -> Validation:
        if mean_iou > self.best_mean_iou:
            return Validation(step, step, mean_iou)
        return self._replace(step=step)


class State(NamedTuple):
    """A point that a run can continue from: `step` steps are done."""

    step: int
    path: str
    recipe: dict[str, Any]
    validation: Validation


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Keep other runs out of `directory`; the lock goes when this process goes, however it ends.

    Raises:
        UsageError: another run has it.
    """
    path = os.path.join(directory, LOCK)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"--snapshot-dir {directory}: can't be locked ({error.strerror})") from error
    try:
        # A lock of the process and not of the file (flock): helper processes that outlive a killed run do not
        # hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            raise UsageError(
                f"--snapshot-dir {directory}: another run writes there ({owner}); wait for its end, or name "
                "another folder"
            ) from None
        print(f"{directory}: has no locks ({error.strerror}): see that no other run uses it", flush=True)
    try:
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)


def snapshot_path(directory: str, name: int | str) -> str:
    return os.path.join(directory, f"CS_scenes_{name}.pth")


def save_snapshot(directory: str, name: int | str, weights: Mapping[str, Tensor]) -> str:
    """Write a plain state dict for other programs; returns its path. `name`: the step, or what it is."""
    _write(snapshot_path(directory, name), dict(weights))
    return snapshot_path(directory, name)


def _write(path: str, content: Any) -> tuple[int, str]:
    """torch.save, whole or not at all; returns size and checksum of the file."""
    with replacing(path) as temporary:
        with writing(temporary) as file:
            torch.save(content, file)
        return os.path.getsize(temporary), _sha256(temporary)


def state_path(directory: str, step: int) -> str:
    return os.path.join(directory, f"state_{step}.pt")


def save(state: State, parts: Mapping[str, Any], keep: int) -> None:
    """Write a state, and delete all but the newest `keep` of its directory.

    The state's JSON file is written last: its size and checksum say that the state is whole.

    Args:
        parts: state dicts by name.
    """
    _describe(state, *_write(state.path, dict(parts)))
    described = [path for path in _states(os.path.dirname(state.path)) if os.path.exists(_description(path))]
    for old in described[keep:]:
        # The description first: what it describes is whole as long as it is there.
        os.unlink(_description(old))
        os.unlink(old)
    for path in _states(os.path.dirname(state.path)):
        if _step_of(path) < state.step and not os.path.exists(_description(path)):
            os.unlink(path)  # of a save, or of a deletion, that was killed


def note_validation(state: State) -> None:
    """Write what `state.validation` is now; the state itself is saved."""
    description = _read_description(state.path)
    _describe(state, description["size"], description["sha256"])


def newest_state(directory: str) -> State | None:
    """The newest complete state in `directory`.

    A damaged one is renamed, one without its description passed over, with a line saying so.

    Raises:
        RunError: the disk can't be read.
    """
    for path in _states(directory):
        try:
            description = _read_description(path)
            whole = description["size"] == os.path.getsize(path) and description["sha256"] == _sha256(path)
            validation = Validation.read(description.get("validation", {}))
            state = State(int(description["step"]), path, dict(description["recipe"]), validation)
        except FileNotFoundError:
            print(f"{path}: incomplete, passed over", flush=True)
            continue
        except OSError as error:
            raise RunError(f"{path}: can't be read ({error.strerror}); see to the disk") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            whole = False
        if whole:
            return state
        print(f"{path}: damaged, passed over", flush=True)
        for part in (path, _description(path)):
            os.replace(part, os.path.join(directory, "damaged_" + os.path.basename(part)))
    return None


def check_recipe(state: State, recipe: Mapping[str, Any]) -> None:
    """See that a run with `recipe` may continue from `state`.

    Raises:
        UsageError: it would be another run.
    """
    for flag, value in recipe.items():
        # Through JSON, as the recipe on disk went: tuples become lists.
        if flag in state.recipe and state.recipe[flag] != json.loads(json.dumps(value)):
            what = (
                "--data-dir, --data-list: not the pictures"
                if flag == "data"
                else f"--{flag.replace('_', '-')}: is {value} here and {state.recipe[flag]} in those"
            )
            raise UsageError(
                f"{what} of the run of {state.path}; resume with the same, add --change-recipe, or start "
                "anew in another --snapshot-dir"
            )


def load(state: State, parts: Mapping[str, Any]) -> None:
    """Load `state` into `parts`, which have load_state_dict.

    The optimizer's own options (learning rate, weight decay) stay what they are; a moving average that the
    state lacks starts from its weights.

    Raises:
        UsageError: the file is no state of this network, or would run code when unpickled (none of it runs).
    """
    try:
        content = torch.load(state.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{state.path}: not a state of plain tensors (refused without running anything in it); remove it"
        ) from error
    except Exception as error:  # what is no checkpoint can fail in any way while it is unpickled
        raise UsageError(f"{state.path}: not a state of a training run; remove it") from error
    options = [{**group, "params": None} for group in parts["optimizer"].param_groups]
    try:
        for name, part in parts.items():
            saved = content[name] if name in ("model", "optimizer") else content.get(name)
            if saved:
                part.load_state_dict(saved)
            elif name == "average":
                part.load_state_dict(content["model"])
    except Exception as error:  # nor need its entries be what load_state_dict expects
        raise UsageError(
            f"{state.path}: not a state of this network; give the flags of its run, or start anew in another "
            "--snapshot-dir"
        ) from error
    for group, own in zip(parts["optimizer"].param_groups, options, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})


def set_aside(directory: str) -> str | None:
    """Move the states and log of an earlier run to a folder of their own and return it; None: no such run."""
    found = glob.glob(os.path.join(glob.escape(directory), "state_*"))
    found += [path for name in RUN_FILES if os.path.exists(path := os.path.join(directory, name))]
    if not found:
        return None
    number = 1
    while os.path.exists(target := os.path.join(directory, f"earlier_{number}")):
        number += 1
    os.makedirs(target)
    for path in found:
        os.replace(path, os.path.join(target, os.path.basename(path)))
    return target


def remove_leftovers(directory: str) -> None:
    """Delete what a killed run had half written. Only while the directory is `locked`."""
    for name in ("state_*", "CS_scenes_*", *RUN_FILES):
        for path in glob.glob(temporary_name(os.path.join(glob.escape(directory), name), "*")):
            os.unlink(path)


def _states(directory: str) -> list[str]:
    """The paths of all states, newest first; those that lack their description too."""
    paths = glob.glob(os.path.join(glob.escape(directory), "state_*.pt"))
    return sorted((path for path in paths if _step_of(path) >= 0), key=_step_of, reverse=True)


def _step_of(state: str) -> int:
    """The step in a state's name, -1 where there is none."""
    step = os.path.basename(state)[len("state_") : -len(".pt")]
    return int(step) if step.isdecimal() else -1


def _description(state: str) -> str:
    return state.removesuffix(".pt") + ".json"


def _describe(state: State, size: int, sha256: str) -> None:
    with replacing(_description(state.path)) as path, open(path, "w", encoding="utf-8") as file:
        content = {"step": state.step, "size": size, "sha256": sha256, "recipe": state.recipe}
        json.dump({**content, "validation": state.validation._asdict()}, file)


def _read_description(state: str) -> dict[str, Any]:
    with open(_description(state), encoding="utf-8") as file:
        return json.load(file)


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
