"""Compare criss-cross attention with plain PyTorch, with full attention, and with the limits of the machine.

    python -m benchmarks.attention [--device cpu|cuda] [--level operator module R=2] [--shapes 8x97x97 ...]
        [--heads 8] [--axes 1] [--dtypes float32 bfloat16 ...] [--contenders ours bmm ...]
        [--out FILE.json] [--plot FILE.png]

Measures the time of forward and of forward + backward (gradients of all inputs and weights), on CUDA also as
a replayed graph, and the peak memory in addition to the inputs. There are three levels:

- operator: `cc_attention.criss_cross_attention` of query, key and value;
- module: `CrissCrossAttention`, with 1x1 convolutions, residual and gamma. The convolutions have float32
  weights; bfloat16 and float16 are inputs of this type in an autocast region;
- R=2: `RecurrentCrissCrossAttention`, the module applied twice.

Shapes of four numbers are videos, N x T x H x W. --heads and --axes are options of the operator. The
contenders are

- ours; in addition "before", our operator after three separate convolutions, with the residual added by
  torch.addcmul, for modules, and "heads=1", our operator on the same maps, for several heads;
- pure PyTorch: the bmm formulation (as in the published CCNet code without its extension) and the einsum
  formulation (as in mmcv), each eager and compiled;
- views: the best hand-written PyTorch, matrix products on views of channels_last tensors;
- FlexAttention, with the criss-cross as a mask, on CUDA only;
- non-local: full attention by scaled_dot_product_attention.

The last two run in one head, and with the value split into heads that share query and key, because flash
kernels do not support 512 channels of value. In modules, every contender gets the same weights.

Each contender runs on contiguous and on channels_last inputs. The last two run only on channels_last ones,
where their tokens are views, and so do compiled ones on the CPU. Comparisons use the best contender of a
family. The floor is the minimum time for the bytes and FLOP that no implementation avoids, at the copy
bandwidth and matrix rate measured in the same run. Two more floors are of bytes only: "ideal" has the same
bytes, "2-pass" those of a kernel that takes one pass for each axis. `benchmarks.attention_report.floor_of`
has the formulas.

Each contender is compared with float64 before it is timed. Contenders that fail are reported. Contenders that
give wrong results are not timed, and the exit status is 1. On the CPU, a contender may use half the free
memory. "Peak" is then the resident memory of a process of its own. "Allocated" is the sum of all tensors that
a forward + backward of a module allocates.

Without --level, --shapes, --heads and --axes, the operator is followed by rows for a module, several heads,
and a video. On the CPU, these rows are in channels_last only, and leave out what is slow: compiled and full
attention. So does the row for memory alone, of 1x193x193, unless --memory-shapes is given. Compiling takes
most of the time there; `--contenders ours bmm einsum views non-local` avoids it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file: the path has benchmarks/ instead of the project folder
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention_peers import (
    CHOICES,
    DTYPES,
    LAYOUTS,
    LEVELS,
    Case,
    Contender,
    Function,
    Shape,
    make_contenders,
)
from benchmarks.attention_report import ALLOCATED, compare, float32_over_bfloat16, floors, plot, show
from cc_attention import ops
from tools.common import end
from utils import timing
from utils.args import Parser, count, positive_int, processes
from utils.environment import machine
from utils.files import check_output_file, write_file

#: Maximum relative error of correct results. Wrong results have errors of tenths.
ERROR_LIMITS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
#: Choices of --contenders that do not make the default run on a CPU much longer.
QUICK = {"ours", "bmm", "einsum", "views"}


# Measuring


def layers(function: Function) -> list[list[Tensor]]:
    """Return the parameters of a module by layer; other functions have none."""
    found: dict[str, list[Tensor]] = {}
    if isinstance(function, nn.Module):
        for name, parameter in function.named_parameters():
            found.setdefault(name.rpartition(".")[0], []).append(parameter)
    return list(found.values())


def forward(function: Function, case: Case, sets: list[list[Tensor]]) -> None:
    """Call a function on each set of inputs, without gradients."""
    with torch.no_grad():
        for *operands, _ in sets:
            with case.autocast():
                function(*operands)


def forward_backward(function: Function, case: Case, sets: list[list[Tensor]]) -> None:
    """Call a function on each set of inputs, and compute the gradients of inputs and parameters."""
    parameters = [parameter for layer in layers(function) for parameter in layer]
    for *operands, grad in sets:
        with case.autocast():
            result = function(*operands)
        torch.autograd.grad(result, (*operands, *parameters), grad)


ACTIONS = {"forward": forward, "forward+backward": forward_backward}


def relative_error(contender: Contender, function: Function, case: Case, weights: dict[str, Tensor]) -> float:
    """Return the largest ||x - exact|| / ||exact|| of the result and its gradients.

    Inputs are narrow maps, each with lines along one axis as long as those of the case. Functions that
    compile run only on the first one, because each shape takes a compilation. The parameters of a layer
    are compared together, because the gradient of the bias of the keys is 0.
    """
    exact_function = contender.exact_function(case, weights)
    errors = []
    spatial = case.shape[1:]
    for axis in reversed(range(len(spatial))):
        narrow = [size if other == axis else 5 for other, size in enumerate(spatial)]
        *operands, grad = dataclasses.replace(case, shape=(2, *narrow)).inputs(contender.layout)
        exact_operands = [x.detach().double().contiguous().requires_grad_() for x in operands]
        exact = exact_function(*exact_operands)
        if case.level != "operator":
            # For a random gradient, that of gamma is a sum of random signs, in which rounding dominates.
            grad = exact.detach().to(grad)
        with case.autocast():
            result = function(*operands)
        found = [result, *gradients(function, result, operands, grad)]
        right = [exact, *gradients(exact_function, exact, exact_operands, grad.double())]
        errors += [
            float((x.detach().double() - y.detach()).norm() / y.detach().norm())
            for x, y in zip(found, right, strict=True)
        ]
        if contender.compiles:
            break
    # max() of Python may lose a NaN.
    return float(torch.tensor(errors).max())


def gradients(function: Function, result: Tensor, operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the gradients of the operands, and those of each layer as a vector."""
    groups = [[operand] for operand in operands] + layers(function)
    found = iter(torch.autograd.grad(result, [tensor for group in groups for tensor in group], grad))
    return [torch.cat([next(found).flatten() for _ in group]) for group in groups]


