"""Build cc_attention._C and nothing else; pyproject.toml has all the rest.

The extension is optional: without a C++ compiler the package is pure Python, and the operators run in plain
PyTorch. A compiler that is there and fails stops the build. CUDA kernels are included where PyTorch is a CUDA
build and an nvcc of its major version is found; no GPU is needed. Environment variables:

    CXX                    the C++ compiler to use
    CCNET_EXTENSION=0      no extension
    CCNET_CUDA=0           kernels for the CPU alone, as USE_CUDA=0
    CUDA_HOME              the CUDA toolkit to try first
    TORCH_CUDA_ARCH_LIST   the architectures
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

MINIMUM_SETUPTOOLS = 77  # the first that reads pyproject.toml's license
if int(setuptools.__version__.split(".")[0]) < MINIMUM_SETUPTOOLS:
    sys.exit(
        f"cc_attention: error: setuptools {setuptools.__version__} is too old: "
        f'pip install --upgrade "setuptools>={MINIMUM_SETUPTOOLS}", then run this again'
    )
try:
    import torch
except ImportError as error:
    sys.exit(f"cc_attention: error: PyTorch is missing ({error}): pip install torch, then run this again")

CSRC = "cc_attention/csrc"
HOST_SOURCES = ["ops.cpp", "cpu/attention_cpu.cpp", "cpu/baseline.cpp", "cpu/avx2.cpp", "cpu/avx512.cpp"]
CUDA_SOURCES = [
    f"cuda/{name}.cu" for name in ("dispatch", "general", "tensor_core_backward", "tensor_core_forward")
]
HEADERS = ["common.h", "kernels.h", "cpu/instruction_sets.h", "cpu/lines.h", "cpu/product.h"]
HEADERS += [f"cuda/{name}.h" for name in ("device", "general", "line", "tensor_core")]

TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one library for it and all later ones
# Turing to Blackwell; each binary serves the later minor versions too, and PTX what comes after the last.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
SYSTEM_TOOLKIT = Path("/usr/local/cuda")


def check_sources() -> None:
    """Stop where the copy is incomplete: what is left would build a library that does not load."""
    names = [f"{CSRC}/{name}" for name in HOST_SOURCES + CUDA_SOURCES + HEADERS]
    if missing := [name for name in names if not Path(name).is_file()]:
        sys.exit(f"cc_attention: error: {', '.join(missing)}: missing; get a complete copy of the source")


def find_compiler() -> tuple[str | None, str]:
    """Return the command of a C++20 compiler that works, or None, and why there is none."""
    if os.environ.get("CCNET_EXTENSION") == "0":
        return None, "they are switched off by CCNET_EXTENSION"
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
    """Return what nvcc prints, errors included."""
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout + result.stderr


def find_toolkit() -> tuple[Path | None, str]:
    """Return the folder of a CUDA toolkit for this PyTorch, or None, and why.

    It is the first that fits of: CUDA_HOME, the toolkit that pip puts beside PyTorch, nvcc on the PATH,
    /usr/local/cuda.
    """
    if "0" in (os.environ.get("CCNET_CUDA"), os.environ.get("USE_CUDA")):
        return None, "CUDA is switched off by CCNET_CUDA or USE_CUDA"
    if not torch.version.cuda:
        return None, "this PyTorch is a CPU build"
    major = torch.version.cuda.split(".")[0]
    candidates = [Path(home)] if (home := os.environ.get("CUDA_HOME")) else []
    candidates.append(Path(torch.__file__).parents[1] / "nvidia" / f"cu{major}")
    if nvcc := shutil.which("nvcc"):
        # It may be a link or a script, but tells where its toolkit is when asked what it would run.
        top = re.search(r"TOP=(.+)", run_nvcc(Path(nvcc), "--dryrun", "-c", "x.cu"))
        candidates += [Path(top[1].strip()).resolve()] if top else []
    candidates.append(SYSTEM_TOOLKIT)
    for home in candidates:
        if (home / "bin/nvcc").is_file() and f"release {major}." in run_nvcc(home / "bin/nvcc", "--version"):
            return home, f"PyTorch for CUDA {torch.version.cuda}"
    return None, f"no nvcc of CUDA {major} for PyTorch's CUDA {torch.version.cuda}"


def make_extension(compiler: str, home: Path | None) -> setuptools.Extension:
    """Return the extension with the kernels of the CPU, and of CUDA where there is a toolkit."""
    os.environ["CXX"] = compiler  # setuptools and PyTorch's ninja file would choose others
    sources = [f"{CSRC}/{name}" for name in HOST_SOURCES]
    flags = ["-O3", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    # The last one changes no result; without it, GCC 11 does not vectorize the conversions of float16.
    cxx_flags = ["-g0", "-fvisibility=hidden", "-fno-trapping-math"]
    options = {"depends": [f"{CSRC}/{name}" for name in HEADERS], "py_limited_api": True}
    if home is None:
        from torch.utils.cpp_extension import CppExtension

        return CppExtension("cc_attention._C", sources, extra_compile_args=flags + cxx_flags, **options)

    os.environ["CUDA_HOME"] = str(home)  # cpp_extension reads both when it is imported or used
    supported = re.findall(r"compute_(\d+)", run_nvcc(home / "bin/nvcc", "--list-gpu-arch"))
    architectures = [arch for arch in ARCHITECTURES if arch.replace(".", "") in supported]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures) + "+PTX"
    from torch.utils.cpp_extension import CUDAExtension

    flags.append("-DUSE_CUDA")
    sources += [f"{CSRC}/{name}" for name in CUDA_SOURCES]
    host = ["-ccbin", compiler] if len(shlex.split(compiler)) == 1 else []  # else nvcc's own choice
    per_compiler = {"cxx": flags + cxx_flags, "nvcc": flags + host}
    result = CUDAExtension("cc_attention._C", sources, extra_compile_args=per_compiler, **options)
    # By its full name: the toolkit from the package index has libcudart.so.13 and no libcudart.so.
    major = torch.version.cuda.split(".")[0]
    result.libraries = [f":libcudart.so.{major}" if name == "cudart" else name for name in result.libraries]
    return result


def main() -> None:
    """Run the command of setuptools, with the extension where there is a compiler."""
    check_sources()
    compiler, reason = find_compiler()
    if compiler is None:
        print(f"cc_attention: pure Python, without the compiled operators: {reason}", flush=True)
        setuptools.setup()
        return
    toolkit, reason = find_toolkit()
    extension = make_extension(compiler, toolkit)
    kind = f"CUDA ({toolkit}, {os.environ['TORCH_CUDA_ARCH_LIST']})" if toolkit else "CPU only"
    print(f"cc_attention: {kind}: {reason}; {compiler}; PyTorch {torch.__version__}", flush=True)
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # of setuptools or PyTorch, which have no type in common
                sys.exit(
                    f"cc_attention: error: {compiler} did not build the extension ({error}; its messages are "
                    "above); CXX names another compiler, CCNET_EXTENSION=0 installs the package without"
                )

    setuptools.setup(
        ext_modules=[extension],
        cmdclass={"build_ext": Build},
        # force: a library left by a build of the other kind must not pass for up to date
        options={"build_ext": {"force": True}, "bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
