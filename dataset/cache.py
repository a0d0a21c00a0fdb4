"""Decoded pictures and labels, in memory or on a disk, for all processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import platform
import shutil
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from utils.errors import DataError, UsageError

#: Of each picture, in the table at the beginning of the file: checksum, and 1 once it is there.
ENTRY = struct.Struct("<IB3x")
#: Bytes of a pixel: three of the picture, one of the label.
PIXEL = 4
GB = 10**9
#: Raised whenever the same files would be decoded otherwise.
VERSION = 2


class Processes(Protocol):
    """The processes of a run, which agree on one cache (engine.runtime.distributed.World)."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, on every process."""

    def first(self, value: Any | None) -> Any | None:
        """Return the first value that is not None, on every process."""


class Place(NamedTuple):
    """Where a cache is, and how large it may become.

    Attributes:
        kind: "ram" or "disk".
        gigabytes: its budget, shared by all processes of a machine.
        folder: folder of a cache on disk.
    """

    kind: str
    gigabytes: float
    folder: str


class Plan:
    """Which pictures of a data set have a place in a cache, and where: the first ones that fit.

    Args:
        sizes: (height, width) of every picture.
        budget: bytes that they may take.

    Attributes:
        number: of the pictures that have a place.
        bytes: of all of it.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], budget: int):
        self.sizes = list(sizes)
        table = len(self.sizes) * ENTRY.size
        ends = table + np.cumsum([height * width * PIXEL for height, width in self.sizes], dtype=np.int64)
        self.number = int(np.searchsorted(ends, budget, "right"))
        self.starts = [table, *ends.tolist()][: self.number]
        self.bytes = int(ends[self.number - 1]) if self.number else 0


class PictureCache:
    """One file with a place for each picture that fits into the budget, the first ones of the data set.

    Every process maps the same file. A picture is written by the process that decodes it first, and read by
    all. It counts as there once its table entry says so, and each process checks the sum of what it reads for
    the first time: what a killed process, a full disk or a power cut left incomplete is decoded again.

    Since each epoch goes through all pictures once, in an order of its own, any fixed part of them serves as
    well as another, and nothing is ever replaced.

    Args:
        path: the file, which is made where there is none; `in_memory` and `on_disk` name one.
        plan: of the pictures of the data set.

    Raises:
        DataError: the file can't be opened.
    """

    def __init__(self, path: str, plan: Plan):
        self.path = path
        self.plan = plan
        self._checked: set[int] = set()
        self._full = False
        if not plan.number:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            # Sparse: it takes room as it fills.
            fcntl.flock(self._file, fcntl.LOCK_EX)  # or another run, with less room, could cut it again
            if os.fstat(self._file).st_size < plan.bytes:
                os.truncate(self._file, plan.bytes)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._map = mmap.mmap(self._file, plan.bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise DataError(f"{path}: no cache there ({error.strerror}); check --cache") from error

    def __reduce__(self) -> tuple:
        """For data workers that are not forked: they open the file again."""
        return PictureCache, (self.path, self.plan)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Picture uint8 [h, w, 3] and label uint8 [h, w], read-only; None where they are not there."""
        if index >= self.plan.number:
            return None
        checksum, there = ENTRY.unpack_from(self._map, index * ENTRY.size)
        if not there:
            return None
        start, (height, width) = self.plan.starts[index], self.plan.sizes[index]
        size = height * width * PIXEL
        if index not in self._checked:
            with memoryview(self._map) as content:
                if zlib.crc32(content[start : start + size]) != checksum:
                    return None
            self._checked.add(index)
        pixels = np.frombuffer(self._map, np.uint8, size, start)
        split = height * width * 3
        return pixels[:split].reshape(height, width, 3), pixels[split:].reshape(height, width)

    def put(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        """Keep picture `index`, uint8 [h, w, 3] and [h, w], if it has a place and there is room for it."""
        if index >= self.plan.number or self._full:
            return
        if image.shape[:2] != self.plan.sizes[index]:
            return  # the file is another one by now
        start = self.plan.starts[index]
        parts = [np.ascontiguousarray(part).reshape(-1).data for part in (image, label)]
        try:
            # By system calls: writing to the map where the disk is full would kill the process.
            _write(self._file, parts[0], start)
            _write(self._file, parts[1], start + len(parts[0]))
            checksum = zlib.crc32(parts[1], zlib.crc32(parts[0]))
            _write(self._file, memoryview(ENTRY.pack(checksum, 1)), index * ENTRY.size)
        except OSError:
            self._full = True  # goes on with what there is


def _write(file: int, content: memoryview, position: int) -> None:
    while content:
        written = os.pwrite(file, content, position)
        content, position = content[written:], position + written


def machine() -> str:
    """Tells this machine from others, those of the same name too where the system numbers its starts."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return platform.node() + file.read()
    except OSError:
        return platform.node()


def _require_memory_files() -> None:
    if not hasattr(os, "memfd_create"):
        raise DataError("--cache ram: needs Linux; give --cache disk")


def in_memory() -> str:
    """Makes an empty file in memory and names it, for this process and others of its user on this machine.

    It is gone with the last process that has it open, however that ends.

    Raises:
        DataError: this system has no such files.
    """
    _require_memory_files()
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('ccnet-pictures')}"


def on_disk(folder: str, root: str, files: Sequence[str], meaning: str) -> str:
    """The file in `folder` for these pictures and labels: another one as soon as one of them has changed.

    Args:
        files: relative to `root`.
        meaning: what else decides how they are decoded.
    """
    digest = hashlib.sha256(f"{VERSION} {meaning}".encode())
    for file in files:
        path = os.path.join(root, file)
        try:
            about = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; check the data set and the list") from error
        described = f"{os.path.abspath(path)}\0{about.st_size}\0{about.st_mtime_ns}\0"
        digest.update(described.encode("utf-8", "surrogateescape"))
    return os.path.join(folder, f"pictures-{digest.hexdigest()[:16]}.cache")


def room(kind: str, path: str) -> int:
    """Bytes that are free: of memory for "ram"; for "disk" where `path` lies, and those that it takes."""
    if kind == "ram":
        _require_memory_files()
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    taken = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
    return shutil.disk_usage(os.path.dirname(path)).free + taken


class Pictures(Protocol):
    """A data set that can be cached (dataset.CSDataSet is one)."""

    def __len__(self) -> int: ...

    def sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) of every picture."""

    def cache_file(self, folder: str) -> str:
        """Return the path of a cache of these pictures in `folder`."""


def check(place: Place, pictures: Pictures) -> str:
    """Return a line that says what a cache will hold.

    Raises:
        UsageError: the budget is more than what is free.
    """
    plan = Plan(pictures.sizes(), int(place.gigabytes * GB))
    free = room(place.kind, pictures.cache_file(place.folder))
    if plan.bytes > free:
        raise UsageError(
            f"--cache-gb {place.gigabytes:g}: {plan.bytes / GB:.1f} GB for {plan.number} pictures, but "
            f"{free / GB:.1f} GB are free; give less"
        )
    size = f"{plan.bytes / GB:.1f} GB"
    return f"--cache {place.kind}: room for {plan.number} of {len(pictures)} decoded pictures, {size}"


def open_shared(place: Place, pictures: Pictures, processes: Processes) -> PictureCache:
    """Open one cache for all processes of each machine.

    Raises:
        DataError: on every process; see `PictureCache`.
    """
    opened, failure = None, None
    own = pictures.cache_file(place.folder) if place.kind == "disk" else in_memory()
    # The first process of a machine names the file.
    this = machine()
    path = next(file for name, file in processes.gather((this, own)) if name == this)
    try:
        opened = PictureCache(path, Plan(pictures.sizes(), int(place.gigabytes * GB)))
    except DataError as error:
        failure = error
    # A cache in memory lives as long as a process has it open: wait until all have.
    if failure := processes.first(failure):
        raise failure
    assert opened is not None
    return opened
