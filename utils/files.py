"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

from utils.args import UsageError

#: Bytes of a name that its temporary one keeps.
LONGEST = 200


def temporary_name(path: str, writer: int | str) -> str:
    """The name under which a thread of some process writes `path`."""
    folder, name = os.path.split(path)
    name = os.fsdecode(os.fsencode(name)[-LONGEST:])  # file systems take names of 255 bytes
    # The ending stays last: writers such as Pillow choose the format by it.
    return os.path.join(folder, f".writing-{writer}-{name}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yield a temporary name beside `path`; on success rename it to `path`, on failure remove it.

    The content is on disk before the rename, so that a power cut leaves the old file or the new one.
    """
    temporary = temporary_name(os.path.abspath(path), f"{os.getpid()}.{threading.get_native_id()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_writable(flag: str, directory: str) -> None:
    """Make `directory` if needed; raises UsageError, naming `flag`, where no file can be written in it."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"{flag} {directory}: can't be written ({error.strerror}); name another folder"
        ) from error
