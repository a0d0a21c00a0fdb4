"""The CPU kernels of instruction sets other than the best one of this processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from cc_attention import ops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 alone has several instruction sets"),
    pytest.mark.skipif("cpu" not in ops.DEVICE_TYPES, reason="the compiled operators are not built"),
]

#: Prints an attention of exact inputs. Its last bits tell how products and sums were rounded.
ATTENTION = """
import torch
from cc_attention import criss_cross_attention
maps = (torch.arange(3 * 8 * 81) * 37 % 61 - 30) / 32
print(criss_cross_attention(*maps.reshape(3, 1, 8, 9, 9)).flatten().tolist())
"""


def run_with(capability: str, *arguments: str) -> str:
    """Run Python with an instruction set, and return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_variable_chooses_the_kernels() -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    assert run_with("default", "-c", ATTENTION) != run_with("avx2", "-c", ATTENTION)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_of_lesser_instruction_sets(capability: str) -> None:
    """The tests of the attention, and those of the fused kernels in float32, pass with them as well."""
    attention = ["unit/test_attention_options.py", "kernels/test_attention_kernels.py"]
    tests = [*attention, "kernels/test_fused_norm.py", "kernels/test_fused_loss.py"]
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    chosen = ["-m", "not gpu and not build", "-k", "attention or float32"]
    printed = run_with(capability, "-m", "pytest", *options, *chosen, *[f"tests/{name}" for name in tests])
    assert " passed" in printed
