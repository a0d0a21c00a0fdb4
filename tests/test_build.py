"""The build: which toolkit it takes, what it installs; the set-up script's errors."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, on a machine with PyTorch for CUDA 13.2 and no toolkit."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CCNET_CUDA", "USE_CUDA", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site-packages/torch/__init__.py"))
    monkeypatch.setattr(module, "SYSTEM_TOOLKIT", tmp_path / "nowhere")
    return module


def make_toolkit(home: Path, release: str) -> Path:
    """A folder with an nvcc that tells that release, and its folder when asked what it would run."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
    --dryrun) echo "#$ TOP={home}/bin/.." >&2 ;;
    *) echo "compilation tools, release {release}, V1" ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return home


def test_no_toolkit(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    home, reason = script.find_toolkit()
    assert home is None and "no nvcc of CUDA 13" in reason
    monkeypatch.setattr(torch.version, "cuda", None)
    home, reason = script.find_toolkit()
    assert home is None and "CPU build" in reason


def test_toolkits_in_order(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "SYSTEM_TOOLKIT", make_toolkit(tmp_path / "usr local", "13.1"))
    assert script.find_toolkit()[0] == tmp_path / "usr local"

    real = make_toolkit(tmp_path / "real", "13.0")  # reached through a script in another folder
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec "{real}/bin/nvcc" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert script.find_toolkit()[0] == real

    package = make_toolkit(tmp_path / "site-packages/nvidia/cu13", "13.2")
    assert script.find_toolkit()[0] == package

    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "mine", "13.0")))
    assert script.find_toolkit()[0] == tmp_path / "mine"
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "old", "12.8")))
    assert script.find_toolkit()[0] == package

    monkeypatch.setenv("CCNET_CUDA", "0")
    assert script.find_toolkit()[0] is None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build and the set-up read, without anything built."""
    folder = tmp_path / "a checkout"
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    for name in ("cc_attention", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "networks").mkdir()
    (folder / "networks/__init__.py").touch()
    for path in [*ROOT.glob("*.txt"), ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        shutil.copy(path, folder)
    return folder


def test_only_the_operator_package_is_installed(checkout: Path, tmp_path: Path) -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    if importlib.util.find_spec("pip") is None:
        pytest.skip("no pip in this environment")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
    ]
    environment = os.environ | {"CCNET_CUDA": "0"}
    result = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
    modules = {f"cc_attention/{path.name}" for path in (ROOT / "cc_attention").glob("*.py")}
    assert set(names) == modules | {"cc_attention/_C.abi3.so"}


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", 'set -eu; . tools/setup_env.sh; echo "ready: $PYTHON"'],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_setup_names_what_is_wrong(checkout: Path, tmp_path: Path) -> None:
    result = set_up(checkout, CCNET_PYTHON=str(tmp_path / "missing"))
    assert result.returncode == 2 and "ready" not in result.stdout
    assert result.stderr == f"setup: CCNET_PYTHON={tmp_path / 'missing'} is not a Python >= 3.10\n"


def test_setup_goes_on_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    result = set_up(checkout, CCNET_PYTHON=sys.executable, CCNET_CUDA="0", CXX=str(tmp_path / "no compiler"))
    assert result.returncode == 0, result.stderr
    assert f"ready: {sys.executable}" in result.stdout
    assert "the reference implementation will be used" in result.stderr.splitlines()[-1]
    assert not list((checkout / "cc_attention").glob("_C*"))
