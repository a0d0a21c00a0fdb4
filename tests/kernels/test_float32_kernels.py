"""The kernels for lines in exact float32, in the emulator: see test_attention_kernels.py for the helpers."""

import functools
from ctypes import byref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from emulator import (
    COMPILER,
    DTYPES,
    SCHEDULES,
    SHARED_MEMORY,
    Backward,
    Device,
    Emulator,
    Forward,
    Map,
    Sizes,
    axes_of,
    build,
)
from test_attention_kernels import (
    BF16,
    F32,
    F64,
    KINDS,
    LARGE,
    MASKED,
    MASKED_PARTS,
    Backend,
    Problem,
    check,
    check_masked,
    check_problem,
    check_where_finite,
    masked,
    run,
    sample,
    solve,
)

pytestmark = pytest.mark.build
SMALL_MEMORY = 99 * 1024  # bytes that a block may have on capabilities 8.6, 8.9 and 12.0


@pytest.fixture(scope="session")
def kernels() -> Emulator:
    if COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    return Emulator(build())


def backend_of(kernels: Emulator) -> Backend:
    """Return the kernels for lines in float32, which fails if others serve."""

    def call(name: str, *operands: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, ...]:
        results = getattr(kernels, name)(*operands, untested=True, **settings)
        assert kernels.lines
        return results

    return Backend("emulator", functools.partial(call, "forward"), functools.partial(call, "backward"))


@dataclass
class Line(Problem):
    """A problem for the kernels for lines in float32."""

    shape: tuple[int, ...] = (2, 8, 72, 3, 4, 5)
    dtype: torch.dtype = F32
    gaps: int = 4
    tensor_cores: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        return super().arguments | {"capability": 90, "untested": True}


def solve_lines(
    kernels: Emulator, problem: Line, operands: list[torch.Tensor], **settings: int
) -> dict[str, Any]:
    results = solve(kernels, problem, operands, **settings)
    assert kernels.lines
    return results


# (N, c, C, H, W). Tails of keys and channels, more than one piece of either, spans of 64 and 128 channels.
SHAPES = [
    (2, 8, 16, 5, 7),
    (1, 64, 136, 20, 33),
    (1, 72, 196, 9, 14),
    (1, 4, 4, 3, 66),
    (1, 20, 68, 2, 97),
    (5, 16, 72, 1, 9),
    (5, 16, 72, 9, 1),
    (5, 8, 8, 1, 1),
    (0, 4, 4, 3, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_pytorch(kernels: Emulator, shape: tuple[int, ...]) -> None:
    operands = sample(shape, F32)
    results, normalizer = run(backend_of(kernels) if shape[0] else emulated(kernels), operands)
    check(results, normalizer, operands)


def emulated(kernels: Emulator) -> Backend:
    return Backend("emulator", kernels.forward, kernels.backward)


@pytest.mark.parametrize("channels", [128, 144, 512, 1024])
def test_sums_of_many_channels_are_as_exact(kernels: Emulator, channels: int) -> None:
    operands = sample((1, 64, channels, 13, 11), F32)
    results, normalizer = run(backend_of(kernels), operands)
    check(results, normalizer, operands)


@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 7), (1, 64, 136, 20, 33)], ids=str)
def test_large_scores(kernels: Emulator, shape: tuple[int, ...]) -> None:
    operands = sample(shape, F32, spread=8.0)
    results, normalizer = run(backend_of(kernels), operands)
    check(results, normalizer, operands, peaked=True)


@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 7), (1, 8, 16, 3, 150)], ids=str)
def test_scores_far_below_zero(kernels: Emulator, shape: tuple[int, ...]) -> None:
    operands = sample(shape, F32, offset=6.0)
    results, normalizer = run(backend_of(kernels), operands)
    check(results, normalizer, operands, peaked=True)


@pytest.mark.parametrize("shape", [(2, 8, 16, 5, 7), (1, 64, 136, 18, 33), (1, 8, 40, 3, 150)], ids=str)
def test_same_bits_in_any_order_of_threads(kernels: Emulator, shape: tuple[int, ...]) -> None:
    operands = sample(shape, F32)
    results, normalizer = run(backend_of(kernels), operands)
    for schedule in SCHEDULES[1:]:
        others, other_normalizer = run(backend_of(kernels), operands, schedule=schedule)
        for one, other in zip([*results, normalizer], [*others, other_normalizer], strict=True):
            assert torch.equal(one, other), f"differs under schedule {schedule}"


