"""Build the extensions cc_attention._C and fused._C; everything else is in pyproject.toml.

fused._C is built in a checkout only, by `python setup.py build_ext --inplace`. Distributions have only
cc_attention.

The extensions are optional. Without a C++ compiler, the packages are pure Python, and the operators run in
plain PyTorch. If there is a compiler and it fails, the build fails. CUDA kernels are included if PyTorch is a
CUDA build and an nvcc of the same major version is found; no GPU is needed. Environment variables:

    CXX                    C++ compiler
    CCNET_EXTENSION=0      do not build the extensions
    CCNET_CUDA=0           do not build CUDA kernels (also USE_CUDA=0)
    CUDA_HOME              CUDA toolkit to try first
    TORCH_CUDA_ARCH_LIST   GPU architectures
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import setuptools

MINIMUM_SETUPTOOLS = 77  # the first version that supports the license field of pyproject.toml
if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
    sys.exit(
        f"cc_attention: error: setuptools {setuptools.__version__} is too old; run "
        f'pip install --upgrade "setuptools>={MINIMUM_SETUPTOOLS}", then run this again'
    )
try:
    import torch
except ImportError as error:
    sys.exit(f"cc_attention: error: PyTorch is missing ({error}); run pip install torch, then run this again")


class Library(NamedTuple):
    """The source files of an extension, relative to the folder csrc of its package."""

    package: str
    host: list[str]
    cuda: list[str]
    headers: list[str]

    def paths(self, names: list[str]) -> list[str]:
        """Return the paths of some of the files."""
        return [f"{self.package}/csrc/{name}" for name in names]


CC_ATTENTION = Library(
    "cc_attention",
    ["ops.cpp", "cpu/attention_cpu.cpp", "cpu/baseline.cpp", "cpu/avx2.cpp", "cpu/avx512.cpp"],
    [f"cuda/{name}.cu" for name in ("dispatch", "general")]
    + [f"cuda/{name}_{way}.cu" for name in ("float32", "tensor_core") for way in ("backward", "forward")],
    ["common.h", "kernels.h", "cpu/instruction_sets.h", "cpu/lines.h", "cpu/product.h", "cpu/vector.h"]
    + [f"cuda/{name}.h" for name in ("device", "float32", "general", "line", "tensor_core")],
)
#: It also includes headers of cc_attention.
FUSED = Library(
    "fused",
    ["module.cpp", "norm_ops.cpp", "loss_ops.cpp"]
    + [f"cpu/{name}.cpp" for name in ("dispatch", "baseline", "avx2", "avx512")],
    ["cuda/norm.cu", "cuda/loss.cu"],
    ["norm.h", "loss.h", "cpu/instruction_sets.h", "cpu/norm_kernels.h", "cpu/loss_kernels.h"],
)

TARGET_VERSION = "0x020a000000000000"  # stable ABI of torch 2.10: one library for this and later versions
# Turing to Blackwell: for each virtual architecture, the real ones that its PTX is assembled for. Making PTX
# takes most of the time of the build, and compute_90 and compute_120 would give the same. A binary also runs
# on later minor versions, and the last PTX on later architectures.
ARCHITECTURES = {"75": ["75"], "80": ["80", "90"], "100": ["100", "120"]}
SYSTEM_TOOLKIT = Path("/usr/local/cuda")


def check_sources(library: Library) -> None:
    """Exit if source files are missing: the rest could build a library that does not load."""
    names = library.paths(library.host + library.cuda + library.headers)
    if missing := [name for name in names if not Path(name).is_file()]:
        sys.exit(f"cc_attention: error: {', '.join(missing)}: missing; get a complete copy of the source")


def find_compiler() -> tuple[str | None, str]:
    """Return the command of a working C++20 compiler, or None and the reason."""
    if os.environ.get("CCNET_EXTENSION") == "0":
        return None, "disabled by CCNET_EXTENSION"
    usual = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    compiler = os.environ.get("CXX") or (usual[0] if usual else "c++")
    command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        subprocess.run(command, input=b"#include <vector>\n", capture_output=True, check=True)
    except OSError as error:
        return None, f"there is no C++ compiler ({compiler}: {error.strerror})"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return (
            None,
            f"{compiler} does not compile C++20 ({lines[0] if lines else f'status {error.returncode}'})",
        )
    return compiler, ""


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    """Run nvcc and return its output, including errors."""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout + result.stderr


def find_toolkit() -> tuple[Path | None, str]:
    """Return the folder of a CUDA toolkit for this PyTorch, or None; and the reason.

    The first one of the required version is used, of: CUDA_HOME, the toolkit that pip installs with PyTorch,
    nvcc on the PATH, /usr/local/cuda.
    """
    if "0" in (os.environ.get("CCNET_CUDA"), os.environ.get("USE_CUDA")):
        return None, "CUDA is disabled by CCNET_CUDA or USE_CUDA"
    if not torch.version.cuda:
        return None, "this PyTorch is a CPU build"
    major = torch.version.cuda.split(".")[0]
    candidates = [Path(home)] if (home := os.environ.get("CUDA_HOME")) else []
    candidates.append(Path(torch.__file__).parents[1] / "nvidia" / f"cu{major}")
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a link or a script; the output of a dry run names the folder of its toolkit.
        top = re.search(r"TOP=(.+)", run_nvcc(Path(nvcc), "--dryrun", "-c", "x.cu"))
        candidates += [Path(top[1].strip()).resolve()] if top else []
    candidates.append(SYSTEM_TOOLKIT)
    for home in candidates:
        if (home / "bin/nvcc").is_file() and f"release {major}." in run_nvcc(home / "bin/nvcc", "--version"):
            return home, f"PyTorch for CUDA {torch.version.cuda}"
    return None, f"no nvcc of CUDA {major} for PyTorch's CUDA {torch.version.cuda}"


def architecture_flags(home: Path) -> list[str]:
    """Return nvcc's flags for those of ARCHITECTURES that this toolkit knows."""
    known = re.findall(r"compute_(\d+)", run_nvcc(home / "bin/nvcc", "--list-gpu-arch"))
    codes = {ptx: [f"sm_{code}" for code in ARCHITECTURES[ptx] if code in known] for ptx in ARCHITECTURES}
    codes = {ptx: code for ptx, code in codes.items() if ptx in known and code}
    if codes:
        last = list(codes)[-1]
        codes[last].append(f"compute_{last}")
    return [f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]" for ptx, code in codes.items()]


