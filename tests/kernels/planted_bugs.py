"""Plant bugs into the CUDA kernels, one at a time, and report which of them the emulator's tests catch.

    python tests/kernels/planted_bugs.py [NAME ...]

All of them take minutes. The exit status is 1 if one is not caught.

Each is what a slip of the pen would leave: a barrier, a wait, a mask or a tail check dropped, a transposition
swapped, a buffer taken too early. "Caught" means that results are wrong, or differ between orders of threads,
or that the emulator itself objects.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]  # run as a script, outside pytest

from emulator import CSRC, SCHEDULES, Emulator  # noqa: E402
from planted_float32_bugs import FLOAT32  # noqa: E402
from planted_loss_bugs import LOSS  # noqa: E402
from planted_norm_bugs import NORM  # noqa: E402
from planting import Bug, Suite  # noqa: E402
from test_attention_kernels import (  # noqa: E402
    BF16,
    F16,
    F32,
    Backend,
    Problem,
    check,
    check_problem,
    check_where_finite,
    in_turns,
    masked,
    on_path,
    run,
    sample,
    solve,
)

FORWARD, BACKWARD = "cuda/tensor_core_forward.cu", "cuda/tensor_core_backward.cu"
COMMON, GENERAL, LINE = "cuda/tensor_core.h", "cuda/general.cu", "cuda/line.h"

BUGS: list[Bug] = [
    # The forward on tensor cores
    Bug(
        "forward: scores without a wait",
        FORWARD,
        "        device::wait_for_copies<2>();\n      } else {\n        device::wait_for_copies<1>();\n",
        "      } else {\n",
    ),
    Bug(
        "forward: scores without a barrier",
        FORWARD,
        "    __syncthreads();\n    multiply_rows",
        "    multiply_rows",
    ),
    Bug("forward: next channels too early", FORWARD, "    if (done > 0) __syncthreads();", "    ;"),
    Bug("forward: values over keys", FORWARD, "int filling = 1;", "int filling = 0;"),
    Bug(
        "forward: one wait too few",
        FORWARD,
        "    if (stages == 3)\n      device::wait_for_copies<1>();",
        "    if (stages == 3)\n      device::wait_for_copies<2>();",
    ),
    Bug(
        "forward: one wait too few of two tiles",
        FORWARD,
        "    else\n      device::wait_for_copies<0>();",
        "    else\n      device::wait_for_copies<1>();",
    ),
    Bug(
        "forward: values without a barrier",
        FORWARD,
        "    __syncthreads();  // this chunk is visible to all",
        "    // this chunk is visible to all",
    ),
    Bug(
        "forward: ring overtakes",
        FORWARD,
        "    __syncthreads();  // this chunk is visible to all warps, and all have read the previous one\n"
        "    start_values();",
        "    start_values();\n    __syncthreads();",
    ),
    Bug(
        "forward: no empty groups",
        FORWARD,
        "    device::commit_copies();  // also an",
        "    if (next_channel < end) device::commit_copies();  // also an",
    ),
    Bug("forward: a key too many", FORWARD, "k >= line.length ||", "k > line.length ||"),
    Bug("forward: self twice", FORWARD, "(!work.last && k == rows[i / 2])", "false"),
    Bug(
        "forward: large scores lost",
        FORWARD,
        "exp2_approximate((scores[j][i] - base[i / 2]) * kLog2e)",
        "exp2_approximate(fmaf(scores[j][i], kLog2e, -base[i / 2] * kLog2e))",
    ),
    Bug("forward: empty line", FORWARD, "total == 0.f && !work.last", "false"),
    Bug("forward: empty column", FORWARD, "top == -INFINITY ? 0.f : top", "top"),
    Bug(
        "forward: the earlier result not read",
        FORWARD,
        "      if (!work.first) copy_rows(",
        "      if (false) copy_rows(",
    ),
    Bug("forward: rows without a barrier", FORWARD, "    __syncwarp();\n    write_rows", "    write_rows"),
    Bug("forward: no merge", FORWARD, "none ? 0.f : here / total", "none ? 0.f : 1.f / total"),
    Bug(
        "forward: a pass of three not merged",
        FORWARD,
        "none ? 0.f : there / total",
        "work.last ? there / total : 0.f",
    ),
    Bug(
        "forward: wrong head",
        FORWARD,
        "const int channel = head * a.c + done,",
        "const int channel = head * a.C + done,",
    ),
    Bug(
        "forward: values of the first head",
        FORWARD,
        "int next_channel = head * a.C;",
        "int next_channel = 0;",
    ),
    Bug(
        "forward: normalizers of one head",
        FORWARD,
        "line.pixel(row) * a.heads + head",
        "line.pixel(row) * a.heads",
    ),
    Bug("forward: no scale", FORWARD, "device::multiply(scores[j][i], a.scale)", "scores[j][i]"),
    Bug(
        "forward: residual over the result",
        FORWARD,
        "const int pair_bytes = (keys + block_queries) * kPitch + residual_bytes;",
        "const int pair_bytes = (keys + block_queries) * kPitch;",
    ),
    Bug(
        "forward: gamma of the line alone",
        FORWARD,
        "with[i] = fmaf(gamma, result[i], with[i])",
        "with[i] = fmaf(gamma * weight[half], results[j][2 * half + i], with[i])",
    ),
    Bug(
        "forward: normalizer beyond the line",
        FORWARD,
        "lane.pair == 0 && rows[half] < line.length",
        "lane.pair == 0",
    ),
    # Shared by both directions
    Bug(
        "copies: channels beyond the end",
        COMMON,
        "from < end ? line.length - first : 0",
        "line.length - first",
    ),
    Bug("copies: rows beyond the end", COMMON, "from < end ? line.length - first : 0", "rows"),
    Bug("rows: beyond the line", COMMON, "    if (first + row >= line.length) break;\n", ""),
    Bug("rows: beyond the channels", COMMON, "  if (from >= end) return;\n", ""),
    Bug(
        "operands: right one swapped",
        COMMON,
        "operands, tile + lane % 16 * pitch + lane / 16 * 16",
        "operands, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16",
    ),
    Bug(
        "operands: left one swapped",
        COMMON,
        "operand, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16",
        "operand, tile + lane % 16 * pitch + lane / 16 * 16",
    ),
    Bug(
        "operands: order of tf32",
        COMMON,
        "operands[i] = word_at(word + i % 2 * pitch + i / 2 * 32)",
        "operands[i] = word_at(word + i % 2 * 4 * pitch + i / 2 * 32)",
    ),
    Bug(
        "operands: tf32 not rounded",
        COMMON,
        "device::round_tf32(results[i % 2 * 2 + i / 2])",
        "std::bit_cast<uint32_t>(results[i % 2 * 2 + i / 2])",
    ),
    Bug(
        "results: beyond the line",
        COMMON,
        "row + 8 * half < line.length ? end - channel : 0",
        "end - channel",
    ),
    Bug(
        "results: beyond the channels",
        COMMON,
        "row + 8 * half < line.length ? end - channel : 0",
        "row + 8 * half < line.length ? end : 0",
    ),
    Bug(
        "results: lanes not swapped",
        COMMON,
        "got[i] = __shfl_xor_sync(kAllLanes, sent[i], 1)",
        "got[i] = sent[i]",
    ),
    Bug(
        "copies: another pitch",
        COMMON,
        "const T* source = map.data + static_cast<int64_t>(line.first) * map.pitch",
        "const T* source = map.data + static_cast<int64_t>(line.first) * (map.pitch - 8)",
    ),
    Bug(
        "rows: another pitch",
        COMMON,
        "T* to = map.data + static_cast<int64_t>(line.first) * map.pitch",
        "T* to = map.data + static_cast<int64_t>(line.first) * (map.pitch - 8)",
    ),
    Bug(
        "results: another pitch",
        COMMON,
        "static_cast<int64_t>(line.first) * pitch +",
        "static_cast<int64_t>(line.first) * end +",
    ),
    Bug("lines: heads after each other", COMMON, "block - index * a.heads", "block % (gridDim.x / a.heads)"),
    Bug(
        "lines: an inexact quotient",
        COMMON,
        "{1} << shift) + divisor - 1) / divisor",
        "{1} << shift)) / divisor",
    ),
    Bug("lines: self in every pass", LINE, "last = axes >> axis == 1;", "last = true;"),
    Bug(
        "lines: frames of one picture",
        LINE,
        "outside * step, step, static_cast<int>(length)",
        "sizes.N * step, step, static_cast<int>(length)",
    ),
    # The backward on tensor cores
    Bug(
        "backward: items without a wait",
        BACKWARD,
        "    device::wait_for_copies<0>();\n    __syncthreads();",
        "    __syncthreads();",
    ),
    Bug(
        "backward: items without a barrier",
        BACKWARD,
        "    __syncthreads();  // the item is visible to all",
        "    // the item is visible to all",
    ),
    Bug(
        "backward: one tile overwritten",
        BACKWARD,
        "      __syncthreads();  // all warps have read the previous item\n",
        "",
    ),
    Bug(
        "backward: ring overtakes",
        BACKWARD,
        "    __syncthreads();  // the item is visible to all warps, and all have read the previous one\n"
        "    if (stages == 2) start_item();",
        "    if (stages == 2) start_item();\n    __syncthreads();",
    ),
    Bug(
        "backward: dS without a barrier",
        BACKWARD,
        "        __syncthreads();\n      }\n      const auto place_of",
        "      }\n      const auto place_of",
    ),
    Bug(
        "backward: queries beyond the line",
        BACKWARD,
        "const bool seen = k < end &&",
        "const bool seen = k < line.length &&",
    ),
    Bug("backward: self twice", BACKWARD, " && (work.last || k != row)", ""),
    Bug("backward: a key too many", BACKWARD, "k < end && (work", "k <= end && (work"),
    Bug(
        "backward: dQ of one block of keys",
        BACKWARD,
        "if (!work.first || !first_block)\n",
        "if (!work.first)\n",
    ),
    Bug(
        "backward: dQ rounded too early",
        BACKWARD,
        "const bool complete = work.last && last_block;",
        "const bool complete = work.last;",
    ),
    Bug(
        "backward: dV of the last pass alone",
        BACKWARD,
        "if (!work.first) before.read(place, a.grad_value.data);",
        "",
    ),
    Bug(
        "backward: the wrong tile",
        BACKWARD,
        "return ring + next.stage",
        "return ring + (stages - 1 - next.stage)",
    ),
    Bug(
        "backward: half of delta",
        BACKWARD,
        "part < parts; ++part) {  // the",
        "part < parts - 1; ++part) {  // the",
    ),
    Bug("backward: no delta", BACKWARD, "fmaf(factor, dp[1], -delta)", "(factor * dp[1])"),
    Bug(
        "backward: P not transposed",
        BACKWARD,
        "a, weights + k * pitch, pitch, lane",
        "a, weights + k * kSize<T>, pitch, lane",
    ),
    Bug(
        "backward: no scale in dS",
        BACKWARD,
        "const float factor = a.factor() * a.scale;",
        "const float factor = a.factor();",
    ),
    Bug(
        "backward: no scale in P",
        BACKWARD,
        "device::multiply(scores[j][2 * half + i], a.scale)",
        "scores[j][2 * half + i]",
    ),
    Bug(
        "backward: gamma twice in dV",
        BACKWARD,
        "write_sum(place, results, a.factor(),",
        "write_sum(place, results, a.factor() * a.factor(),",
    ),
    Bug("backward: gamma not in delta", BACKWARD, "? factor * a.delta", "? a.delta"),
    Bug(
        "backward: dK of the last pass alone",
        BACKWARD,
        "if (!work.first) before.read(place_of(a.partial_key",
        "if (false) before.read(place_of(a.partial_key",
    ),
    Bug(
        "backward: wrong head of dQ",
        BACKWARD,
        "return Place(line, row, head * a.c + channel",
        "return Place(line, row, head * a.C + channel",
    ),
    Bug(
        "backward: pitch of the partial result",
        BACKWARD,
        "complete ? a.grad_query.pitch : a.partial_query.pitch",
        "a.partial_query.pitch",
    ),
    Bug(
        "backward: delta of one head",
        BACKWARD,
        "delta[line.pixel(pixel) * heads + head] = sum",
        "delta[line.pixel(pixel) * heads] = sum",
    ),
    Bug(
        "backward: small kernel for all",
        BACKWARD,
        "partial |= pass.length > key_tiles_for",
        "partial &= pass.length > key_tiles_for",
    ),
    # The general kernels
    Bug(
        "general: pieces without a barrier",
        GENERAL,
        "    __syncthreads();  // the piece is visible to all threads, and all have read the previous one\n"
        "  };",
        "  };",
    ),
    Bug(
        "general: one place for pieces",
        GENERAL,
        "next = next == stage ? stage + kPieceSize<kARows, kBRows> : stage;",
        ";",
    ),
    Bug(
        "general: values without a barrier",
        GENERAL,
        "      if (piece % V::kAhead == 0) __syncthreads();",
        "      ",
    ),
    Bug(
        "general: a barrier for all values",
        GENERAL,
        "if (piece % V::kAhead == 0)",
        "if (piece % V::kPieces == 0)",
    ),
    Bug(
        "general: one place for values",
        GENERAL,
        "(piece + V::kAhead) % V::kPieces *",
        "piece % V::kPieces *",
    ),
    Bug(
        "general: scores over pieces",
        GENERAL,
        "    __syncthreads();  // the scores overwrite the pieces\n",
        "",
    ),
    Bug(
        "general: weights overtake",
        GENERAL,
        "    __syncthreads();  // all threads have used the previous weights\n",
        "",
    ),
    Bug("general: empty line", GENERAL, "total == 0 && !pass.last ? 0 : 1 / total", "1 / total"),
    Bug("general: all masked", GENERAL, "const S base = top == -INFINITY ? 0 : top;", "const S base = top;"),
    Bug("general: self twice", GENERAL, "!pass.last && self ? -INFINITY : ", ""),
    Bug("general: no scale", GENERAL, "device::multiply(scores[i][j], scale)", "scores[i][j]"),
    Bug("general: no scale in P", GENERAL, "device::multiply(quad.at[k], factor)", "quad.at[k]"),
    Bug(
        "general: no scale in dS",
        GENERAL,
        "const S factor = static_cast<S>(p.scale) * ",
        "const S factor = (result == Result::gradient ? S{1} : static_cast<S>(p.scale)) * ",
    ),
    Bug(
        "general: gamma twice in dV",
        GENERAL,
        "const S factor = factor_of<S>(a.gamma);",
        "const S factor = factor_of<S>(a.gamma) * factor_of<S>(a.gamma);",
    ),
    Bug("general: gamma twice in dK", GENERAL, "        a.gamma = nullptr;  // it is in dS\n", ""),
    Bug(
        "general: wrong head",
        GENERAL,
        "{f.key, line.head * c, line, keys}",
        "{f.key, line.head * C, line, keys}",
    ),
    Bug("general: normalizers of one head", GENERAL, "* p.heads + line.head;", "* p.heads;"),
    Bug("general: pitch of the key", GENERAL, "b_pieces.load(b.step, left);", "b_pieces.load(a.step, left);"),
    Bug(
        "general: pitch of the sum",
        GENERAL,
        "sum_step = pass.step * f.sum.pitch;",
        "sum_step = pass.step * f.out.pitch;",
    ),
    Bug(
        "general: pitch of the gradient",
        GENERAL,
        "const int64_t step = a.pass.step * a.out.pitch;",
        "const int64_t step = a.pass.step * a.values.pitch;",
    ),
    Bug(
        "general: no merge in the middle",
        GENERAL,
        "const Normalizer<S> before = pass.first ? none",
        "const Normalizer<S> before = !pass.last ? none",
    ),
    Bug(
        "general: gradients of the last pass alone",
        GENERAL,
        "a.add = !pass.first || first_key > 0;",
        "a.add = first_key > 0;",
    ),
    Bug("general: gamma of warps without a barrier", GENERAL, "= sum;\n  __syncthreads();\n", "= sum;\n"),
    Bug(
        "general: gamma of one block",
        GENERAL,
        "static_cast<const double*>(partial), blocks, total);",
        "static_cast<const double*>(partial), int64_t{1}, total);",
    ),
    Bug("general: no gradient of gamma", GENERAL, "  totals[blockIdx.x] = static_cast<Out>(sum);\n", ""),
    Bug("general: self twice in P", GENERAL, "quad.at[k] = self ? 0 : ", "quad.at[k] = "),
    Bug(
        "general: scores overtake",
        GENERAL,
        "    __syncthreads();  // all threads have used the previous tile\n",
        "",
    ),
    Bug("general: pixels beyond the end", GENERAL, "i * apart() + j < present ? *next : T{}", "*next"),
    Bug(
        "general: channels beyond the end",
        GENERAL,
        "const int present = channel() < channels ? rows : 0;",
        "const int present = rows;",
    ),
    Bug("general: last sources", GENERAL, "row < left; ++row", "row < left - 1; ++row"),
    Bug("general: sums of one launch", GENERAL, "Quad quad = first ? Quad{} : *to;", "Quad quad{};"),
    Bug(
        "general: delta of 31 lanes",
        GENERAL,
        "channel < b.sizes.C; channel += kWarp",
        "channel < b.sizes.C; channel += kWarp + 1",
    ),
    # Both passes in one launch, in image order
    Bug(
        "forward: values before the earlier pass",
        FORWARD,
        "      if constexpr (in_image_order) work.wait(a.order);\n",
        "",
    ),
    Bug(
        "forward: wait for the earlier pass too late",
        FORWARD,
        "      if constexpr (in_image_order) work.wait(a.order);\n      start_values();\n",
        "      start_values();\n      if constexpr (in_image_order) work.wait(a.order);\n",
    ),
    Bug(
        "forward: earlier pass never complete",
        FORWARD,
        "  if constexpr (in_image_order) work.finish(a.order);\n",
        "",
    ),
    Bug(
        "backward: gradients before the earlier pass",
        BACKWARD,
        "      if (first_block) work.wait(a.order);",
        "      ;",
    ),
    Bug(
        "backward: earlier pass never complete",
        BACKWARD,
        "  if constexpr (in_image_order) work.finish(a.order);\n",
        "",
    ),
    Bug(
        "order: wait without a barrier",
        COMMON,
        "device::wait_for_counter(done(order), order.earlier_blocks);\n    __syncthreads();",
        "device::wait_for_counter(done(order), order.earlier_blocks);",
    ),
    Bug(
        "order: counted without a barrier",
        COMMON,
        "    if (last) return;\n    __syncthreads();\n",
        "    if (last) return;\n",
    ),
    Bug(
        "order: one block is not waited for",
        COMMON,
        "done(order), order.earlier_blocks);",
        "done(order), order.earlier_blocks - 1);",
    ),
    Bug(
        "order: one counter for all images",
        COMMON,
        "    return order.counters + 1 + *reinterpret_cast<const unsigned*>(device::dynamic_shared());",
        "    return order.counters + 1;",
    ),
    Bug("order: number of the block as ticket", COMMON, "device::take_ticket(order.counters)", "blockIdx.x"),
    Bug(
        "order: earlier pass of the last image first",
        COMMON,
        "          ++image;\n",
        "          image = order.images - 1 - image;\n",
    ),
    Bug(
        "order: work without a barrier",
        COMMON,
        "      shared[2] = earlier;\n    }\n    __syncthreads();",
        "      shared[2] = earlier;\n    }",
    ),
    Bug(
        "order: header in the ring",
        FORWARD,
        "device::dynamic_shared() + kHeaderBytes<in_image_order>;",
        "device::dynamic_shared();",
    ),
    Bug(
        "order: header in the weights",
        BACKWARD,
        "device::dynamic_shared() + kHeaderBytes<in_image_order>;",
        "device::dynamic_shared();",
    ),
    Bug(
        "order: frames as images",
        COMMON,
        "return sizes.pixels() / (earlier.step * earlier.length);",
        "return sizes.N * sizes.T;",
    ),
    Bug(
        "order: counters are not zero",
        COMMON,
        "device::set_zero(counters, ImageOrder::counter_bytes(a.order.images), stream)",
        "cudaSuccess",
    ),
    Bug(
        "order: one counter is not zero",
        COMMON,
        "return (images + 1) * static_cast<int64_t>(sizeof(unsigned));",
        "return images * static_cast<int64_t>(sizeof(unsigned));",
    ),
    Bug(
        "order: residual in the earlier pass",
        FORWARD,
        "a.residual.data != nullptr && (!in_image_order || work.last);",
        "a.residual.data != nullptr && (!in_image_order || work.first);",
    ),
    Bug(
        "order: next image of the last one",
        COMMON,
        "const bool more = image + 1 < order.images;",
        "const bool more = image < order.images;",
    ),
]

# Heads, other axes, pitches with gaps, scale and residual.
PROBLEMS = [
    Problem((4, 8, 72, 4, 5), BF16, untested=True),
    Problem((2, 8, 16, 3, 4, 5), F16, axes="TW", untested=True),
    on_path(True, BF16, axes="THW"),
    on_path(True, BF16, axes="W", scale=3.0),
    on_path(True, F32, axes="TW"),
    on_path(False, F32, axes="THW"),
    on_path(False, BF16, axes="TH"),
    Problem((1, 8, 8, 2, 150), BF16, axes="W"),
    Problem((1, 1, 1, 16, 130), F32, gaps=1, tensor_cores=False),
]

# Shape, dtype, settings: both widths of elements, several chunks of channels, tails, a line of several blocks
# of keys, little shared memory.
CASES: list[tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = [
    ((1, 64, 264, 7, 33), BF16, {}),
    ((2, 72, 40, 7, 18), F32, {"tf32": True}),
    ((1, 8, 72, 3, 150), BF16, {}),
    ((1, 8, 24, 150, 3), BF16, {}),
    ((1, 8, 16, 1, 9), BF16, {}),
    (
        (1, 8, 72, 3, 70),
        BF16,
        {"shared_memory": 48_000},
    ),  # two tiles in the forward's ring, one in the backward's
    ((2, 5, 9, 20, 33), F32, {"capability": 75}),
    ((1, 24, 600, 4, 18), BF16, {"capability": 75}),
    ((1, 5, 133, 2, 9), F32, {}),  # more channels than one sum has
    ((1, 5, 9, 1, 9), F32, {"capability": 75}),
    ((1, 8, 72, 3, 18), BF16, {"offset": 6.0}),  # scores far below zero
    ((2, 8, 16, 5, 19), BF16, {"masked": "row"}),  # by scores of -inf
    ((2, 8, 16, 5, 19), BF16, {"masked": "column"}),
    ((2, 5, 9, 5, 19), F32, {"masked": "column", "capability": 75}),
    ((1, 8, 16, 3, 18), BF16, {"masked": "equal and large"}),
]


def failure(library: Path) -> str | None:
    """Return the first failure of the kernels in a library, or None."""
    emulator = Emulator(library)
    backend = Backend("emulator", emulator.forward, emulator.backward)
    for problem in PROBLEMS:
        operands, exact = problem.sample(), None
        for schedule in SCHEDULES:
            try:
                turns = in_turns(schedule) if problem.untested else {"schedule": schedule}
                named = solve(emulator, problem, operands, **turns)
                if exact is None:
                    check_problem(problem, named, operands)
                    exact = named
                assert all(torch.equal(exact[name], named[name]) for name in exact), "not the same bits"
            except (RuntimeError, AssertionError) as error:
                return f"{problem}, schedule {schedule}: {(str(error) or repr(error)).splitlines()[0]}"
    for shape, dtype, chosen in CASES:
        settings = dict(chosen)
        offset, kind = settings.pop("offset", 0.0), settings.pop("masked", None)
        operands = masked(kind, shape, dtype) if kind else sample(shape, dtype, offset=offset)
        first = None
        for schedule in SCHEDULES:
            try:
                results, normalizer = run(backend, operands, schedule=schedule, **settings)
                numbers = [t.nan_to_num(nan=7.0) for t in (*results, normalizer)]
                if first is None:
                    if kind:
                        check_where_finite(results, operands, 0.06 if dtype == BF16 else 1e-4)
                    else:
                        like = torch.float16 if settings.get("tf32") else None
                        check(results, normalizer, operands, like=like)
                    first = numbers
                assert all(torch.equal(a, b) for a, b in zip(first, numbers, strict=True)), (
                    "not the same bits"
                )
            except (RuntimeError, AssertionError) as error:
                return f"{shape}, schedule {schedule}: {(str(error) or repr(error)).splitlines()[0]}"
    return None


ATTENTION = Suite(CSRC, BUGS, failure)
SUITES = [ATTENTION, FLOAT32, NORM, LOSS]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a bug to plant; default: all of them")
    names = parser.parse_args().names
    if unknown := set(names) - {bug.name for suite in SUITES for bug in suite.bugs}:
        print(f"planted_bugs.py: no such bug: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    planted = missed = 0
    for suite in SUITES:
        chosen = [bug for bug in suite.bugs if not names or bug.name in names]
        if chosen and (how := suite.caught(None)):
            print(f"planted_bugs.py: the kernels fail without a bug: {how}", file=sys.stderr)
            return 1
        for bug in chosen:
            start = time.monotonic()
            how = suite.caught(bug)
            planted += 1
            missed += how is None
            print(f"{bug.name:32} {time.monotonic() - start:5.1f} s  {how or 'NOT CAUGHT'}", flush=True)
    print(f"{planted - missed} of {planted} planted bugs caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