@pytest.mark.parametrize("shape", [shape for shape in MASKED if shape[1] % 4 == 0], ids=str)
@pytest.mark.parametrize("kind", KINDS + LARGE)
def test_what_is_finite_in_the_reference_is_so_here(
    kernels: Emulator, kind: str, shape: tuple[int, ...]
) -> None:
    operands = masked(kind, shape, F32)
    results, _ = run(backend_of(kernels), operands)
    check_where_finite(results, operands, 1e-4)


@pytest.mark.parametrize("axes", ["T", "H", "W", "TH", "TW", "HW", "THW"])
def test_any_axes(kernels: Emulator, axes: str) -> None:
    problem = Line(axes=axes)
    operands = problem.sample()
    check_problem(problem, solve_lines(kernels, problem, operands), operands)


@pytest.mark.parametrize("gamma", [None, 0.0])
def test_without_residual_and_with_gamma_of_zero(kernels: Emulator, gamma: float | None) -> None:
    problem = Line(axes="THW", heads=3, scale=-1.5, gamma=gamma)
    operands = problem.sample()
    results = solve_lines(kernels, problem, operands)
    check_problem(problem, results, operands)
    if gamma == 0:
        assert torch.equal(results["sum"], operands[3])
        assert all(not results[f"grad_{name}"].any() for name in ("query", "key", "value"))


# Lines at the limits of the kernels and beyond: of the forward 72, 80, 104 and 112 pixels, of the backward
# 66, 98, 130, 190 and 272.
LENGTHS = [64, 66, 67, 72, 73, 80, 97, 98, 99, 104, 105, 112, 113, 129, 130, 131, 190, 191, 257, 272]


@pytest.mark.parametrize("length", LENGTHS)
def test_lines_of_any_length(kernels: Emulator, length: int) -> None:
    problem = Line((1, 4, 8, 2, length), axes="W")
    operands = problem.sample()
    check_problem(problem, solve_lines(kernels, problem, operands), operands)


LONG = [
    Line((1, 4, 8, 97, 2), axes="H"),
    Line((1, 8, 72, 2, 40, 2), axes="TH"),
    Line((1, 20, 132, 2, 100), gamma=None),
    Line((1, 8, 8, 2, 112), shared_memory=SMALL_MEMORY),
    Line((1, 8, 8, 150, 2), shared_memory=SMALL_MEMORY),
    Line((1, 4, 4, 16, 130), gaps=0),  # more numbers than one block adds up for gamma
]


@pytest.mark.parametrize("problem", LONG, ids=str)
def test_long_lines_of_heads(kernels: Emulator, problem: Line) -> None:
    operands = problem.sample()
    check_problem(problem, solve_lines(kernels, problem, operands), operands)


@pytest.mark.parametrize("problem", [Line(axes="THW"), Line((1, 4, 8, 2, 140), axes="W")], ids=str)
def test_same_bits_of_heads_in_any_order_of_threads(kernels: Emulator, problem: Line) -> None:
    operands = problem.sample()
    results = solve_lines(kernels, problem, operands)
    for schedule in SCHEDULES[1:]:
        others = solve_lines(kernels, problem, operands, schedule=schedule)
        for name, result in results.items():
            assert torch.equal(result, others[name]), f"{name} differs under schedule {schedule}"


@pytest.mark.parametrize("axes", ["W", "TH", "THW"])
@pytest.mark.parametrize("part", MASKED_PARTS)
def test_masked_lines_of_any_axes(kernels: Emulator, part: str, axes: str) -> None:
    problem = Line(axes=axes, scale=0.5, gamma=None)
    check_masked(problem, part, functools.partial(solve_lines, kernels), 1e-5)


# Which arguments they serve


