"""Compare criss-cross attention with plain PyTorch, with full attention, and with the limits of the machine.

    python -m benchmarks.attention [--device cpu|cuda] [--shapes 8x97x97 ...] [--dtypes float32 bfloat16 ...]
        [--contenders ours bmm ...] [--out FILE.json] [--plot FILE.png]

Measures the time of forward and of forward + backward (gradients of query, key and value), on CUDA also as a
replayed graph, and the peak memory in addition to the inputs. The contenders are

- ours: `cc_attention.criss_cross_attention`;
- pure PyTorch: the bmm formulation (as in the published CCNet code without its extension) and the einsum
  formulation (as in mmcv), each eager and compiled;
- views: the best hand-written PyTorch, matrix products on views of channels_last tensors;
- non-local: full attention by scaled_dot_product_attention, in one head, and with the value split into heads
  that share query and key, because flash kernels do not support 512 channels of value.

Each contender runs on contiguous and on channels_last inputs (non-local only on channels_last ones, where its
tokens are views). Comparisons use the best contender of a family. The floor is the minimum time for the bytes
and FLOP that no implementation avoids, at the copy bandwidth and matrix rate measured in the same run. Each
contender is compared with float64 before it is timed. Contenders that fail are reported. Contenders that give
wrong results are not timed, and the exit status is 1. On the CPU, a contender may use half the free memory.

On the CPU, compiling takes most of the time; `--contenders ours bmm einsum views non-local` avoids it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the path has benchmarks/ instead of the project folder
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from cc_attention import criss_cross_attention, ops, reference
from tools.common import end
from utils import timing
from utils.args import Parser, positive_int, processes
from utils.environment import machine
from utils.files import check_output_file, replacing, write_file

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int]  # N, H, W

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Maximum relative error of correct results. Wrong results have errors of tenths.
ERROR_LIMITS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
TIMED = ("forward", "forward+backward")
PEERS = {name: f"best {name} / ours" for name in ("pure PyTorch", "views", "non-local")}
COLUMNS = (*TIMED, *(f"{name} graph" for name in TIMED), *(f"{name} peak" for name in TIMED))


# The peers


def bmm_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute criss-cross attention as batched matrix products over copied rows and columns.

    Source: the pure PyTorch branch of CCNet (arXiv 1811.11721), which excludes a pixel from its own column
    with -inf.
    """
    n, _, h, w = query.shape
    channels = value.shape[1]

    def columns(x: Tensor) -> Tensor:  # [N, k, H, W] -> [N * W, k, H]
        return x.permute(0, 3, 1, 2).reshape(n * w, x.shape[1], h)

    def rows(x: Tensor) -> Tensor:  # [N, k, H, W] -> [N * H, k, W]
        return x.permute(0, 2, 1, 3).reshape(n * h, x.shape[1], w)

    vertical = torch.bmm(columns(query).transpose(1, 2), columns(key)) + _diagonal(query)
    vertical = vertical.view(n, w, h, h).transpose(1, 2)  # [N, H, W, H]
    horizontal = torch.bmm(rows(query).transpose(1, 2), rows(key)).view(n, h, w, w)
    weight = F.softmax(torch.cat([vertical, horizontal], dim=3), dim=3)  # [N, H, W, H + W]
    down = weight[..., :h].transpose(1, 2).reshape(n * w, h, h)
    along = weight[..., h:].reshape(n * h, w, w)
    from_columns = torch.bmm(columns(value), down.transpose(1, 2))
    from_rows = torch.bmm(rows(value), along.transpose(1, 2))
    return (
        from_columns.view(n, w, channels, h).permute(0, 2, 3, 1)
        + from_rows.view(n, h, channels, w).permute(0, 2, 1, 3)
    )  # fmt: skip


