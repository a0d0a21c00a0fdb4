"""Bugs to plant into the CUDA kernels of the loss (see planted_bugs.py)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_fused_loss_cuda as tests
import torch
from emulator.fused_loss import FUSED, LossKernels
from planting import Bug, Suite
from test_fused_loss_cuda import F32, F64, SHAPES

LOSS_CU = "cuda/loss.cu"

#: Name, the right text, the wrong text.
TABLE = [
    # Upsampling
    ("corners that are not aligned", "static_cast<S>(coarse - 1) /", "static_cast<S>(coarse) /"),
    ("weights swapped", "return {1 - upper, upper};", "return {upper, 1 - upper};"),
    ("first pixel: not searched", "while (pixel < fine && lower(pixel) < node) ++pixel;", ""),
    ("first pixel: starts too high", "* inverse) - 1, 0);", "* inverse) + 1, 0);"),
    ("right of the last node", "right = a.columns.step(left);", "right = 1;"),
    ("below the last node", "down = a.rows.step(node) * a.columns.coarse;", "down = a.columns.coarse;"),
    ("NaN without upsampling", "coarse && coarse != fine ? 1 : 0", "coarse ? 1 : 0"),
    ("logits of the first image", "static_cast<int64_t>(image) * a.classes * plane + ", ""),
    ("pitch of the pixels", "(node * a.columns.coarse + left)", "(node * a.columns.fine + left)"),
    # Items
    ("items: tail", "exists = index < items;", "exists = true;"),
    ("items: block too many", "(items + kThreads - 1u) / kThreads", "items / kThreads + 1u"),
    # Softmax and loss
    (
        "softmax: last logit",
        "std::fmax(result[r].top, rows[r].blend(above, below))",
        "rows[r].blend(above, below)",
    ),
    ("softmax: base 2", "multiply(a - b, kLog2e)", "multiply(a - b, 1)"),
    ("loss: rows twice", "if (first + r >= end) continue;", ""),
    (
        "loss: rows left out",
        "first += R) {\n      Weights<S> rows[R];\n",
        "first += R + 1) {\n      Weights<S> rows[R];\n",
    ),
    ("loss: ignored class counts", "if (label != labels.ignored) {", "if (labels.is_class(label)) {"),
    ("loss: wrong target", "if (!is_class(label)) return NAN;", "if (!is_class(label)) return 0;"),
    ("loss: target of 32 bits", "is_class(int64_t label) const", "is_class(int label) const"),
    ("loss: at the threshold", "softmax[r]) > *threshold", "softmax[r]) >= *threshold"),
    (
        "loss: NaN and a threshold",
        "!(probability_of(logit, softmax[r]) > *threshold)",
        "probability_of(logit, softmax[r]) <= *threshold",
    ),
    (
        "loss: another exponential",
        "probability_of(logit, softmax[r]) >",
        "std::exp(logit - softmax[r].top) / softmax[r].total >",
    ),
    ("loss: no class weights", "return class_weights ? class_weights[label] : 1;", "return 1;"),
    ("loss: unweighted", "loss += weight * (", "loss += ("),
    ("loss: counts pixels", "weights += weight;", "weights += 1;"),
    ("sum: warps", "for (int warp = 1; warp < kWarps;", "for (int warp = 1; warp < kWarps - 1;"),
    ("sum: lanes", "lanes = kWarp / 2; lanes > 0;", "lanes = kWarp / 2; lanes > 1;"),
    ("sum: no barrier", "  __syncthreads();\n  for (int warp = 1;", "  for (int warp = 1;"),
    ("sum: last block", "block < blocks; block +=", "block < blocks - 1; block +="),
    # Gradient
    ("gradient: no interval above", "(first_node > 0 ? a.rows.step(first_node - 1) : 0)", "0"),
    ("gradient: strips without upsampling", "s.H == s.h ? 1 : kNodeRows", "kNodeRows"),
    ("gradient: row of others", "if (node >= first_node && first_class", "if (first_class"),
    ("gradient: not passed on", "sums[k] = next[k];", "sums[k] = 0;"),
    ("gradient: classes too many", " && first_class + k < a.classes) vertical", ") vertical"),
    ("gradient: classes overlap", "% groups * K;", "% groups * (K - 1);"),
    ("gradient: class of first group", "static_cast<int>(label) - first_class", "static_cast<int>(label)"),
    (
        "gradient: one row of logits",
        "below[k] = column.below(class_of(k));",
        "below[k] = column.above(class_of(k));",
    ),
    ("gradient: weight of rows", "sums[k] += row.lower * gradient;", "sums[k] += row.upper * gradient;"),
    ("gradient: of pixels that do not count", "if (pixel.scale == 0) continue;", ""),
    ("gradient: scale", "scale = weight / softmax[r].total;", "scale = 1 / softmax[r].total;"),
    ("gradient: columns before", "int x = a.columns.first(node - 1);", "int x = middle;"),
    ("workspace: one image", "pixels(s.N * s.h * s.w)", "pixels(s.h * s.w)"),
    ("workspace: width", "vertical(s.N * s.C * s.H * s.w)", "vertical(s.N * s.C * s.H * s.W)"),
    # Coarse probability
    ("coarse: outside", "return {position <= pixels - 1,", "return {true,"),
    (
        "coarse: contraction",
        "device::add(sum, device::multiply(device::multiply(probability, y_weight), x_weight))",
        "device::fused_multiply_add(device::multiply(probability, y_weight), x_weight, sum)",
    ),
    ("coarse: nearest", "std::floor(position + 0.5)", "std::floor(position)"),
    ("coarse: upper neighbor", "min(lower + 1, pixels - 1),", "lower,"),
    ("coarse: label outside", "inside ? target[", "true ? target["),
    ("coarse: wrong target", "sum = NAN;", "sum = 0;"),
    # Classes
    ("classes: ties", "if (logit > best[r] ||", "if (logit >= best[r] ||"),
    ("classes: NaN", " || logit != logit)", ")"),
    ("classes: below zero", "best[r] = -INFINITY;", "best[r] = 0;"),
    ("classes: rows too many", "if (first + r < end)\n", "if (true)\n"),
    ("sizes: 32 bits", "&& fits(s.h * s.w) &&", "&&"),
]
BUGS = [Bug(f"loss: {name}", LOSS_CU, right, wrong) for name, right, wrong in TABLE]

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


LOSS = Suite(FUSED, BUGS, failure)
