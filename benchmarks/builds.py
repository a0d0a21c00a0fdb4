"""Builds of the operator beside each other: what a change of its kernels gains.

    python -m benchmarks.builds before=FOLDER after=FOLDER [--device cuda] [--shapes 8x97x97] [--out FILE]

Each FOLDER holds a package cc_attention with its compiled library; a build runs in a process of its own.
Checks each against float64, and for the same bits twice, then times forward and backward: medians of replays
of a CUDA graph on a GPU, of calls on the CPU, over three sets of inputs in turn. Prints the times, and the
first build's over the others'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
SHAPES = ["8x97x97", "2x97x97", "1x129x257"]
#: What results are checked on; odd, and with lines of one.
CHECKED = ["2x5x7", "1x20x33", "2x33x1", "1x3x150"]
INPUTS, REPLAYS, SECONDS = 3, 60, 300.0


def operands(shape: str, dtype: torch.dtype, device: str, channels: list[int], seed: int) -> list[Tensor]:
    """query, key [n, c, h, w], value and the gradient of the result [n, C, h, w], channels_last."""
    n, height, width = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(seed)
    few, many = channels
    return [
        (scale * torch.randn(n, height, width, number, generator=generator, device=device))
        .to(dtype)
        .permute(0, 3, 1, 2)
        for number, scale in ((few, few**-0.25), (few, few**-0.25), (many, 1.0), (many, 1.0))
    ]


def one(folder: str, device: str, shapes: list[str], channels: list[int]) -> dict[str, Any]:
    """The errors and the times, in microseconds, of the build in `folder`."""
    sys.path[:0] = [folder, str(ROOT)]
    from cc_attention import ops, reference
    from utils.timing import captured, samples

    if device not in ops.DEVICE_TYPES:
        raise SystemExit(f"{folder}: its library was not built for {device}")
    operator = torch.ops.cc_attention

    def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, tf32: bool) -> list[Tensor]:
        out, normalizer = operator.criss_cross_attention(q, k, v, tf32)
        return [out, *operator.criss_cross_attention_backward(grad, q, k, v, out, normalizer, tf32)]

    result: dict[str, Any] = {"worst_relative_error": {}, "times": {}}
    for name, dtype in TYPES.items():
        tf32 = name == "tf32"
        for shape in CHECKED:
            inputs = operands(shape, dtype, device, channels, len(shape))
            got, again = both(*inputs, tf32), both(*inputs, tf32)
            leaves = [each.double().requires_grad_() for each in inputs[:3]]
            out = reference.criss_cross_attention(*leaves)
            truth = [out, *torch.autograd.grad(out, leaves, inputs[3].double())]
            for ours, twice, exact in zip(got, again, truth, strict=True):
                if not torch.equal(ours, twice):
                    raise SystemExit(f"{folder}: {shape} {name}: other bits the second time")
                error = ((ours.double() - exact).norm() / exact.norm()).item()
                worst = result["worst_relative_error"]
                worst[name] = np.maximum(worst.get(name, 0.0), error).item()
        for shape in shapes:
            sets = [operands(shape, dtype, device, channels, seed) for seed in range(INPUTS)]
            kept = [operator.criss_cross_attention(*inputs[:3], tf32) for inputs in sets]

            def forward(i: int, sets: list = sets, tf32: bool = tf32) -> None:
                operator.criss_cross_attention(*sets[i][:3], tf32)

            def backward(i: int, sets: list = sets, kept: list = kept, tf32: bool = tf32) -> None:
                operator.criss_cross_attention_backward(sets[i][3], *sets[i][:3], *kept[i], tf32)

            for what, run in (("forward", forward), ("backward", backward)):
                runs: list[Callable[[], object]] = [lambda run=run, i=i: run(i) for i in range(INPUTS)]
                if device == "cuda":
                    runs = [captured(each) for each in runs]
                turn = iter([runs[i % INPUTS] for i in range(2 * REPLAYS)])
                times = samples(lambda turn=turn: next(turn)(), device, REPLAYS if device == "cuda" else 6)
                result["times"][f"{shape} {name} {what}"] = 1e6 * statistics.median(times)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.builds", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("builds", nargs="+", metavar="NAME=FOLDER", help="the first is the one to compare with")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--shapes", nargs="+", default=SHAPES, help="pictures, height and width of the feature maps")
    add("--channels", nargs=2, type=int, default=[64, 512], help="of query and key, and of value")
    add("--out", help="JSON")
    add("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.builds[0], args.device, args.shapes, args.channels)))
        return 0
    from utils.environment import machine
    from utils.files import replacing

    report: dict[str, Any] = {"machine": machine(args.device), "channels": args.channels, "builds": {}}
    for build in args.builds:
        name, _, folder = build.partition("=")
        if not (Path(folder) / "cc_attention").is_dir():
            parser.error(f"{build}: no package cc_attention in it; give NAME=FOLDER")
        command = [sys.executable, __file__, folder, "--one", "--device", args.device]
        command += ["--shapes", *args.shapes, "--channels", *map(str, args.channels)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        report["builds"][name] = json.loads(done.stdout.splitlines()[-1])
    builds = report["builds"]
    first = next(iter(builds))
    for name, result in builds.items():
        print(name, {dtype: f"{error:.1e}" for dtype, error in result["worst_relative_error"].items()})
    for case, base in builds[first]["times"].items():
        others = "  ".join(
            f"{name} {result['times'][case]:.1f} us ({base / result['times'][case]:.2f} x)"
            for name, result in builds.items()
        )
        print(f"{case:32} {others}")
    if args.out:
        with replacing(args.out) as path:
            Path(path).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
