"""Profile the network by part: parameters, FLOPs, memory and time.

    python -m tools.profile --input-size 1024,2048               prediction
    python -m tools.profile --train --batch-size 2 --amp bf16    a training step
    python -m tools.profile --fit 8,24 --input-size 769 513      the largest batches on GPUs of 8 and 24 GB
    python -m tools.profile --paper                              the attentions, compared with the paper

Convolutions, matrix products and the criss-cross attention are counted; a multiply-add is two FLOPs. FLOPs
and memory are computed with tensors without data, for any size on any machine. Times, and the measured peak
on a GPU, come from runs on the device. Memory is that of the tensors, without workspaces of libraries and
fragmentation.
"""

from __future__ import annotations

import sys

# PyTorch imports the module profile of the standard library. Started as a file, this module would replace it.
if not __package__:
    sys.stderr.write(
        "tools/profile.py: can't be started as a file; run python -m tools.profile in the project folder\n"
    )
    sys.exit(2)

import argparse
import functools
import json
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from cc_attention import ops
from dataset.labels import NUM_CLASSES
from engine.acceleration import PRECISIONS, choose_precision, use_fused
from networks import MODELS, Network, load_weights, make_network
from networks.models import backbone_name
from networks.of_run import Description, describe, of_flags
from networks.variants import variant_of
from networks.weights import read_state_dict
from tools import common
from tools.cost import (
    GIB,
    MIB,
    Setting,
    Times,
    measure,
    paper_formulas,
    parameters_of,
    simulate,
)
from tools.published import ATTENTION_COST
from utils import args as flags
from utils.errors import UsageError
from utils.files import check_outputs, check_writable, write_file
from utils.progress import Progress
from utils.resources import check_memory

#: --fit: memory of a GPU besides the tensors, as a factor and in bytes. A step on an H200 took 3 % more than
#: the tensors. The CUDA context takes about 0.5 GiB, and some memory is lost to fragmentation.
OVERHEAD, RESERVE = 1.05, 1 * GIB
#: Largest batch that train.py accepts.
LARGEST_BATCH = 2**16
#: --paper: size of the input in the papers.
PAPER_SIZE = (769, 769)
#: Part of the network that is the attention.
PAPER_PARTS = {"ccnet": "head.cca", "nonlocal": "head.attention"}


def describe_network(args: argparse.Namespace) -> tuple[Description, dict[str, Tensor] | None]:
    """Return the description of the network of the flags, and the weights of --restore-from."""
    given = {name: getattr(args, name) for name in ("model", "backbone", "num_classes", "recurrence", "clip")}
    if args.restore_from:
        weights = read_state_dict(args.restore_from)
        found = describe(args.restore_from, weights, given)
        print(*found.notes, sep="\n", end="\n" if found.notes else "", flush=True)
        return found.description, weights
    return of_flags({**given, "num_classes": given["num_classes"] or NUM_CLASSES}).description, None


def network_of(found: Description, path: str | None, weights: dict[str, Tensor] | None) -> Network:
    """Return the network with the weights of a file, or with random ones."""
    torch.manual_seed(0)
    model = make_network(
        found.model,
        cast(int, found.num_classes),
        found.recurrence,
        backbone=found.backbone,
        variant=variant_of(weights or {}),
    )
    if weights:
        load_weights(model, str(path), complete=True, state=weights)
        return model
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(0.2)  # gamma and scales of residuals start at 0, and zeros are faster
    return model


# Tables


