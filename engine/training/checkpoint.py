"""Snapshots and states of a run, and the lock on its directory.

A snapshot is a plain state dict of the network, for evaluation and other programs. A state is what --resume
continues from. The tensors of a state (network, optimizer and more) are in state_STEP.pt, and its description
is in state_STEP.json.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import pickle
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.training.optimizer import entries_of
from utils.errors import RunError, UsageError
from utils.files import kind_of, open_input, put_aside, replacing, temporary_name, write_file, writing
from utils.run_files import CLASSES, read_arguments

#: Files and folders of a run, except states and the snapshots that are named by their step.
RUN_FILES = ("args.json", "environment.json", "log.jsonl", "tensorboard", "CS_scenes_best.pth")
LOCK = ".lock"
#: Format version of states. In version 1, which had no version number, dropout depended on the number of
#: processes.
FORMAT = 2
#: Maximum number of bytes to read from the JSON file of a state. Valid files have less than 10,000 bytes.
LARGEST_DESCRIPTION = 1 << 20


class Validation(NamedTuple):
    """The newest and the best validation of a run. Steps count from 1; step 0 means no validation."""

    step: int = 0  # step of the newest validation
    best_step: int = 0
    best_mean_iou: float = -1.0

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Validation:
        """Return the results in the JSON file of a state.

        Args:
            fields: the entry "validation" of the file.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: `fields` is not valid.
        """
        kinds = {"step": int, "best_step": int, "best_mean_iou": float}
        return cls(**{name: kind(fields[name]) for name, kind in kinds.items()})

    def with_score(self, step: int, mean_iou: float) -> Validation:
        """Return the results updated by the mean IoU of the validation after `step`."""
        if mean_iou > self.best_mean_iou:
            return Validation(step, step, mean_iou)
        return self._replace(step=step)


class State(NamedTuple):
    """A point that a run can continue from.

    Attributes:
        step: number of steps done.
        path: file of the tensors; the JSON file has the same name with the ending .json.
        recipe: values that a resumed run must repeat (see engine/options.py), and a digest of the data.
        validation: newest and best validation of the run.
    """

    step: int
    path: str
    recipe: dict[str, Any]
    validation: Validation


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Lock `directory` against other runs. The lock ends with the process, even if the process is killed.

    Raises:
        UsageError: another run holds the lock, or the lock can't be opened as a file.
    """
    path = os.path.join(directory, LOCK)
    try:
        # Do not follow a link, because the file is truncated below.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(kind := os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, f"is {kind_of(kind)}, not a file")
    except OSError as error:
        raise UsageError(
            f"--snapshot-dir {directory}: {LOCK} can't be locked ({error.strerror}); move it away"
        ) from error
    try:
        # lockf, not flock: a lock of lockf belongs to this process only. Helper processes that outlive a
        # killed run do not hold the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            raise UsageError(
                f"--snapshot-dir {directory}: another run writes there ({owner}); wait until it ends, or "
                "name another folder"
            ) from None
        print(f"{directory}: can't be locked ({error.strerror}); let no other run use it", flush=True)
    try:
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)


def snapshot_path(directory: str, name: int | str) -> str:
    """Return the path of a snapshot; `name` is its step, or another name."""
    return os.path.join(directory, f"CS_scenes_{name}.pth")


def save_snapshot(directory: str, name: int | str, weights: Mapping[str, Tensor]) -> str:
    """Write a snapshot, a plain state dict, and return its path.

    Args:
        directory: folder of the run.
        name: step of the snapshot, or another name.
        weights: state dict of the network.

    Raises:
        OSError: the file can't be written.
    """
    _write(snapshot_path(directory, name), dict(weights))
    return snapshot_path(directory, name)


def _write(path: str, content: Any) -> tuple[int, str]:
    """Write a file atomically with torch.save; return its size and checksum."""
    with replacing(path) as temporary:
        with writing(temporary) as file:
            torch.save(content, file)
        return os.path.getsize(temporary), _sha256(temporary)


def state_path(directory: str, step: int) -> str:
    """Return the path of the state after `step`."""
    return os.path.join(directory, f"state_{step}.pt")


