"""Shared code of the tools: parser, network of a checkpoint, exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from engine.acceleration import use_fused
from engine.options import ToolOptions, add_flags
from engine.runtime.distributed import choose_devices
from networks import MODELS
from networks.models import backbone_name
from networks.of_run import Description
from segmenter import Segmenter
from utils import args as flags
from utils.errors import UsageError
from utils.files import unwritable
from utils.resources import shortage


class Parser(flags.Parser):
    """Parser of a tool, whose help text is the docstring of the tool."""

    def __init__(self, tool: str, doc: str | None):
        super().__init__(f"python -m tools.{tool}", doc)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add --restore-from, the flags that describe the network, and --gpu."""
    add_flags(parser, ToolOptions, {"model": MODELS, "backbone": backbone_name}, reads_checkpoint=True)
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


def open_network(args: argparse.Namespace) -> Segmenter:
    """Load the network of the flags of `add_network_flags`, and print a line for each unusual one.

    Raises:
        InputError: a flag or file is invalid; the message names it.
    """
    device = choose_device(args.gpu)
    use_fused(getattr(args, "fused", "auto"), device)
    flags_of_network = {name: getattr(args, name, None) for name in Description._fields}
    return Segmenter.load(
        args.restore_from,
        device=device,
        amp=getattr(args, "amp", None),
        channels_last=getattr(args, "channels_last", False),
        compile=getattr(args, "compile", False),
        cuda_graph=getattr(args, "cuda_graph", False),
        fused=getattr(args, "fused", "auto"),
        say=lambda line: print(line, flush=True),
        **flags_of_network,
    )


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