def columns(headings: list[str], rows: list[list[str]]) -> str:
    """Format a table as text; the first column is left-aligned and the others are right-aligned."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in [headings, *rows])
    ]
    return "\n".join(lines)


def profile(setting: Setting, model: Network, device: torch.device, rounds: int) -> dict[str, Any]:
    """Profile a setting.

    Args:
        setting: network, precision and input.
        model: the network.
        device: device of the timed runs.
        rounds: number of timed runs; 0 for none.

    Returns:
        Results for JSON, in bytes, seconds and FLOPs.
    """
    simulation = simulate(setting)
    if rounds and device.type == "cpu":
        check_memory("--batch-size, --input-size", simulation.peak)
    times = measure(setting, model, device, rounds) if rounds else Times({}, None)
    parameters = parameters_of(model)
    parts: dict[str, dict[str, Any]] = {}
    for name, cost in simulation.parts.items():
        parts[name] = {"parameters": parameters.get(name, 0), **cost._asdict()}
    for (phase, part), value in times.seconds.items():
        parts.setdefault(part, {})[f"seconds_{phase}"] = value
    return {
        "setting": {**setting._asdict(), "device": str(device), "torch": torch.__version__},
        "parts": parts,
        "peak_estimated": simulation.peak,
        "peak_measured": times.peak,
        "weights": simulation.weights,
        "gradients": simulation.gradients,
        "optimizer": simulation.optimizer,
    }


def page(setting: Setting, result: dict[str, Any]) -> str:
    """Format the result of `profile`: a table of the parts, and the memory of the whole."""
    memory = "kept, MiB" if setting.train else "peak, MiB"
    shown: list[tuple[str, str, float, str]] = [
        ("parameters", "parameters", 1, ",.0f"),
        ("GFLOPs", "flops_forward", 1e-9, ".2f"),
        ("backward", "flops_backward", 1e-9, ".2f"),
        (memory, "memory", 1 / MIB, ".1f"),
        ("forward, ms", "seconds_forward", 1e3, ".1f"),
        ("backward, ms", "seconds_backward", 1e3, ".1f"),
    ]
    parts = result["parts"]
    shown = [column for column in shown if any(part.get(column[1]) for part in parts.values())]

    def row(name: str, values: Mapping[str, Any]) -> list[str]:
        cells = [format(values[key] * unit, form) if key in values else "" for _, key, unit, form in shown]
        return [name, *cells]

    total = {key: sum(part.get(key, 0) for part in parts.values()) for _, key, _, _ in shown}
    if not setting.train:
        total["memory"] = max(part["memory"] for part in parts.values())
    rows = [row(name, values) for name, values in parts.items()] + [row("all", total)]
    lines = [setting.words(), "", columns(["", *(column[0] for column in shown)], rows), ""]
    weights, gradients, optimizer, peak = (
        f"{result[key] / GIB:.2f}" for key in ("weights", "gradients", "optimizer", "peak_estimated")
    )
    if setting.train:
        lines.append(
            f"weights {weights} GiB, gradients {gradients}, momentum {optimizer}; peak of a step {peak} GiB"
        )
    else:
        lines.append(f"weights {weights} GiB; peak, weights included, {peak} GiB")
    if result["peak_measured"] is not None:
        lines.append(f"measured peak {result['peak_measured'] / GIB:.2f} GiB")
    return "\n".join(lines)


# The largest batch


def need(setting: Setting) -> float:
    """Return the GPU memory in GiB that a training step takes, with or without --grad-accum."""
    return (simulate(setting, passes=2).peak * OVERHEAD + RESERVE) / GIB


def fit(setting: Setting, rooms: list[float], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Find the largest batch that trains on GPUs of several sizes, in float32 and in mixed precision.

    Args:
        setting: network and precision.
        rooms: memory of the GPUs in GiB.
        sizes: input sizes.

    Returns:
        For each size and precision: GiB of the first picture and of each further one, and the batches.
    """
    rows = []
    settings = [
        setting._replace(train=True, size=size, amp=amp)
        for size in sizes
        for amp in (None, setting.amp or "bf16")
    ]
    progress = Progress(len(settings), "row")
    for number, one in enumerate(settings, 1):
        needs = functools.cache(lambda batch, one=one: need(one._replace(batch=batch)))
        first, further = needs(1), needs(2) - needs(1)
        batches = []
        for room in rooms:
            # Memory is at least linear in the batch, but may grow faster: the peak is the maximum of several
            # moments, each linear in the batch.
            batch = beyond = min(LARGEST_BATCH, max(0, int((room - first) / further + 1)))
            step = 1
            while batch and needs(batch) > room:  # the linear estimate is mostly right, or off by one
                batch, beyond, step = max(0, batch - step), batch, 2 * step
            while beyond - batch > 1:
                middle = (batch + beyond) // 2
                batch, beyond = (middle, beyond) if needs(middle) <= room else (batch, middle)
            batches.append(batch)
        rows.append(
            {"size": one.size, "amp": one.amp, "first": first, "further": further, "batches": batches}
        )
        progress.show(number)
    return {"setting": setting._asdict(), "rooms": rooms, "rows": rows}