def served(
    kernels: Emulator,
    lengths: tuple[int, int, int] = (1, 4, 97),
    channels: tuple[int, int, int] = (1, 64, 512),
    dtype: torch.dtype = F32,
    capability: int = 90,
    shared_memory: int = SHARED_MEMORY,
    shift: int = 0,
    pitch: int = 0,
    batch: int = 2,
) -> tuple[bool, bool]:
    """Return whether forward and backward serve lengths (T, H, W) and channels (heads, c, C).

    shift: bytes by which one map is not aligned; pitch: of that map, or 0 for its channels.
    """
    answers = []
    heads, c, wide = channels
    for kind, name in ((Forward, "forward"), (Backward, "backward")):
        arguments = kind(DTYPES.index(dtype), Sizes(batch, heads, c, wide, *lengths), axes_of("HW"), 1.0)
        for field in kind._fields_:
            if field[1] is Map:
                few = field[0] in ("query", "key", "grad_query", "grad_key")
                setattr(arguments, field[0], Map(1 << 20, heads * (c if few else wide)))
        arguments.value = Map((1 << 20) + shift, pitch or heads * wide)
        device = Device(capability, shared_memory, False, True)
        function = kernels.library[f"emulated_{name}_in_float32"]
        answers.append(bool(function(byref(arguments), byref(device))))
    return answers[0], answers[1]


ALL, NONE = (True, True), (False, False)


@pytest.mark.parametrize(
    "changes, answers",
    [
        ({}, ALL),
        ({"capability": 80}, ALL),
        ({"capability": 75}, NONE),
        ({"dtype": F64}, NONE),
        ({"dtype": BF16}, NONE),
        ({"channels": (2, 4, 4)}, ALL),
        ({"channels": (2, 6, 4)}, NONE),
        ({"channels": (2, 4, 6)}, NONE),
        ({"channels": (2, 0, 4)}, NONE),
        ({"shift": 16}, ALL),
        ({"shift": 8}, NONE),
        ({"pitch": 516}, ALL),
        ({"pitch": 514}, NONE),
        ({"lengths": (1, 272, 272)}, ALL),
        ({"lengths": (1, 4, 273)}, (True, False)),
        ({"lengths": (1, 4, 5000)}, NONE),
        ({"lengths": (1, 112, 112), "shared_memory": SMALL_MEMORY}, ALL),
        ({"lengths": (1, 4, 190), "shared_memory": SMALL_MEMORY}, ALL),
        ({"lengths": (1, 4, 257), "shared_memory": SMALL_MEMORY}, (True, False)),
        ({"lengths": (1, 97, 97), "shared_memory": 52 * 1024}, (True, False)),
        ({"lengths": (1, 97, 97), "shared_memory": 32 * 1024}, NONE),
        ({"batch": 2**30}, NONE),  # more lines than a grid has
        ({"lengths": (1, 4, 97), "pitch": 2**24}, NONE),  # offsets beyond an int
    ],
    ids=str,
)
def test_what_they_serve(kernels: Emulator, changes: dict[str, Any], answers: tuple[bool, bool]) -> None:
    assert served(kernels, **changes) == answers


def test_they_are_off_unless_untested_kernels_are_allowed(kernels: Emulator) -> None:
    problem = Line()
    operands = problem.sample()
    exact = solve_lines(kernels, problem, operands)
    others = solve(kernels, problem, operands, untested=False)
    assert not kernels.lines and not torch.equal(exact["out"], others["out"])


def test_tensor_cores_come_first(kernels: Emulator) -> None:
    problem = replace(Line(), tensor_cores=True)
    solve(kernels, problem, problem.sample(), tf32=True)
    assert kernels.tensor_cores and not kernels.lines


def test_blocks_fill_a_multiprocessor(kernels: Emulator) -> None:
    """Three blocks of a line of 97 pixels fit in a multiprocessor of sm_90, as their registers do."""
    operands = sample((1, 64, 64, 1, 97), F32)
    backend = backend_of(kernels)
    out, normalizer = backend.forward(*operands[:3])
    forward = kernels.library.emulator_largest_shared()
    backend.backward(*operands[:3], out, normalizer, operands[3])
    backward = kernels.library.emulator_largest_shared()
    assert all(3 * (bytes_ + 1024) <= 228 * 1024 for bytes_ in (forward, backward))
