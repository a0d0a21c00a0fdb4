"""Bugs to plant into the kernels for lines in exact float32 (see planted_bugs.py)."""

from pathlib import Path
from typing import Any

import torch
from emulator import CSRC, SCHEDULES, Emulator
from planting import Bug, Suite
from test_attention_kernels import F32, check, check_problem, check_where_finite, masked, run, sample
from test_float32_kernels import SMALL_MEMORY, Line, backend_of, solve_lines

COMMON, FORWARD, BACKWARD = "cuda/float32.h", "cuda/float32_forward.cu", "cuda/float32_backward.cu"

#: File, name, the right text, the wrong text.
TABLE = [
    (
        COMMON,
        "copies: rows beyond the end",
        "copy_async(to, row < rows ? from : static_cast<const float*>(map.data), row < rows)",
        "copy_async(to, from, true)",
    ),
    (
        COMMON,
        "keys: single ones",
        "4 * groups * kQuads + group + groups * i",
        "groups * kQuads + group + groups * i",
    ),
    (
        COMMON,
        "results: beyond the rows",
        "start + i < rows && row < count && part",
        "start + i < rows && part",
    ),
    (COMMON, "results: beyond the channels", "row < count && part * kNarrow < channels,", "row < count,"),
    (
        COMMON,
        "lines: head of the next line",
        "static_cast<int>(index - line * heads)",
        "static_cast<int>(index % heads + heads) % max(heads - 1, 1)",
    ),
    (
        FORWARD,
        "pieces without a wait",
        "    device::wait_for_copies<0>();\n    __syncthreads();",
        "    __syncthreads();",
    ),
    (
        FORWARD,
        "pieces without a barrier",
        "    __syncthreads();  // the piece is visible to all",
        "    // the piece is visible to all",
    ),
    (
        FORWARD,
        "the next piece too early",
        "    __syncthreads();  // the piece is visible to all threads, and all have read the previous one\n"
        "    start_piece();",
        "    start_piece();\n    __syncthreads();",
    ),
    (FORWARD, "one place for pieces", "    next_stage = 1 - next_stage;\n", ""),
    (FORWARD, "self twice", "const bool self = !pass.last &&", "const bool self = false &&"),
    (FORWARD, "no scale", "device::multiply(scores[i][j], scale)", "scores[i][j]"),
    (FORWARD, "padding of keys", "key < length ? score : 0.f", "score"),
    (FORWARD, "all masked", "top == -INFINITY ? 0.f : top", "top"),
    (FORWARD, "an empty line", "total == 0.f && !pass.last ? 0.f : 1.f / total", "1.f / total"),
    (FORWARD, "no merge", "!pass.first && query < queries ? normalizer()", "false ? normalizer()"),
    (
        FORWARD,
        "no merge in the middle",
        "!pass.first && query < queries ? normalizer()",
        "pass.last && !pass.first && query < queries ? normalizer()",
    ),
    (
        FORWARD,
        "a lane left out",
        "for (int lanes = 1; lanes < kLanes; lanes *= 2) added",
        "for (int lanes = 2; lanes < kLanes; lanes *= 2) added",
    ),
    (
        FORWARD,
        "normalizers beyond the queries",
        "    if (query < queries) normalizer() = {top, total};",
        "    normalizer() = {top, total};",
    ),
    (
        FORWARD,
        "the earlier result not weighted",
        "factor_of_old * others[i][j / 4].at[j % 4]",
        "others[i][j / 4].at[j % 4]",
    ),
    (
        FORWARD,
        "residual in every pass",
        "!pass.last || f.residual.data == nullptr",
        "f.residual.data == nullptr",
    ),
    (FORWARD, "gamma left out", "other = fmaf(gamma, results", "other = fmaf(1.f, results"),
    (
        FORWARD,
        "queries of the first tile",
        "static_cast<int>(block - line_index * division.tiles) * division.tile",
        "0 * division.tile",
    ),
    (
        FORWARD,
        "a short last piece",
        "ceil_div(min(division.piece, length - first_key), 4)",
        "min(division.piece, length - first_key) / 4",
    ),
    (
        FORWARD,
        "channels of the first span",
        "line.offset(pitch, first_query, C, own_channel)",
        "line.offset(pitch, first_query, C, 4 * lane)",
    ),
    (
        FORWARD,
        "scores of the last block of keys",
        "          next_channel = before_values;",
        "          next_channel = 0;",
    ),
    (
        BACKWARD,
        "pieces without a wait",
        "    device::wait_for_copies<0>();\n    __syncthreads();",
        "    __syncthreads();",
    ),
    (
        BACKWARD,
        "pieces without a barrier",
        "    __syncthreads();  // the piece is visible to all",
        "    // the piece is visible to all",
    ),
    (
        BACKWARD,
        "the next piece too early",
        "    __syncthreads();  // the piece is visible to all threads, and all have read the previous one\n"
        "    copy_next(ring + filling * division.stage);",
        "    copy_next(ring + filling * division.stage);\n    __syncthreads();",
    ),
    (BACKWARD, "one place for pieces", "    filling = 1 - filling;\n", ""),
    (
        BACKWARD,
        "delta without a barrier",
        "      new_delta.write(delta, deltas, line);\n      __syncthreads();",
        "      new_delta.write(delta, deltas, line);",
    ),
    (
        BACKWARD,
        "delta of some channels",
        "      if (first_delta) new_delta.add(",
        "      if (first_delta && channel == 0) new_delta.add(",
    ),
    (
        BACKWARD,
        "delta of a quarter",
        "for (int lanes = 1; lanes < kQuads; lanes *= 2) sums[i] +=",
        "for (int lanes = 2; lanes < kQuads; lanes *= 2) sums[i] +=",
    ),
    (
        BACKWARD,
        "no delta in later passes",
        "  if (!pass.first) {\n    for (int i = threadIdx.x",
        "  if (false) {\n    for (int i = threadIdx.x",
    ),
    (BACKWARD, "products of other threads kept", "place < S::kQueryGroups ? length : 0", "length"),
    (BACKWARD, "products not cleared", "          products[i][j] = 0.f;\n", ""),
    (BACKWARD, "sums of the last channels alone", "keep_products(C > kLongestSum)", "keep_products(false)"),
    (BACKWARD, "P added to dP", "keep_products(channel > kLongestSum)", "keep_products(true)"),
    (
        BACKWARD,
        "self twice",
        "const bool self = !pass.last && first_key + key == query;",
        "const bool self = false;",
    ),
    (BACKWARD, "self of another block of keys", "first_key + key == query;", "key == query;"),
    (BACKWARD, "no scale in P", "device::multiply(weight, static_cast<float>(b.scale))", "weight"),
    (BACKWARD, "P not divided", "exp_difference(score, top) * factor", "exp_difference(score, top)"),
    (
        BACKWARD,
        "padding of keys",
        "for (int key = keys; key < padded; ++key)",
        "for (int key = padded; key < padded; ++key)",
    ),
    (
        BACKWARD,
        "no scale in dS",
        "const float factor = gamma * static_cast<float>(b.scale);",
        "const float factor = gamma;",
    ),
    (
        BACKWARD,
        "no gamma in dS",
        "const float factor = gamma * static_cast<float>(b.scale);",
        "const float factor = static_cast<float>(b.scale);",
    ),
    (BACKWARD, "no delta", "(factor * weight - shift)", "(factor * weight)"),
    (
        BACKWARD,
        "no gamma in dV",
        "write_sums(sums, gamma, b.grad_value",
        "write_sums(sums, 1.f, b.grad_value",
    ),
    (BACKWARD, "dV of the last pass alone", "b.grad_value, !pass.first,", "b.grad_value, false,"),
    (BACKWARD, "dK of the last pass alone", "b.grad_key, !pass.first,", "b.grad_key, false,"),
    (BACKWARD, "dQ of one block of keys", "!pass.first || first_key > 0, 0,", "!pass.first, 0,"),
    (BACKWARD, "keys of the first block", "line, first_key + first, count,", "line, first, count,"),
    (
        BACKWARD,
        "dK of the first block of keys",
        "b.grad_key, !pass.first, first_key, keys",
        "b.grad_key, !pass.first, 0, keys",
    ),
    (
        BACKWARD,
        "a row of weights too far",
        "add_over_queries<side>(sums, own, weights + weight_at<side>(first, 0), piece + 4 * this_lane(),\n"
        "                               min(division.query_piece, length - first));\n"
        "      }\n"
        "      write_sums(sums, 1.f",
        "add_over_queries<side>(sums, own, weights + weight_at<side>(first, 0), piece + 4 * this_lane(),\n"
        "                               division.query_piece);\n"
        "      }\n"
        "      write_sums(sums, 1.f",
    ),
    (
        BACKWARD,
        "workspace of one line",
        "pass.lines * b.sizes.heads * choice.products",
        "b.sizes.heads * choice.products",
    ),
]
BUGS = [
    Bug(
        f"float32 {Path(file).stem.removeprefix('float32').strip('_') or 'common'}: {name}",
        file,
        right,
        wrong,
    )
    for file, name, right, wrong in TABLE
]