def make_extension(library: Library, compiler: str, home: Path | None) -> setuptools.Extension:
    """Return an extension with the CPU kernels and, if there is a toolkit, the CUDA kernels."""
    os.environ["CXX"] = compiler  # otherwise setuptools and PyTorch's ninja file would use their own choice
    name, sources = f"{library.package}._C", library.paths(library.host)
    flags = ["-O3", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    # -fno-trapping-math changes no result. Without it, GCC 11 does not vectorize float16 conversions.
    cxx_flags = ["-g0", "-fvisibility=hidden", "-fno-trapping-math"]
    headers = library.paths(library.headers)
    if library is FUSED:
        headers += CC_ATTENTION.paths(CC_ATTENTION.headers)
    options = {"depends": headers, "py_limited_api": True}
    if home is None:
        from torch.utils.cpp_extension import CppExtension

        return CppExtension(name, sources, extra_compile_args=flags + cxx_flags, **options)

    # cpp_extension reads CUDA_HOME and TORCH_CUDA_ARCH_LIST when it is imported or used.
    os.environ["CUDA_HOME"] = str(home)
    architectures = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else architecture_flags(home)
    from torch.utils.cpp_extension import CUDAExtension

    flags.append("-DUSE_CUDA")
    sources += library.paths(library.cuda)
    host = ["-ccbin", compiler] if len(shlex.split(compiler)) == 1 else []  # otherwise nvcc chooses
    per_compiler = {"cxx": flags + cxx_flags, "nvcc": flags + host + architectures}
    result = CUDAExtension(name, sources, extra_compile_args=per_compiler, **options)
    # Link by the full name: the toolkit from PyPI has libcudart.so.13 but no libcudart.so.
    major = torch.version.cuda.split(".")[0]
    result.libraries = [f":libcudart.so.{major}" if name == "cudart" else name for name in result.libraries]
    return result


def main() -> None:
    """Run the setuptools command, with the extensions if there is a compiler."""
    in_place = "--inplace" in sys.argv or "-i" in sys.argv
    libraries = [CC_ATTENTION, FUSED] if in_place and Path("fused").is_dir() else [CC_ATTENTION]
    for library in libraries:
        check_sources(library)
    compiler, reason = find_compiler()
    if compiler is None:
        print(f"cc_attention: pure Python, without the compiled operators: {reason}", flush=True)
        setuptools.setup()
        return
    toolkit, reason = find_toolkit()
    extensions = [make_extension(library, compiler, toolkit) for library in libraries]
    kind = "CPU only"
    if toolkit:
        binaries = ", ".join(re.findall(r"sm_\d+", str(architecture_flags(toolkit))))
        kind = f"CUDA ({toolkit}, {os.environ.get('TORCH_CUDA_ARCH_LIST') or binaries})"
    print(f"cc_attention: {kind}: {reason}; {compiler}; PyTorch {torch.__version__}", flush=True)
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Build the extensions; a failure ends the build with one line."""

        def build_extensions(self) -> None:
            """Compile the extensions."""
            try:
                super().build_extensions()
            except Exception as error:  # setuptools and PyTorch raise errors without a common base class
                sys.exit(
                    f"cc_attention: error: {compiler} did not build the extensions ({error}; see its "
                    "messages above); set CXX to another compiler, or CCNET_EXTENSION=0 to install without"
                )

    setuptools.setup(
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        # force: otherwise a library from an earlier build without CUDA could count as up to date
        options={"build_ext": {"force": True}, "bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
