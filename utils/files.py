"""Opening inputs and writing results: nothing waits for a FIFO, nothing is half written."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import IO, Any

from utils.errors import RunError, UsageError

#: Bytes that file systems take for a name; those that a temporary name keeps of it.
LONGEST_NAME, LONGEST = 255, 200


def open_input(path: str | os.PathLike, mode: str = "rb", **options: Any) -> IO[Any]:
    """Open a regular file for reading, as `open` does.

    Args:
        mode: "rb" or "r"; `options` are those of `open`.

    Raises:
        OSError: missing or unreadable, a folder, or a FIFO, socket or device, which could block for ever.
    """

    def opener(name: str, flags: int) -> int:
        try:
            # Without O_NONBLOCK opening a FIFO waits for a writer; regular files ignore it.
            file = os.open(name, flags | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # as of a socket
                raise _not_a_file(os.stat(name).st_mode, name) from error
            raise
        kind = os.fstat(file).st_mode
        if not stat.S_ISREG(kind):
            os.close(file)
            raise _not_a_file(kind, name)
        return file

    return open(path, mode, opener=opener, **options)


def _not_a_file(mode: int, path: str) -> OSError:
    """Return the error for a path at which something other than a regular file lies."""
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    return OSError(code, f"is {kind_of(mode)}, not a file", path)


def kind_of(mode: int) -> str:
    """Return the noun, with its article, for the kind of file that `st_mode` tells."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_input(path: str | os.PathLike, most: int | None = None) -> bytes:
    """Return the content of a regular file; see `open_input` for the errors.

    Args:
        most: bytes that it may have; more of them are an OSError too.
    """
    with open_input(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"has more than {most} bytes", os.fspath(path))
        return file.read()


def temporary_name(path: str, writer: int | str) -> str:
    """Return the name under which `writer`, a process and thread, writes `path` before it is renamed."""
    folder, name = os.path.split(path)
    name = os.fsdecode(os.fsencode(name)[-LONGEST:])
    # The ending stays last: writers such as Pillow choose the format by it.
    return os.path.join(folder, f".writing-{writer}-{name}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yield a temporary name in the folder of `path`; rename it to `path` on success, remove it on failure.

    The content is on disk before the rename, so that a power cut leaves the old file or the new one. A
    symbolic link stays: the file that it names is replaced.

    Raises:
        OSError: the disk refuses it, or `path` is a folder, FIFO, socket or device, which stays as it is. Its
            `filename` is `path`, never the temporary name.
    """
    path = os.path.abspath(path)
    target = os.path.realpath(path)
    temporary = temporary_name(target, f"{os.getpid()}.{threading.get_native_id()}")
    try:
        if problem := _unwritable_kind(target):
            raise problem
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, temporary, target):
            reason = error.strerror or str(error)
            raise OSError(error.errno or errno.EIO, reason, path) from error
        raise


def write_file(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a whole file, text as UTF-8; see `replacing`.

    Text may have names of files that are no UTF-8: the bytes that are none are written as escapes (\\udcff).
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Yield a new binary file for torch.save, which turns a full disk into an error about file positions.

    Raises:
        OSError: what the disk refuses, once torch.save is done.
    """
    with open(path, "wb") as file:
        late = _LateErrors(file)
        yield late  # type: ignore[misc]  # torch.save only writes and flushes
        if late.error is not None:
            raise late.error


class _LateErrors:
    """A file that takes everything, and keeps the first error in `error`."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Do nothing: closing the file flushes it."""


def put_aside(path: str) -> str:
    """Rename a damaged file, folder or link to damaged_NAME, or damaged_2_NAME if that is taken, and so on.

    Returns:
        The new path, in the same folder.
    """
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f"damaged_{name}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = os.path.join(folder, f"damaged_{number}_{name}")
    os.rename(path, aside)
    return aside


def _unwritable_kind(path: str) -> OSError | None:
    """Return the error for an output that is there and no regular file."""
    try:
        kind = os.stat(path).st_mode
    except OSError:  # nothing there; writing says what else may be wrong
        return None
    return None if stat.S_ISREG(kind) else _not_a_file(kind, path)


def check_outputs(flag: str, outputs: Iterable[str], inputs: Iterable[str | None] = ()) -> None:
    """See that the files that a command is about to write replace none that it reads, nor each other.

    Files are compared by what they are: links, hard links, .. and other spellings of a name change nothing.

    Args:
        flag: what decides where the outputs go.
        outputs: those that exist are looked at; their folders need not exist.
        inputs: None, and what does not exist, is skipped.

    Raises:
        UsageError: naming `flag` and the output, which may also be a folder, FIFO, socket or device.
    """
    read = {}
    for path in filter(None, inputs):
        with contextlib.suppress(OSError, ValueError):
            about = os.stat(path)
            read[about.st_dev, about.st_ino] = path
    written: dict[object, str] = {}
    for path in outputs:
        if not os.path.basename(path):
            raise UsageError(f"{flag} {path}: is no name of a file; name a file")
        try:
            if len(os.fsencode(os.path.basename(path))) > LONGEST_NAME:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            about = os.stat(path)
        except FileNotFoundError:
            place: object = os.path.realpath(path)
        except OSError as error:
            raise UsageError(f"{flag}: {path} can't be written ({error.strerror}); name another") from error
        else:
            place = about.st_dev, about.st_ino
            if found := read.get(place):
                same = "" if found == path else f", which is {found}"
                raise UsageError(f"{flag}: would replace its own input {path}{same}; name another")
            if not stat.S_ISREG(about.st_mode):
                raise UsageError(f"{flag}: {path} is {kind_of(about.st_mode)}, not a file; name another")
        if (other := written.setdefault(place, path)) != path:
            raise UsageError(f"{flag}: {other} and {path} are the same file; name another")


def check_output_file(flag: str, path: str, inputs: Iterable[str | None] = ()) -> None:
    """See that `path` can be written as a file, before the work whose result it is to hold.

    Args:
        inputs: see `check_outputs`.

    Raises:
        UsageError: naming `flag`: its folder is missing or read-only, or `path` is an input or no regular
            file.
    """
    check_outputs(flag, [path], inputs)
    folder = os.path.dirname(os.path.realpath(path))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: no file can be written in {folder} ({error.strerror}); name another"
        ) from error


def check_writable(flag: str, directory: str) -> None:
    """Make `directory` if needed, and see that a file can be written in it.

    Raises:
        UsageError: naming `flag`.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {directory}: can't be written ({error.strerror}); name another folder"
        ) from error


def unwritable(error: OSError, then: str = "run it again") -> RunError:
    """Return the error that ends a command when a result can't be written: which file, why, what to do.

    Args:
        then: what to do once the file can be written.
    """
    advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check the disk"
    what = os.fsdecode(error.filename) if error.filename else "the results"
    return RunError(f"{what}: can't be written ({error.strerror or error}); {advice}, then {then}")
