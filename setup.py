"""Builds cc_attention._C and nothing else; pyproject.toml has all the rest.

CUDA kernels are included where PyTorch is a CUDA build and an nvcc of its major version is found; no GPU is
needed. CUDA_HOME names the toolkit to try first, TORCH_CUDA_ARCH_LIST the architectures; CCNET_CUDA=0 (or
USE_CUDA=0) builds for the CPU alone.
"""

import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

import torch
from setuptools import setup

TARGET_VERSION = "0x020a000000000000"  # the stable ABI of torch 2.10: one library for it and all later ones
# Turing to Blackwell; each binary serves the later minor versions too, and PTX what comes after the last.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
SYSTEM_TOOLKIT = Path("/usr/local/cuda")


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return result.stdout + result.stderr


def find_toolkit() -> tuple[Path | None, str]:
    """The folder of a CUDA toolkit for this PyTorch, or None, and why: the first that fits of CUDA_HOME, the
    toolkit that pip puts beside PyTorch, nvcc on the PATH, /usr/local/cuda."""
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


def extension(home: Path | None):
    """The extension with the kernels of the CPU, and of CUDA where there is a toolkit."""
    sources = sorted(glob("cc_attention/csrc/*.cpp") + glob("cc_attention/csrc/cpu/*.cpp"))
    flags = ["-O3", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    cxx_flags = ["-g0", "-fvisibility=hidden"]
    options = {"depends": glob("cc_attention/csrc/**/*.h", recursive=True), "py_limited_api": True}
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
    sources += sorted(glob("cc_attention/csrc/cuda/*.cu"))
    per_compiler = {"cxx": flags + cxx_flags, "nvcc": flags}
    result = CUDAExtension("cc_attention._C", sources, extra_compile_args=per_compiler, **options)
    # By its full name: the toolkit from the package index has libcudart.so.13 and no libcudart.so.
    major = torch.version.cuda.split(".")[0]
    result.libraries = [f":libcudart.so.{major}" if name == "cudart" else name for name in result.libraries]
    return result


if __name__ == "__main__":
    toolkit, reason = find_toolkit()
    module = extension(toolkit)
    kind = f"CUDA ({toolkit}, {os.environ['TORCH_CUDA_ARCH_LIST']})" if toolkit else "CPU only"
    print(f"cc_attention: {kind}: {reason}; PyTorch {torch.__version__}", flush=True)
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=[module],
        cmdclass={"build_ext": BuildExtension},
        # force: a library left by a build of the other kind must not pass for up to date
        options={"build_ext": {"force": True}, "bdist_wheel": {"py_limited_api": "cp310"}},
    )