def memory_of(contender: Contender, function: Function, case: Case, action: str) -> tuple[int, int | None]:
    """Return the peak memory of an action in bytes, including its results, without its inputs.

    The second number is the sum of all allocations of a module's forward + backward, otherwise None.
    """
    if case.device == "cuda":
        run, sets = ACTIONS[action], [case.inputs(contender.layout)]
        run(function, case, sets)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, total = torch.cuda.memory_allocated(), allocated_on_gpu()
        run(function, case, sets)
        peak = torch.cuda.max_memory_allocated() - before
        return peak, allocated_on_gpu() - total if sums_allocations(case, action) else None
    if contender.compiles:
        raise RuntimeError("can't be measured: the memory of the compiler is in the same process")
    # A process forked from one that has only imported PyTorch: clean, and started quickly.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cc_attention"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(memory_of_process, contender, case, action, torch.get_num_threads()).result()


def memory_of_process(contender: Contender, case: Case, action: str, threads: int) -> tuple[int, int | None]:
    """Return `memory_of` on the CPU; for a new process."""
    torch.set_num_threads(threads)
    run, function = ACTIONS[action], contender.function(case, case.weights())
    small = dataclasses.replace(case, shape=(1, *(3, 5, 7)[-len(case.shape) + 1 :]))
    run(function, small, [small.inputs(contender.layout)])  # starts libraries and threads
    sets = [case.inputs(contender.layout)]
    before = timing.resident_peak()
    run(function, case, sets)
    peak = timing.resident_peak() - before
    if not sums_allocations(case, action):
        return peak, None
    os.environ["KINETO_LOG_LEVEL"] = "99"  # otherwise the profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(function, case, sets)
    events = profiler.profiler.kineto_results.events()
    return peak, sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def sums_allocations(case: Case, action: str) -> bool:
    """Return whether the allocations of an action are added up."""
    return case.level != "operator" and f"{action} allocated" == ALLOCATED


def allocated_on_gpu() -> int:
    """Return the bytes that this process has ever allocated on the GPU."""
    return torch.cuda.memory_stats().get("allocated_bytes.all.allocated", 0)


