"""The build: the choice of compiler and toolkit, packages, installation, errors of the set-up script."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import include_paths

import cc_attention

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return setup.py as a module, as on a machine with PyTorch for CUDA 13.2 and no toolkit."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CXX", "CCNET_EXTENSION", "CCNET_CUDA", "USE_CUDA", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site-packages/torch/__init__.py"))
    monkeypatch.setattr(module, "SYSTEM_TOOLKIT", tmp_path / "nowhere")
    return module


def make_toolkit(home: Path, release: str) -> Path:
    """Make a folder with an nvcc that reports the release, and for --dryrun its folder."""
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


@pytest.mark.parametrize(
    "known, expected",
    [
        (
            "75 80 86 90 100 120",
            ["75,code=[sm_75]", "80,code=[sm_80,sm_90]", "100,code=[sm_100,sm_120,compute_100]"],
        ),
        ("60 75 80 90", ["75,code=[sm_75]", "80,code=[sm_80,sm_90,compute_80]"]),
        ("100 103 110 120", ["100,code=[sm_100,sm_120,compute_100]"]),
    ],
)
def test_architectures_of_the_toolkit(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, known: str, expected: list[str]
) -> None:
    """Nvcc compiles for the architectures that it knows, and keeps the PTX of the last for later ones."""
    lines = "".join(f"compute_{number}\n" for number in known.split())
    monkeypatch.setattr(script, "run_nvcc", lambda nvcc, flag: lines if flag == "--list-gpu-arch" else "")
    flags = script.architecture_flags(Path("toolkit"))
    assert flags == [f"-gencode=arch=compute_{codes}" for codes in expected]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that the build and the set-up read, without build results."""
    folder = tmp_path / "a checkout"
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    for name in ("cc_attention", "fused", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "networks").mkdir()
    (folder / "networks/__init__.py").touch()
    for name in ("*.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        for path in ROOT.glob(name):
            shutil.copy(path, folder)
    return folder


pytestmark = [pytest.mark.slow, pytest.mark.build]


def run_setup(checkout: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *map(str, arguments)],
        cwd=checkout,
        env=os.environ | {"CCNET_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["CC_ATTENTION", "FUSED"])
def test_every_source_is_listed(script: ModuleType, name: str) -> None:
    library = getattr(script, name)
    listed = [*library.host, *library.cuda, *library.headers]
    csrc = ROOT / library.package / "csrc"
    assert sorted(listed) == sorted(str(path.relative_to(csrc)) for path in csrc.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["cuda/dispatch.cu", "cuda/line.h", "cpu/avx2.cpp"])
def test_missing_source_stops_the_build(checkout: Path, name: str) -> None:
    (checkout / "cc_attention/csrc" / name).unlink()
    result = run_setup(checkout, "sdist")
    assert result.returncode == 1
    assert result.stderr == (
        f"cc_attention: error: cc_attention/csrc/{name}: missing; get a complete copy of the source\n"
    )


def test_old_setuptools_and_missing_torch_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='pip install .*"setuptools>=77"'):
        patch.setattr(setuptools, "__version__", "65.5.0")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="PyTorch is missing"):
        patch.setitem(sys.modules, "torch", None)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


STEP = """
import sys, torch, cc_attention
from torch import nn
assert cc_attention.__file__.startswith(sys.argv[1])
network = nn.Sequential(nn.Conv2d(3, 16, 3), cc_attention.CrissCrossAttention(16), nn.Conv2d(16, 5, 1))
optimizer = torch.optim.SGD(network.parameters(), 0.1)
before = network[1].gamma.item()
labels = torch.zeros(2, 7, 10, dtype=torch.long)
nn.functional.cross_entropy(network(torch.randn(2, 3, 9, 12)), labels).backward()
optimizer.step()
assert network[1].gamma.item() != before
print(cc_attention.__version__, cc_attention.ops.DEVICE_TYPES)
"""