def einsum_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute criss-cross attention as four contractions, the formulation of mmcv's CrissCrossAttention."""
    h = query.shape[2]
    vertical = torch.einsum("ncyx,ncvx->nxyv", query, key) + _diagonal(query)
    horizontal = torch.einsum("ncyx,ncyu->nyxu", query, key)
    weight = F.softmax(torch.cat([vertical.transpose(1, 2), horizontal], dim=3), dim=3)
    from_columns = torch.einsum("ncvx,nyxv->ncyx", value, weight[..., :h])
    return from_columns + torch.einsum("ncyu,nyxu->ncyx", value, weight[..., h:])


def view_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute criss-cross attention as products of views, without copies for channels_last inputs."""
    h = query.shape[2]
    diagonal = _diagonal(query)
    query, key, value = (x.permute(0, 2, 3, 1) for x in (query, key, value))  # [N, H, W, k]
    query_down, key_down, value_down = (x.transpose(1, 2) for x in (query, key, value))  # [N, W, H, k]
    vertical = (query_down @ key_down.mT + diagonal).transpose(1, 2)  # [N, H, W, H]
    weight = F.softmax(torch.cat([vertical, query @ key.mT], dim=3), dim=3)  # [N, H, W, H + W]
    from_columns = weight[..., :h].transpose(1, 2) @ value_down
    return (weight[..., h:] @ value + from_columns.transpose(1, 2)).permute(0, 3, 1, 2)


def _diagonal(query: Tensor) -> Tensor:
    """Return [H, H] with -inf on the diagonal: the row of a pixel already contains it."""
    h = query.shape[2]
    return torch.diag(torch.full((h,), -torch.inf, device=query.device, dtype=query.dtype))


def non_local(query: Tensor, key: Tensor, value: Tensor, width: int = 0) -> Tensor:
    """Compute full attention, in which each pixel attends to all, without scaling as in CCNet.

    Args:
        query: [N, c, H, W].
        key: [N, c, H, W].
        value: [N, C, H, W].
        width: 0 for one head. Otherwise the channels of value are split into heads of width * c channels,
            which share query and key, padded with zeros to that many channels.
    """
    _, c, h, w = query.shape
    # [N, k, H, W] -> [N, H * W, k], in channels_last without a copy
    query, key, value = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (query, key, value))
    heads = value.shape[2] // (width * c) if width else 1
    value = value.unflatten(2, (heads, -1)).transpose(1, 2)  # [N, heads, H * W, C / heads]
    padding = (0, width * c - c) if width else (0, 0)
    query, key = (F.pad(x, padding).unsqueeze(1).expand(-1, heads, -1, -1) for x in (query, key))
    out = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return out.transpose(1, 2).flatten(2).unflatten(1, (h, w)).permute(0, 3, 1, 2)


def exact_non_local(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute `non_local` step by step, as its reference."""
    weight = F.softmax(query.flatten(2).mT @ key.flatten(2), dim=2)  # [N, pixel, pixel seen]
    return (value.flatten(2) @ weight.mT).view(value.shape)


#: Family, function and reference by name. The heads of non-local have as many channels as the key, or twice
#: as many.
FORMULATIONS: dict[str, tuple[str, Function, Function]] = {
    "ours": ("ours", criss_cross_attention, reference.criss_cross_attention),
    "bmm": ("pure PyTorch", bmm_attention, reference.criss_cross_attention),
    "einsum": ("pure PyTorch", einsum_attention, reference.criss_cross_attention),
    "views": ("views", view_attention, reference.criss_cross_attention),
    "non-local": ("non-local", non_local, exact_non_local),
    "non-local split": ("non-local", partial(non_local, width=1), exact_non_local),
    "non-local split wide": ("non-local", partial(non_local, width=2), exact_non_local),
}
#: Choices of --contenders, and their formulations.
CHOICES = {
    "ours": ["ours"],
    "bmm": ["bmm"],
    "einsum": ["einsum"],
    "views": ["views"],
    "bmm-compiled": ["bmm"],
    "einsum-compiled": ["einsum"],
    "non-local": ["non-local", "non-local split", "non-local split wide"],
}


