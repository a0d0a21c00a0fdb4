"""Checkpoints in: read them safely, say what fits, refuse what does not."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError

#: The two layers whose shape depends on the number of classes.
CLASSIFIERS = ("head.bottleneck.3.", "dsn.3.")
#: What only weights that come from another program have: how its pictures differ.
SHIFT = "shift"
#: What an ImageNet backbone lacks, and may.
HEADS = ("head.", "dsn.")


class LoadReport(NamedTuple):
    """What `load_weights` did, by names of state-dict entries."""

    path: str
    loaded: list[str]
    new: list[str]
    left_over: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        for names, word in ((self.new, "new"), (self.left_over, "left over")):
            parts.append(f"{len(names)} {word}" + (f" ({_groups(names)})" if names else ""))
        return f"{self.path}: " + ", ".join(parts)


def _groups(names: list[str]) -> str:
    """The top-level modules that `names` belong to."""
    return ", ".join(dict.fromkeys(name.split(".")[0] + ".*" if "." in name else name for name in names))


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict, bare or under "model" / "state_dict", with or without "module." before its names.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one that would run code when unpickled.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file; name an existing checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors (refused without running anything in it); "
            "save it again as a state dict"
        ) from error
    except Exception as error:  # a damaged file can fail in any way while it is unpickled
        raise CheckpointError(f"{path}: damaged or not a checkpoint; copy or download it again") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    state = dict(content) if isinstance(content, Mapping) else {}
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{path}: holds no state dict; save model.state_dict() and use that file")
    return {name.removeprefix("module."): value for name, value in state.items()}


def match_weights(
    model: nn.Module,
    path: str | os.PathLike,
    fresh_classifiers: bool = False,
    complete: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[LoadReport, dict[str, Tensor]]:
    """What `load_weights` would do, and the entries that it would load; `model` may be on the meta device."""
    state = read_state_dict(path) if state is None else state
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    own = model.state_dict()
    fresh = {name for name in own if fresh_classifiers and name.startswith(CLASSIFIERS)}
    loaded = {name: state[name] for name in own if name in state and name not in fresh}
    new = [name for name in own if name not in loaded]
    left_over = [name for name in state if name not in loaded]
    if not loaded:
        raise CheckpointError(
            f"{path}: none of its {len(state)} entries belongs to this network; check the file, or convert "
            "another program's with python -m tools.convert"
        )
    for name, value in loaded.items():
        if own[name].shape != value.shape:
            raise CheckpointError(_shape_mismatch(path, name, own[name], value))
    missing = [name for name in new if name not in fresh and (complete or not name.startswith(HEADS))]
    if SHIFT in missing:
        raise CheckpointError(
            f"{path}: made for another program's pictures; convert it first with python -m tools.convert"
        )
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} entries of this network, the first is {missing[0]}; "
            "check --backbone and --model, or name a complete checkpoint"
        )
    own_modules = {name.split(".")[0] for name in own}
    foreign = [name for name in left_over if name not in fresh and name.split(".")[0] in own_modules]
    if foreign:
        raise CheckpointError(
            f"{path}: has {len(foreign)} entries that this network lacks, the first is {foreign[0]}; "
            "check --backbone and --model"
        )
    return LoadReport(str(path), list(loaded), new, left_over), loaded


def load_weights(
    model: nn.Module,
    path: str | os.PathLike,
    fresh_classifiers: bool = False,
    complete: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Load a checkpoint of CCNet or of its ImageNet backbone into `model`.

    Args:
        path: file that `read_state_dict` can read. num_batches_tracked entries are left out silently.
        fresh_classifiers: leave the two classifiers as they are (fine-tuning to other classes).
        complete: every entry of the model must be in the file, as evaluation needs it.
        state: what the file holds, where it has been read; `path` is then its name in messages.

    Raises:
        CheckpointError: unreadable, of another network, or (without `fresh_classifiers`) of other classes.
            The model is then unchanged.
    """
    report, loaded = match_weights(model, path, fresh_classifiers, complete, state)
    model.load_state_dict({**model.state_dict(), **loaded})
    return report


def _shape_mismatch(path: str | os.PathLike, name: str, own: Tensor, other: Tensor) -> str:
    if name.startswith(CLASSIFIERS):
        return (
            f"{path}: has {other.shape[0]} classes, the network {own.shape[0]}; give --num-classes "
            f"{other.shape[0]}, or --not-restore-last to start the classifiers fresh"
        )
    return (
        f"{path}: {name} has shape {list(other.shape)}, the network needs {list(own.shape)}; check --backbone"
    )
