"""The package without its compiled library, with a broken one, and on an unsuitable PyTorch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cc_attention
from cc_attention import ops

PACKAGE = Path(cc_attention.__file__).parent

pytestmark = pytest.mark.slow


def run_copy_of_the_package(
    folder: Path, library: bytes | None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Use a copy of the package with the given bytes as its library, in its own process.

    Args:
        before: statements to run before the package is imported.
    """
    shutil.copytree(
        PACKAGE, folder / "cc_attention", ignore=shutil.ignore_patterns("_C*", "csrc", "__pycache__")
    )
    if library is not None:
        (folder / "cc_attention/_C.abi3.so").write_bytes(library)
    program = (
        f"import torch; {before}\nimport cc_attention; from cc_attention import ca_weight, reference;"
        "x = torch.randn(1, 2, 3, 4);"
        "assert torch.equal(ca_weight(x, x), reference.ca_weight(x, x)) and ca_weight(x, x).numel();"
        "print(cc_attention.__file__)"
    )
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_missing_library_means_the_reference_with_one_warning(tmp_path: Path) -> None:
    result = run_copy_of_the_package(tmp_path, None)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert result.stderr.count("the compiled criss-cross attention is missing") == 1
    assert "setup.py build_ext" in result.stderr


def test_broken_library_is_an_error(tmp_path: Path) -> None:
    result = run_copy_of_the_package(tmp_path, b"not a library")
    assert result.returncode != 0
    assert "ImportError" in result.stderr and "Rebuild it" in result.stderr


@pytest.mark.skipif("cpu" not in ops.DEVICE_TYPES, reason="cc_attention._C is not built")
def test_a_pytorch_without_what_the_registration_builds_on_means_the_reference(tmp_path: Path) -> None:
    (library,) = PACKAGE.glob("_C*.so")
    gone = "import torch.autograd.function; del torch.autograd.function._SingleLevelFunction"
    result = run_copy_of_the_package(tmp_path, library.read_bytes(), gone)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("using the slower PyTorch reference") == 1
    assert "_SingleLevelFunction" in result.stderr
