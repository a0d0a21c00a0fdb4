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
from ctypes import byref, c_double, c_int, c_int64, c_void_p
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
    _fields_ = [(name, c_int64) for name in ("N", "heads", "c", "C", "T", "H", "W")]


class Device(ctypes.Structure):
    _fields_ = [
        ("capability", c_int),
        ("shared_memory", c_int),
        ("tf32", ctypes.c_bool),
        ("untested", ctypes.c_bool),
    ]


class Map(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("pitch", c_int64)]


class Forward(ctypes.Structure):
    _fields_ = [
        ("dtype", c_int),
        ("sizes", Sizes),
        ("axes", c_int),
        ("scale", c_double),
        ("query", Map),
        ("key", Map),
        ("value", Map),
        ("out", Map),
        ("normalizer", c_void_p),
        ("residual", Map),
        ("sum", Map),
        ("gamma", c_void_p),
        ("workspace", c_void_p),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("dtype", c_int),
        ("sizes", Sizes),
        ("axes", c_int),
        ("scale", c_double),
        ("query", Map),
        ("key", Map),
        ("value", Map),
        ("out", Map),
        ("normalizer", c_void_p),
        ("grad", Map),
        ("gamma", c_void_p),
        ("grad_query", Map),
        ("grad_key", Map),
        ("grad_value", Map),
        ("grad_gamma", c_void_p),
        ("workspace", c_void_p),
    ]


class Operand:
    """Memory of a tensor surrounded by NaN: a copy of a tensor, or all NaN for a shape.

    offset: elements by which its address is not a multiple of 64 bytes.
    gap: elements of NaN after each row of its last dimension.
    """

    def __init__(
        self, content: Tensor | tuple[int, ...], dtype: torch.dtype, offset: int = 0, gap: int = 0
    ) -> None:
        shape = tuple(content.shape) if isinstance(content, Tensor) else content
        self.shape, self.dtype = shape, dtype
        self.pitch = shape[-1] + gap
        self.first = GUARD + offset
        self.count = torch.Size(shape[:-1]).numel() * self.pitch
        size = torch.empty(0, dtype=dtype).element_size()
        self.memory = torch.full(((self.count + 2 * GUARD) * size,), 0xFF, dtype=torch.uint8)
        self.tensor = self._inside(self.memory)
        self.before = None
        if isinstance(content, Tensor):
            self.tensor.copy_(content)
            self.before = self.memory.clone()

    def _inside(self, memory: Tensor) -> Tensor:
        """Return the tensor in a memory like this one."""
        elements = memory.view(self.dtype)[self.first : self.first + self.count]
        return elements.view(*self.shape[:-1], self.pitch)[..., : self.shape[-1]]

    @property
    def pointer(self) -> int:
        return self.memory.data_ptr() + self.first * self.memory.view(self.dtype).element_size()

    def check(self, name: str) -> None:
        """Fail if an input, memory around an output, or its gaps were written to."""
        if self.before is not None:
            assert torch.equal(self.memory, self.before), f"{name}, an input, was written to"
            return
        around = self.memory.clone()
        self._inside(around).view(torch.uint8).fill_(0xFF)
        assert bool((around == 0xFF).all()), f"a write outside of {name}"


