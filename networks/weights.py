"""Checkpoints in: read them safely, say what fits, refuse what does not."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shlex
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import CheckpointError
from utils.files import open_input

#: The two layers whose shape depends on the number of classes, and the weight that tells it.
CLASSIFIERS = ("head.bottleneck.3.", "dsn.3.")
CLASSIFIER = "head.bottleneck.3.weight"
#: What only weights that come from another program have: how its pictures differ.
SHIFT = "shift"
#: What an ImageNet backbone lacks, and may.
HEADS = ("head.", "dsn.")
#: Under which a checkpoint may hold its state dict.
WRAPPERS = ("model", "state_dict")
#: What data parallelism and torch.compile put into the names of the modules that they wrap.
WRAPPING = ("module", "_orig_mod")
#: Of weights; integers, complex numbers and types of 8 bits, which need a scale, are none.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Numbers in an entry; CCNet's largest has 12 million. A view of one number can claim any shape.
LARGEST = 2**28

#: How files of torch.save before 1.6 begin.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: What takes the weights out of a file that only an unsafe load opens: an expression that loads it, the rest.
UNSAFE_LOADS = {
    "torch": 'torch.load(sys.argv[1], map_location="cpu", weights_only=False)',
    "pickle": 'pickle.load(open(sys.argv[1], "rb"))',
    "script": 'torch.jit.load(sys.argv[1], map_location="cpu")',
}
EXTRACT = (
    "import pickle, sys, torch; c = {load}; "
    'c = next((c[k] for k in ("model", "state_dict") if k in c), c) if isinstance(c, dict) else c; '
    'torch.save({{k: torch.as_tensor(v) for k, v in getattr(c, "state_dict", lambda: c)().items() '
    'if hasattr(v, "shape")}}, sys.argv[2])'
)

#: The entry of a state dict's metadata (what torch keeps beside the names, and saves with them) that says
#: which batch norm the weights are for: names and shapes are the same.
BATCH_NORM = "batch_norm"
PLAIN, ACTIVATED = "plain", "activated"


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
    """Return the top-level modules that `names` belong to."""
    return ", ".join(dict.fromkeys(name.split(".")[0] + ".*" if "." in name else name for name in names))


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict from a file of torch.save or safetensors.

    It may lie under "model" or "state_dict", and its names may have "module." and "_orig_mod." in them, which
    are left out.

    Raises:
        CheckpointError: no such file, not a checkpoint, one that would run code when unpickled, or entries
            that are no weights (`check_entries`).
    """
    content = _load(path)
    for _ in WRAPPERS:
        found = [name for name in WRAPPERS if isinstance(content, Mapping) and _is_mapping(content, name)]
        if len(found) > 1:
            raise CheckpointError(f"{path}: holds both {' and '.join(found)}; save one of them by itself")
        content = content[found[0]] if found else content
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no state dict; save model.state_dict() and use that file")
    return check_entries(path, content)


def _is_mapping(content: Mapping, name: str) -> bool:
    return isinstance(content.get(name), Mapping)


