"""Shared code of the tools: parser, network of a checkpoint, exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NamedTuple, cast

import torch

from dataset.labels import LabelReader, choose_table
from engine.options import ToolOptions, add_flags
from engine.runtime.distributed import choose_devices
from networks import MODELS, Seg_Model, load_weights
from networks.of_run import Description, args_file, describe
from networks.variants import DEPTHS, options_of
from networks.weights import read_state_dict
from utils import args as flags
from utils.errors import UsageError
from utils.files import unwritable
from utils.resources import shortage


class Network(NamedTuple):
    """A network that is ready to predict, and its classes."""

    model: Seg_Model  # in evaluation mode, on `device`
    device: torch.device
    path: str
    description: Description
    labels: LabelReader  # names and colors of the classes
    files: list[str]  # files that were read: checkpoint, args.json, class table

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.description.backbone

    @property
    def recurrence(self) -> int:
        """Number of applications of the attention."""
        return self.description.recurrence

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.labels.num_classes


class Parser(flags.Parser):
    """Parser of a tool, whose help text is the docstring of the tool."""

    def __init__(self, tool: str, doc: str | None):
        super().__init__(f"python -m tools.{tool}", doc)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add --restore-from, the flags that describe the network, and --gpu."""
    add_flags(parser, ToolOptions, {"model": MODELS, "backbone": DEPTHS}, reads_checkpoint=True)
    parser.add_argument("--gpu", metavar="ID", help="GPU id, or cpu; by default the first GPU, or the CPU")


def choose_device(gpu: str | None) -> torch.device:
    """Return the device of --gpu.

    Raises:
        UsageError: there is no such GPU, or there are several ids.
    """
    devices = choose_devices(gpu, None)
    if gpu is not None and len(devices) > 1:
        raise UsageError(f"--gpu {gpu}: this command uses one device; give one id, or cpu")
    return devices[0]


def open_network(args: argparse.Namespace) -> Network:
    """Load the network of the flags of `add_network_flags` (see networks.of_run.describe).

    Raises:
        InputError: a flag or file is invalid; the message names it.
    """
    device = choose_device(args.gpu)
    path = args.restore_from
    state = read_state_dict(path)
    given = {name: getattr(args, name, None) for name in Description._fields}
    found, notes = describe(path, state, given)
    if notes:
        print(*notes, sep="\n", flush=True)
    if found.classes != given["classes"] and not _fits(found):
        # Do not guess: wrong names and colors of classes would go unnoticed.
        print(
            f"{found.classes}: the class table of the run is missing or has changed; give --classes",
            flush=True,
        )
        found = found._replace(classes=None)
    if not issubclass(MODELS[found.model], Seg_Model):
        raise UsageError(f"--model {found.model}: the tools open checkpoints of ccnet only; use evaluate.py")
    table, _ = choose_table(found.classes, None)
    if table is not None and len(table.classes) != found.num_classes:
        raise UsageError(
            f"--classes {found.classes}: has {len(table.classes)} classes, but {path} has "
            f"{found.num_classes}; give the table that it was trained with"
        )
    model = MODELS[found.model](
        found.num_classes,
        recurrence=found.recurrence,
        backbone=found.backbone,
        **options_of(state),
    )
    load_weights(model, path, complete=True, state=state)
    model.to(device).eval()
    labels = LabelReader(table, num_classes=found.num_classes)
    files = [path, args_file(path), *filter(None, [found.classes])]
    return Network(cast(Seg_Model, model), device, path, found, labels, files)


def _fits(found: Description) -> bool:
    """Return whether the class table of a run exists and has as many classes as the network."""
    if not os.path.isfile(str(found.classes)):
        return False
    table, _ = choose_table(found.classes, None)
    return table is not None and len(table.classes) == found.num_classes


def end(main: Callable[[], int | None]) -> None:
    """Run the main function of a tool and exit (see `exit_status`); a write error gives one line."""

    def run() -> int | None:
        try:
            return main()
        except OSError as error:
            if shortage(error):
                raise
            raise unwritable(error) from error

    sys.exit(flags.exit_status(run))