class Emulator:
    """The functions of kernels.h in a library from build().

    Feature maps are [N,channels,H,W] or [N,channels,T,H,W] of any layout, and come back so (channels_last).
    What the kernels have not written is NaN.

    Errors: RuntimeError where a launch fails or a function returns an error code,
    AssertionError where something else than the outputs was written to.

    Settings: capability, shared_memory (bytes of a block), tf32, untested, as in struct Device; schedule,
    one of SCHEDULES or beyond; threads, of the operating system; resident, blocks that run in turns, an even
    number to let late ones go first (0: each thread runs one, at the same time).

    tensor_cores: whether the last attention call ran on tensor cores.
    workspace_size: bytes of its workspace.
    lines: whether it ran on the kernels for lines in float32.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_switches.restype = c_int64
        self.tensor_cores = self.lines = False
        self.workspace_size = 0

    def call(
        self,
        name: str,
        *arguments: object,
        schedule: int = 0,
        threads: int = 2,
        shared_memory: int = SHARED_MEMORY,
        resident: int = 0,
    ) -> None:
        """Call a function of the library that launches kernels and returns a cudaError_t."""
        self.library.emulator_set(schedule, threads, shared_memory, resident)
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
        untested: int = False,
        **settings: int,
    ) -> None:
        """Call a function with the operands as the fields of its arguments of these names."""
        device = Device(capability, shared_memory, tf32, untested)
        maps = {field[0] for field in arguments._fields_ if field[1] is Map}

        def give(field: str, operand: Operand) -> None:
            pointer = operand.pointer
            setattr(arguments, field, Map(pointer, operand.pitch) if field in maps else pointer)

        for field, operand in operands.items():
            give(field, operand)
        workspace_bytes = self.library[f"{name}_workspace"]
        workspace_bytes.restype = c_int64
        self.workspace_size = workspace_bytes(byref(arguments), byref(device))
        operands["workspace"] = Operand((self.workspace_size,), torch.uint8)
        give("workspace", operands["workspace"])
        self.call(name, byref(arguments), byref(device), shared_memory=shared_memory, **settings)
        self.tensor_cores = bool(self.library[f"{name}_on_tensor_cores"](byref(arguments), byref(device)))
        in_float32 = bool(self.library[f"{name}_in_float32"](byref(arguments), byref(device)))
        self.lines = bool(untested) and not self.tensor_cores and in_float32
        check(operands)

    def forward(
        self,
        query: Tensor,  # [N,heads*c,T,H,W], as all maps
        key: Tensor,
        value: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,  # []
        heads: int = 1,
        axes: str = "HW",
        scale: float = 1.0,
        gaps: int = 0,
        **settings: int,
    ) -> tuple[Tensor, ...]:
        """Run forward_cuda; return out, normalizer [N,T,H,W,heads,2] and, with a residual, sum.

        A single head has no dimension of its own in the normalizer.
        gaps: the i-th map has i * gaps elements of NaN after the channels of each pixel.
        """
        dtype, sizes = query.dtype, sizes_of(query, value, heads)
        inputs = {"query": query, "key": key, "value": value}
        outputs = {"out": value.shape}
        if residual is not None:
            inputs["residual"], outputs["sum"] = residual, value.shape
        operands = maps_of(inputs, outputs, dtype, gaps)
        pixels = operands["out"].shape[:-1]
        each = (*pixels, 2) if heads == 1 else (*pixels, heads, 2)
        operands["normalizer"] = Operand(each, sum_type(dtype))
        if gamma is not None:
            operands["gamma"] = Operand(gamma.reshape(1), sum_type(dtype))
        arguments = Forward(DTYPES.index(dtype), sizes, axes_of(axes), scale)
        self.attention("emulated_forward", arguments, operands, **settings)
        out, *sums = (operands[name].tensor.movedim(-1, 1) for name in outputs)
        return (out, operands["normalizer"].tensor, *sums)

    def backward(
        self,
        query: Tensor,  # [N,heads*c,T,H,W], as all maps
        key: Tensor,
        value: Tensor,
        out: Tensor,
        normalizer: Tensor,
        grad: Tensor,
        gamma: Tensor | None = None,  # []
        heads: int = 1,
        axes: str = "HW",
        scale: float = 1.0,
        gaps: int = 0,
        **settings: int,
    ) -> tuple[Tensor, ...]:
        """Run backward_cuda; return the gradients of query, key, value and, if given, gamma."""
        dtype, sizes = query.dtype, sizes_of(query, value, heads)
        inputs = {"query": query, "key": key, "value": value, "out": out, "grad": grad}
        outputs = {"grad_query": query.shape, "grad_key": key.shape, "grad_value": value.shape}
        operands = maps_of(inputs, outputs, dtype, gaps)
        operands["normalizer"] = Operand(normalizer, normalizer.dtype)
        if gamma is not None:
            operands["gamma"] = Operand(gamma.reshape(1), sum_type(dtype))
            operands["grad_gamma"] = Operand((1,), sum_type(dtype))
        arguments = Backward(DTYPES.index(dtype), sizes, axes_of(axes), scale)
        self.attention("emulated_backward", arguments, operands, **settings)
        grads = tuple(operands[name].tensor.movedim(-1, 1) for name in outputs)
        return grads if gamma is None else (*grads, operands["grad_gamma"].tensor[0])

    def primitive(self, primitive: str, first: Tensor, second: Tensor, **settings: int) -> Tensor:
        """Run primitive_cuda.

        "score" of two feature maps gives weights [N,L,H,W]. "gather" and "scatter" take weights and a feature
        map and give a feature map [N,C,H,W].
        """
        n, channels, height, width = second.shape
        sizes = Sizes(n, 0, 0, channels, 0, height, width)  # those that the primitives use
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


def sizes_of(query: Tensor, value: Tensor, heads: int) -> Sizes:
    n, _, *axes = query.shape
    t, h, w = (1, *axes)[-3:]
    return Sizes(n, heads, query.shape[1] // heads, value.shape[1] // heads, t, h, w)


def axes_of(axes: str) -> int:
    """Return the set of enum Axis for letters of T, H and W."""
    return sum(1 << "THW".index(axis) for axis in axes)


def sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_memory(feature_map: Tensor, gap: int = 0) -> Operand:
    """Return a feature map [N,C,...] as [N,...,C]."""
    return Operand(feature_map.movedim(1, -1), feature_map.dtype, gap=gap)


def maps_of(
    inputs: dict[str, Tensor], outputs: dict[str, torch.Size], dtype: torch.dtype, gaps: int
) -> dict[str, Operand]:
    """Return feature maps as operands: copies of inputs and, by their shapes, outputs."""
    operands = {name: to_memory(tensor, i * gaps) for i, (name, tensor) in enumerate(inputs.items())}
    for i, (name, (n, channels, *axes)) in enumerate(outputs.items(), len(inputs)):
        operands[name] = Operand((n, *axes, channels), dtype, gap=i * gaps)
    return operands


def check(operands: dict[str, Operand]) -> None:
    for name, operand in operands.items():
        operand.check(name)
