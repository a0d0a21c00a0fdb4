"""Bugs to plant into the CUDA kernels of the activated batch norm (see planted_bugs.py)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import test_fused_norm_cuda as tests
from emulator.fused_norm import FUSED, NormEmulator
from planting import Bug, Suite
from test_fused_norm_cuda import BF16, F16, F32, F64

NORM_CU = "cuda/norm.cu"

#: Name, the right text, the wrong text.
TABLE = [
    ("partial sums without a barrier", "  __syncthreads();\n  double sum = 0;", "  double sum = 0;"),
    ("a step of the shuffles left out", "int distance = lanes; ", "int distance = 2 * lanes; "),
    ("lanes of other channels", "if (lane < lanes) partial", "if (lane <= lanes) partial"),
    ("a warp left out", "w < kWarps; ++w", "w < kWarps - 1; ++w"),
    ("sums of other channels", "threadIdx.x / (2 * run), which", "threadIdx.x / (4 * run), which"),
    ("sums swapped", "which = threadIdx.x / run % 2", "which = 1 - threadIdx.x / run % 2"),
    ("sums beyond the channels", "lane < grid.lanes && channel < grid.channels", "lane < grid.lanes"),
    ("a part left out", "part < parts; part +=", "part + 1 < parts; part +="),
    ("a total twice", "if (threadIdx.x >= kFinished) return;\n  if", "if"),
    ("the last rows", "grid.rounds + (row < grid.extra)", "grid.rounds"),
    ("a row too many", "row < grid.extra", "row <= grid.extra"),
    ("channels beyond the end", "channel < grid.channels ? grid.rounds", "true ? grid.rounds"),
    ("backwards from behind the end", "(grid.rows - 1 - row)", "(grid.rows - row)"),
    (
        "addresses not checked",
        "aligned = aligned && reinterpret_cast",
        "aligned = aligned || reinterpret_cast",
    ),
    ("channels not checked", "bool aligned = sizes.C * cc", "bool aligned = true || sizes.C * cc"),
    ("a workspace for runs only", "std::max(make_grid(sizes, 1).parts, make", "std::max(1u, make"),
    ("pixels beyond the end", "      if (k < left)\n#pragma unroll", "#pragma unroll"),
    (
        "the same pixels again",
        "  for (int k = 0; k < kAhead; ++k)\n    if (k < count) runs[k].load(map + at + k * apart);",
        "  for (int k = 0; k < kAhead; ++k)\n    if (k < count) runs[k].load(map + at);",
    ),
    (
        "steps of one pixel, sums",
        "at += kAhead * share.apart) {\n    Run<T, run> x[kAhead];",
        "at += share.apart) {\n    Run<T, run> x[kAhead];",
    ),
    (
        "steps of one pixel, apply",
        "at += kAhead * share.apart) {\n    Run<T, run> x[kAhead], residual",
        "at += share.apart) {\n    Run<T, run> x[kAhead], residual",
    ),
    (
        "steps of one pixel, backward sums",
        "at += kAhead * share.apart) {\n      Run<T, run> x[kAhead], y",
        "at += share.apart) {\n      Run<T, run> x[kAhead], y",
    ),
    (
        "steps of one pixel, backward input",
        "at += kAhead * share.apart) {\n    Run<T, run> x[kAhead], y",
        "at += share.apart) {\n    Run<T, run> x[kAhead], y",
    ),
    ("no shift", "if (share.count > 0) first.load", "if (false) first.load"),
    ("half of the shift", "(shifts + 2 * sum)", "(shifts + sum)"),
    ("sums of squares of x", "= x[k].at(i) - first.at(i);", "= x[k].at(i);"),
    ("a variance below zero", "deviation < 0 ? 0 : deviation", "deviation"),
    ("a running variance with a bias", "variance * (count / (count - 1))", "variance"),
    (
        "momentum of the other",
        "(1 - a.momentum) * number + a.momentum * value",
        "a.momentum * number + (1 - a.momentum) * value",
    ),
    ("eps outside of the root", "1 / sqrt(variance + a.eps)", "1 / (sqrt(variance) + a.eps)"),
    ("weight with its sign", "(std::abs(scale[i]) + static", "(scale[i] + static"),
    ("weight without eps", "(std::abs(scale[i]) + static_cast<S>(norm.eps)) *", "std::abs(scale[i]) *"),
    ("no residual", "if (residuals) z += residual[k].at(i);", ""),
    (
        "the residual after the activation",
        "          if (residuals) z += residual[k].at(i);\n          y[i] = activate(z, z);",
        "          y[i] = activate(z, z);\n          if (residuals) y[i] += residual[k].at(i);",
    ),
    ("derivative at zero", "sign <= 0 ?", "sign < 0 ?"),
    (
        "NaN becomes zero",
        "return sign <= 0 ? (relu ? S(0) : slope * value) : value;",
        "return sign > 0 ? value : (relu ? S(0) : slope * value);",
    ),
    ("slope of the identity", "norm.activation == Activation::identity ? S(1) : ", ""),
    (
        "elements swapped",
        "pack<T>(values[2 * i], values[2 * i + 1])",
        "pack<T>(values[2 * i + 1], values[2 * i])",
    ),
    (
        "the sign before rounding",
        "device::to_sum(device::from_sum<T>(affine.z(i, x.at(i))))",
        "affine.z(i, x.at(i))",
    ),
    ("the activation differentiated twice", "mask_of(a.norm, a.y, a.masked)", "mask_of(a.norm, a.y, false)"),
    (
        "the gradient not masked",
        "gradient_of_z(gradient, mask, affine, activate, x[k], y[k], grad[k]);\n          if",
        "gradient_of_z(gradient, Mask::none, affine, activate, x[k], y[k], grad[k]);\n          if",
    ),
    (
        "products without the mean",
        "std::fma(gradient[i], x[k].at(i) - affine.mean[i], products[i])",
        "std::fma(gradient[i], x[k].at(i), products[i])",
    ),
    (
        "products without the deviation",
        "    sum *= static_cast<const S*>(a.norm.statistics)[grid.channels + channel];\n",
        "",
    ),
    ("sign of zero weights", "[channel] < 0;", "[channel] <= 0;"),
    ("gradient of weight without a sign", "negative ? -sum : sum", "sum"),
    ("pixels of this process", "static_cast<S>(1 / *a.count)", "static_cast<S>(1.0 / grid.rows)"),
    ("the second sum without the deviation", "slope[i] *= each * inverse[i];", "slope[i] *= each;"),
    ("constants corrected", "if (a.sums) gradient[i] -=", "gradient[i] -="),
]
BUGS = [Bug(f"norm: {name}", NORM_CU, right, wrong) for name, right, wrong in TABLE]

TESTS: list[Callable[[NormEmulator], None]] = [
    partial(tests.test_as_exact_as_pytorch, activation="leaky_relu", dtype=BF16, shape=(3, 64, 97)),
    partial(tests.test_as_exact_as_pytorch, activation="relu", dtype=F32, shape=(2, 3, 700)),
    partial(tests.test_as_exact_as_pytorch, activation="identity", dtype=F64, shape=(1, 520, 33)),
    partial(tests.test_same_bits_in_any_order_of_threads, dtype=F16, shape=(3, 64, 97)),
    partial(tests.test_addresses_that_are_no_multiple_of_16, dtype=F32),
    partial(tests.test_constant_statistics, activation="leaky_relu", dtype=F32),
    partial(tests.test_a_mean_far_from_zero, shape=(2, 3, 700), mean=-3e4),
    partial(tests.test_statistics, channels=3, dtype=F32),
    partial(tests.test_zero_infinity_and_nan, activation="relu", dtype=BF16),
    partial(tests.test_outputs_that_round_to_zero, activation="relu"),
    tests.test_sums_of_all_processes,
    tests.test_constant_statistics_do_not_read_x,
    partial(tests.test_many_pixels_for_each_thread, dtype=F64),
]


def failure(library: Path) -> str | None:
    """Return the first failure of the kernels in a library, or None."""
    kernels = NormEmulator(library)
    for test in TESTS:
        try:
            test(kernels)
        except (RuntimeError, AssertionError) as error:
            name = getattr(test, "func", test).__name__
            return f"{name}: {(str(error) or repr(error)).splitlines()[0]}"
    return None


NORM = Suite(FUSED, BUGS, failure)
