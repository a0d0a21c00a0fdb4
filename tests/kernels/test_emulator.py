"""The emulator of CUDA: each primitive against its definition, and each kind of planted error is found."""

import itertools
import re
import shutil
import subprocess
from ctypes import c_void_p
from pathlib import Path

import emulator
import pytest
import torch
from emulator import CSRC, DTYPES, HERE, SCHEDULES, Emulator
from torch import Tensor

SOURCE = HERE / "selftest.cu"
FAULTS = re.findall(r"^  (\w+),", SOURCE.read_text().split("enum Fault {")[1].split("}")[0], re.MULTILINE)
CHAIN_FAULTS = re.findall(r"\w+", SOURCE.read_text().split("enum ChainFault {")[1].split("}")[0])
#: Faults that give a wrong result with at least one schedule. Every other fault ends the launch.
SILENT = {
    *("no_barrier_before_read", "no_barrier_after_read", "no_wait", "wait_for_too_few", "no_warp_barrier"),
    *("uninitialized_dynamic", "uninitialized_variable"),
}

pytestmark = pytest.mark.build
needs_compiler = pytest.mark.skipif(not emulator.COMPILER, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def kernels() -> Emulator:
    if not emulator.COMPILER:
        pytest.skip("there is no C++ compiler")
    return Emulator(emulator.build(sources=[SOURCE]))


def at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def tf32(x: Tensor) -> Tensor:
    """Round to 10 bits of mantissa, ties away from zero, by arithmetic."""
    mantissa, exponent = torch.frexp(x.double())
    rounded = (mantissa.abs() * 2**11 + 0.5).floor() * x.double().sign()
    return torch.ldexp(rounded, exponent - 11).float()


def as_int32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_product(kernels: Emulator, dtype: torch.dtype, schedule: int):
    depth = 32 // dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    a, b, d = (torch.randn(shape, generator=generator) for shape in ((16, depth), (8, depth), (16, 8)))
    a, b = (tf32(x) if dtype == torch.float32 else x.to(dtype) for x in (a, b))
    expected = d.double() + a.double() @ b.double().T
    kernels.call("run_product", DTYPES.index(dtype), at(a), at(b), at(d), schedule=schedule)
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-5)


