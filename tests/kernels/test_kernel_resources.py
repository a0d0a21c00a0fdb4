"""The CUDA kernels compile for every architecture and need the resources in the table."""

import json
import re
import subprocess
from pathlib import Path

import emulator
import kernel_resources
import pytest
from kernel_resources import ARCHITECTURES, TABLE

EXPECTED = json.loads(TABLE.read_text())


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = kernel_resources.find_nvcc()
    if found is None:
        pytest.skip("no nvcc for this PyTorch here")
    return found


@pytest.fixture(scope="module")
def measured(nvcc: str) -> dict[str, dict[str, dict[str, int]]]:
    return kernel_resources.measure(nvcc)


@pytest.mark.build
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_take_what_the_table_says(
    nvcc: str, measured: dict[str, dict[str, dict[str, int]]], architecture: str
) -> None:
    expected = EXPECTED["kernels"][architecture]
    assert measured[architecture].keys() == expected.keys()
    if kernel_resources.nvcc_version(nvcc) == EXPECTED["nvcc"]:
        assert measured[architecture] == expected
    for name, kernel in measured[architecture].items():
        # Another version may allocate other registers, but must not spill where the table has no spills.
        assert kernel["spills"] == 0 or expected[name]["spills"] > 0, name


def test_no_kernel_for_lines_of_112_spills() -> None:
    for architecture, kernels in EXPECTED["kernels"].items():
        for name, kernel in kernels.items():
            tiles = name.partition("kernel<")[2].split(",")
            long_lines = "tensor_core" in name and (int(tiles[1]) > 7 or int(tiles[2]) > 7)
            assert kernel["spills"] == 0 or long_lines, (architecture, name)


@pytest.mark.build
def test_blocks_ask_for_the_shared_memory_of_the_table() -> None:
    if emulator.COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    assert kernel_resources.shared_memory() == EXPECTED["shared_memory"]
    for operator in ("forward bfloat16", "backward bfloat16"):
        block = EXPECTED["shared_memory"][operator]["112"]
        assert 2 * (block + 1024) <= 228 * 1024  # two blocks in a multiprocessor of sm_90
        assert block <= 99 * 1024  # one in that of sm_86, sm_89 and sm_120
    for operator in ("forward float32 in lines", "backward float32 in lines"):
        block = EXPECTED["shared_memory"][operator]["97"]
        assert 3 * (block + 1024) <= 228 * 1024


def test_registers_of_the_float32_kernels_for_lines_of_97() -> None:
    """Three blocks of 128 threads fit in a multiprocessor, so that some compute while others wait."""
    for kernels in EXPECTED["kernels"].values():
        for name in (
            "forward_kernel<13, 7>",
            "backward_kernel<float32::Shape<128, 9, 11, 14, 7, 98, 3, 3> >",
        ):
            kernel = kernels[f"float32_{name.split('_')[0]}: float32::{name}"]
            assert 3 * 128 * kernel["registers"] <= 64 * 1024


@pytest.mark.build
@pytest.mark.parametrize("source", ["tensor_core_forward.cu", "tensor_core_backward.cu"])
def test_shared_memory_is_not_read_byte_by_byte(nvcc: str, source: str, tmp_path: Path) -> None:
    """The compiler knows the alignment of shared memory. Reads byte by byte would be several times slower."""
    path = kernel_resources.ROOT / "cc_attention/csrc/cuda" / source
    ptx = tmp_path / "kernels.ptx"
    subprocess.run([nvcc, "-O3", "-std=c++20", "-arch=sm_80", "-ptx", path, "-o", ptx], check=True)
    assert "ldmatrix" in ptx.read_text() and "ld.shared.u8" not in ptx.read_text()


def test_the_norm_kernels_have_enough_threads() -> None:
    """Two blocks of 256 threads fit in a multiprocessor, so that enough loads are under way."""
    kernels = [
        kernel
        for kernels in EXPECTED["kernels"].values()
        for name, kernel in kernels.items()
        if name.startswith("norm:")
    ]
    assert kernels and all(2 * 256 * kernel["registers"] <= 64 * 1024 for kernel in kernels)


@pytest.mark.build
def test_the_norm_kernels_access_16_bytes_at_once(nvcc: str, tmp_path: Path) -> None:
    """Kernels whose threads have several channels load and store them in one instruction."""
    ptx = tmp_path / "norm.ptx"
    source = kernel_resources.ROOT / "fused/csrc/cuda/norm.cu"
    subprocess.run([nvcc, "-O3", "-std=c++20", "-arch=sm_80", "-ptx", source, "-o", ptx], check=True)
    kernels = [text for text in ptx.read_text().split(".entry ")[1:] if re.match(r"\w+Li[248]E", text)]
    assert len(kernels) == 4 * (1 + 1 + 3 + 3)
    for text in kernels:
        assert "ld.global.v4.u32" in text
        assert not re.search(r"(ld|st)\.global\.[usbf](8|16|32)\b", text), text[:200]