def measure_case(
    case: Case, contenders: list[Contender], *, timed: bool, memory: bool, graphs: bool, rounds: int
) -> dict[str, Any]:
    """Measure the contenders of a case.

    Args:
        case: the inputs.
        contenders: the functions to compare; those that do not apply to the case are left out.
        timed: whether to measure times.
        memory: whether to measure peak memory.
        graphs: whether to measure CUDA graphs.
        rounds: number of measurements.

    Returns:
        Errors, times (seconds), peaks and allocations (bytes) by contender; "failed" holds the reasons of
        missing columns.
    """
    case.apply_precision()
    contenders = [contender for contender in contenders if contender.applies(case)]
    weights = case.weights()
    if any(contender.compiles for contender in contenders):
        torch.compiler.reset()  # the number of compilations of a function is limited
    results: dict[str, dict[str, Any]] = {}
    functions: dict[str, Function] = {}
    for contender in contenders:
        result = results[contender.name] = {"kind": contender.kind, "family": contender.family, "failed": {}}
        try:
            function = contender.function(case, weights)
            result["error"] = relative_error(contender, function, case, weights)
            result["wrong"] = not result["error"] <= ERROR_LIMITS[case.precision]
        except Exception as error:  # out of memory, no compiler: continue with the others
            result["failed"]["all"] = timing.reason(error)
            continue
        if result["wrong"]:
            result["failed"]["all"] = f"wrong: relative error {result['error']:.2g}"
        else:
            functions[contender.name] = function

    usable = [contender for contender in contenders if contender.name in functions]
    if timed:
        time_case(case, usable, functions, results, graphs, rounds)
    if memory:
        for contender in usable:
            for action in ACTIONS:
                try:
                    peak, total = memory_of(contender, functions[contender.name], case, action)
                    results[contender.name][f"{action} peak"] = peak
                    if total is not None:
                        results[contender.name][f"{action} allocated"] = total
                except Exception as error:
                    results[contender.name]["failed"][f"{action} peak"] = timing.reason(error)
    return results


def time_case(
    case: Case,
    contenders: list[Contender],
    functions: dict[str, Function],
    results: dict[str, dict[str, Any]],
    graphs: bool,
    rounds: int,
) -> None:
    """Add the times of the contenders to their results."""
    sets = {layout: case.input_sets(layout) for layout in LAYOUTS}
    size = len(sets["contiguous"])
    sizes = {
        # Full attention on a CPU takes so long that other data evicts its inputs from the caches.
        c.name: 1 if c.family == "non-local" and case.device == "cpu" else size
        for c in contenders
    }
    for action, run in ACTIONS.items():
        runs = {
            c.name: partial(run, functions[c.name], case, sets[c.layout][: sizes[c.name]]) for c in contenders
        }
        collect(results, action, runs, case.device, rounds, sizes)
        if graphs:
            replays: dict[str, timing.Run] = {}
            for name, launched in runs.items():
                try:
                    replays[name] = timing.captured(launched)
                except Exception as error:  # not every function can be captured
                    results[name]["failed"][f"{action} graph"] = timing.reason(error)
            collect(results, f"{action} graph", replays, case.device, rounds, sizes)


def collect(
    results: dict[str, dict[str, Any]],
    column: str,
    runs: Mapping[str, timing.Run],
    device: str,
    rounds: int,
    sizes: Mapping[str, int],
) -> None:
    """Add the times of runs to a column of the results; `sizes` are the sets of inputs of each run."""
    times, failures = timing.interleaved(runs, device, rounds)
    for name, values in times.items():
        results[name][column] = timing.quartiles([value / sizes[name] for value in values])
    for name, why in failures.items():
        results[name]["failed"][column] = why


# The command


