"""Plant bugs into fused/csrc/cuda/loss.cu, one at a time, and report which of them the tests catch.

    python tests/kernels/planted_loss_bugs.py [NAME ...]

The exit status is 1 if one is not caught. "Caught" means that one of CHECKS fails with the kernels in the
emulator.
"""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # run as a script, outside pytest

import test_fused_loss_cuda as tests  # noqa: E402
from emulator import build  # noqa: E402
from emulator.fused_loss import FUSED, LossKernels  # noqa: E402
from test_fused_loss_cuda import F32, F64, SHAPES  # noqa: E402

LOSS = "cuda/loss.cu"


class Bug(NamedTuple):
    name: str
    right: str  # occurs once in the file
    wrong: str

    def plant(self) -> dict[str, str]:
        text = (FUSED / LOSS).read_text()
        assert text.count(self.right) == 1, f"{self.name}: {text.count(self.right)} times in {LOSS}"
        return {LOSS: text.replace(self.right, self.wrong)}


BUGS = [
    # Upsampling
    Bug("corners that are not aligned", "static_cast<S>(coarse - 1) /", "static_cast<S>(coarse) /"),
    Bug("weights swapped", "return {1 - upper, upper};", "return {upper, 1 - upper};"),
    Bug("first pixel: not searched", "while (pixel < fine && lower(pixel) < node) ++pixel;", ""),
    Bug("first pixel: starts too high", "* inverse) - 1, 0);", "* inverse) + 1, 0);"),
    Bug("right of the last node", "right = a.columns.step(left);", "right = 1;"),
    Bug("below the last node", "down = a.rows.step(node) * a.columns.coarse;", "down = a.columns.coarse;"),
    Bug("NaN without upsampling", "coarse && coarse != fine ? 1 : 0", "coarse ? 1 : 0"),
    Bug("logits of the first image", "static_cast<int64_t>(image) * a.classes * plane + ", ""),
    Bug("pitch of the pixels", "(node * a.columns.coarse + left)", "(node * a.columns.fine + left)"),
    # Items
    Bug("items: tail", "exists = index < items;", "exists = true;"),
    Bug("items: block too many", "(items + kThreads - 1u) / kThreads", "items / kThreads + 1u"),
    # Softmax and loss
    Bug(
        "softmax: last logit",
        "std::fmax(result[r].top, rows[r].blend(above, below))",
        "rows[r].blend(above, below)",
    ),
    Bug("softmax: base 2", "multiply(a - b, kLog2e)", "multiply(a - b, 1)"),
    Bug("loss: rows twice", "if (first + r >= end) continue;", ""),
    Bug(
        "loss: rows left out",
        "first += R) {\n      Weights<S> rows[R];\n",
        "first += R + 1) {\n      Weights<S> rows[R];\n",
    ),
    Bug("loss: ignored class counts", "if (label != labels.ignored) {", "if (labels.is_class(label)) {"),
    Bug("loss: wrong target", "if (!is_class(label)) return NAN;", "if (!is_class(label)) return 0;"),
    Bug("loss: target of 32 bits", "is_class(int64_t label) const", "is_class(int label) const"),
    Bug("loss: at the threshold", "softmax[r]) > *threshold", "softmax[r]) >= *threshold"),
    Bug(
        "loss: NaN and a threshold",
        "!(probability_of(logit, softmax[r]) > *threshold)",
        "probability_of(logit, softmax[r]) <= *threshold",
    ),
    Bug(
        "loss: another exponential",
        "probability_of(logit, softmax[r]) >",
        "std::exp(logit - softmax[r].top) / softmax[r].total >",
    ),
    Bug("loss: no class weights", "return class_weights ? class_weights[label] : 1;", "return 1;"),
    Bug("loss: unweighted", "loss += weight * (", "loss += ("),
    Bug("loss: counts pixels", "weights += weight;", "weights += 1;"),
    Bug("sum: warps", "for (int warp = 1; warp < kWarps;", "for (int warp = 1; warp < kWarps - 1;"),
    Bug("sum: lanes", "lanes = kWarp / 2; lanes > 0;", "lanes = kWarp / 2; lanes > 1;"),
    Bug("sum: no barrier", "  __syncthreads();\n  for (int warp = 1;", "  for (int warp = 1;"),
    Bug("sum: last block", "block < blocks; block +=", "block < blocks - 1; block +="),
    # Gradient
    Bug("gradient: no interval above", "(first_node > 0 ? a.rows.step(first_node - 1) : 0)", "0"),
    Bug("gradient: strips without upsampling", "s.H == s.h ? 1 : kNodeRows", "kNodeRows"),
    Bug("gradient: row of others", "if (node >= first_node && first_class", "if (first_class"),
    Bug("gradient: not passed on", "sums[k] = next[k];", "sums[k] = 0;"),
    Bug("gradient: classes too many", " && first_class + k < a.classes) vertical", ") vertical"),
    Bug("gradient: classes overlap", "% groups * K;", "% groups * (K - 1);"),
    Bug("gradient: class of first group", "static_cast<int>(label) - first_class", "static_cast<int>(label)"),
    Bug(
        "gradient: one row of logits",
        "below[k] = column.below(class_of(k));",
        "below[k] = column.above(class_of(k));",
    ),
    Bug("gradient: weight of rows", "sums[k] += row.lower * gradient;", "sums[k] += row.upper * gradient;"),
    Bug("gradient: of pixels that do not count", "if (pixel.scale == 0) continue;", ""),
    Bug("gradient: scale", "scale = weight / softmax[r].total;", "scale = 1 / softmax[r].total;"),
    Bug("gradient: columns before", "int x = a.columns.first(node - 1);", "int x = middle;"),
    Bug("workspace: one image", "pixels(s.N * s.h * s.w)", "pixels(s.h * s.w)"),
    Bug("workspace: width", "vertical(s.N * s.C * s.H * s.w)", "vertical(s.N * s.C * s.H * s.W)"),
    # Coarse probability
    Bug("coarse: outside", "return {position <= pixels - 1,", "return {true,"),
    Bug(
        "coarse: contraction",
        "device::add(sum, device::multiply(device::multiply(probability, y_weight), x_weight))",
        "device::fused_multiply_add(device::multiply(probability, y_weight), x_weight, sum)",
    ),
    Bug("coarse: nearest", "std::floor(position + 0.5)", "std::floor(position)"),
    Bug("coarse: upper neighbor", "min(lower + 1, pixels - 1),", "lower,"),
    Bug("coarse: label outside", "inside ? target[", "true ? target["),
    Bug("coarse: wrong target", "sum = NAN;", "sum = 0;"),
    # Classes
    Bug("classes: ties", "if (logit > best[r] ||", "if (logit >= best[r] ||"),
    Bug("classes: NaN", " || logit != logit)", ")"),
    Bug("classes: below zero", "best[r] = -INFINITY;", "best[r] = 0;"),
    Bug("classes: rows too many", "if (first + r < end)\n", "if (true)\n"),
    Bug("sizes: 32 bits", "&& fits(s.h * s.w) &&", "&&"),
]