def save(state: State, parts: Mapping[str, Any], keep: int) -> None:
    """Write a state, and delete old states of its directory.

    The JSON file records the size and the checksum of the tensor file. The JSON file is written last, so its
    presence shows that the state is complete.

    Args:
        state: the state to write.
        parts: state dicts by name.
        keep: number of newest states to keep.

    Raises:
        OSError: a file can't be written.
    """
    _describe(state, *_write(state.path, dict(parts)))
    directory = os.path.dirname(state.path)
    complete = []
    for step in _steps(directory):
        path = state_path(directory, step)
        if os.path.isfile(path) and os.path.isfile(_description(path)):
            complete.append(path)
        elif step < state.step and os.path.isfile(path) and not os.path.lexists(_description(path)):
            os.unlink(path)  # left by a save or a deletion that was killed
    for old in complete[keep:]:
        # Delete the description first: as long as it exists, the tensor file must be complete.
        os.unlink(_description(old))
        os.unlink(old)


def note_validation(state: State) -> None:
    """Write `state.validation` to the JSON file of the state, which must have been saved before.

    Raises:
        OSError: the file can't be written.
        RunError: the JSON file was changed by another program.
    """
    try:
        description = _read_description(state.path)
    except _Damaged as error:
        raise RunError(
            f"{_description(state.path)}: was changed by another program; --resume uses an earlier state"
        ) from error
    _describe(state, description["size"], description["sha256"])


def newest_state(directory: str) -> State | None:
    """Return the newest complete state in `directory`.

    Damaged states are renamed, and incomplete states are skipped. A line is printed for each such state.

    Raises:
        UsageError: the state was written by another version of this program.
        RunError: a file can't be read.
    """
    for step in _steps(directory):
        path = state_path(directory, step)
        try:
            if state := _state_or_aside(path):
                return state
        except OSError as error:
            file = os.fsdecode(error.filename or path)
            raise RunError(f"{file}: can't be read ({error.strerror}); check the disk") from error
    return None


def _state_or_aside(path: str) -> State | None:
    """Return the state at `path`, or None if the state is incomplete or damaged.

    Damaged files are renamed. In both cases a line is printed.
    """
    parts = [part for part in (path, _description(path)) if os.path.lexists(part)]
    try:
        if not all(map(_is_file, parts)):
            raise _Damaged
        if len(parts) == 2:
            return _read_state(path)
        print(f"{path}: incomplete, skipped", flush=True)
    except _Damaged:
        aside = [os.path.basename(put_aside(part)) for part in parts]
        print(f"{path}: damaged, skipped; renamed to {' and '.join(aside)}", flush=True)
    return None


class _Damaged(Exception):
    """A state differs from what was written."""