def test_product_of_nothing_but_nan_and_zero(kernels: Emulator):
    """Uninitialized rows are not an error if only their own results are NaN."""
    a, b, d = torch.ones(16, 8), torch.ones(8, 8), torch.zeros(16, 8)
    bits(a)[3] = -1
    kernels.call("run_product", 0, at(a), at(b), at(d))
    assert d[3].isnan().all() and (d[torch.arange(16) != 3] == 8).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matrices(kernels: Emulator, schedule: int):
    rows = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(2, 32, 4, 2, dtype=torch.int16)
    kernels.call("run_matrices", at(rows), at(out), schedule=schedule)
    # Lane 4 r + p holds elements 2 p and 2 p + 1 of row r of each matrix.
    for result, matrix in zip(out, (rows, rows.transpose(1, 2)), strict=True):
        assert torch.equal(result.view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(4, 8, 8), matrix)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exchanges(kernels: Emulator, schedule: int):
    out = torch.zeros(9, 64, dtype=torch.int32)
    kernels.call("run_exchanges", at(out), schedule=schedule)
    own = range(64)
    expected = [
        [i // 32 * 32 + 5 for i in own],
        [i // 8 * 8 + (i + 3) % 8 for i in own],
        [i ^ 6 for i in own],
        [i + 4 if i % 32 < 28 else i for i in own],
        [i + 2 if i % 4 < 2 else i for i in own],
        [2 * (i ^ 1) + 1 for i in own],
        [as_int32(sum(1 << lane for lane in range(0, 32, 3)))] * 64,
        [int(i >= 32) for i in own],
        [i ^ 1 if i % 32 < 8 else i ^ 2 for i in own],
    ]
    assert out.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(kernels: Emulator, dtype: torch.dtype):
    halves = torch.arange(65536).to(torch.int16).view(dtype)
    exact = halves.float()
    # Each number itself, and one above it in magnitude: halfway to the next, just before, just after.
    beyond = torch.tensor([-1, 0, 1, 7]).repeat(16384) + (1 << 12 if dtype == torch.float16 else 1 << 15)
    floats = torch.cat([exact, (bits(exact) + beyond.int()).view(torch.float32)])
    widened, narrowed = torch.empty(65536), torch.empty(131072, dtype=dtype)
    kernels.call("run_conversions", DTYPES.index(dtype), at(halves), at(widened), at(floats), at(narrowed))
    torch.testing.assert_close(widened, exact, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrowed, floats.to(dtype), rtol=0, atol=0, equal_nan=True)
    numbers = ~floats.isnan()
    assert torch.equal(bits(narrowed)[numbers], bits(floats.to(dtype))[numbers])  # zeros with their signs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers(kernels: Emulator, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.cat(
        [torch.randn(900, generator=generator) * 20, torch.tensor([0.0, 1 + 2**-11, -1 - 2**-11, -200])]
    )
    x = torch.cat([x, torch.tensor([float("-inf"), float("inf")])])
    out = torch.zeros(3, len(x), dtype=torch.int32)
    kernels.call("run_numbers", DTYPES.index(dtype), at(x), at(out), len(x))
    finite = x.isfinite()
    assert torch.equal(out[0].view(torch.float32)[finite], tf32(x[finite]))
    assert not (out[0] & 0x1FFF).any()
    assert torch.equal(out[1].view(dtype).view(-1, 2), torch.stack([x, -x], 1).to(dtype))
    power = torch.exp2(x.double()).float()
    power[power < torch.finfo(torch.float32).tiny] = 0
    torch.testing.assert_close(out[2].view(torch.float32), power, rtol=3e-7, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threads", [1, 2])
def test_each_thread_runs_once(kernels: Emulator, schedule: int, threads: int):
    for grid, block in (((5, 3, 2), 40), ((1, 1, 1), 1024), ((7, 1, 1), 1)):
        out = torch.zeros(torch.Size(grid).numel() * block, dtype=torch.int32)
        kernels.call("run_places", *grid, block, at(out), schedule=schedule, threads=threads)
        assert torch.equal(out, torch.arange(len(out), dtype=torch.int32))


#: Blocks that run at a time: on two OS threads, or that number in turns.
RESIDENT = (0, 1, 2, 4, 5)


def run_chain(kernels: Emulator, fault: str, schedule: int, resident: int) -> bool:
    """Run blocks that wait for each other, and return whether the result is right."""
    blocks, threads = 12, 40
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(100, (blocks, threads), generator=generator, dtype=torch.int32)
    out, counters = torch.full_like(numbers, -1000), torch.full((2,), -1, dtype=torch.int32)
    kernels.call(
        "run_chain",
        *(at(numbers), at(out), at(counters), blocks, threads, CHAIN_FAULTS.index(fault)),
        schedule=schedule,
        resident=resident,
    )
    expected = numbers.clone()
    for before, row in itertools.pairwise(expected):
        row += before.roll(-1)
    return torch.equal(out, expected) and counters.tolist() == [blocks, blocks]


@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_that_wait_for_each_other(kernels: Emulator, schedule: int, resident: int):
    assert run_chain(kernels, "chain_right", schedule, resident)


@pytest.mark.parametrize("fault", CHAIN_FAULTS[1:])
def test_faults_of_blocks_that_wait_are_found(kernels: Emulator, fault: str):
    found = set()
    for schedule, resident in itertools.product(SCHEDULES, RESIDENT[1:]):
        try:
            found.add("right" if run_chain(kernels, fault, schedule, resident) else "wrong")
        except RuntimeError as error:
            found.add("deadlock" if re.search(r"deadlock.*wait_for_counter", str(error)) else str(error))
    silent = fault in ("no_wait_for_counter", "no_barrier_after_wait", "no_barrier_before_add")
    assert found - {"right"} <= {"wrong" if silent else "deadlock", "wrong"}
    assert ("wrong" if silent else "deadlock") in found


@pytest.mark.parametrize(
    "grid, block", [((0, 1, 1), 32), ((1, 65536, 1), 32), ((1, 1, 1), 1025), ((1, 1, 1), 0)]
)
def test_launches_that_no_gpu_takes(kernels: Emulator, grid: tuple[int, int, int], block: int):
    with pytest.raises(RuntimeError, match=r"no GPU takes.*\(code 9,"):
        kernels.call("run_places", *grid, block, c_void_p())


def run_pipeline(kernels: Emulator, fault: str, schedule: int, shared_memory: int = 65536) -> bool:
    """Return whether the result is right."""
    rows = torch.randn(6, 512, generator=torch.Generator().manual_seed(2))
    out = torch.full((6, 128), float("nan"))
    arguments = (at(rows), at(out), len(rows), FAULTS.index(fault))
    kernels.call("run_pipeline", *arguments, schedule=schedule, shared_memory=shared_memory)
    fours = rows.view(6, 128, 4).double().sum(2).roll(-32, 1)
    expected = fours + fours.view(6, 64, 2).flip(2).view(6, 128)
    return bool((out.double() - expected).abs().max() < 1e-5)  # NaN is not


def test_correct_kernel(kernels: Emulator):
    assert all(run_pipeline(kernels, "none", schedule) for schedule in (*SCHEDULES, *range(6, 30)))
    with pytest.raises(RuntimeError, match="4096 bytes of shared memory, of which there are 4095"):
        run_pipeline(kernels, "none", 0, shared_memory=4095)


@pytest.mark.parametrize("fault", sorted(SILENT))
def test_finds_wrong_results(kernels: Emulator, fault: str):
    assert not all(run_pipeline(kernels, fault, schedule) for schedule in SCHEDULES)


MESSAGES = {
    "copies_left_at_end": "ended with copies",
    "diverging_collectives": "lanes of a warp diverge.*__shfl_(xor_)?sync",
    "diverging_instructions": "lanes of a warp diverge.*load_matrices",
    "diverging_barriers": "lanes of a warp diverge.*__syncthreads",
    "lane_ended": "ended",
    "lane_not_in_mask": "not in its own mask",
    "deadlock": "deadlock.*threads 0 to 15 wait in __syncthreads at selftest.cu:[0-9]+",
    "misaligned_copy": "shared memory is not a multiple of 16",
    "misaligned_source": "global memory is not a multiple of 16",
    "copy_out_of_bounds": "not in the block's shared memory",
    "write_behind_end": "write behind the end of the dynamic shared memory",
    "write_before_begin": "write before the begin of the dynamic shared memory",
    "write_behind_variable": "write behind the end of a __shared__ variable",
    "not_tf32": "not a tf32 number",
}


@pytest.mark.parametrize("fault", sorted(MESSAGES))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reports_errors(kernels: Emulator, fault: str, schedule: int):
    with pytest.raises(RuntimeError, match=f"{MESSAGES[fault]}.*code 719, schedule {schedule}"):
        run_pipeline(kernels, fault, schedule)
    assert run_pipeline(kernels, "none", schedule)  # the next launch is not disturbed


def test_every_fault_is_tried():
    assert {*FAULTS} == {"none", *SILENT, *MESSAGES}


@needs_compiler
def test_other_processors():
    """The emulator works with fibers of the C library, as on processors other than x86-64."""
    kernels = Emulator(emulator.build(sources=[SOURCE], flags=["-O1", "-DCC_EMULATOR_UCONTEXT"]))
    assert run_pipeline(kernels, "none", 4) and not run_pipeline(kernels, "no_barrier_after_read", 2)
    with pytest.raises(RuntimeError, match="deadlock"):
        run_pipeline(kernels, "deadlock", 0)


@needs_compiler
def test_compiler_errors_are_told():
    with pytest.raises(RuntimeError, match="device.h"):
        emulator.build({"cuda/device.h": "#error no device"}, sources=[SOURCE])


def test_nvcc_takes_the_same_source(tmp_path: Path):
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("there is no nvcc")
    command = [
        nvcc,
        "-std=c++20",
        "-arch=sm_80",
        f"-I{CSRC / 'cuda'}",
        "-c",
        SOURCE,
        "-o",
        tmp_path / "selftest.o",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
