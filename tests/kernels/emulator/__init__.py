"""Compile the CUDA kernels with an emulator for the CPU, and call them with tensors.

kernels = Emulator(build())
out, normalizer = kernels.forward(query, key, value, schedule=2)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_int, c_int64, c_void_p
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CSRC = ROOT / "cc_attention/csrc"
#: By the folder of the sources, the file with what Python calls their kernels by.
HARNESSES = {CSRC: HERE / "harness.cpp", ROOT / "fused/csrc": HERE / "fused_harness.cpp"}
CACHE = ROOT / "build/emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")

#: 0, 1: in rounds, forwards and backwards; 2, 3: the first warp ahead and the last behind, and the opposite;
#: even from 4 on: at random; odd from 5 on: ahead and behind in other orders.
SCHEDULES = (0, 1, 2, 3, 4, 5)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # enum Dtype
PRIMITIVES = ("score", "gather", "scatter")  # enum Primitive
SHARED_MEMORY = 227 * 1024  # bytes that a block may have, on capability 9.0
GUARD = 4096  # elements around each operand


@cache
def compiler_version() -> str:
    """Return the compiler version and its meaning of -march=native on this machine."""
    assert COMPILER is not None, "there is no C++ compiler"
    command = [COMPILER, "-march=native", "-x", "c++", "-v", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _write(text: str, path: str) -> None:
    Path(path).write_text(text)


def make_once(result: Path, make: Callable[[str], None]) -> Path:
    """Make a file unless it exists. It is renamed when complete, so other processes never see half of it."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=result.parent) as folder:
            name = os.path.join(folder, result.name)
            make(name)
            os.replace(name, result)
    return result