def _read_state(path: str) -> State:
    """Read a state and check that its files are as they were written.

    Raises:
        _Damaged: a file is not as it was written.
        OSError: a file can't be read.
        UsageError: see `newest_state`.
    """
    description = _read_description(path)
    try:
        step, size, sha256 = (description[name] for name in ("step", "size", "sha256"))
        state = State(
            _step_of(path), path, dict(description["recipe"]), Validation.read(description["validation"])
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _Damaged from error
    # Check the step in the name too: under another name, the run would count steps that were never done.
    if step != state.step or size != os.path.getsize(path) or sha256 != _sha256(path):
        raise _Damaged
    return state


def _is_file(path: str) -> bool:
    """Return whether `path` is a file, not a folder, a FIFO or a broken link.

    Raises:
        OSError: the path can't be examined. In this case, os.path.isfile would return False.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def check_run_files(directory: str, own_table: bool = False) -> None:
    """Check that the files of the run are regular files, and that tensorboard is a folder.

    Args:
        directory: folder of the run.
        own_table: whether the run writes its class table.

    Raises:
        UsageError: a path is of another kind, such as a FIFO or a broken link.
    """
    for name in _run_files(directory, own_table):
        path = os.path.join(directory, name)
        is_right, wanted = (os.path.isdir, "folder") if name == "tensorboard" else (os.path.isfile, "file")
        if os.path.lexists(path) and not is_right(path):
            found = kind_of(os.stat(path).st_mode) if os.path.exists(path) else "a broken link"
            raise UsageError(f"{path}: is {found}, not a {wanted}; move it away")


def check_recipe(state: State, recipe: Mapping[str, Any]) -> None:
    """Check that a run with `recipe` may continue from `state`.

    Raises:
        UsageError: the recipe or the data differ from those of the state.
    """
    for flag, value in recipe.items():
        # Convert through JSON, like the recipe on disk: tuples become lists.
        if flag in state.recipe and state.recipe[flag] != json.loads(json.dumps(value)):
            what = (
                "--data-dir, --data-list: not the pictures and classes"
                if flag == "data"
                else f"--{flag.replace('_', '-')}: is {value} here and {state.recipe[flag]} in those"
            )
            raise UsageError(
                f"{what} of the run of {state.path}; resume with the same, add --change-recipe, or start "
                "over in another --snapshot-dir"
            )


def load(state: State, parts: Mapping[str, Any], partial: bool = False) -> None:
    """Load `state` into `parts`. The whole state is checked before any part is changed.

    The options of the optimizer, such as the learning rate, are not changed. If the state has no moving
    average, the average starts from the weights of the state.

    Args:
        state: the state to load.
        parts: objects with `state_dict` and `load_state_dict`, by name: "model" and "optimizer", and
            optionally "average" and "scaler".
        partial: whether the state may lack the momentum of some weights. Weights that the network does not
            use, or did not use in an earlier part of the run, have no momentum.

    Raises:
        UsageError: the file is not a state of this network, holds values that are not finite, or would run
            code when unpickled. No such code is run.
    """
    try:
        content = torch.load(state.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{state.path}: not a state of plain tensors (refused without running anything in it); remove it"
        ) from error
    except Exception as error:  # unpickling an arbitrary file can raise anything
        raise UsageError(f"{state.path}: not a state of a training run; remove it") from error
    model, optimizer = parts["model"], parts["optimizer"]
    try:
        weights, entries = content["model"], content["optimizer"]
        average, scale = content.get("average", weights), content.get("scaler", {})
        _check_tensors(model.state_dict(), weights)
        _check_optimizer(optimizer, entries, partial)
        if "average" in parts:
            _check_tensors(parts["average"].state_dict(), average)
        if "scaler" in parts:
            _check_scale(parts["scaler"].state_dict(), scale)
    except Exception as error:  # the content can be anything
        problem = error if isinstance(error, _Misfit) else "it has other entries"
        raise UsageError(
            f"{state.path}: not a state of this network: {problem}; give the flags of its run, or move its "
            ".pt and .json away to continue from the state before"
        ) from error
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries["state"], "param_groups": groups})
    if "average" in parts:
        parts["average"].load_state_dict(average)
    if "scaler" in parts and scale:
        parts["scaler"].load_state_dict(scale)


class _Misfit(Exception):
    """The content of a state does not fit this run; the message names the entry."""


def _check_tensors(own: Mapping[str, Tensor], saved: Any) -> None:
    """Check that `saved` can replace the tensors `own`.

    Raises:
        _Misfit: names, shapes or dtypes differ, or values are not finite.
    """
    if saved.keys() != own.keys():
        raise _Misfit("its weights have other names")
    for name, value in own.items():
        _check_tensor(name, value, saved[name])


def _check_tensor(name: str, own: Tensor, saved: Any) -> None:
    plain = isinstance(saved, Tensor) and saved.layout == torch.strided and not saved.is_nested
    if not plain or saved.is_meta:
        raise _Misfit(f"{name} is not a plain tensor")
    if saved.shape != own.shape or saved.dtype != own.dtype:
        found, wanted = (f"{list(each.shape)} of {each.dtype}" for each in (saved, own))
        raise _Misfit(f"{name} is {found}, not {wanted}")
    # Minimum and maximum are NaN if any value is.
    if saved.numel() and not all(end.isfinite() for end in torch.aminmax(saved)):
        raise _Misfit(f"{name} has values that are not finite")


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: Any, partial: bool) -> None:
    """Check that `saved` has the moments of all weights of `optimizer`, or of none.

    With `partial`, some weights may lack them.

    load_state_dict accepts moments of the wrong shape. The first step would then fail, or broadcast them.

    Raises:
        _Misfit: weights, entries or shapes differ.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    groups, own = (
        [group["params"] for group in state["param_groups"]] for state in (saved, optimizer.state_dict())
    )
    entries = saved["state"]
    if groups != own or not set(entries) <= set(range(len(weights))):
        raise _Misfit("its optimizer has other weights")
    if entries and not partial and len(entries) < len(weights):
        raise _Misfit(f"its optimizer lacks {len(weights) - len(entries)} of {len(weights)} weights")
    for number, entry in entries.items():
        if entry.keys() != entries_of(optimizer):
            raise _Misfit(f"its optimizer has other entries for weight {number}")
        for name, value in entry.items():
            like = torch.zeros(()) if name == "step" else weights[number]
            _check_tensor(f"{name} of weight {number}", like, value)
            if name in ("step", "exp_avg_sq") and value.numel() and value.min() < 0:
                raise _Misfit(f"{name} of weight {number} is negative")


def _check_scale(own: Mapping[str, float], saved: Any) -> None:
    if own and saved and saved.keys() != own.keys():
        raise _Misfit("its loss scale has other entries")
    for name, value in saved.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise _Misfit(f"{name} of its loss scale is not a finite non-negative number")


def replaced(directory: str, steps: int, interval: int, own_table: bool = False) -> list[str]:
    """Return the existing files of `directory` that a run would replace or move away.

    Args:
        directory: folder of the run.
        steps: number of steps of the run.
        interval: number of steps between snapshots.
        own_table: whether the run writes its class table.
    """
    folder = glob.escape(directory)
    found = [
        path for name in _run_files(directory, own_table) for path in glob.glob(os.path.join(folder, name))
    ]
    found += glob.glob(os.path.join(folder, "state_*"))
    for path in glob.glob(snapshot_path(folder, "*")):
        match = re.search(r"_(\d+)(_ema)?\.pth$", path)
        step = int(match[1]) if match else 0
        if step == steps or (0 < step < steps and step % interval == 0):
            found.append(path)
    return [path for path in found if not os.path.isdir(path)]


def _run_files(directory: str, own_table: bool) -> tuple[str, ...]:
    """Return the names of the files of a run, with that of its class table if it is the run's own.

    Args:
        directory: folder of the run.
        own_table: whether the new run writes its class table; an earlier run in the folder may have done so.
    """
    with contextlib.suppress(UsageError):  # a damaged args.json, which is moved with the rest
        own_table = own_table or read_arguments(directory).get("classes") == CLASSES
    return (*RUN_FILES, CLASSES) if own_table else RUN_FILES


def set_aside(directory: str, own_table: bool = False) -> str | None:
    """Move the states and the log of an earlier run to a new subfolder.

    Args:
        directory: folder of the run.
        own_table: whether the run writes its class table, so that an earlier one is moved too.

    Returns:
        The path of the subfolder; None if there is nothing to move.
    """
    found = glob.glob(os.path.join(glob.escape(directory), "state_*"))
    names = _run_files(directory, own_table)
    found += [path for name in names if os.path.lexists(path := os.path.join(directory, name))]
    if not found:
        return None
    number = 1
    while os.path.lexists(target := os.path.join(directory, f"earlier_{number}")):
        number += 1
    os.makedirs(target)
    for path in found:
        os.replace(path, os.path.join(target, os.path.basename(path)))
    return target


def remove_leftovers(directory: str) -> None:
    """Delete partly written files of a killed run. The directory must be `locked`."""
    for name in ("state_*", "CS_scenes_*", *RUN_FILES, CLASSES):
        for path in glob.glob(temporary_name(os.path.join(glob.escape(directory), name), "*")):
            if os.path.isfile(path):
                os.unlink(path)


def _steps(directory: str) -> list[int]:
    """Return the steps of all states, newest first, including incomplete states."""
    names = (os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(directory), "state_*")))
    # Only names that state_path returns: neither state_07 nor non-ASCII digits.
    steps = {
        int(found[1])
        for name in names
        if (found := re.fullmatch(r"state_(0|[1-9][0-9]*)\.(?:pt|json)", name))
    }
    return sorted(steps, reverse=True)