def shape_argument(text: str) -> Shape:
    """Parse NxHxW, such as 8x97x97, or NxTxHxW."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; give NxHxW such as 8x97x97, or NxTxHxW such as 1x5x49x49"
        )
    return tuple(map(int, text.split("x")))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if cuda else "cpu",
        help="device (default: %(default)s)",
    )
    add(
        "--level",
        nargs="+",
        choices=LEVELS,
        help="the operator, the module with convolutions and residual, or the module applied twice "
        "(default: operator; without --shapes, --heads and --axes also one row each of others)",
    )
    add(
        "--shapes",
        nargs="+",
        type=shape_argument,
        metavar="N[xT]xHxW",
        help="shapes of the inputs, videos with T (default: 8x97x97 2x97x97 1x129x257, on the CPU 1x97x97)",
    )
    add(
        "--memory-shapes",
        nargs="*",
        type=shape_argument,
        metavar="N[xT]xHxW",
        help="shapes for the peak memory, or none (default: those of --shapes, on the CPU also 1x193x193)",
    )
    add(
        "--heads",
        type=positive_int,
        default=1,
        help="heads of the operator, also compared with one head (default: %(default)s)",
    )
    add(
        "--axes",
        nargs="+",
        type=count,
        metavar="AXIS",
        help="spatial axes that the operator attends along, counted from 0 (default: all)",
    )
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        help="data types; tf32 only on CUDA (default: float32 bfloat16, on a CPU without fast products of "
        "bfloat16 only float32)",
    )
    add(
        "--channels",
        type=positive_int,
        default=512,
        help="channels of value, a multiple of 16; query and key have 1/8 of them (default: %(default)s)",
    )
    add(
        "--contenders",
        nargs="+",
        choices=CHOICES,
        default=list(CHOICES),
        help="functions to compare (default: all)",
    )
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure CUDA graphs (default: yes)",
    )
    add(
        "--untested",
        action="store_true",
        help="on a GPU, also use kernels that no GPU has run yet (docs/operator.md)",
    )
    add("--rounds", type=positive_int, default=5, help="number of measurements (default: %(default)s)")
    add("--threads", type=processes, help="number of CPU threads (default: that of PyTorch)")
    add("--out", metavar="FILE.json", help="JSON file to write the results to, updated after each case")
    add("--plot", metavar="FILE.png", help="file to write a bar chart of the times to")
    return parser


def default_dtypes(device: str) -> list[str]:
    """Return float32 and bfloat16, without bfloat16 on a CPU whose products of it are very slow."""
    if device == "cpu":
        seconds = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(512, 512, dtype=dtype)
            seconds[dtype] = min(timing.samples(partial(torch.mm, a, a), device, 4))
        if seconds[torch.bfloat16] > 4 * seconds[torch.float32]:
            print("bfloat16 is left out: this CPU has no fast products of it; --dtypes bfloat16 measures it")
            return ["float32"]
    return ["float32", "bfloat16"]


class Row(NamedTuple):
    """A case, and what is measured."""

    case: Case
    timed: bool
    memory: bool
    choices: list[str]  # of --contenders
    layouts: Sequence[str] = LAYOUTS

    def contenders(self) -> list[Contender]:
        """Return the contenders, those that do not apply to the case included."""
        return [c for c in make_contenders(self.choices) if c.layout in self.layouts]


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2 if options of the operator do not fit."""
    levels, c = args.level or ["operator"], args.channels // 8
    for flag, given in (("--heads", args.heads > 1), ("--axes", args.axes)):
        if given and "operator" not in levels:
            parser.error(f"argument {flag}: modules have no such option; add --level operator")
    if c % args.heads:
        parser.error(
            f"argument --heads: the {c} channels of query and key are not divisible by {args.heads}; "
            "give another number of heads, or other --channels"
        )
    if args.axes:
        if len(set(args.axes)) < len(args.axes):
            parser.error("argument --axes: an axis is given twice; give each once")
        for shape in (*operator_shapes(args)[0], *operator_shapes(args)[1]):
            if max(args.axes) > len(shape) - 2:
                name = "x".join(map(str, shape))
                parser.error(
                    f"argument --axes: {name} has no axis {max(args.axes)}; give 0 to {len(shape) - 2}"
                )


