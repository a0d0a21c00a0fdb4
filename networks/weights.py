"""Safe loading of checkpoints, with a report of what was loaded and errors for mismatches."""

from __future__ import annotations

import contextlib
import json
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

from utils import run_files
from utils.errors import CheckpointError
from utils.files import open_input

#: Prefixes of the two layers whose shape depends on the number of classes, and the weight whose shape gives
#: this number.
CLASSIFIERS = ("head.bottleneck.3.", "dsn.3.")
CLASSIFIER = "head.bottleneck.3.weight"
#: Entry that only converted weights of another program have: an offset added to the input images.
SHIFT = "shift"
#: Prefixes allowed to be missing: an ImageNet backbone does not have them.
HEADS = ("head.", "dsn.", "consistency.")
#: Keys under which a checkpoint may hold its state dict.
WRAPPERS = ("model", "state_dict")
#: Components that data parallelism and torch.compile add to the names of wrapped modules.
WRAPPING = ("module", "_orig_mod")
#: Valid dtypes of weights: no integers, no complex numbers, and no 8-bit types, which need a scale.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Maximum number of elements of an entry; the largest of our networks has 19 million. A small file can hold
#: an expanded view of any shape.
LARGEST = 2**28

#: First bytes of files that torch.save wrote before PyTorch 1.6.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: Code for the user, which extracts the weights from a file that needs an unsafe load: expressions that load
#: the file (UNSAFE_LOADS), and the script (EXTRACT).
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

#: Keys in the metadata of a file, which torch.save and safetensors keep. Their values are texts: the batch
#: norm that the weights are for (PLAIN or ACTIVATED; names and shapes are the same for both), and the
#: description of the network, as JSON (see `about_of`).
BATCH_NORM, ABOUT = "batch_norm", "ccnet"
PLAIN, ACTIVATED = "plain", "activated"


class LoadReport(NamedTuple):
    """The result of `load_weights`: lists of names of state-dict entries."""

    path: str
    loaded: list[str]  # entries of the model that were loaded
    new: list[str]  # entries of the model that were not loaded
    left_over: list[str]  # entries of the file that were not used

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries loaded"]
        for names, word in ((self.new, "new"), (self.left_over, "left over")):
            parts.append(f"{len(names)} {word}" + (f" ({_groups(names)})" if names else ""))
        return f"{self.path}: " + ", ".join(parts)


def _groups(names: list[str]) -> str:
    """Return the top-level modules of `names`, as text."""
    return ", ".join(dict.fromkeys(name.split(".")[0] + ".*" if "." in name else name for name in names))


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict from a file of torch.save or safetensors, without running code in the file.

    The state dict may be stored under "model" or "state_dict". The components "module" and "_orig_mod" are
    removed from names. Metadata of the file is kept (see `batch_norm_of` and `about_of`). This includes the
    names and colors of the classes in a file of mmsegmentation.

    Raises:
        CheckpointError: the file does not exist, is not a checkpoint, would run code when unpickled, or has
            entries that are not weights (see `check_entries`).
    """
    content = _load(path)
    classes = _mmseg_classes(content) if isinstance(content, Mapping) else None
    for _ in WRAPPERS:
        found = [name for name in WRAPPERS if isinstance(content, Mapping) and _is_mapping(content, name)]
        if len(found) > 1:
            raise CheckpointError(f"{path}: holds both {' and '.join(found)}; save one of them by itself")
        content = content[found[0]] if found else content
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path}: does not hold a state dict; save model.state_dict() and use that file"
        )
    state = check_entries(path, content)
    return mark(state, {**metadata_of(state), ABOUT: json.dumps({"labels": classes})}) if classes else state


def _is_mapping(content: Mapping, name: str) -> bool:
    return isinstance(content.get(name), Mapping)


def _load(path: str | os.PathLike) -> Any:
    """Return the content of a checkpoint file; raise CheckpointError if the file can't be read."""
    try:
        with open_input(path) as file:
            head = file.read(len(LEGACY))
            if head[8:9] == b"{":  # safetensors: 8 bytes with the length of the header, then JSON
                return _read_safetensors(path)
            _check_size(path, file)
            file.seek(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore"
                    )  # files that would cause warnings are rejected with an error
                    return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file can fail in any way while it is unpickled
                raise CheckpointError(f"{path}: {_why_not(path, file, head, error)}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; name an existing checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; name a checkpoint file") from error