@dataclass(frozen=True)
class Contender:
    """A formulation with a memory format of the inputs."""

    formulation: str
    layout: str
    compiled: bool

    @property
    def kind(self) -> str:
        """Return the formulation, and whether it is compiled."""
        return f"{self.formulation} compiled" if self.compiled else self.formulation

    @property
    def name(self) -> str:
        """Return the kind and the memory format."""
        return f"{self.kind}, {self.layout}"

    @property
    def family(self) -> str:
        """Return the family of the formulation."""
        return FORMULATIONS[self.formulation][0]

    def function(self) -> Function:
        """Return the function to measure."""
        function = FORMULATIONS[self.formulation][1]
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compiled else function


def make_contenders(names: list[str]) -> list[Contender]:
    """Return the contenders for choices of --contenders."""
    return [
        Contender(formulation, layout, name.endswith("-compiled"))
        for name in names
        for formulation in CHOICES[name]
        for layout in (LAYOUTS if CHOICES[name] == [formulation] else ["channels_last"])
    ]


# The floors


@dataclass(frozen=True)
class Work:
    """FLOP and bytes of device memory that no implementation avoids."""

    flop: int
    bytes: int

    def seconds(self, flop_per_second: float, bytes_per_second: float) -> float:
        """Return the minimum time: FLOP and bytes overlap, so that the slower one decides."""
        return max(self.flop / flop_per_second, self.bytes / bytes_per_second)


def necessary_work(shape: Shape, channels: tuple[int, int], element_size: int) -> tuple[Work, Work]:
    """Return the necessary work of forward and backward.

    There are S = N H W (H + W - 1) scores. The forward consists of two products, query key and weight value:
    2 S (c + C) FLOP. The backward consists of five, for the scores, grad_weight, grad_value, grad_query and
    grad_key: 2 S (3 c + 2 C) FLOP. Each tensor moves once. The forward reads query, key and value, and writes
    the result and 4 bytes per pixel (logarithm of the denominator of the softmax). The backward reads all of
    these and the gradient of the result, and writes three gradients.

    Args:
        shape: N, H, W.
        channels: c and C.
        element_size: bytes of an element.
    """
    (n, h, w), (c, value) = shape, channels
    pixels = n * h * w
    scores = pixels * (h + w - 1)
    forward = Work(2 * scores * (c + value), pixels * (element_size * (2 * c + 2 * value) + 4))
    backward = Work(
        2 * scores * (3 * c + 2 * value),
        pixels * (element_size * (2 * c + 3 * value) + 4 + element_size * (2 * c + value)),
    )
    return forward, backward


# Measuring