def _step_of(state: str) -> int:
    return int(os.path.basename(state)[len("state_") : -len(".pt")])


def _description(state: str) -> str:
    return state.removesuffix(".pt") + ".json"


def _describe(state: State, size: int, sha256: str) -> None:
    content = {
        "format": FORMAT,
        "step": state.step,
        "size": size,
        "sha256": sha256,
        "recipe": state.recipe,
        "validation": state.validation._asdict(),
    }
    write_file(_description(state.path), json.dumps({**content, "checksum": _checksum(content)}))


def _read_description(state: str) -> dict[str, Any]:
    """Read the JSON file of a state and check its checksum.

    Raises:
        OSError: the file can't be read.
        _Damaged: the file is not as it was written.
        UsageError: the file was written by another version of this program.
    """
    with open_input(_description(state)) as file:
        text = file.read(LARGEST_DESCRIPTION)
    try:
        content = json.loads(text)
        checksum = content.pop("checksum", None)
        whole = checksum == _checksum(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged from error
    if content.keys() - {"validation"} == {"step", "size", "sha256", "recipe"} and checksum is None:
        raise UsageError(
            f"{state}: written by an earlier version, whose dropout depended on the number of processes; "
            "resume with that version, or continue from its weights in another --snapshot-dir: "
            f"--restore-from {state} --start-iters {_step_of(state)}"
        )
    if not whole:
        raise _Damaged
    if content.get("format") != FORMAT:
        raise UsageError(f"{state}: written by another version; resume with that version")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of the content of a JSON file of a state, which detects edited values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open_input(path) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
