"""What the tools share: the network of a checkpoint, the flags that name it, the way they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset.labels import LabelReader, choose_table
from engine.runtime.distributed import choose_devices
from networks import Seg_Model, load_weights
from networks.variants import DEPTHS, blocks_of, variant_of
from networks.weights import classes_of, read_state_dict
from utils import args as flags
from utils import run_files
from utils.errors import CheckpointError, UsageError
from utils.files import unwritable
from utils.resources import shortage


class Network(NamedTuple):
    """A network ready to predict, and what is known of it."""

    model: Seg_Model  # in evaluation mode, on `device`
    device: torch.device
    path: str
    backbone: str
    recurrence: int
    num_classes: int
    labels: LabelReader  # names and colors of the classes
    files: list[str]  # that were read for it


class Parser(flags.Parser):
    """Its help is the tool's docstring."""

    def __init__(self, tool: str, doc: str | None):
        summary, _, rest = (doc or "").partition("\n\n")
        super().__init__(
            prog=f"python -m tools.{tool}",
            description=summary,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """--restore-from, and what the checkpoint does not say by itself."""
    add = parser.add_argument
    add("--restore-from", metavar="FILE", required=True, help="checkpoint")
    add(
        "--classes",
        metavar="TABLE",
        help="names and colors of another data set's classes (docs/own_data.md); without it those of the "
        "checkpoint's run, or Cityscapes'",
    )
    add(
        "--recurrence",
        type=flags.recurrence,
        help="how often the attention is applied; without it as in the checkpoint's run, or 2",
    )
    add("--gpu", metavar="ID", help="a GPU's number, or cpu; without it the first GPU, or the CPU")


def choose_device(gpu: str | None) -> torch.device:
    """Raises UsageError where --gpu names no GPU of this machine, or several."""
    devices = choose_devices(gpu, None)
    if gpu is not None and len(devices) > 1:
        raise UsageError(f"--gpu {gpu}: this command runs on one; give one number, or cpu")
    return devices[0]


def beside(checkpoint: str) -> str:
    """Return the file with the flags of the run that wrote a checkpoint, which need not exist."""
    return os.path.join(os.path.dirname(checkpoint), run_files.RECIPE)


def recipe_of(checkpoint: str) -> dict[str, Any]:
    """Return the flags of the run that wrote a checkpoint; empty where they are not beside it.

    Raises:
        UsageError: the file is damaged.
    """
    return run_files.read_recipe(os.path.dirname(checkpoint))


def backbone_of(path: str, state: Mapping[str, Tensor]) -> str:
    """The backbone of a CCNet state dict, by the blocks of its stages.

    Raises:
        CheckpointError: none of ours.
    """
    blocks = blocks_of(state)
    for backbone, depths in DEPTHS.items():
        if depths == blocks:
            return backbone
    raise CheckpointError(
        f"{path}: its stages have {list(blocks)} blocks, which is none of {', '.join(sorted(DEPTHS))}; "
        "name a checkpoint of CCNet (python -m tools.convert makes one of other releases')"
    )


def open_network(args: argparse.Namespace) -> Network:
    """The network that the flags of `add_network_flags` ask for.

    Backbone and number of classes are the checkpoint's own; recurrence and class table those of the run that
    wrote it, where args.json lies beside it and no flag says otherwise.

    Raises:
        InputError: one line that says which flag or file is wrong.
    """
    device = choose_device(args.gpu)
    path = args.restore_from
    state = read_state_dict(path)
    num_classes = classes_of(path, state)
    backbone = backbone_of(path, state)
    if num_classes > 255:
        raise CheckpointError(f"{path}: has {num_classes} classes; predictions have room for 255")
    recipe = recipe_of(path)
    table_path = args.classes or _table_of(beside(path), recipe, num_classes)
    table, _ = choose_table(table_path, None)
    if table is not None and len(table.classes) != num_classes:
        raise UsageError(
            f"--classes {table_path}: has {len(table.classes)} classes and {path} {num_classes}; "
            "name the table that it was trained with"
        )
    recurrence = args.recurrence
    if recurrence is None:
        recurrence = recipe.get("recurrence", 2)
        if not (type(recurrence) is int and run_files.is_number(recurrence, 0, 100)):
            raise UsageError(
                f"{beside(path)}: recurrence is {repr(recurrence)[:40]}, not a number from 0 to 100; "
                "give --recurrence"
            )
    model = Seg_Model(num_classes, recurrence=recurrence, backbone=backbone, variant=variant_of(state))
    load_weights(model, path, complete=True, state=state)
    model.to(device).eval()
    labels = LabelReader(table, num_classes=num_classes)
    files = [path, beside(path), *filter(None, [table_path])]
    return Network(model, device, path, backbone, recurrence, num_classes, labels, files)


def _table_of(where: str, recipe: Mapping[str, Any], num_classes: int) -> str | None:
    """Return the path of the run's class table, if it is still there and fits.

    Otherwise a line says so: names and colors of other classes would be a mistake that nobody sees.

    Raises:
        UsageError: `where`, the file of the recipe, names no path.
    """
    path = recipe.get("classes")
    if path is None:
        return None
    if not isinstance(path, str):
        raise UsageError(f"{where}: classes is {path!r}, no name of a file; give --classes")
    if os.path.isfile(path):
        table, _ = choose_table(path, None)
        if table is not None and len(table.classes) == num_classes:
            return path
    print(
        f"{path}, the class table of the run, is not there or another one by now: give --classes", flush=True
    )
    return None


def end(main: Callable[[], int | None]) -> None:
    """Run a tool's main and exit as `exit_status` says; a file that can't be written is one line too."""

    def run() -> int | None:
        try:
            return main()
        except OSError as error:
            if shortage(error):
                raise
            raise unwritable(error) from error

    sys.exit(flags.exit_status(run))