@dataclass(frozen=True)
class Case:
    """Inputs on which contenders are compared."""

    shape: Shape
    channels: tuple[int, int]  # c, C
    precision: str  # a key of DTYPES
    device: str

    def apply_precision(self) -> None:
        """Set the precision of matrix products for the process."""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def inputs(self, layout: str) -> list[Tensor]:
        """Return random query, key and value, which require gradients, and a gradient of the result.

        Scores have variance 1: errors of much larger ones would be dominated by the rounding of bfloat16.
        """
        n, h, w = self.shape
        c, channels = self.channels
        tensors = [
            torch.empty(
                (n, k, h, w),
                dtype=DTYPES[self.precision],
                device=self.device,
                memory_format=LAYOUTS[layout],
            ).normal_(std=std)
            for k, std in ((c, c**-0.25), (c, c**-0.25), (channels, 1.0), (channels, 1.0))
        ]
        return [*(t.requires_grad_() for t in tensors[:3]), tensors[3]]

    def input_sets(self, layout: str) -> list[list[Tensor]]:
        """Return several sets of inputs, so that none is found in a cache again.

        On a GPU they exceed the L2 cache four times. On the CPU two are enough, because the contenders run
        alternately.
        """
        count = 2
        if self.device == "cuda":
            n, h, w = self.shape
            one = n * h * w * (2 * self.channels[0] + self.channels[1]) * DTYPES[self.precision].itemsize
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            count = min(max(4 * cache // one + 1, count), 32)
        return [self.inputs(layout) for _ in range(count)]


def forward(function: Function, sets: list[list[Tensor]]) -> None:
    """Call a function on each set of inputs, without gradients."""
    with torch.no_grad():
        for query, key, value, _ in sets:
            function(query, key, value)


def forward_backward(function: Function, sets: list[list[Tensor]]) -> None:
    """Call a function on each set of inputs, and compute the gradients of query, key and value."""
    for query, key, value, grad in sets:
        torch.autograd.grad(function(query, key, value), (query, key, value), grad)


ACTIONS = {"forward": forward, "forward+backward": forward_backward}


def relative_error(contender: Contender, function: Function, case: Case) -> float:
    """Return the largest ||x - exact|| / ||exact|| of the result and its gradients.

    Inputs are two narrow pictures, with rows and with columns as long as those of the case. Compiled
    functions run only on the first one, because each shape takes a compilation.
    """
    _, h, w = case.shape
    exact_function = FORMULATIONS[contender.formulation][2]
    errors = []
    for shape in ((2, 5, w), (2, h, 5))[: 1 if contender.compiled else 2]:
        *operands, grad = Case(shape, case.channels, case.precision, case.device).inputs(contender.layout)
        exact_operands = [x.detach().double().contiguous().requires_grad_() for x in operands]
        result = function(*operands)
        exact = exact_function(*exact_operands)
        results = [result, *torch.autograd.grad(result, operands, grad)]
        exacts = [exact, *torch.autograd.grad(exact, exact_operands, grad.double())]
        errors += [
            float((x.detach().double() - y.detach()).norm() / y.detach().norm())
            for x, y in zip(results, exacts, strict=True)
        ]
    # max() of Python may lose a NaN.
    return float(torch.tensor(errors).max())


def peak(contender: Contender, function: Function, case: Case, action: str) -> int:
    """Return the peak memory of an action in bytes, including its results, without its inputs."""
    if case.device == "cuda":
        run, sets = ACTIONS[action], [case.inputs(contender.layout)]
        run(function, sets)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(function, sets)
        return torch.cuda.max_memory_allocated() - before
    if contender.compiled:
        raise RuntimeError("can't be measured: the memory of the compiler is in the same process")
    # A process forked from one that has only imported PyTorch: clean, and started quickly.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cc_attention"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_of_process, contender, case, action, torch.get_num_threads()).result()


def peak_of_process(contender: Contender, case: Case, action: str, threads: int) -> int:
    """Return the peak memory of an action on the CPU; for a new process."""
    torch.set_num_threads(threads)
    run, function = ACTIONS[action], contender.function()
    small = Case((1, 3, 5), case.channels, case.precision, case.device)
    run(function, [small.inputs(contender.layout)])  # starts libraries and threads
    sets = [case.inputs(contender.layout)]
    before = timing.resident_peak()
    run(function, sets)
    return timing.resident_peak() - before


def measure_case(
    case: Case, contenders: list[Contender], *, timed: bool, memory: bool, graphs: bool, rounds: int
) -> dict[str, Any]:
    """Measure the contenders of a case.

    Args:
        case: the inputs.
        contenders: the functions to compare.
        timed: whether to measure times.
        memory: whether to measure peak memory.
        graphs: whether to measure CUDA graphs.
        rounds: number of measurements.

    Returns:
        Errors, times (seconds) and peaks (bytes) by contender; "failed" holds the reasons of missing columns.
    """
    case.apply_precision()
    if any(contender.compiled for contender in contenders):
        torch.compiler.reset()  # the number of compilations of a function is limited
    results: dict[str, dict[str, Any]] = {}
    functions: dict[str, Function] = {}
    for contender in contenders:
        result = results[contender.name] = {"kind": contender.kind, "family": contender.family, "failed": {}}
        try:
            function = contender.function()
            result["error"] = relative_error(contender, function, case)
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
                    results[contender.name][f"{action} peak"] = peak(
                        contender, functions[contender.name], case, action
                    )
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
    count = len(sets["contiguous"])
    for action, run in ACTIONS.items():
        runs = {c.name: partial(run, functions[c.name], sets[c.layout]) for c in contenders}
        collect(results, action, runs, case.device, rounds, count)
        if graphs:
            replays: dict[str, timing.Run] = {}
            for name, launched in runs.items():
                try:
                    replays[name] = timing.captured(launched)
                except Exception as error:  # not every function can be captured
                    results[name]["failed"][f"{action} graph"] = timing.reason(error)
            collect(results, f"{action} graph", replays, case.device, rounds, count)


def collect(
    results: dict[str, dict[str, Any]],
    column: str,
    runs: Mapping[str, timing.Run],
    device: str,
    rounds: int,
    sets: int,
) -> None:
    """Add the times of runs, each over `sets` sets of inputs, to a column of the results."""
    times, failures = timing.interleaved(runs, device, rounds)
    for name, values in times.items():
        results[name][column] = timing.quartiles([value / sets for value in values])
    for name, why in failures.items():
        results[name]["failed"][column] = why


# Comparing


def number(result: dict[str, Any], column: str) -> float | None:
    """Return the median seconds, or the bytes, of a column of the results of a contender."""
    value = result.get(column)
    return value["median"] if isinstance(value, dict) else value


def best(results: dict[str, dict[str, Any]], column: str, **key: str) -> tuple[str, float] | None:
    """Return name and value of the best contender of a family or kind in a column."""
    ((field, wanted),) = key.items()
    found = [
        (name, value)
        for name, result in results.items()
        if result[field] == wanted and (value := number(result, column)) is not None
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def compare(results: dict[str, dict[str, Any]], floors: dict[str, float]) -> dict[str, Any]:
    """Return for each column our best value, its ratio to the floor, and the ratios of other families."""
    ratios: dict[str, Any] = {}
    for column in COLUMNS:
        ours = best(results, column, family="ours")
        if ours is None:
            continue
        entry: dict[str, Any] = {"ours": {"name": ours[0], "value": ours[1]}}
        for family in PEERS:
            if peer := best(results, column, family=family):
                entry[family] = {
                    "name": peer[0],
                    "value": peer[1],
                    "over_ours": peer[1] / max(ours[1], 1e-12),
                }
        floor = floors.get(column.removesuffix(" graph"))
        if floor:
            entry["ours_over_floor"] = ours[1] / floor
        ratios[column] = entry
    return ratios


def float32_over_bfloat16(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the ratio of our float32 to our bfloat16 values, by shape and column."""
    result: dict[str, dict[str, float]] = {}
    for wide in (case for case in cases if case["dtype"] == "float32"):
        for narrow in (c for c in cases if c["dtype"] == "bfloat16" and c["shape"] == wide["shape"]):
            columns = [column for column in wide["ratios"] if column in narrow["ratios"]]
            result["x".join(map(str, wide["shape"]))] = {
                column: wide["ratios"][column]["ours"]["value"]
                / max(narrow["ratios"][column]["ours"]["value"], 1e-12)
                for column in columns
            }
    return result


# Tables and charts


def title(case: dict[str, Any]) -> str:
    """Return shape and dtype of a case."""
    return f"{'x'.join(map(str, case['shape']))} {case['dtype']}"


def show(case: dict[str, Any]) -> None:
    """Print a case as a table: milliseconds and megabytes, comparisons, and failures."""
    columns = [column for column in COLUMNS if any(column in r for r in case["contenders"].values())]
    width = max(map(len, [*case["contenders"], *PEERS.values()]))

    def cell(column: str, value: float | None, scale: float | None = None) -> str:
        if value is None:
            return "-"
        return f"{value * (scale or (1e-6 if column.endswith('peak') else 1e3)):.4g}"

    def line(name: str, cells: list[str]) -> None:
        print(
            f"  {name:<{width}}"
            + "".join(f"  {text:>{len(head)}}" for text, head in zip(cells, headings, strict=True))
        )

    headings = [f"{column} {'MB' if column.endswith('peak') else 'ms'}" for column in columns] + ["error"]
    print(f"\n{title(case)}, channels {case['channels'][0]}/{case['channels'][1]}")
    line("", headings)
    for name, result in case["contenders"].items():
        error = f"{result['error']:.0e}" if "error" in result else "-"
        line(name, [cell(column, number(result, column)) for column in columns] + [error])
    line("floor", [cell(c, case["floors"].get(c.removesuffix(" graph"))) for c in columns] + [""])
    ratios = [case["ratios"].get(column, {}) for column in columns]
    for family, label in PEERS.items():
        values = [ratio.get(family, {}).get("over_ours") for ratio in ratios]
        line(label, [cell("", value, 1) for value in values] + [""])
    line("ours / floor", [cell("", ratio.get("ours_over_floor"), 1) for ratio in ratios] + [""])
    for name, result in case["contenders"].items():
        for why in dict.fromkeys(result["failed"].values()):
            missing = ", ".join(column for column, reason in result["failed"].items() if reason == why)
            print(f"  {name}: {missing}: {why}")
    sys.stdout.flush()


def plot(report: dict[str, Any], path: str) -> None:
    """Draw a bar chart with a panel for each case and time.

    Each bar is the best time of a kind of contender, with or without a CUDA graph.
    """
    colors = {
        "ours": (31, 119, 180),
        "pure PyTorch": (150, 150, 150),
        "views": (110, 110, 110),
        "non-local": (214, 158, 96),
    }
    ink, pale = (30, 30, 30), (222, 222, 222)
    bold, plain = ImageFont.load_default(17), ImageFont.load_default(14)
    panels = []  # (title, floor in ms, [(kind, family, ms)])
    for case in report["cases"]:
        kinds = {result["kind"]: result["family"] for result in case["contenders"].values()}
        for action in TIMED:
            bars = []
            for kind, family in kinds.items():
                found = [best(case["contenders"], c, kind=kind) for c in (action, f"{action} graph")]
                if values := [value for _, value in filter(None, found)]:
                    bars.append((kind, family, 1e3 * min(values)))
            if bars:
                panels.append((f"{title(case)}, {action}", 1e3 * case["floors"][action], bars))
    bar, column, left, scale = 24, 640, 165, 350
    height = 70 + 24 * max((len(bars) for _, _, bars in panels), default=0)
    picture = Image.new("RGB", (2 * column, 60 + height * ((len(panels) + 1) // 2)), "white")
    draw = ImageDraw.Draw(picture)
    about = report["machine"]
    draw.text((16, 10), "Criss-cross attention: milliseconds, logarithmic scale, lower is better", ink, bold)
    text = "dashed: floor, at the rate of PyTorch's matrix products"
    draw.text((16, 34), f"{about['name']}, PyTorch {about['torch']}; {text}", ink, plain)
    for index, (heading, floor, bars) in enumerate(panels):
        x, y = column * (index % 2), 60 + height * (index // 2)
        draw.text((x + 16, y + 12), heading, ink, bold)
        times = [floor, *(ms for _, _, ms in bars)]
        low, high = math.log(min(times) / 2), math.log(max(times))
        top = y + 42
        for row, (kind, family, ms) in enumerate(bars):
            middle = top + bar * row + bar // 2
            end = x + left + round(scale * (math.log(ms) - low) / (high - low))
            draw.text((x + left - 8, middle), kind, ink, plain, anchor="rm")
            draw.rectangle((x + left, middle - 8, end, middle + 8), colors[family])
            draw.text((end + 6, middle), f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}", ink, plain, anchor="lm")
        bottom = top + bar * len(bars)
        draw.line((x + left, top, x + left, bottom), pale)
        at = x + left + round(scale * (math.log(floor) - low) / (high - low))
        for dash in range(top, bottom, 8):
            draw.line((at, dash, at, dash + 4), ink)
    with replacing(path) as temporary:
        picture.save(temporary)


# The command


def shape_argument(text: str) -> Shape:
    """Parse NxHxW, such as 8x97x97."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; give NxHxW such as 8x97x97")
    n, h, w = map(int, text.split("x"))
    return n, h, w


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
        "--shapes",
        nargs="+",
        type=shape_argument,
        metavar="NxHxW",
        help="shapes of the inputs (default: 8x97x97 2x97x97 1x129x257, on the CPU 1x97x97)",
    )
    add(
        "--memory-shapes",
        nargs="*",
        type=shape_argument,
        metavar="NxHxW",
        help="shapes for the peak memory, or none (default: those of --shapes, on the CPU also 1x193x193)",
    )
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16"],
        help="data types; tf32 only on CUDA (default: float32 bfloat16)",
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
    add("--rounds", type=positive_int, default=5, help="number of measurements (default: %(default)s)")
    add("--threads", type=processes, help="number of CPU threads (default: that of PyTorch)")
    add("--out", metavar="FILE.json", help="JSON file to write the results to, updated after each case")
    add("--plot", metavar="FILE.png", help="file to write a bar chart of the times to")
    return parser


def cases_of(args: argparse.Namespace) -> Iterator[tuple[Case, bool, bool]]:
    """Yield each case, and whether its time and its memory are measured."""
    gpu = args.device == "cuda"
    shapes = args.shapes or ([(8, 97, 97), (2, 97, 97), (1, 129, 257)] if gpu else [(1, 97, 97)])
    memory = args.memory_shapes
    if memory is None:
        memory = shapes if gpu else [*shapes, (1, 193, 193)]
    for shape in dict.fromkeys([*shapes, *memory]):
        for precision in args.dtypes:
            case = Case(shape, (args.channels // 8, args.channels), precision, args.device)
            yield case, shape in shapes, shape in memory


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.channels % 16:
        parser.error(f"argument --channels: {args.channels} is not a multiple of 16; give one, such as 512")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: no GPU found; give cpu")
    if args.device == "cpu" and "tf32" in args.dtypes:
        parser.error("argument --dtypes: tf32 needs a GPU; give other types")
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path:
            check_output_file(flag, path)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        timing.limit_memory()
    return compare_all(args)


def compare_all(args: argparse.Namespace) -> int:
    """Measure, print and write all cases. Return 1 if a contender was wrong, otherwise 0."""
    about = machine(args.device) | {"compiled_for": sorted(ops.DEVICE_TYPES)}
    contenders = make_contenders(args.contenders)
    bandwidth = timing.copy_bandwidth(args.device)
    rates = {}
    for precision in args.dtypes:
        Case((1, 1, 1), (1, 1), precision, args.device).apply_precision()
        rates[precision] = timing.matrix_rate(DTYPES[precision], args.device)
    cases: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "machine": about,
        "ceilings": {"copy_bytes_per_second": bandwidth, "matrix_flop_per_second": rates},
        "units": "seconds; peaks in addition to the inputs in bytes",
        "cases": cases,
    }
    print(f"{about['name']}, {about['threads']} threads, PyTorch {about['torch']}, {about['date']}")
    print(
        f"system load before the run: {about['load']:.2g} (other processes distort measurements on the CPU)"
    )
    print(f"operator compiled for: {', '.join(about['compiled_for']) or 'no device'}")
    print(f"copy {bandwidth / 1e9:.4g} GB/s; matrix products in TFLOP/s: ", end="")
    print(", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in rates.items()), flush=True)
    for case, timed, memory in cases_of(args):
        graphs = args.graphs and args.device == "cuda"
        results = measure_case(
            case, contenders, timed=timed, memory=memory, graphs=graphs, rounds=args.rounds
        )
        work = necessary_work(case.shape, case.channels, DTYPES[case.precision].itemsize)
        ahead, back = (part.seconds(rates[case.precision], bandwidth) for part in work)
        floors = {"forward": ahead, "backward": back, "forward+backward": ahead + back}
        entry = {
            "shape": case.shape,
            "channels": case.channels,
            "dtype": case.precision,
            "work": {name: vars(part) for name, part in zip(("forward", "backward"), work, strict=True)},
            "floors": floors,
            "contenders": results,
            "ratios": compare(results, floors),
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
