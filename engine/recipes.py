"""Recipes by name: files with flags of train.py (`--recipe`).

recipes/NAME.toml of this repository holds one of the published recipes; any other file can be given too. Each
key is a flag without its dashes:

    model = "ccnet"
    input-size = [769, 769]
    random-mirror = true
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from utils import args as flags
from utils.errors import UsageError
from utils.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Folder of the recipes that have a name.
FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "recipes")
ENDING = ".toml"
#: Maximum size of a recipe in bytes.
LARGEST = 2**20
#: Flags that a recipe can't hold.
EXCLUDED = ("help", "recipe", "local-rank", "local_rank")


class Parser(flags.Parser):
    """A parser with --recipe, whose flags come first; flags of the command line override them."""

    def __init__(self, prog: str | None = None, doc: str | None = None, **options: Any):
        super().__init__(prog, doc, **options)
        self.add_argument(
            "--recipe",
            metavar="NAME",
            help="take flags from recipes/NAME.toml, or from a file that ends in .toml (docs/recipes.md); "
            "flags of the command line override them",
        )

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse the flags of the recipe, then the given ones.

        Raises:
            UsageError: there is no such recipe, or it can't be used.
        """
        given = sys.argv[1:] if args is None else list(args)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--recipe", nargs="?")
        recipe = finder.parse_known_args(given)[0].recipe
        first = arguments_of(recipe, self) if recipe else []
        found, others = super().parse_known_args([*first, *given], namespace)
        if found.recipe != recipe:
            self.error("argument --recipe: write the name of the flag in full")
        return found, others


def names() -> list[str]:
    """Return the names of the recipes of this repository."""
    return sorted(name.removesuffix(ENDING) for name in os.listdir(FOLDER) if name.endswith(ENDING))


def path_of(recipe: str) -> str:
    """Return the file of a recipe.

    Args:
        recipe: name of a recipe of this repository, or path of a file that ends in .toml.

    Raises:
        UsageError: there is no recipe of this name.
    """
    if recipe.endswith(ENDING):
        return recipe
    if recipe not in names():
        raise UsageError(
            f"--recipe {flags.quoted(recipe)}: is unknown; give {', '.join(names())}, or a file that ends in "
            f"{ENDING}"
        )
    return os.path.join(FOLDER, recipe + ENDING)


def arguments_of(recipe: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags of a recipe as arguments of the command line.

    Args:
        recipe: see `path_of`.
        parser: parser of train.py.

    Raises:
        UsageError: there is no recipe of this name, or it has an unknown flag or a wrong value.
        DataError: the file can't be read.
    """
    path = path_of(recipe)
    text = read_text(path, "recipe", "give a TOML file with flags of train.py", LARGEST)
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not TOML ({error or 'nested too deeply'}); fix the file") from error
    return [f"--{key}={_checked(path, key, value, parser)}" for key, value in content.items()]


def _checked(path: str, key: str, value: Any, parser: argparse.ArgumentParser) -> str:
    """Return the text of a value on the command line, after checking both key and value."""
    action = parser._option_string_actions.get(f"--{key}")
    if action is None or key in EXCLUDED:
        raise UsageError(f"{path}: {flags.quoted(key)} is not a flag of train.py; train.py --help lists them")
    text = _text(value)
    parsed: Any = None
    try:
        parsed = text if action.type is None else action.type(text)  # type: ignore[operator]
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"{path}: {key}: {error}") from error
    if action.choices is not None and parsed not in action.choices:
        raise UsageError(
            f"{path}: {key}: {flags.quoted(text)} is unknown; give one of {', '.join(action.choices)}"
        )
    if not text or not _same_kind(value, parsed):
        raise UsageError(f"{path}: {key}: {flags.quoted(str(value))} can't be used; give {_kind(parsed)}")
    return text


def _text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value)


def _same_kind(value: Any, parsed: Any) -> bool:
    """Return whether the value of a recipe has the type of the parsed one; a number may stand for a list."""
    if isinstance(value, bool) or isinstance(parsed, bool):
        return isinstance(value, bool) and isinstance(parsed, bool)
    if isinstance(value, list):
        numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value)
        return isinstance(parsed, Sequence) and not isinstance(parsed, str) and numbers
    if isinstance(value, (int, float)):
        return not isinstance(parsed, (str, type(None)))
    return isinstance(value, str) and isinstance(parsed, (str, type(None)))


def _kind(parsed: Any) -> str:
    """Return what a recipe must give for a flag, from a parsed value of the flag."""
    if isinstance(parsed, bool):
        return "true or false"
    if isinstance(parsed, (int, float)):
        return "a number"
    return "a text in quotes" if isinstance(parsed, (str, type(None))) else "a list of numbers"
