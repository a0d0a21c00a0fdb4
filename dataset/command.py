"""What the small commands of this package share."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Errors take one line, without the usage above them, and end in status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: digits alone, from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\d{1,12}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"'{text}' does not fit: give a whole number from {low} to {high}"
            )
        return int(text)

    return convert


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write under a temporary name first: a file with its final name is always whole."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
    os.replace(temporary, path)
