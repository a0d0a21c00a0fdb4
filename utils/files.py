"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

from utils.args import UsageError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yield a temporary name beside `path`; on success rename it to `path`, on failure remove it.

    The content is on disk before the rename, so that a power cut leaves the old file or the new one.
    """
    folder, name = os.path.split(os.path.abspath(path))
    # The ending stays last: writers such as Pillow choose the format by it.
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
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