def _load(path: str | os.PathLike) -> Any:
    """Return the content of a checkpoint's file. Raises CheckpointError where it has none."""
    try:
        with open_input(path) as file:
            head = file.read(len(LEGACY))
            if head[8:9] == b"{":  # behind the length of its header
                return _read_safetensors(path)
            _check_size(path, file)
            file.seek(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of formats and layouts that are refused in a line
                    return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file can fail in any way while it is unpickled
                raise CheckpointError(f"{path}: {_why_not(path, file, head, error)}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; name an existing checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; name the file of a checkpoint") from error


def _read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: needs the safetensors package; install it with pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(f"{path}: damaged or not a checkpoint; copy or download it again") from error


def _check_size(path: str | os.PathLike, file: IO[bytes]) -> None:
    """See that a zip file is not larger inside than outside: torch.save compresses nothing.

    Raises:
        CheckpointError: it is, and could fill the memory.
    """
    inside = 0
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # damaged ones fail in torch.load
        inside = sum(entry.file_size for entry in archive.infolist())
    if inside > os.fstat(file.fileno()).st_size:
        raise CheckpointError(
            f"{path}: is a compressed zip file; unpack it, or save it again with torch.save"
        )


def _why_not(path: str | os.PathLike, file: IO[bytes], head: bytes, error: Exception) -> str:
    """Return what is wrong with a file that torch.load refuses, and what to do, for an error message."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        return f"is a TorchScript archive, which is a program; {_extraction(path, 'script')}"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "is a program of torch.export; name the checkpoint that it was made from"
    file.seek(0)
    with contextlib.suppress(Exception), tarfile.open(fileobj=file, mode="r:") as packed:
        if {"storages", "pickle"} <= set(packed.getnames()):
            return f"is a tar file, as the first torch.save wrote them; {_extraction(path, 'torch')}"
        return "is a tar file; unpack it and name the checkpoint in it"
    if isinstance(error, pickle.UnpicklingError) and (names or head.startswith(b"\x80")):
        if blocked := re.search(r"GLOBAL (\S{1,200}) whose module \S+ is blocked", str(error)):
            return f"would call {blocked[1]}, as no checkpoint does; delete it (nothing of it was run)"
        found = re.search(r"GLOBAL (\S{1,200})", str(error))
        what = f" ({found[1]})" if found else ", or is damaged"
        advice = _extraction(path, "torch" if names or head == LEGACY else "pickle")
        return f"holds more than plain tensors{what}, which could run code (nothing of it was run); {advice}"
    if not head:
        return "is empty; copy or download it again"
    return "damaged or not a checkpoint; copy or download it again"


def _extraction(path: str | os.PathLike, kind: str) -> str:
    """Return the advice how the owner of a file that could run code gets its weights out of it."""
    code = EXTRACT.format(load=UNSAFE_LOADS[kind])
    start, number = os.path.splitext(path)[0], 1
    while os.path.exists(out := f"{start}_weights{number if number > 1 else ''}.pth"):
        number += 1
    return (
        "if you trust whoever made it, take the weights out with "
        f"python -c '{code}' {shlex.quote(str(path))} {shlex.quote(out)} and use {out}"
    )


def check_entries(path: str | os.PathLike, entries: Mapping[Any, Any]) -> OrderedDict[str, Tensor]:
    """Return the entries of a state dict in a new one, the names without those of wrapping modules.

    Its mark of batch norm is kept (`batch_norm_of`).

    Args:
        path: names the weights in messages.

    Raises:
        CheckpointError: naming the first entry that is no dense tensor with values, or that holds numbers
            that no network has, and saying how many do.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in entries.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            what = f"is of type {type(value).__name__}" if isinstance(name, str) else "has no name"
            raise CheckpointError(
                f"{path}: holds no state dict, as its entry {name!r} {what}; save model.state_dict() and use "
                "that file"
            )
        if problem := _problem(value):
            raise CheckpointError(f"{path}: {name} {problem}")
        bare = ".".join(part for part in name.split(".") if part not in WRAPPING)
        if bare in state:
            raise CheckpointError(
                f"{path}: holds {bare} twice, with and without module. or _orig_mod. in its name; save the "
                "state dict of one network"
            )
        state[bare] = value.detach()
    check_numbers(path, state)
    return mark(state, batch_norm_of(entries))


def _problem(value: Tensor) -> str | None:
    """Return why a tensor can't be read as numbers, and what to do; None where it can."""
    if value.is_meta:
        return "is on the meta device and has no values; save the network after its weights are there"
    if value.layout != torch.strided:
        return "is sparse; save it as value.to_dense()"
    if value.is_quantized:
        return "is quantized; save it as value.dequantize()"
    if value.numel() > LARGEST:
        return f"has shape {list(value.shape)}, larger than any of this network; check the file"
    return None


def check_numbers(path: str | os.PathLike, state: Mapping[str, Tensor]) -> None:
    """See that all weights are finite in float32 and no variance is negative.

    Raises:
        CheckpointError: naming the first entry that holds others, and saying how many do.
    """
    largest = torch.finfo(torch.float32).max
    infinite, negative = [], []
    for name, value in state.items():
        if value.dtype not in FLOATS or not value.numel():
            continue
        # Every number once: of an expanded view, those that it repeats.
        once = tuple(slice(1) if step == 0 else slice(None) for step in value.stride())
        low, high = torch.aminmax(value[once])
        if not (low >= -largest and high <= largest):  # nan fails both
            infinite.append(name)
        elif name.endswith("running_var") and low < 0:
            negative.append(name)
    for what, names in (("nan, inf, or numbers beyond float32", infinite), ("negative variances", negative)):
        if names:
            raise CheckpointError(
                f"{path}: has {what} in {len(names)} of its {len(state)} entries, the first is {names[0]}; "
                "take a checkpoint from before that, or copy it again"
            )


def batch_norm_of(state: Mapping[str, Tensor]) -> str | None:
    """Return which batch norm a state dict is marked to be for, PLAIN or ACTIVATED; None without a mark."""
    metadata = getattr(state, "_metadata", None)
    own = metadata.get("") if isinstance(metadata, Mapping) else None
    kind = own.get(BATCH_NORM) if isinstance(own, Mapping) else None
    return kind if kind in (PLAIN, ACTIVATED) else None


def mark(state: Mapping[str, Tensor], kind: str | None) -> OrderedDict[str, Tensor]:
    """Return `state`, marked to be for the batch norm `kind`: no entry is added, and torch.save keeps it."""
    marked = OrderedDict(state)
    if kind is not None:
        marked._metadata = {"": {"version": 1, BATCH_NORM: kind}}  # type: ignore[attr-defined]
    return marked


def classes_of(path: str | os.PathLike, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a CCNet state dict, which its classifier tells.

    Raises:
        CheckpointError: it has no classifier, or one of another shape.
    """
    if CLASSIFIER not in state:
        raise CheckpointError(
            f"{path}: has no {CLASSIFIER}, so it is no checkpoint of CCNet; name one, or make one of another "
            "release's with python -m tools.convert"
        )
    shape = state[CLASSIFIER].shape
    if len(shape) != 4 or shape[0] < 1:
        raise CheckpointError(
            f"{path}: {CLASSIFIER} has shape {list(shape)}, which is no classifier's; name another checkpoint"
        )
    return shape[0]


def check_dtype(path: str | os.PathLike, name: str, value: Tensor) -> None:
    """See that an entry holds floating point numbers. Raises CheckpointError, naming it."""
    if value.dtype not in FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {name} holds {kind} numbers; save the network in float32")


def match_weights(
    model: nn.Module,
    path: str | os.PathLike,
    fresh_classifiers: bool = False,
    complete: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Return what `load_weights` would do, and the entries that it would load.

    `model` may be on the meta device; the other arguments and errors are those of `load_weights`.
    """
    state = read_state_dict(path) if state is None else state
    if batch_norm_of(state) == PLAIN:
        raise CheckpointError(
            f"{path}: is for plain batch norm, which python -m tools.convert --to batch-norm wrote it for; "
            "convert it back with python -m tools.convert"
        )
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
        check_dtype(path, name, value)
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
        CheckpointError: unreadable, of another network, marked to be for plain batch norm, or (without
            `fresh_classifiers`) of other classes. The model is then unchanged.
    """
    report, loaded = match_weights(model, path, fresh_classifiers, complete, state)
    model.load_state_dict({**model.state_dict(), **loaded})
    return report


def _shape_mismatch(path: str | os.PathLike, name: str, own: Tensor, other: Tensor) -> str:
    """Return the error for an entry whose shape is not the network's."""
    if name.startswith(CLASSIFIERS) and other.shape[1:] == own.shape[1:] and other.dim() and len(other):
        return (
            f"{path}: has {other.shape[0]} classes, the network {own.shape[0]}; give --num-classes "
            f"{other.shape[0]}, or --not-restore-last to start the classifiers fresh"
        )
    return (
        f"{path}: {name} has shape {list(other.shape)}, the network needs {list(own.shape)}; check --backbone"
    )
