"""A cache of decoded pictures and labels, in memory or on disk, shared by all processes of a machine."""

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

#: Entry of a picture in the table at the start of the file: checksum, and 1 if the picture is stored.
ENTRY = struct.Struct("<IB3x")
#: Bytes per pixel: three for the picture, one for the label.
PIXEL = 4
GB = 10**9
#: Format version; increase it whenever the same files would be decoded differently.
VERSION = 2


class Processes(Protocol):
    """The processes of a run, which agree on one cache (engine.runtime.distributed.World)."""

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, on every process."""

    def first(self, value: Any | None) -> Any | None:
        """Return the first value that is not None, on every process."""


class Place(NamedTuple):
    """Location and size limit of a cache.

    Attributes:
        kind: "ram" or "disk".
        gigabytes: its budget, shared by all processes of a machine.
        folder: folder of a cache on disk.
    """

    kind: str
    gigabytes: float
    folder: str


class Plan:
    """The layout of a cache: the first pictures of a data set that fit, and their offsets.

    Args:
        sizes: (height, width) of every picture.
        budget: maximum size of the cache in bytes.

    Attributes:
        number: number of pictures that have a place in the cache.
        bytes: size of the cache in bytes.
        starts: offset of each of these pictures.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], budget: int):
        self.sizes = list(sizes)
        table = len(self.sizes) * ENTRY.size
        ends = table + np.cumsum([height * width * PIXEL for height, width in self.sizes], dtype=np.int64)
        self.number = int(np.searchsorted(ends, budget, "right"))
        self.starts = [table, *ends.tolist()][: self.number]
        self.bytes = int(ends[self.number - 1]) if self.number else 0


class PictureCache:
    """A cache in one file, with a place for each picture of a plan.

    Every process maps the same file. The process that first decodes a picture writes it, and all processes
    read it. A picture is valid once its table entry is written. Each process verifies the checksum of a
    picture when it first reads it. So pictures left incomplete by a killed process, a full disk or a power
    failure are decoded again.

    Pictures are never replaced: each epoch visits all pictures once in random order, so any fixed subset has
    the same hit rate.

    Args:
        path: file of the cache, created if missing (see `in_memory` and `on_disk`).
        plan: layout of the cache.

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
            # The file is sparse: it takes disk space only as it fills. The lock prevents another run with a
            # smaller budget from shrinking it.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file).st_size < plan.bytes:
                os.truncate(self._file, plan.bytes)
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._map = mmap.mmap(self._file, plan.bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise DataError(f"{path}: the cache can't be opened ({error.strerror}); check --cache") from error

    def __reduce__(self) -> tuple:
        """Pickle the path and the plan, so that data workers that are not forked open the file again."""
        return PictureCache, (self.path, self.plan)

    def get(self, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return picture uint8 [h, w, 3] and label uint8 [h, w], read-only; None if they are not cached."""
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
        """Store a picture and its label if they have a place and the disk has space.

        Args:
            index: number of the picture in the data set.
            image: uint8 [h, w, 3].
            label: uint8 [h, w].
        """
        if index >= self.plan.number or self._full:
            return
        if image.shape[:2] != self.plan.sizes[index]:
            return  # the picture file has changed since the plan was made
        start = self.plan.starts[index]
        parts = [np.ascontiguousarray(part).reshape(-1).data for part in (image, label)]
        try:
            # Use system calls: writing to the memory map on a full disk would kill the process.
            _write(self._file, parts[0], start)
            _write(self._file, parts[1], start + len(parts[0]))
            checksum = zlib.crc32(parts[1], zlib.crc32(parts[0]))
            _write(self._file, memoryview(ENTRY.pack(checksum, 1)), index * ENTRY.size)
        except OSError:
            self._full = True  # continue with what is cached


def _write(file: int, content: memoryview, position: int) -> None:
    while content:
        written = os.pwrite(file, content, position)
        content, position = content[written:], position + written


def machine() -> str:
    """Return an identifier of this machine: its name, and its boot id if the system has one."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return platform.node() + file.read()
    except OSError:
        return platform.node()


def _require_memory_files() -> None:
    if not hasattr(os, "memfd_create"):
        raise DataError("--cache ram: needs Linux; give --cache disk")


def in_memory() -> str:
    """Create an empty file in memory and return its path.

    Other processes of the same user on this machine can open the path. The file disappears with the last
    process that has it open.

    Raises:
        DataError: the system has no files in memory.
    """
    _require_memory_files()
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('ccnet-pictures')}"


def on_disk(folder: str, root: str, files: Sequence[str], meaning: str) -> str:
    """Return the path of the cache file for some pictures and labels; it changes if one of them changes.

    Args:
        folder: folder of the cache files.
        root: the data directory.
        files: pictures and labels, relative to `root`.
        meaning: description of everything else that affects decoding.

    Raises:
        DataError: a file is missing.
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
    """Return the bytes that a cache can use.

    Args:
        kind: "ram" for the available memory; "disk" for the free space plus the current size of the cache.
        path: file of the cache.
    """
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
