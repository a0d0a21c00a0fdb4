"""Types for argparse, and the exit status of the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from utils import streams
from utils.errors import InputError, RunError


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, without the usage above it, and end in status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{program()}: error: {message}\n")


def program() -> str:
    """Return the command's name for its errors: train.py, or tools.predict for `python -m tools.predict`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else os.path.basename(sys.argv[0])


#: Numbers beyond it are infinite where weights are trained.
FLOAT32_MAX = 3.4028234e38


def boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "y", "t", "on"):
        return True
    if text.lower() in ("0", "false", "no", "n", "f", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not a boolean; give 1 or 0")


def size(text: str) -> tuple[int, int]:
    """'height,width', or one number for a square."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; give positive height,width such as 769,769"
        )
    return numbers[0], numbers[-1]


def number(
    kind: type, low: float, high: float = FLOAT32_MAX, open_low: bool = False
) -> Callable[[str], float]:
    """An int or float between `low` and `high`, both included (`open_low`: low itself excluded)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value if open_low else low <= value) or not value <= high:
            bounds = f"{'more than' if open_low else 'at least'} {low}" + (
                f", at most {high}" if high < FLOAT32_MAX else ""
            )
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; give {bounds}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, 1, 2**31 - 1)
classes = number(int, 1, 255)
label = number(int, 0, 255)
count = number(int, 0, 2**31 - 1)
positive_float = number(float, 0, open_low=True)
fraction = number(float, 0, 1)


def numbers(text: str) -> list[float]:
    """Comma-separated positive numbers."""
    return [positive_float(part) for part in text.split(",")]


def add_averaging(parser: argparse.ArgumentParser) -> None:
    """--scales and --flip, of the commands that predict (engine.inference.predict_multiscale)."""
    add = parser.add_argument
    add(
        "--scales",
        type=numbers,
        default=[1.0],
        metavar="S,S",
        help="average the predictions at these scales",
    )
    add("--flip", action="store_true", help="average with the prediction of the mirrored picture")


def exit_status(main: Callable[[], int | None]) -> int:
    """Run `main` and return its status: 0 when it has none, 2 after an InputError, 1 after a RunError.

    The error's message is the last line on standard error. Ctrl-C ends in 130 without a word. Anything else
    that goes wrong keeps its traceback and ends in 1, as Python does. Standard output and error are made safe
    first (utils.streams).
    """
    streams.secure()
    try:
        return main() or 0
    except (InputError, RunError) as error:
        sys.stdout.flush()
        # Where the processes of a run come to the same error together, one of a machine speaks.
        if not error.silent:
            message = " ".join(str(error).splitlines())
            print(f"{program()}: error: {message}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