def fit_page(result: dict[str, Any]) -> str:
    """Format the result of `fit` as a Markdown table."""
    headings = [
        "crop",
        "",
        "first picture, GiB",
        "each further",
        *(f"{room:g} GB" for room in result["rooms"]),
    ]
    lines = [headings, ["---"] * len(headings)]
    for row in result["rows"]:
        height, width = row["size"]
        precision = f"--amp {row['amp']}" if row["amp"] else "float32"
        batches = [str(batch) if batch else "-" for batch in row["batches"]]
        lines.append(
            [f"{height}x{width}", precision, f"{row['first']:.2f}", f"{row['further']:.2f}", *batches]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Comparison with the paper


def paper() -> dict[str, dict[str, float]]:
    """Return GFLOPs and training memory of both attentions, beside the values of the paper.

    GFLOPs are counted both as in the paper and as computed by the code. Memory is the difference between the
    network and the same one without attention.

    Raises:
        UsageError: the operator is not compiled.
    """
    if not ops.DEVICE_TYPES:
        raise UsageError("--paper: the operator is not compiled; run python setup.py build_ext --inplace")
    setting = Setting(backbone="resnet50", size=PAPER_SIZE, train=True)
    without = simulate(setting._replace(recurrence=0))
    rows = {}
    for (model, recurrence), (gflops, megabytes) in ATTENTION_COST.items():
        one = setting._replace(model=model, recurrence=recurrence)
        ours = simulate(one)
        theirs = simulate(one._replace(train=False), formulas=paper_formulas())
        kept, kept_without = (sum(c.memory for c in s.parts.values()) for s in (ours, without))
        part = PAPER_PARTS[model]
        rows[f"{model}, R={recurrence}"] = {
            "gflops_paper": gflops,
            "gflops_as_the_paper_counts": theirs.parts[part].flops_forward / 1e9,
            "gflops": ours.parts[part].flops_forward / 1e9,
            "memory_paper": megabytes,
            "memory_kept": (kept - kept_without) / MIB,
            "memory_peak": (ours.peak - without.peak) / MIB,
        }
    return rows


def paper_page(rows: dict[str, dict[str, float]]) -> str:
    """Format the result of `paper` as a table."""
    headings = [
        "",
        "GFLOPs, paper",
        "counted as there",
        "this code",
        "memory, paper",
        "kept, MiB",
        "peak, MiB",
    ]
    body = [
        [
            name,
            *(
                format(value, f)
                for value, f in zip(row.values(), ("g", ".2f", ".2f", "g", ".1f", ".1f"), strict=True)
            ),
        ]
        for name, row in rows.items()
    ]
    height, width = PAPER_SIZE
    return f"the attention, {height}x{width}: features 1x512x97x97\n\n" + columns(headings, body)


# The command


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("profile", __doc__)
    add = parser.add_argument
    of_checkpoint = "by default that of the checkpoint, or"
    add("--model", choices=sorted(MODELS), help=f"network; {of_checkpoint} ccnet")
    add(
        "--backbone",
        type=backbone_name,
        metavar="NAME",
        help=f"resnet50, resnet101, or timm:NAME; {of_checkpoint} resnet101",
    )
    add("--num-classes", type=flags.classes, help=f"number of classes; {of_checkpoint} {NUM_CLASSES}")
    add(
        "--recurrence",
        type=flags.recurrence,
        help=f"number of times that the attention is applied; {of_checkpoint} that of the model",
    )
    add(
        "--clip",
        type=flags.frames,
        metavar="T",
        help=f"frames of a clip, for ccnet3d; {of_checkpoint} 3",
    )
    add("--restore-from", metavar="FILE", help="checkpoint (default: random weights)")
    add(
        "--input-size",
        type=flags.size,
        nargs="+",
        default=[(769, 769)],
        metavar="H,W",
        help="size of the pictures; --fit accepts several (default: 769,769)",
    )
    add(
        "--batch-size",
        type=flags.batch,
        default=1,
        help="number of pictures in a batch (default: %(default)s)",
    )
    add("--train", action="store_true", help="profile a training step instead of a prediction")
    add("--amp", choices=sorted(PRECISIONS), help="mixed precision (default: float32)")
    add(
        "--channels-last",
        action="store_true",
        help="channels_last memory format [N, h, w, C], which tensor cores prefer",
    )
    add("--fused", action="store_true", help="fused operators, as --fused on of train.py")
    add("--recompute", action="store_true", help="recompute outputs of batch norm; requires --fused")
    add("--ohem", action="store_true", help="online hard example mining in the loss of --train and --fit")
    add("--gpu", metavar="ID", help="number of a GPU, or cpu (default: the first GPU, or the CPU)")
    add(
        "--rounds",
        type=flags.number(int, 0, 10000),
        default=3,
        metavar="N",
        help="number of timed runs; 0 needs no device (default: %(default)s)",
    )
    add("--json", metavar="FILE", help="file to write all numbers to, in bytes, seconds and FLOPs")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--fit",
        type=flags.several(flags.number(float, 0.01, 100_000)),
        metavar="GIB,GIB",
        help="print the largest batches that train on GPUs with this memory, as a Markdown table",
    )
    kind.add_argument(
        "--paper", action="store_true", help="compare the cost of the attention with that of the paper"
    )
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    if args.json:
        check_outputs("--json", [args.json], [args.restore_from])
        check_writable("--json", os.path.dirname(args.json) or ".")
    found, weights = describe_network(args)
    setting = Setting(
        found.backbone,
        cast(int, found.num_classes),
        found.recurrence,
        args.amp,
        args.channels_last,
        args.ohem,
        args.train,
        args.batch_size,
        args.input_size[0],
        fused=args.fused,
        recompute=args.recompute,
        model=found.model,
        clip=found.clip or 1,
    )
    if args.recompute and args.gpu != "cpu" and not args.channels_last:
        raise UsageError("--recompute: requires --channels-last on a GPU; add it")
    if args.recompute and not args.fused:
        raise UsageError("--recompute: requires --fused; add it")
    if args.fused:
        use_fused("on", torch.device("cpu") if not args.rounds else common.choose_device(args.gpu))
    result: dict[str, Any]
    if args.paper:
        result = paper()
        print(paper_page(result))
    elif args.fit:
        result = fit(setting, args.fit, args.input_size)
        print(fit_page(result))
    else:
        if len(args.input_size) > 1:
            raise UsageError("--input-size: several sizes need --fit; give one")
        device = common.choose_device(args.gpu)
        if args.rounds:
            choose_precision(args.amp, device)
        model = network_of(found, args.restore_from, weights)
        setting = setting._replace(variant=variant_of(weights or {}))
        result = profile(setting, model, device, args.rounds)
        print(page(setting, result))
    if args.json:
        write_file(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    common.end(main)
