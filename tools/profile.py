"""What the network costs, part by part: parameters, FLOPs, memory and time.

    python -m tools.profile --input-size 1024,2048               prediction
    python -m tools.profile --train --batch-size 2 --amp bf16    a training step
    python -m tools.profile --fit 8,24 --input-size 769 513      the largest batches on GPUs of 8 and 24 GB
    python -m tools.profile --paper                              the attention beside the paper's

A multiply-add counts as two FLOPs; convolutions and matrix products are counted, the criss-cross attention by
what it needs. FLOPs and memory come from a run on tensors without data, of any size on any machine; only the
times, and on a GPU the measured peak, from runs on the device. Memory is that of the tensors: the libraries'
workspaces and what the allocator can't use come on top.
"""

from __future__ import annotations

import sys

# The standard library has a profile too, which PyTorch imports: started as a file, or found by that name,
# this one would take its place.
if not __package__:
    sys.stderr.write(
        "tools/profile.py: not a command by itself; run python -m tools.profile in its project\n"
    )
    sys.exit(2)

import argparse
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cc_attention import CrissCrossAttention, ops
from engine.training.step import PRECISIONS
from networks import Seg_Model, load_weights
from networks.variants import DEPTHS, variant_of
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
from utils import args as flags
from utils.errors import UsageError
from utils.files import check_outputs, check_writable, write_file
from utils.progress import Progress
from utils.resources import check_memory

#: --fit: what a GPU holds besides the tensors. One H200 step had 3 % above them; the context takes about half
#: a GiB, and memory falls into pieces.
OVERHEAD, RESERVE = 1.05, 1 * GIB
#: Batches beyond it are not looked for: train.py takes none.
LARGEST_BATCH = 2**16
#: --paper: GFLOPs and memory (MB) that the paper gives (ICCV, tables 3 and 5; input 3x769x769).
PAPER = {"R=1": (8.3, 53), "R=2": (16.5, 127), "R=3": (24.7, 208), "non-local": (108, 1411)}
PAPER_SIZE = (769, 769)


def make_network(args: argparse.Namespace) -> tuple[Seg_Model, str]:
    """The network, and its variant."""
    torch.manual_seed(0)
    weights = read_state_dict(args.restore_from) if args.restore_from else None
    variant = variant_of(weights or {})
    model = Seg_Model(args.num_classes, recurrence=args.recurrence, backbone=args.backbone, variant=variant)
    if weights:
        load_weights(model, args.restore_from, complete=True, state=weights)
        return model, variant
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(0.2)  # gamma and the residuals' scales, which start at 0: zeros are faster
    return model, variant


# What is printed


def columns(headings: list[str], rows: list[list[str]]) -> str:
    """Rows of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in [headings, *rows])
    ]
    return "\n".join(lines)


def profile(setting: Setting, model: Seg_Model, device: torch.device, rounds: int) -> dict[str, Any]:
    """Everything about one setting, in bytes, seconds and FLOPs, ready for JSON."""
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
    """The table of `profile`, and what is to be known of the whole."""
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
    """GiB of a GPU that a training step takes, with --grad-accum or without it."""
    return (simulate(setting, passes=2).peak * OVERHEAD + RESERVE) / GIB


def fit(setting: Setting, rooms: list[float], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """For each size and precision: GiB of the first picture and of each further one, and the largest batch
    for each of `rooms` GiB."""
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
            # A large batch may take more than a line through the first two says, never less: its peak is the
            # highest of the lines of several moments.
            batch = beyond = min(LARGEST_BATCH, max(0, int((room - first) / further + 1)))
            step = 1
            while batch and needs(batch) > room:  # most often the line is right, or off by one
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
    """A Markdown table."""
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


# The paper's table


class NonLocal(CrissCrossAttention):
    """Every pixel attends to every other: the peer in the paper's table, its maps in memory as theirs."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_dim, H, W] -> [N, in_dim, H, W]"""
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        weight = torch.softmax(query.mT @ key, dim=2)  # [N, pixel, pixel seen]
        return torch.addcmul(x, self.gamma, (value @ weight.mT).view(x.shape))


