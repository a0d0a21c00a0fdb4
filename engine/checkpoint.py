"""Snapshots of a run, and the states that it continues from."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.args import UsageError
from utils.files import replacing

#: What a run leaves beside snapshots and states.
RUN_FILES = ("args.json", "log.jsonl", "tensorboard")
#: States kept beside the snapshots: the newest, and one to fall back to.
KEPT_STATES = 2


class State(NamedTuple):
    """A point that a run can continue from: `step` steps are done."""

    step: int
    path: str
    recipe: dict[str, Any]


def snapshot_path(directory: str, step: int) -> str:
    return os.path.join(directory, f"CS_scenes_{step}.pth")


def save(
    directory: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> str:
    """Write the snapshot of `step` (a plain state dict) and the state for resuming; returns the snapshot's
    path.

    The state's JSON file is written last: its size and checksum say that the state is whole.
    """
    weights = model.state_dict()
    with replacing(snapshot_path(directory, step)) as path:
        torch.save(weights, path)
    state = os.path.join(directory, f"state_{step}.pt")
    with replacing(state) as path:
        torch.save({"model": weights, "optimizer": optimizer.state_dict()}, path)
    with replacing(_description(state)) as path, open(path, "w", encoding="utf-8") as file:
        json.dump(
            {"step": step, "size": os.path.getsize(state), "sha256": _sha256(state), "recipe": recipe}, file
        )
    described = [path for path in _states(directory) if os.path.exists(_description(path))]
    for old in described[KEPT_STATES:]:
        # The description first: what it describes is whole as long as it is there.
        os.unlink(_description(old))
        os.unlink(old)
    return snapshot_path(directory, step)


def newest_state(directory: str) -> State | None:
    """The newest complete state in `directory`; damaged ones are renamed, with a line saying so."""
    for path in _states(directory):
        try:
            with open(_description(path), encoding="utf-8") as file:
                description = json.load(file)
            whole = description["size"] == os.path.getsize(path) and description["sha256"] == _sha256(path)
            state = State(int(description["step"]), path, dict(description["recipe"]))
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return state
        print(f"{path}: incomplete or damaged, passed over", flush=True)
        for part in (path, _description(path)):
            with contextlib.suppress(FileNotFoundError):
                os.replace(part, os.path.join(directory, "damaged_" + os.path.basename(part)))
    return None


def restore(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]) -> None:
    """Load `state` into `model` and `optimizer`.

    Raises:
        UsageError: the state is of a run with another recipe.
    """
    for flag, value in recipe.items():
        # Through JSON, as the recipe on disk went: tuples become lists.
        if flag in state.recipe and state.recipe[flag] != json.loads(json.dumps(value)):
            if flag == "data":
                raise UsageError(
                    f"--data-dir, --data-list: not the pictures of the run of {state.path}; resume with the "
                    "same, or start anew in another --snapshot-dir"
                )
            raise UsageError(
                f"--{flag.replace('_', '-')}: is {value} here and {state.recipe[flag]} in the run of "
                f"{state.path}; resume with the same, or start anew in another --snapshot-dir"
            )
    content = torch.load(state.path, map_location="cpu", weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])


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


def _states(directory: str) -> list[str]:
    """The paths of all states, newest first; those that lack their description too."""
    paths = glob.glob(os.path.join(glob.escape(directory), "state_*.pt"))
    steps = {path: os.path.basename(path)[len("state_") : -len(".pt")] for path in paths}
    return sorted((path for path in paths if steps[path].isdigit()), key=lambda path: -int(steps[path]))


def _description(state: str) -> str:
    return state.removesuffix(".pt") + ".json"


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