def _mmseg_classes(content: Mapping[Any, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of a class table from the metadata of mmsegmentation, CLASSES and PALETTE, if any."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    # mmsegmentation 1 keeps them in dataset_meta, in lower case.
    later = meta.get("dataset_meta")
    names, colors = (
        next((place[key] for place, key in places if isinstance(place, Mapping) and key in place), None)
        for places in (
            ((meta, "CLASSES"), (later, "classes")),
            ((meta, "PALETTE"), (later, "palette")),
        )
    )
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    if not isinstance(colors, (list, tuple)) or len(colors) != len(names):
        colors = [None] * len(names)
    return [
        {
            "name": name,
            "id": number,
            "train_id": number,
            "color": list(color) if _is_color(color) else None,
        }
        for number, (name, color) in enumerate(zip(names, colors, strict=True))
    ]


def _is_color(color: Any) -> bool:
    return (
        isinstance(color, (list, tuple))
        and len(color) == 3
        and all(type(channel) is int and 0 <= channel <= 255 for channel in color)
    )


def require_safetensors(path: str | os.PathLike) -> Any:
    """Return the module safetensors.

    Args:
        path: file that needs the package, for the error message.

    Raises:
        CheckpointError: the package is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: needs the safetensors package; install it with pip install safetensors"
        ) from error
    return safetensors


def _read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    safetensors = require_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return mark(entries, file.metadata() or {})
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(f"{path}: damaged or not a checkpoint; copy or download it again") from error


def _check_size(path: str | os.PathLike, file: IO[bytes]) -> None:
    """Reject compressed zip files, which could exhaust memory; torch.save does not compress.

    Raises:
        CheckpointError: the file is compressed.
    """
    inside = 0
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # torch.load reports damaged files
        inside = sum(entry.file_size for entry in archive.infolist())
    if inside > os.fstat(file.fileno()).st_size:
        raise CheckpointError(
            f"{path}: is a compressed zip file; unpack it, or save it again with torch.save"
        )


def _why_not(path: str | os.PathLike, file: IO[bytes], head: bytes, error: Exception) -> str:
    """Return the end of an error message for a file that torch.load rejects: what is wrong, what to do."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        return f"is a TorchScript archive, which is a program; {_extraction(path, 'script')}"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "is a program saved by torch.export; name the checkpoint that it was made from"
    file.seek(0)
    with contextlib.suppress(Exception), tarfile.open(fileobj=file, mode="r:") as packed:
        if {"storages", "pickle"} <= set(packed.getnames()):
            return f"is a tar file of an early version of torch.save; {_extraction(path, 'torch')}"
        return "is a tar file; unpack it and name a checkpoint in it"
    if isinstance(error, pickle.UnpicklingError) and (names or head.startswith(b"\x80")):
        if blocked := re.search(r"GLOBAL (\S{1,200}) whose module \S+ is blocked", str(error)):
            return f"would call {blocked[1]}, which no checkpoint needs; delete the file (no code was run)"
        found = re.search(r"GLOBAL (\S{1,200})", str(error))
        what = f" ({found[1]})" if found else ", or is damaged"
        advice = _extraction(path, "torch" if names or head == LEGACY else "pickle")
        return f"holds more than plain tensors{what}, which could run code (no code was run); {advice}"
    if not head:
        return "is empty; copy or download it again"
    return "damaged or not a checkpoint; copy or download it again"


def _extraction(path: str | os.PathLike, kind: str) -> str:
    """Return advice on extracting the weights from a file that could run code."""
    code = EXTRACT.format(load=UNSAFE_LOADS[kind])
    start, number = os.path.splitext(path)[0], 1
    while os.path.exists(out := f"{start}_weights{number if number > 1 else ''}.pth"):
        number += 1
    return (
        "if you trust its author, extract the weights with "
        f"python -c '{code}' {shlex.quote(str(path))} {shlex.quote(out)} and use {out}"
    )


def check_entries(path: str | os.PathLike, entries: Mapping[Any, Any]) -> OrderedDict[str, Tensor]:
    """Check the entries of a state dict and return them with plain names.

    Components of wrapping modules (WRAPPING) are removed from names. The metadata is kept (see `mark`).

    Args:
        path: name of the weights in error messages.
        entries: state dict as loaded.

    Raises:
        CheckpointError: an entry is not a dense tensor with values, or holds invalid values (see
            `check_numbers`). The message names the first such entry.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in entries.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
            what = f"is of type {type(value).__name__}" if isinstance(name, str) else "has no name"
            raise CheckpointError(
                f"{path}: does not hold a state dict, its entry {name!r} {what}; save model.state_dict() and "
                "use that file"
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
    return mark(state, metadata_of(entries))


def _problem(value: Tensor) -> str | None:
    """Return the end of an error message if a tensor can't be used as a weight; None if it can."""
    if value.is_meta:
        return "is on the meta device and has no values; save the network after loading its weights"
    if value.layout != torch.strided:
        return "is sparse; save it as value.to_dense()"
    if value.is_quantized:
        return "is quantized; save it as value.dequantize()"
    if value.numel() > LARGEST:
        return f"has shape {list(value.shape)}, larger than any of this network; check the file"
    return None


def check_numbers(path: str | os.PathLike, state: Mapping[str, Tensor]) -> None:
    """Check that all weights are finite in float32 and no variance is negative.

    Raises:
        CheckpointError: an entry holds an invalid value. The message names the first such entry and counts
            the entries.
    """
    largest = torch.finfo(torch.float32).max
    infinite, negative = [], []
    for name, value in state.items():
        if value.dtype not in FLOATS or not value.numel():
            continue
        # Read every stored number only once: an expanded view repeats numbers with stride 0.
        once = tuple(slice(1) if step == 0 else slice(None) for step in value.stride())
        low, high = torch.aminmax(value[once])
        if not (low >= -largest and high <= largest):  # also true for nan
            infinite.append(name)
        elif name.endswith("running_var") and low < 0:
            negative.append(name)
    for what, names in (("nan, inf, or numbers beyond float32", infinite), ("negative variances", negative)):
        if names:
            raise CheckpointError(
                f"{path}: has {what} in {len(names)} of its {len(state)} entries, the first is {names[0]}; "
                "use an earlier checkpoint, or copy the file again"
            )


def metadata_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the entries BATCH_NORM and ABOUT of the metadata of a state dict (see `mark`)."""
    metadata = getattr(state, "_metadata", None)
    own = metadata.get("") if isinstance(metadata, Mapping) else None
    known = own if isinstance(own, Mapping) else {}
    return {key: known[key] for key in (BATCH_NORM, ABOUT) if isinstance(known.get(key), str)}


def batch_norm_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the batch norm that a state dict is marked for, PLAIN or ACTIVATED; None without a mark."""
    kind = metadata_of(state).get(BATCH_NORM)
    return kind if kind in (PLAIN, ACTIVATED) else None


def about_of(path: str | os.PathLike, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the description of the network that a file holds (see tools/convert.py); empty without one.

    The values are not checked.

    Args:
        path: the file, for the error message.
        state: its state dict, from `read_state_dict`.

    Raises:
        CheckpointError: the description is damaged.
    """
    try:
        about = run_files.parse(metadata_of(state).get(ABOUT, "{}"))
        if not isinstance(about, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: the description of the network in it is damaged ({error}); convert the checkpoint again"
        ) from error
    return about


def mark(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OrderedDict[str, Tensor]:
    """Return `state` with the entries BATCH_NORM and ABOUT of `metadata`, which torch.save keeps."""
    marked = OrderedDict(state)
    if known := {key: metadata[key] for key in (BATCH_NORM, ABOUT) if key in metadata}:
        marked._metadata = {"": {"version": 1, **known}}  # type: ignore[attr-defined]
    return marked


def classes_of(path: str | os.PathLike, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a CCNet state dict, from the shape of its classifier.

    Raises:
        CheckpointError: the classifier is missing or has an invalid shape.
    """
    if CLASSIFIER not in state:
        raise CheckpointError(
            f"{path}: has no {CLASSIFIER}, so it is not a checkpoint of CCNet; name one, or convert one of "
            "another release with python -m tools.convert"
        )
    shape = state[CLASSIFIER].shape
    if len(shape) != 4 or shape[0] < 1:
        raise CheckpointError(
            f"{path}: {CLASSIFIER} has shape {list(shape)}, which no classifier has; name another checkpoint"
        )
    return shape[0]


def check_dtype(path: str | os.PathLike, name: str, value: Tensor) -> None:
    """Raise CheckpointError unless an entry has a dtype in FLOATS."""
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
    """Return the report of `load_weights` and the entries to load, without loading the entries.

    `model` may be on the meta device. Arguments and errors are those of `load_weights`.
    """
    state = read_state_dict(path) if state is None else state
    if batch_norm_of(state) == PLAIN:
        raise CheckpointError(
            f"{path}: was converted for plain batch norm by python -m tools.convert --to batch-norm; "
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
            "weights of another program with python -m tools.convert"
        )
    for name, value in loaded.items():
        if own[name].shape != value.shape:
            raise CheckpointError(_shape_mismatch(path, name, own[name], value))
        check_dtype(path, name, value)
    missing = [name for name in new if name not in fresh and (complete or not name.startswith(HEADS))]
    if SHIFT in missing:
        raise CheckpointError(
            f"{path}: needs the input of another program; convert it first with python -m tools.convert"
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
        model: network to load into.
        path: file that `read_state_dict` can read. Entries named num_batches_tracked are ignored.
        fresh_classifiers: whether to keep the two classifiers as initialized (for fine-tuning to other
            classes).
        complete: whether to require every entry of the model, as evaluation does.
        state: content of the file if the file has been read already. Then `path` is used only in messages.

    Returns:
        A report of three groups of entries: loaded, not loaded (kept as initialized), and left over (unused
        entries of the checkpoint).

    Raises:
        CheckpointError: the checkpoint is unreadable, belongs to another network, is marked for plain batch
            norm, or has another number of classes (without `fresh_classifiers`). The model is unchanged.
    """
    report, loaded = match_weights(model, path, fresh_classifiers, complete, state)
    model.load_state_dict({**model.state_dict(), **loaded})
    return report


def _shape_mismatch(path: str | os.PathLike, name: str, own: Tensor, other: Tensor) -> str:
    """Return the error message for an entry whose shape differs from the model's."""
    if name.startswith(CLASSIFIERS) and other.shape[1:] == own.shape[1:] and other.dim() and len(other):
        return (
            f"{path}: has {other.shape[0]} classes, the network {own.shape[0]}; give --num-classes "
            f"{other.shape[0]}, or --not-restore-last to start the classifiers fresh"
        )
    return (
        f"{path}: {name} has shape {list(other.shape)}, the network needs {list(own.shape)}; "
        "check --backbone and --model"
    )
