"""The network of a checkpoint: from the flags, the file itself, the args.json of its run, and the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from networks.models import MODELS, model_flags, models_of
from networks.timm_backbone import BACKBONE, is_timm
from networks.variants import DEPTHS, blocks_of
from networks.weights import about_of, classes_of
from utils import run_files
from utils.errors import CheckpointError, UsageError

#: Maximum number of classes: a label picture has 8 bits, and 255 is void.
MOST_CLASSES = 255
#: Maximum number of frames of a clip, and maximum distance of its frames.
MOST_FRAMES = 99
#: Number of classes of Cityscapes.
CITYSCAPES_CLASSES = 19


class Description(NamedTuple):
    """The values that are needed to build a network and to name its classes.

    Attributes:
        model: value of --model.
        backbone: value of --backbone.
        recurrence: value of --recurrence. None in a description that is not complete yet, and for a model
            that does not take it.
        num_classes: value of --num-classes; None for the number of classes in the class table.
        classes: path of the class table; None for the classes of Cityscapes.
        clip: value of --clip; None like `recurrence`.
        clip_stride: value of --clip-stride; None like `recurrence`.
    """

    model: str = "ccnet"
    backbone: str = "resnet101"
    recurrence: int | None = None
    num_classes: int | None = None
    classes: str | None = None
    clip: int | None = None
    clip_stride: int | None = None


class OfRun(NamedTuple):
    """The known facts about the network of a checkpoint.

    Attributes:
        description: values to build the network.
        labels: rows of the class table, as JSON values, if the checkpoint itself has them and no flag names
            another table; see dataset.labels.table_of_rows.
        run: recorded flags of the training run; empty if nothing is known about it.
        notes: a line for each flag that differs from the recorded one, or if args.json is not used.
    """

    description: Description
    labels: list[Any] | None
    run: dict[str, Any]
    notes: list[str]


def args_file(checkpoint: str) -> str:
    """Return the path of the args.json of the run that wrote a checkpoint. The file need not exist."""
    return os.path.join(os.path.dirname(checkpoint), run_files.ARGUMENTS)


def of_flags(given: Mapping[str, Any]) -> OfRun:
    """Return what is known about a network without a checkpoint.

    Args:
        given: values of the flags by field of `Description`; None for a flag that is not given.

    Raises:
        UsageError: the model does not take a recurrence or clips, but a flag for them is given.
    """
    found = Description(**{name: value for name, value in given.items() if value is not None})
    return OfRun(_completed(found), None, {}, [])


def _completed(found: Description) -> Description:
    """Return a description with the defaults of the model; see `of_flags` for the errors."""
    return found._replace(**cast(Any, model_flags(**found._asdict())))


def describe(
    checkpoint: str, state: Mapping[str, Tensor], given: Mapping[str, Any], of_run: bool = True
) -> OfRun:
    """Return what is known about the network of a checkpoint.

    Precedence: flag, description in the file, args.json next to the checkpoint, weights, default. The model,
    the backbone and the number of classes must be those of the weights.

    Args:
        checkpoint: path of the checkpoint, for args.json and for messages.
        state: weights of the checkpoint, from `read_state_dict`.
        given: values of the flags by field of `Description`; None for a flag that is not given.
        of_run: whether the checkpoint is one of a training run, so that args.json is read.

    Raises:
        UsageError: a flag or args.json contradicts the weights, or args.json has an impossible value.
        CheckpointError: the weights are not those of a network of this project, or the description in the
            file is damaged.
    """
    file, run, labels, notes = _recorded(checkpoint, state, of_run)
    models = models_of(state)
    said = given.get("model") or run.get("model")
    of_weights: dict[str, Any] = {}
    if models:
        of_weights["model"] = said if said in models else models[0]
    # The entries of a model that another program registered may be unknown: the flags or args.json have to
    # tell these values.
    if models or said in (None, Description().model):
        said = given.get("backbone") or run.get("backbone")
        of_weights["backbone"] = backbone_of(checkpoint, state, said)
        of_weights["num_classes"] = classes_of(checkpoint, state)
    if of_weights.get("num_classes", 0) > MOST_CLASSES:
        raise CheckpointError(
            f"{checkpoint}: has {of_weights['num_classes']} classes; predictions have room for {MOST_CLASSES}"
        )
    chosen = MODELS.get(given.get("model") or "")
    if chosen is not None and chosen.clip is None:
        # The weights of ccnet3d are also those of ccnet, which takes single images.
        run = {name: value for name, value in run.items() if name not in ("clip", "clip_stride")}
    found: dict[str, Any] = {}
    for name, default in Description()._asdict().items():
        flag, value = f"--{name.replace('_', '-')}", given.get(name)
        source, remedy = f"{flag} {value}", "omit the flag"
        if value is not None:
            if name in run and run[name] != value:
                notes.append(f"{flag} {value}: used instead of {run[name]}, which {file} has")
        elif name in run and not (run[name] is None and _may_be_none(name, found.get("model"))):
            check_value(file, name, run[name])
            value = table_path(checkpoint, run[name]) if name == "classes" else run[name]
            source, remedy = f"{file}: {name} {value}", f"give {flag} {of_weights.get(name)}"
        else:
            value = of_weights.get(name, default)
        if value != of_weights.get(name, value):
            actual = f"{name.removeprefix('num_')} {of_weights[name]}"
            raise UsageError(f"{source}: the weights of {checkpoint} have {actual}; {remedy}")
        found[name] = value
    complete = _completed(Description(**found))
    found = complete._asdict()
    if not run and given.get("recurrence") is None:
        names = (None, CITYSCAPES_CLASSES)  # Cityscapes' classes are known by their number
        named = labels is not None or found["classes"] is not None or found["num_classes"] in names
        what = []
        if found["recurrence"] is not None:
            what.append(f"recurrence {found['recurrence']} is assumed (--recurrence)")
        if not named:
            what.append("the classes have no names (--classes)")
        if what:
            without = f"without {run_files.ARGUMENTS} next to it or a description in it"
            notes.append(f"{checkpoint}: {without}, {', and '.join(what)}")
    return OfRun(complete, labels if found["classes"] is None else None, run, notes)


def _may_be_none(name: str, model: str | None) -> bool:
    """Return whether a run of a model may have no value for a field of `Description`."""
    architecture = MODELS.get(model or "")
    if name == "recurrence":
        return architecture is not None and architecture.recurrence is None
    if name in ("clip", "clip_stride"):
        return architecture is not None and architecture.clip is None
    return name == "classes"


def _recorded(
    checkpoint: str, state: Mapping[str, Tensor], of_run: bool
) -> tuple[str, dict[str, Any], list[Any] | None, list[str]]:
    """Return the values that are recorded about a checkpoint.

    Returns:
        The file that has the values, the values by name of their flag, the rows of the class table if the
        checkpoint itself has them, and lines to print.
    """
    about, file = about_of(checkpoint, state), args_file(checkpoint)
    labels = about.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise CheckpointError(f"{checkpoint}: its class table is not a list; convert the checkpoint again")
    if "model" in about:
        recipe = about.get("recipe")
        values = {name: about[name] for name in Description._fields if name in about}
        return checkpoint, {**(recipe if isinstance(recipe, dict) else {}), **values}, labels, []
    run = run_files.read_arguments(os.path.dirname(checkpoint)) if of_run else {}
    step = re.search(r"_(\d+)(_ema)?\.pth$", checkpoint)
    if step and type(run.get("num_steps")) is int and int(step[1]) > run["num_steps"]:
        # A later, shorter run in the same folder wrote args.json.
        return file, {}, labels, [f"{file}: not used, because its run has {run['num_steps']} steps only"]
    return file, run, labels, []


def table_path(checkpoint: str, table: str) -> str:
    """Return the path of the class table that args.json names.

    A bare file name is the table of the run itself, in the folder of args.json. Other paths are those of the
    flag. If such a file does not exist, one of the same name next to the checkpoint is used.
    """
    beside = os.path.join(os.path.dirname(checkpoint), os.path.basename(table))
    first, second = (table, beside) if os.path.dirname(table) else (beside, table)
    return second if not os.path.isfile(first) and os.path.isfile(second) else first


def check_value(file: str, name: str, value: Any) -> None:
    """Raise UsageError unless `value` is possible for the field `name` of `Description`.

    Args:
        file: source of the value, for the message.
        name: name of the field.
        value: the value.
    """
    right = {
        "model": isinstance(value, str) and value in MODELS,
        "backbone": isinstance(value, str) and (value in DEPTHS or is_timm(value)),
        "recurrence": type(value) is int and 0 <= value <= 100,
        "num_classes": type(value) is int and 1 <= value <= MOST_CLASSES,
        "classes": isinstance(value, str),
        "clip": type(value) is int and 1 <= value <= MOST_FRAMES and value % 2 == 1,
        "clip_stride": type(value) is int and 1 <= value <= MOST_FRAMES,
    }
    if not right[name]:
        raise UsageError(
            f"{file}: {name} is {repr(value)[:40]}, which is not possible; give --{name.replace('_', '-')}"
        )


def backbone_of(checkpoint: str, state: Mapping[str, Tensor], said: Any = None) -> str:
    """Return the backbone of a state dict, from the number of blocks in its layers.

    Args:
        checkpoint: path of the checkpoint, for the error message.
        state: its weights.
        said: the backbone by a flag or by what is recorded. The entries of the state dict do not name a
            network of timm.

    Raises:
        CheckpointError: the block counts match no known backbone, or the network of timm is not named.
    """
    if f"{BACKBONE}shift" in state:
        if is_timm(said):
            return str(said)
        raise CheckpointError(
            f"{checkpoint}: its backbone is a network of timm, and nothing says which (args.json next to it, "
            "or a description in it); give --backbone timm:NAME"
        )
    blocks = blocks_of(state)
    for backbone, depths in DEPTHS.items():
        if depths == blocks:
            return backbone
    raise CheckpointError(
        f"{checkpoint}: its layers have {list(blocks)} blocks, unlike those of {', '.join(sorted(DEPTHS))}; "
        "name a checkpoint of CCNet (python -m tools.convert makes one of other releases')"
    )