def operator_shapes(args: argparse.Namespace) -> tuple[list[Shape], list[Shape]]:
    """Return the shapes for times, and those for memory."""
    gpu = args.device == "cuda"
    shapes = args.shapes or ([(8, 97, 97), (2, 97, 97), (1, 129, 257)] if gpu else [(1, 97, 97)])
    memory = args.memory_shapes
    if memory is None:
        memory = shapes if gpu else [*shapes, (1, 193, 193)]
    return shapes, memory


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows to measure."""
    gpu = args.device == "cuda"
    channels = (args.channels // 8, args.channels)
    shapes, memory = operator_shapes(args)
    quick_choices = [name for name in args.contenders if gpu or name in QUICK]
    for level in dict.fromkeys(args.level or ["operator"]):
        axes = tuple(args.axes) if args.axes else None
        options = {"heads": args.heads, "axes": axes} if level == "operator" else {}
        for shape in dict.fromkeys([*shapes, *memory]):
            quick = shape not in shapes and args.memory_shapes is None
            for precision in args.dtypes:
                case = Case(shape, channels, precision, args.device, level, **options)
                yield Row(case, shape in shapes, shape in memory, quick_choices if quick else args.contenders)
    if args.level or args.shapes or args.heads > 1 or args.axes:
        return
    first = Case(shapes[0], channels, args.dtypes[0], args.device)
    added = [dataclasses.replace(first, level="module", precision=precision) for precision in args.dtypes]
    added.append(dataclasses.replace(first, heads=math.gcd(8, channels[0])))
    added.append(dataclasses.replace(first, shape=(2, 5, 97, 97) if gpu else (1, 5, 49, 49)))
    for case in added:
        memory_too = case.level == "module"
        yield Row(case, True, memory_too, quick_choices, LAYOUTS if gpu else ["channels_last"])


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.channels % 16:
        parser.error(f"argument --channels: {args.channels} is not a multiple of 16; give one, such as 512")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: no GPU found; give cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.dtypes is None:
        args.dtypes = default_dtypes(args.device)
    if args.device == "cpu" and "tf32" in args.dtypes:
        parser.error("argument --dtypes: tf32 needs a GPU; give other types")
    check_options(parser, args)
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            check_output_file(flag, path)
    if args.device == "cpu":
        timing.limit_memory()
    with ops.untested_kernels() if args.untested else contextlib.nullcontext():
        return compare_all(args)


def compare_all(args: argparse.Namespace) -> int:
    """Measure, print and write all cases. Return 1 if a contender was wrong, otherwise 0."""
    about = machine(args.device) | {"compiled_for": sorted(ops.DEVICE_TYPES)}
    bandwidth = timing.copy_bandwidth(args.device)
    rates = {}
    for precision in args.dtypes:
        Case((1, 1, 1), (1, 1), precision, args.device).apply_precision()
        rates[precision] = timing.matrix_rate(DTYPES[precision], args.device)
    cases: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "machine": about,
        "ceilings": {"copy_bytes_per_second": bandwidth, "matrix_flop_per_second": rates},
        "units": "seconds; peaks in addition to the inputs, and allocations, in bytes",
        "untested_kernels": os.environ.get(ops.UNTESTED) == "1",
        "cases": cases,
    }
    print(f"{about['name']}, {about['threads']} threads, PyTorch {about['torch']}, {about['date']}")
    print(
        f"system load before the run: {about['load']:.2g} (other processes distort measurements on the CPU)"
    )
    print(f"operator compiled for: {', '.join(about['compiled_for']) or 'no device'}")
    print(f"copy {bandwidth / 1e9:.4g} GB/s; matrix products in TFLOP/s: ", end="")
    print(", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in rates.items()), flush=True)
    for row in filter(Row.contenders, rows_of(args)):
        case = row.case
        results = measure_case(
            case,
            row.contenders(),
            timed=row.timed,
            memory=row.memory,
            graphs=args.graphs and args.device == "cuda",
            rounds=args.rounds,
        )
        limits = floors(case, rates[case.precision], bandwidth)
        entry = {
            "name": case.name,
            "shape": case.shape,
            "level": case.level,
            "heads": case.heads,
            "axes": case.axes,
            "channels": case.channels,
            "dtype": case.precision,
            **limits,
            "contenders": results,
            "ratios": compare(results, limits),
        }
        cases.append(entry)
        show(entry)
        report["float32_over_bfloat16"] = float32_over_bfloat16(cases)
        if args.out:
            write_file(args.out, json.dumps(report, indent=2) + "\n")
        if args.plot:
            plot(report, args.plot)
    for name, ratios in report["float32_over_bfloat16"].items():
        text = ", ".join(f"{column} {ratio:.3g}" for column, ratio in ratios.items())
        print(f"\n{name}: ratio of our float32 to our bfloat16: {text}")
    return int(any(result.get("wrong") for case in cases for result in case["contenders"].values()))


if __name__ == "__main__":
    end(main)