def test_wheel_of_the_source_distribution(checkout: Path, tmp_path: Path) -> None:
    """A source distribution made for the CPU has all source. A wheel that is built from it alone trains."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    if importlib.util.find_spec("pip") is None:
        pytest.skip("no pip in this environment")
    (checkout / "tests").mkdir()
    (checkout / "tests/test_it.py").touch()
    (checkout / "README.md").touch()
    result = run_setup(checkout, "sdist", "--dist-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    package = {
        f"cc_attention/{path.relative_to(checkout / 'cc_attention')}"
        for path in (checkout / "cc_attention").rglob("*")
        if path.is_file()
    }
    described = {"LICENSE", "MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg", "setup.py"}
    assert {name for name in names if ".egg-info/" not in name} == package | described

    command = ["-m", "pip", "wheel", "--no-cache-dir", "--no-build-isolation", "--no-deps", "-w"]
    result = subprocess.run(
        [sys.executable, *command, str(tmp_path), str(source)],
        env=os.environ | {"CCNET_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers, _, description = archive.read(metadata).decode().partition("\n\n")
        archive.extractall(tmp_path / "installed")
    modules = {name for name in package if name.endswith(".py")}
    assert names == modules | {"cc_attention/py.typed", "cc_attention/_C.abi3.so"}
    for line in ("License-Expression: MIT", "License-File: LICENSE", "Requires-Dist: torch>=2.10"):
        assert line in headers.splitlines()
    assert description == (checkout / "cc_attention/README.md").read_text()

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEP, str(tmp_path / "installed")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{cc_attention.__version__} frozenset({{'cpu'}})\n"


def make_compiler(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_working_compiler(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    assert script.find_compiler() == (
        None,
        f"there is no C++ compiler ({tmp_path / 'nowhere'}: No such file or directory)",
    )
    old = make_compiler(
        tmp_path / "g++-8", "echo \"g++-8: error: unrecognized option '-std=c++20'\" >&2; exit 1"
    )
    monkeypatch.setenv("CXX", old)
    compiler, reason = script.find_compiler()
    assert compiler is None and reason.startswith(f"{old} does not compile C++20 (g++-8: error: unrecog")

    make_compiler(tmp_path / "clang++", "cat >/dev/null")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:/bin")  # for cat
        patch.setattr(shutil, "which", lambda name: name if name == "clang++" else None)
        assert script.find_compiler() == ("clang++", "")
        patch.setenv("CCNET_EXTENSION", "0")
        assert script.find_compiler()[0] is None


def test_no_compiler_makes_a_pure_wheel(checkout: Path, tmp_path: Path) -> None:
    result = run_setup(checkout, "bdist_wheel", "--dist-dir", tmp_path, CXX=str(tmp_path / "nowhere"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pure Python, without the compiled operators: there is no C++ compiler") == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_C" in name]


def test_failing_compiler_stops_the_build(checkout: Path, tmp_path: Path) -> None:
    body = """case "$*" in
    *-fsyntax-only*) cat >/dev/null ;;
    *-dump*) echo 99.0.0 ;;
    *) echo "out of order" >&2; exit 1 ;;
esac"""
    compiler = make_compiler(tmp_path / "g++-99", body)
    result = run_setup(checkout, "bdist_wheel", "--dist-dir", tmp_path, CXX=compiler)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "out of order" in result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"cc_attention: error: {compiler} did not build the extensions")
    assert "CCNET_EXTENSION=0" in last and not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize("compiler", ["g++", "g++-11", "clang++", "clang++-16"])
def test_each_file_has_its_instruction_set(compiler: str, tmp_path: Path) -> None:
    """Functions that the linker may take from any of the files run on every processor.

    They are compiled without optimization, which is four times as fast and emits more functions.
    """
    for tool in (compiler, "objdump"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} here")
    if platform.machine() != "x86_64":
        pytest.skip("x86-64 alone has several instruction sets")
    includes = [f"-isystem{path}" for path in include_paths()]
    flags = ["-O0", "-std=c++20", "-Wall", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes]
    for name, register in (("baseline", "%xmm"), ("avx2", "%ymm"), ("avx512", "%zmm")):
        target = tmp_path / f"{name}.o"
        source = ROOT / f"cc_attention/csrc/cpu/{name}.cpp"
        command = [compiler, *flags, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and not result.stderr, result.stderr
        command = ["objdump", "-d", "-w", "--no-show-raw-insn", str(target)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", listing, re.MULTILINE)
        tiles = [code for function, code in functions if "multiply_tile" in function]
        assert tiles and all(register in code for code in tiles)
        assert max(re.findall(r"%[xyz]mm", listing)) == register[:4]
        for function, code in functions:
            if "_GLOBAL__N_1" not in function:  # the unnamed namespace
                assert not re.search(r"\tv[a-z]", code), function  # AVX and later: v before the name


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