def paper() -> dict[str, dict[str, float]]:
    """GFLOPs of head.cca, as the paper counts and as the code computes, and the memory that training takes
    for it: that of CCNet minus that of CCNet without it.

    Raises:
        UsageError: the compiled operator, which is what is counted, is missing.
    """
    if not ops.DEVICE_TYPES:
        raise UsageError(
            "--paper: counts the compiled operator; `python setup.py build_ext --inplace` builds it"
        )
    setting = Setting(backbone="resnet50", size=PAPER_SIZE, train=True)
    without = simulate(setting._replace(recurrence=0))
    rows = {}
    for name, (gflops, megabytes) in PAPER.items():
        attention = functools.partial(NonLocal, 512) if name == "non-local" else None
        one = setting if attention else setting._replace(recurrence=int(name.removeprefix("R=")))
        ours = simulate(one, attention=attention)
        theirs = simulate(one._replace(train=False), formulas=paper_formulas(), attention=attention)
        kept, kept_without = (sum(c.memory for c in s.parts.values()) for s in (ours, without))
        rows[name] = {
            "gflops_paper": gflops,
            "gflops_as_the_paper_counts": theirs.parts["head.cca"].flops_forward / 1e9,
            "gflops": ours.parts["head.cca"].flops_forward / 1e9,
            "memory_paper": megabytes,
            "memory_kept": (kept - kept_without) / MIB,
            "memory_peak": (ours.peak - without.peak) / MIB,
        }
    return rows


def paper_page(rows: dict[str, dict[str, float]]) -> str:
    headings = [
        "",
        "GFLOPs, paper",
        "counted its way",
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
    return f"head.cca, {height}x{width}: features 1x512x97x97\n\n" + columns(headings, body)


# The command


def get_parser() -> argparse.ArgumentParser:
    parser = common.Parser("profile", __doc__)
    add = parser.add_argument
    add("--backbone", choices=sorted(DEPTHS), default="resnet101", help="resnet101 without it")
    add("--num-classes", type=flags.classes, default=19, help="19 without it")
    add(
        "--recurrence",
        type=flags.recurrence,
        default=2,
        help="how often the attention is applied; 2 without it",
    )
    add("--restore-from", metavar="FILE", help="checkpoint; random weights without it")
    add(
        "--input-size",
        type=flags.size,
        nargs="+",
        default=[(769, 769)],
        metavar="H,W",
        help="769,769 without it; --fit takes several",
    )
    add("--batch-size", type=flags.batch, default=1, help="1 without it")
    add("--train", action="store_true", help="a training step instead of a prediction")
    add("--amp", choices=sorted(PRECISIONS), help="mixed precision")
    add("--channels-last", action="store_true", help="the layout [N, h, w, C], which tensor cores want")
    add("--ohem", action="store_true", help="online hard example mining in the loss of --train and --fit")
    add("--gpu", metavar="ID", help="a GPU's number, or cpu; without it the first GPU, or the CPU")
    add(
        "--rounds",
        type=flags.number(int, 0, 10000),
        default=3,
        metavar="N",
        help="timed runs, 3 without it; 0 measures nothing, so that no device is needed",
    )
    add("--json", metavar="FILE", help="also write all numbers, in bytes, seconds and FLOPs")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--fit",
        type=flags.several(flags.number(float, 0.01, 100_000)),
        metavar="GIB,GIB",
        help="instead: the largest batch that trains on GPUs of these sizes, as a Markdown table",
    )
    kind.add_argument("--paper", action="store_true", help="instead: the attention's cost beside the paper's")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    if args.json:
        check_outputs("--json", [args.json], [args.restore_from])
        check_writable("--json", os.path.dirname(args.json) or ".")
    setting = Setting(
        args.backbone,
        args.num_classes,
        args.recurrence,
        args.amp,
        args.channels_last,
        args.ohem,
        args.train,
        args.batch_size,
        args.input_size[0],
    )
    result: dict[str, Any]
    if args.paper:
        result = paper()
        print(paper_page(result))
    elif args.fit:
        result = fit(setting, args.fit, args.input_size)
        print(fit_page(result))
    else:
        if len(args.input_size) > 1:
            raise UsageError("--input-size: several sizes are for --fit; give one")
        device = common.choose_device(args.gpu)
        if args.amp == "fp16" and device.type == "cpu" and args.rounds:
            raise UsageError("--amp fp16: is for GPUs; give --amp bf16, or --rounds 0")
        model, variant = make_network(args)
        setting = setting._replace(variant=variant)
        result = profile(setting, model, device, args.rounds)
        print(page(setting, result))
    if args.json:
        write_file(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    common.end(main)
