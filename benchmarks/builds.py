"""Compare builds of the operator, to measure changes of its kernels.

    python -m benchmarks.builds before=FOLDER after=FOLDER [--device cuda] [--shapes 8x97x97] [--out FILE]

Each FOLDER holds a package cc_attention with its compiled library. Each build runs in its own process. Its
results are compared with float64, and checked to be bit-identical when repeated. Times of forward and
backward are medians over three sets of inputs: replays of a CUDA graph on a GPU, calls on the CPU. Speedups
are relative to the first build.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
SHAPES = ["8x97x97", "2x97x97", "1x129x257"]
#: Shapes for checking results: odd sizes, and rows and columns of length 1.
CHECKED = ["2x5x7", "1x20x33", "2x33x1", "1x3x150"]
INPUTS, REPLAYS, SECONDS = 3, 60, 300.0


def operands(shape: str, dtype: torch.dtype, device: str, channels: list[int], seed: int) -> list[Tensor]:
    """Return random query, key [n, c, h, w], value and gradient of the result [n, C, h, w].

    Args:
        shape: NxHxW.
        dtype: type of the tensors.
        device: device of the tensors.
        channels: c and C.
        seed: seed of the random numbers.
    """
    n, height, width = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(seed)
    few, many = channels
    return [
        (scale * torch.randn(n, height, width, number, generator=generator, device=device))
        .to(dtype)
        .permute(0, 3, 1, 2)
        for number, scale in ((few, few**-0.25), (few, few**-0.25), (many, 1.0), (many, 1.0))
    ]


def in_turn(runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that calls the next one of several functions, in turn."""
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def one(folder: str, device: str, shapes: list[str], channels: list[int]) -> dict[str, Any]:
    """Return the errors and the times (in microseconds) of the build in `folder`."""
    sys.path[:0] = [folder, str(ROOT)]
    from cc_attention import ops, reference
    from utils.timing import captured, samples

    if device not in ops.DEVICE_TYPES:
        raise SystemExit(f"{folder}: not built for {device}; build it there, or choose another --device")
    operator = torch.ops.cc_attention

    def both(inputs: Sequence[Tensor], tf32: bool) -> list[Tensor]:
        q, k, v, grad = inputs
        out, normalizer, *_ = operator.criss_cross_attention(q, k, v, tf32=tf32)
        gradients = operator.criss_cross_attention_backward(grad, q, k, v, out, normalizer, tf32=tf32)
        return [out, *gradients[:3]]

    result: dict[str, Any] = {"worst_relative_error": {}, "times": {}}
    for name, dtype in TYPES.items():
        tf32 = name == "tf32"
        for shape in CHECKED:
            inputs = operands(shape, dtype, device, channels, len(shape))
            got, again = both(inputs, tf32), both(inputs, tf32)
            leaves = [each.double().requires_grad_() for each in inputs[:3]]
            out = reference.criss_cross_attention(*leaves)
            truth = [out, *torch.autograd.grad(out, leaves, inputs[3].double())]
            for ours, twice, exact in zip(got, again, truth, strict=True):
                if not torch.equal(ours, twice):
                    raise SystemExit(f"{folder}: {shape} {name}: the second run gave other bits")
                error = ((ours.double() - exact).norm() / exact.norm()).item()
                worst = result["worst_relative_error"]
                worst[name] = np.maximum(worst.get(name, 0.0), error).item()
        for shape in shapes:
            sets = [operands(shape, dtype, device, channels, seed) for seed in range(INPUTS)]
            kept = [operator.criss_cross_attention(*inputs[:3], tf32=tf32)[:2] for inputs in sets]

            def forward(i: int, sets: list = sets, tf32: bool = tf32) -> None:
                operator.criss_cross_attention(*sets[i][:3], tf32=tf32)

            def backward(i: int, sets: list = sets, kept: list = kept, tf32: bool = tf32) -> None:
                operator.criss_cross_attention_backward(sets[i][3], *sets[i][:3], *kept[i], tf32=tf32)

            for what, run in (("forward", forward), ("backward", backward)):
                runs: list[Callable[[], object]] = [partial(run, i) for i in range(INPUTS)]
                if device == "cuda":
                    runs = [captured(each) for each in runs]
                times = samples(in_turn(runs), device, REPLAYS if device == "cuda" else 6)
                result["times"][f"{shape} {name} {what}"] = 1e6 * statistics.median(times)
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.builds", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add(
        "builds",
        nargs="+",
        metavar="NAME=FOLDER",
        help="builds to compare; times are relative to the first one",
    )
    add("--device", choices=("cpu", "cuda"), default="cuda", help="device (default: %(default)s)")
    add(
        "--shapes",
        nargs="+",
        default=SHAPES,
        metavar="NxHxW",
        help=f"batch, height and width of the features (default: {' '.join(SHAPES)})",
    )
    add(
        "--channels",
        nargs=2,
        type=int,
        default=[64, 512],
        metavar=("KEY", "VALUE"),
        help="channels of query and key, and of value (default: 64 512)",
    )
    add("--out", metavar="FILE", help="JSON file to write the results to")
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
            parser.error(f"{build}: holds no package cc_attention; give NAME=FOLDER")
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
