"""Safe opening of input files, and atomic file writes."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import IO, Any

from utils.errors import DataError, RunError, UsageError

#: Maximum bytes of a file name on common file systems; bytes of a name that its temporary name keeps.
LONGEST_NAME, LONGEST = 255, 200


def open_input(path: str | os.PathLike, mode: str = "rb", **options: Any) -> IO[Any]:
    """Open a regular file for reading, like `open`.

    Args:
        path: file to read.
        mode: "rb" or "r".
        **options: passed to `open`.

    Raises:
        OSError: the file is missing or unreadable, or is a folder, FIFO, socket or device. Reading a FIFO or
            a device could block forever.
    """

    def opener(name: str, flags: int) -> int:
        try:
            # Without O_NONBLOCK, opening a FIFO waits for a writer. Regular files ignore the flag.
            file = os.open(name, flags | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # for example a socket
                raise _not_a_file(os.stat(name).st_mode, name) from error
            raise
        kind = os.fstat(file).st_mode
        if not stat.S_ISREG(kind):
            os.close(file)
            raise _not_a_file(kind, name)
        return file

    return open(path, mode, opener=opener, **options)


def _not_a_file(mode: int, path: str) -> OSError:
    """Return the error for a path that is not a regular file."""
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    return OSError(code, f"is {kind_of(mode)}, not a file", path)


def kind_of(mode: int) -> str:
    """Return the kind of file of an `st_mode`, as a noun with an article."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_input(path: str | os.PathLike, most: int | None = None) -> bytes:
    """Return the content of a regular file.

    Args:
        path: file to read.
        most: maximum size in bytes.

    Raises:
        OSError: the file is larger than `most`, or can't be opened (see `open_input`).
    """
    with open_input(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"has more than {most} bytes", os.fspath(path))
        return file.read()


def read_text(path: str, what: str, advice: str, most: int) -> str:
    """Return the content of a text file in UTF-8, with or without a byte order mark.

    Args:
        path: file to read.
        what: kind of the file, for the error message.
        advice: what to do, for the error message.
        most: maximum size in bytes.

    Raises:
        DataError: the file can't be opened (see `read_input`), or is not such text.
    """
    try:
        text = read_input(path, most).decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("not text in UTF-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a readable {what} ({why}); {advice}") from error
    return text


def temporary_name(path: str, writer: int | str) -> str:
    """Return the temporary name for writing `path`; `writer` identifies the process and thread."""
    folder, name = os.path.split(path)
    name = os.fsdecode(os.fsencode(name)[-LONGEST:])
    # Keep the file extension: writers such as Pillow choose the format by it.
    return os.path.join(folder, f".writing-{writer}-{name}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Replace a file atomically: yield a temporary name, then rename it to `path`.

    On failure, the temporary file is removed. The content is flushed to disk before the rename, so that a
    power failure leaves either the old or the new file. If `path` is a symbolic link, its target is replaced.

    Raises:
        OSError: writing fails, or `path` is a folder, FIFO, socket or device, which is left unchanged. The
            `filename` of the error is `path`, never the temporary name.
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
    r"""Write a file atomically; text is encoded as UTF-8.

    Text may contain file names that are not valid UTF-8: their invalid bytes are written as escapes (\udcff).

    Raises:
        OSError: see `replacing`.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Yield a new binary file for torch.save, and report write errors correctly.

    On a full disk, torch.save itself raises a misleading error about file positions.

    Raises:
        OSError: the first write error, raised after torch.save has finished.
    """
    with open(path, "wb") as file:
        late = _LateErrors(file)
        yield late  # type: ignore[misc]  # torch.save only writes and flushes
        if late.error is not None:
            raise late.error


class _LateErrors:
    """A file whose writes always succeed; the first error is stored in `error`."""

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
    """Rename a damaged file, folder or link to damaged_NAME (damaged_2_NAME and so on if that exists).

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
    """Return the error for an output path that exists but is not a regular file, or None."""
    try:
        kind = os.stat(path).st_mode
    except OSError:  # does not exist; other problems are reported when writing
        return None
    return None if stat.S_ISREG(kind) else _not_a_file(kind, path)


def check_outputs(flag: str, outputs: Iterable[str], inputs: Iterable[str | None] = ()) -> None:
    """Check that the outputs of a command do not overwrite its inputs or each other.

    Files are compared by identity, so symbolic links, hard links and other spellings of a path are
    recognized.

    Args:
        flag: flag that determines the output paths, for error messages.
        outputs: paths to write; their folders need not exist.
        inputs: paths that the command reads; None and missing files are ignored.

    Raises:
        UsageError: an output is an input or another output, can't be written, or is not a regular file.
    """
    read = {}
    for path in filter(None, inputs):
        with contextlib.suppress(OSError, ValueError):
            about = os.stat(path)
            read[about.st_dev, about.st_ino] = path
    written: dict[object, str] = {}
    for path in outputs:
        if not os.path.basename(path):
            raise UsageError(f"{flag} {path}: is not a file name; name a file")
        try:
            if len(os.fsencode(os.path.basename(path))) > LONGEST_NAME:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            about = os.stat(path)
        except FileNotFoundError:
            place: object = os.path.realpath(path)
        except OSError as error:
            raise UsageError(
                f"{flag}: {path} can't be written ({error.strerror}); name another file"
            ) from error
        else:
            place = about.st_dev, about.st_ino
            if found := read.get(place):
                same = "" if found == path else f", which is {found}"
                raise UsageError(f"{flag}: would replace its own input {path}{same}; name another file")
            if not stat.S_ISREG(about.st_mode):
                raise UsageError(f"{flag}: {path} is {kind_of(about.st_mode)}, not a file; name another file")
        if (other := written.setdefault(place, path)) != path:
            raise UsageError(f"{flag}: {other} and {path} are the same file; name another file")


def check_output_file(flag: str, path: str, inputs: Iterable[str | None] = ()) -> None:
    """Check that an output file can be written, before the computation of its content.

    Args:
        flag: flag that gives `path`, for error messages.
        path: file to write.
        inputs: paths that the command reads (see `check_outputs`).

    Raises:
        UsageError: the folder is missing or read-only, or `path` is an input or not a regular file.
    """
    check_outputs(flag, [path], inputs)
    folder = os.path.dirname(os.path.realpath(path))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: no file can be written in {folder} ({error.strerror}); name another file"
        ) from error


def check_writable(flag: str, directory: str) -> None:
    """Create `directory` if needed, and check that files can be written in it.

    Raises:
        UsageError: they can't; the message names `flag`.
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
    """Return the RunError for a result that can't be written.

    Args:
        error: the error from writing.
        then: what the user should do once the file can be written.
    """
    advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check the disk"
    what = os.fsdecode(error.filename) if error.filename else "the results"
    return RunError(f"{what}: can't be written ({error.strerror or error}); {advice}, then {then}")
