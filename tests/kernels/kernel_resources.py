"""Measure the resources of a multiprocessor that the CUDA kernels need.

    python tests/kernels/kernel_resources.py      measures and writes tests/data/kernel_resources.json

Registers, spills and static shared memory of each kernel and architecture are what the compiler reports: in
the log of the build (CCNET_DEV=1 tools/setup_env.sh), or else when it compiles the files again. The dynamic
shared memory of a block is what the launches ask for (in the emulator), by operator, dtype and length of the
line.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # run as a script, outside pytest

from emulator import Emulator, build

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parents[1] / "data/kernel_resources.json"
LOG = ROOT / "build/build.log"  # of tools/setup_env.sh
LENGTHS = (64, 97, 112, 144, 257)
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Return the path of the nvcc that setup.py would use."""
    home, _ = setup_script().find_toolkit()
    return str(home / "bin/nvcc") if home else None


@cache
def setup_script() -> ModuleType:
    """Return setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def nvcc_version(nvcc: str) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", output)
    assert found, output
    return found[1]


def short(name: str) -> str:
    """Shorten a demangled name to forward_kernel<float, 7, 7, 2>."""
    name = re.sub(r"cc_attention::|fused::|\(anonymous namespace\)::", "", name).removeprefix("void ")
    return re.sub(r"\(.*", "", re.sub(r"\((?:bool|int|general::Result|Mask)\)", "", name)).strip()


def compile_for(nvcc: str, source: Path, architecture: str) -> str:
    """Compile one file for one architecture; return the compiler's output."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-O3", "-std=c++20", "-cubin", "-Xptxas", "-v"]
        architectures = setup_script().ARCHITECTURES
        virtual = next(f"compute_{ptx}" for ptx in architectures if architecture[3:] in architectures[ptx])
        command = [nvcc, *options, f"-gencode=arch={virtual},code={architecture}", str(source)]
        done = subprocess.run(
            [*command, "-o", os.path.join(folder, "out.cubin")], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
    return done.stderr


def logged(source: Path, architecture: str) -> str | None:
    """Return the compiler's output for a file in the log of the build, or None if that was of other files."""
    if not LOG.exists() or LOG.stat().st_mtime < max(p.stat().st_mtime for p in ROOT.glob("*/csrc/**/*.*")):
        return None
    for text in re.split(r"^\[\d+/\d+\] ", LOG.read_text(), flags=re.MULTILINE):
        command, _, output = text.partition("\n")
        compiled = f"{source} " in command and re.search(rf"\b{architecture}\b", command)
        if compiled and "ptxas info" in output:
            return output
    return None


def kernels_of(source: Path, output: str, architecture: str) -> dict[str, dict[str, int]]:
    """Return the resources of the kernels of a file, by name, from the compiler's output."""
    reports = [match.groupdict() for match in REPORT.finditer(output)]
    reports = [report for report in reports if report["architecture"] == architecture]
    mangled = "\n".join(report["name"] for report in reports)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
    return {
        f"{source.stem}: {short(name)}": {
            "registers": int(report["registers"]),
            "spills": int(report["stores"]) + int(report["loads"]),
            "stack": int(report["stack"]),
            "shared": int(report["shared"] or 0),
        }
        for name, report in zip(names.splitlines(), reports, strict=True)
    }


def shared_memory() -> dict[str, dict[str, int]]:
    """Return the bytes of dynamic shared memory of a block, by operator and dtype, then line length."""
    kernels = Emulator(build())
    table: dict[str, dict[str, int]] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        paths: list[tuple[str, dict[str, Any]]] = [(str(dtype).removeprefix("torch."), {})]
        if dtype == torch.float32:
            paths += [("tf32", {"tf32": True}), ("float32 in lines", {"untested": True})]
        for name, path in paths:
            for length in LENGTHS:
                query, value = (
                    torch.zeros(1, 64, 1, length, dtype=dtype),
                    torch.zeros(1, 64, 1, length, dtype=dtype),
                )
                out, normalizer = kernels.forward(query, query, value, **path)
                forward = kernels.library.emulator_largest_shared()
                kernels.backward(query, query, value, out, normalizer, value, **path)
                table.setdefault(f"forward {name}", {})[str(length)] = forward
                backward = kernels.library.emulator_largest_shared()
                table.setdefault(f"backward {name}", {})[str(length)] = backward
    return table


def measure(nvcc: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return the resources of all kernels, by architecture and name."""
    sources = sorted(ROOT.glob("cc_attention/csrc/cuda/*.cu")) + sorted(ROOT.glob("fused/csrc/cuda/*.cu"))
    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in sources]

    def output(source: Path, architecture: str) -> str:
        return logged(source, architecture) or compile_for(nvcc, source, architecture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(lambda job: output(*job), jobs))
    table: dict[str, dict[str, dict[str, int]]] = {architecture: {} for architecture in ARCHITECTURES}
    for (source, architecture), text in zip(jobs, outputs, strict=True):
        table[architecture] |= kernels_of(source, text, architecture)
    return table


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("kernel_resources.py: there is no nvcc for this PyTorch", file=sys.stderr)
        return 2
    resources = measure(nvcc)
    table = {"nvcc": nvcc_version(nvcc), "shared_memory": shared_memory(), "kernels": resources}
    text = json.dumps(table, indent=1)
    # Put each kernel on one line.
    text = re.sub(
        r"\{\s+(\"(?:registers|64)\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text
    )
    TABLE.write_text(text + "\n")
    for architecture, kernels in resources.items():
        spilling = [f"{name} ({r['spills']} bytes)" for name, r in kernels.items() if r["spills"]]
        print(f"{architecture}: {len(kernels)} kernels, spilling: {', '.join(spilling) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