PROBLEMS = [
    Line(axes="THW"),
    Line((1, 4, 8, 2, 73), axes="W", gaps=8),
    Line((1, 8, 8, 2, 140), axes="HW", gamma=None),
    Line((1, 4, 8, 2, 97), axes="W", heads=1, shared_memory=SMALL_MEMORY),
]

# Shape and settings.
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 20, 68, 9, 14), {}),
    ((1, 72, 260, 3, 33), {}),
    ((1, 4, 8, 3, 18), {"offset": 6.0}),
    ((2, 8, 16, 5, 19), {"masked": "row"}),
    ((2, 8, 16, 5, 19), {"masked": "column"}),
]


def failure(library: Path) -> str | None:
    """Return the first failure of the kernels in a library, or None."""
    kernels = Emulator(library)
    for problem in PROBLEMS:
        operands, exact = problem.sample(), None
        for schedule in SCHEDULES:
            try:
                named = solve_lines(kernels, problem, operands, schedule=schedule)
                if exact is None:
                    check_problem(problem, named, operands)
                    exact = named
                assert all(torch.equal(exact[name], named[name]) for name in exact), "not the same bits"
            except (RuntimeError, AssertionError) as error:
                return f"{problem}, schedule {schedule}: {(str(error) or repr(error)).splitlines()[0]}"
    for shape, settings in CASES:
        kind = settings.get("masked")
        operands = (
            masked(kind, shape, F32) if kind else sample(shape, F32, offset=settings.get("offset", 0.0))
        )
        try:
            results, normalizer = run(backend_of(kernels), operands)
            if kind:
                check_where_finite(results, operands, 1e-4)
            else:
                check(results, normalizer, operands)
        except (RuntimeError, AssertionError) as error:
            return f"{shape}: {(str(error) or repr(error)).splitlines()[0]}"
    return None


FLOAT32 = Suite(CSRC, BUGS, failure)