BOTH = (F32, F64)
#: Tests and their arguments after the kernels.
CHECKS: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    *((tests.test_as_exact_as_pytorch, (dtype, shape)) for dtype in BOTH for shape in SHAPES),
    *((tests.test_class_weights_and_threshold, (dtype, SHAPES[0])) for dtype in BOTH),
    (tests.test_ignored_may_be_any_number, (0,)),
    *((tests.test_logits_that_are_not_finite, (size, math.nan)) for size in ((41, 49), (6, 7))),
    *((tests.test_large_logits, (dtype,)) for dtype in BOTH),
    *(
        (tests.test_target_that_is_no_class_gives_nan, (wrong, optional))
        for wrong in (-1, 2**32 + 1)
        for optional in ("", "threshold")
    ),
    *((tests.test_coarse_probability, (dtype, shape)) for dtype in BOTH for shape in SHAPES),
    *(
        (tests.test_ohem_with_the_same_bits, (dtype, size, factor, ignored))
        for dtype in BOTH
        for size, factor in (((55, 58), 4), ((30, 117), 8))
        for ignored in (0, tests.IGNORED)
    ),
    (tests.test_coarse_target_that_is_no_class_gives_nan, ()),
    *((tests.test_upsampled_classes, (dtype, shape)) for dtype in BOTH for shape in SHAPES),
    (tests.test_classes_of_equal_and_of_missing_logits, ()),
    (tests.test_the_same_bits_in_every_order_of_threads, (F32, SHAPES[0])),
    (tests.test_sizes_beyond_the_limits_are_refused, ((1, 1, 1, 1, 70_000, 70_000),)),
]
WITHOUT_BACKEND = (
    tests.test_the_same_bits_in_every_order_of_threads,
    tests.test_sizes_beyond_the_limits_are_refused,
)


def caught(edits: dict[str, str]) -> str | None:
    """Return how the tests catch the edited kernels, or None if they do not.

    They run in a process of their own, whose memory a bug may write all over.
    """
    library = build(edits, csrc=FUSED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["planted_loss_bugs"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(failure, library).result()
        except BrokenProcessPool:
            return "the process died"


def failure(library: Path) -> str | None:
    """Return the first failure of the kernels in a library, or None."""
    torch.set_num_threads(1)  # the tensors are small
    kernels = LossKernels(library)
    backend = tests.on_emulator(kernels)
    for test, arguments in CHECKS:
        try:
            test(kernels if test in WITHOUT_BACKEND else backend, *arguments)
        except (AssertionError, RuntimeError, pytest.fail.Exception) as error:
            return f"{test.__name__}{arguments}: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def main(names: list[str]) -> int:
    if unknown := set(names) - {bug.name for bug in BUGS}:
        print(f"planted_loss_bugs.py: no such bug: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [bug for bug in BUGS if not names or bug.name in names]
    if how := caught({}):
        print(f"planted_loss_bugs.py: the kernels fail without a bug: {how}", file=sys.stderr)
        return 1
    missed = 0
    for bug in chosen:
        start = time.monotonic()
        how = caught(bug.plant())
        missed += how is None
        print(f"{bug.name:38} {time.monotonic() - start:5.1f} s  {how or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