def compile_once(result: Path, command: Iterable[object]) -> Path:
    def compile_(name: str) -> None:
        run = subprocess.run([*map(str, command), "-o", name], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the compiler failed:\n{run.stderr}")

    return make_once(result, compile_)


def build(
    edits: Mapping[str, str] | None = None,
    sources: Iterable[Path] | None = None,
    flags: Iterable[str] = ("-O2",),
    csrc: Path = CSRC,
) -> Path:
    """Compile the kernels into a library for the CPU, or reuse an existing one.

    Args:
        edits: texts in the place of files of `csrc`, {"cuda/device.h": ...}.
        sources: files to compile; without, all of `csrc`/cuda and what Python calls them by.
        flags: further flags of the compiler.
        csrc: folder of the sources, a key of HARNESSES.

    Returns:
        The library; build/emulator keeps objects and libraries under the hash of all that they depend on.
    """
    place = csrc.relative_to(ROOT)
    edits = {str(place / name): text for name, text in (edits or {}).items()}
    compiled = sources or [*csrc.glob("cuda/*.cu"), HARNESSES[csrc]]
    texts = {str(place / "cuda" / path.name): path.read_text() for path in compiled}
    for folder in {CSRC, csrc}:
        headers = [*folder.glob("*.h"), *folder.glob("cuda/*.h")]
        texts |= {str(path.relative_to(ROOT)): path.read_text() for path in headers}
    assert edits.keys() <= texts.keys(), f"files that are not compiled: {[*(edits.keys() - texts.keys())]}"
    texts |= edits
    own = [HERE / name for name in ("emulator.h", "emulator_device.h", "emulator.cpp")]
    flags = ["-std=c++20", "-march=native", "-fPIC", "-pthread", "-Wall", "-Wno-unknown-pragmas", *flags]
    if "gcc version" in compiler_version():
        flags.append("-fno-gnu-unique")  # or libraries loaded later would share variables of the first
    flags += ["-DCC_EMULATOR", f"-I{HERE}", "-include", "emulator.h"]
    included = [text for name, text in sorted(texts.items()) if name.endswith(".h")]
    common = digest(compiler_version(), *flags, *included, *(path.read_text() for path in own))

    # Copy all sources for the edits, because the files include each other by relative paths.
    tree = CACHE / digest(common, *sorted(map(str, texts.items()))) / "tree"
    for name, text in texts.items():
        make_once(tree / name, partial(_write, text))
    # The emulator comes last, because its variables have to follow those of the kernels in memory.
    inputs = {tree / name: text for name, text in sorted(texts.items()) if not name.endswith(".h")}
    inputs[own[-1]] = ""
    objects = [CACHE / f"{digest(common, path.name, text)}.o" for path, text in inputs.items()]
    with ThreadPoolExecutor(2) as pool:
        commands = [[COMPILER, *flags, "-x", "c++", "-c", path] for path in inputs]
        list(pool.map(compile_once, objects, commands))
    library = CACHE / f"{digest(*map(str, objects))}.so"
    return compile_once(library, [COMPILER, *flags, "-shared", *objects])


class Sizes(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("N", "c", "C", "H", "W")]


class Device(ctypes.Structure):
    _fields_ = [
        ("capability", c_int),
        ("shared_memory", c_int),
        ("tf32", ctypes.c_bool),
    ]


class Forward(ctypes.Structure):
    _fields_ = [("dtype", c_int), ("sizes", Sizes)] + [
        (name, c_void_p) for name in ("query", "key", "value", "out", "normalizer")
    ]


class Backward(ctypes.Structure):
    _fields_ = [("dtype", c_int), ("sizes", Sizes)] + [
        (name, c_void_p)
        for name in [
            "query",
            "key",
            "value",
            "out",
            "normalizer",
            "grad_out",
            "grad_query",
            "grad_key",
            "grad_value",
            "workspace",
        ]
    ]


class Operand:
    """Memory of a tensor surrounded by NaN: a copy of a tensor, or all NaN for a shape.

    offset: elements by which its address is not a multiple of 64 bytes.
    """

    def __init__(self, content: Tensor | tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> None:
        shape = tuple(content.shape) if isinstance(content, Tensor) else content
        count = torch.Size(shape).numel()
        size = torch.empty(0, dtype=dtype).element_size()
        self.memory = torch.full(((count + 2 * GUARD) * size,), 0xFF, dtype=torch.uint8)
        first = GUARD + offset
        self.tensor = self.memory.view(dtype)[first : first + count].view(shape)
        self.before = None
        if isinstance(content, Tensor):
            self.tensor.copy_(content)
            self.before = self.memory.clone()
        self.inside = slice(first * size, (first + count) * size)

    @property
    def pointer(self) -> int:
        return self.tensor.data_ptr()

    def check(self, name: str) -> None:
        """Fail if an input or memory around an output was written to."""
        if self.before is not None:
            assert torch.equal(self.memory, self.before), f"{name}, an input, was written to"
        outside = (self.memory[: self.inside.start], self.memory[self.inside.stop :])
        assert all(bool((part == 0xFF).all()) for part in outside), f"a write outside of {name}"


class Emulator:
    """The functions of kernels.h in a library from build().

    Feature maps are [N,channels,H,W] of any layout, and come back so (channels_last). What the kernels have
    not written is NaN. Errors: RuntimeError where a launch fails or a function returns an error code,
    AssertionError where something else than the outputs was written to.

    Settings: capability, shared_memory (bytes of a block), tf32, as in struct Device; schedule,
    one of SCHEDULES or beyond; threads, of the operating system.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_switches.restype = c_int64

    def call(
        self,
        name: str,
        *arguments: object,
        schedule: int = 0,
        threads: int = 2,
        shared_memory: int = SHARED_MEMORY,
    ) -> None:
        """Call a function of the library that launches kernels and returns a cudaError_t."""
        self.library.emulator_set(schedule, threads, shared_memory)
        code = self.library[name](*arguments)
        message = self.library.emulator_error().decode()
        if message or code:
            raise RuntimeError(f"{name}: {message or 'no launch failed'} (code {code}, schedule {schedule})")

    def attention(
        self,
        name: str,
        arguments: Forward | Backward,
        operands: dict[str, Operand],
        capability: int = 90,
        shared_memory: int = SHARED_MEMORY,
        tf32: int = False,
        **settings: int,
    ) -> None:
        for operand_name, operand in operands.items():
            setattr(arguments, operand_name, operand.pointer)
        device = Device(capability, shared_memory, tf32)
        self.call(name, byref(arguments), byref(device), shared_memory=shared_memory, **settings)
        check(operands)

    def forward(
        self,
        query: Tensor,  # [N,c,H,W]
        key: Tensor,  # [N,c,H,W]
        value: Tensor,  # [N,C,H,W]
        **settings: int,
    ) -> tuple[Tensor, Tensor]:
        """Run forward_cuda; return out [N,C,H,W] and normalizer [N,H,W,2]."""
        dtype, sizes = query.dtype, sizes_of(query, value)
        pixels = (sizes.N, sizes.H, sizes.W)
        operands = {name: to_memory(t) for name, t in (("query", query), ("key", key), ("value", value))}
        operands["out"] = Operand((*pixels, sizes.C), dtype)
        operands["normalizer"] = Operand(
            (*pixels, 2), torch.float64 if dtype == torch.float64 else torch.float32
        )
        self.attention("emulated_forward", Forward(DTYPES.index(dtype), sizes), operands, **settings)
        return operands["out"].tensor.permute(0, 3, 1, 2), operands["normalizer"].tensor

    def backward(
        self,
        query: Tensor,  # [N,c,H,W]
        key: Tensor,  # [N,c,H,W]
        value: Tensor,  # [N,C,H,W]
        out: Tensor,  # [N,C,H,W]
        normalizer: Tensor,  # [N,H,W,2]
        grad_out: Tensor,  # [N,C,H,W]
        **settings: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run backward_cuda; return the gradients of query, key and value."""
        dtype, sizes = query.dtype, sizes_of(query, value)
        number = DTYPES.index(dtype)
        inputs = {"query": query, "key": key, "value": value, "out": out, "grad_out": grad_out}
        operands = {name: to_memory(tensor) for name, tensor in inputs.items()}
        operands["normalizer"] = Operand(normalizer, normalizer.dtype)
        outputs = {"grad_query": sizes.c, "grad_key": sizes.c, "grad_value": sizes.C}
        for name, channels in outputs.items():
            operands[name] = Operand((sizes.N, sizes.H, sizes.W, channels), dtype)
        workspace_bytes = self.library.emulated_backward_workspace
        workspace_bytes.restype = c_int64
        operands["workspace"] = Operand((workspace_bytes(number, byref(sizes)),), torch.uint8)
        self.attention("emulated_backward", Backward(number, sizes), operands, **settings)
        grad_query, grad_key, grad_value = (operands[name].tensor.permute(0, 3, 1, 2) for name in outputs)
        return grad_query, grad_key, grad_value

    def primitive(self, primitive: str, first: Tensor, second: Tensor, **settings: int) -> Tensor:
        """Run primitive_cuda.

        "score" of two feature maps gives weights [N,L,H,W]. "gather" and "scatter" take weights and a feature
        map and give a feature map [N,C,H,W].
        """
        n, channels, height, width = second.shape
        sizes = Sizes(n, 0, channels, height, width)
        score = primitive == "score"
        shape = (n, height + width - 1, height, width) if score else (n, height, width, channels)
        operands = {
            "first": to_memory(first) if score else Operand(first, first.dtype),
            "second": to_memory(second),
            "out": Operand(shape, first.dtype),
        }
        self.call(
            "emulated_primitive",
            PRIMITIVES.index(primitive),
            DTYPES.index(first.dtype),
            byref(sizes),
            *(c_void_p(operand.pointer) for operand in operands.values()),
            **settings,
        )
        check(operands)
        out = operands["out"].tensor
        return out if score else out.permute(0, 3, 1, 2)


def sizes_of(query: Tensor, value: Tensor) -> Sizes:
    n, channels, height, width = query.shape
    return Sizes(n, channels, value.shape[1], height, width)


def to_memory(feature_map: Tensor) -> Operand:
    """Return a feature map [N,C,H,W] as [N,H,W,C]."""
    return Operand(feature_map.permute(0, 2, 3, 1), feature_map.dtype)


def check(operands: dict[str, Operand]) -> None:
    for name, operand in operands.items():
        operand.check(name)
