"""Argument types for argparse, and the exit status of commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from utils import streams
from utils.errors import InputError, RunError
from utils.resources import shortage

#: Flags that affect the memory use of a command, in the order in which the user should try to lower them.
HEAVY = ("--batch-size", "--tile-batch", "--input-size", "--scales", "--num-workers")
#: The flags of HEAVY that the current command has; None before its arguments are parsed.
_heavy: list[str] | None = None


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Print the description as it is written, and each default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default:" in (action.help or ""):
            return action.help
        if isinstance(action.default, (tuple, list)):
            values = [f"{value:g}" if isinstance(value, float) else str(value) for value in action.default]
            return f"{action.help} (default: {','.join(values)})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that describes a command by its docstring, and whose errors take one line and end in status 2.

    Args:
        prog: the command, such as `train.py` or `python -m tools.predict`.
        doc: the docstring of its module. The first paragraph becomes the description, the rest follows the
            flags.
    """

    def __init__(self, prog: str | None = None, doc: str | None = None, **options: Any):
        summary, _, rest = (doc or "").partition("\n\n")
        if doc is not None:
            options = {"description": summary, "epilog": rest, **options}
        super().__init__(prog=prog, **{"formatter_class": HelpFormatter, **options})

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse as argparse does, but reject empty values."""
        global _heavy
        if _heavy is None:
            _heavy = [flag for flag in HEAVY if flag in self._option_string_actions]
        found, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            # Catch unset shell variables: an empty --restore-from "$WEIGHTS" would train from random weights.
            # argparse drops the value of --flag=-- and stores an empty list.
            value = getattr(found, action.dest, None)
            if value == "" or (value == [] and action.nargs is None):
                self.error(
                    f"argument {'/'.join(action.option_strings) or action.metavar}: is empty; give a value"
                )
        return found, others

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and exit with status 2."""
        self.exit(2, f"{program()}: error: {' '.join(message.splitlines())}\n")


def program() -> str:
    """Return the command name for error lines: train.py, or tools.predict for `python -m tools.predict`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else os.path.basename(sys.argv[0])


#: Approximate range of positive float32 numbers, the dtype of training.
FLOAT32_MIN, FLOAT32_MAX = 1e-37, 3e38
#: Maximum height or width of a crop or tile, in pixels.
LONGEST_SIDE = 32768
#: Accepted spellings of numbers. Python's int and float also accept likely typing errors: 1_000, " 5 ", nan.
_WRITTEN = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"),
}


def quoted(text: str) -> str:
    """Return an argument for an error line: quoted, escaped, and shortened if it is long."""
    return repr(text if len(text) <= 60 else f"{text[:40]}...")


def boolean(text: str) -> bool:
    """Parse a boolean: 1 or 0, or a word such as yes or no."""
    if text.lower() in ("1", "true", "yes", "y", "t", "on"):
        return True
    if text.lower() in ("0", "false", "no", "n", "f", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{quoted(text)} is not a boolean; give 1 or 0")


def number(
    kind: type, low: float, high: float = FLOAT32_MAX, open_low: bool = False
) -> Callable[[str], float]:
    """Return an argparse type for a bounded number.

    Args:
        kind: int or float.
        low: smallest value.
        high: largest value.
        open_low: whether to exclude `low` itself.
    """

    def parse(text: str) -> Any:
        value = float("nan")
        if _WRITTEN[kind].fullmatch(text):
            with contextlib.suppress(ValueError):  # more digits than Python can parse
                value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            what = "a whole number" if kind is int else "a number"
            bounds = [f"{bound:.4g}" if kind is float else str(bound) for bound in (low, high)]
            between = f"above {bounds[0]}, at most {bounds[1]}" if open_low else "from " + " to ".join(bounds)
            raise argparse.ArgumentTypeError(f"{quoted(text)} can't be used; give {what} {between}")
        return value

    parse.__name__ = kind.__name__
    return parse


def pair(one: Callable[[str], float], what: str) -> Callable[[str], tuple[int, int]]:
    """Return an argparse type for two whole numbers.

    Args:
        one: type of each number.
        what: what the pair is, and how to write it, for the error line.
    """

    def parse(text: str) -> tuple[int, int]:
        try:
            first, second = (int(one(part)) for part in text.split(","))
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not {what}") from None
        return first, second

    return parse


def frames(text: str) -> int:
    """Parse the number of frames of a clip, which has a middle frame."""
    value = number(int, 1, 99)(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(
            f"{value} is even, so a clip would have no middle frame; give {value - 1} or {value + 1}"
        )
    return int(value)


def several(one: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return an argparse type for comma-separated values, each parsed by `one`."""
    return lambda text: [one(part) for part in text.split(",")]


positive_int = number(int, 1, 2**31 - 1)
count = number(int, 0, 2**31 - 1)
seed = number(int, 0, 2**63 - 1)
batch = number(int, 1, 2**16)
workers = number(int, 0, 1024)
processes = number(int, 1, 1024)
recurrence = number(int, 0, 100)
classes = number(int, 1, 255)
label = number(int, 0, 255)
positive_float = number(float, FLOAT32_MIN)
fraction = number(float, 0, 1)
numbers = several(positive_float)
scales = several(number(float, 0.01, 16))
side = number(int, 1, LONGEST_SIDE)
sides = several(side)


def factors(text: str) -> tuple[float, float]:
    """Parse "low,high", two scale factors in steps of 0.1."""
    try:
        found = [number(float, 0.1, 16)(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        found = []
    if len(found) != 2 or found[0] > found[1] or any(abs(10 * x - round(10 * x)) > 1e-9 for x in found):
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is not a range of factors; give LOW,HIGH in steps of 0.1, such as 0.5,2.0"
        )
    return found[0], found[1]


def size(text: str) -> tuple[int, int]:
    """Parse "height,width", or one number for a square, into (height, width)."""
    try:
        found = [int(side(part)) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        found = []
    if len(found) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is not a size; give height,width such as 769,769, each from 1 to {LONGEST_SIDE}"
        )
    return found[0], found[-1]


def initial_weights(text: str) -> str | None:
    """Parse the source of initial weights; the word random, which overrides a recipe, means none."""
    return None if text == "random" else text


def exhausted(what: str) -> RunError:
    """Return the error for a shortage, naming flags that help.

    Args:
        what: description of the shortage (see `utils.resources.shortage`).
    """
    if not _heavy:
        return RunError(f"{what}; close other programs, or use a larger machine")
    *others, last = _heavy
    return RunError(f"{what}; give a smaller {', '.join(others)}{' or ' if others else ''}{last}")


def exit_status(main: Callable[[], int | None]) -> int:
    """Run `main` and return its exit status: its own (None means 0), 2 after InputError, 1 after RunError.

    The message of the error is the last line on standard error. Running out of memory, processes or open
    files counts as a RunError. Ctrl-C returns 130 without a message. Other exceptions propagate, so Python
    prints their traceback and exits with 1. Standard output and error are made robust first (see
    `utils.streams`).
    """
    global _heavy
    _heavy = None
    streams.secure()
    try:
        return main() or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not isinstance(error, (InputError, RunError)):
            if (what := shortage(error)) is None:
                raise
            # Partially built objects, such as a DataLoader, may print errors while they are destroyed.
            sys.unraisablehook = lambda _: None
            error = exhausted(what)
        sys.stdout.flush()
        # If several processes of a machine have the same error, only one prints it.
        if not error.silent:
            message = " ".join(str(error).splitlines())
            print(f"{program()}: error: {message}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
