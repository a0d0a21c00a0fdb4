"""A few fixed inputs of each fuzzer. tests/fuzz.py tries new ones for longer."""

from __future__ import annotations

import os

import fuzz
import pytest

from utils.args import Parser
from utils.errors import UsageError


@pytest.fixture(scope="module", autouse=True)
def ground(tmp_path_factory):
    """Make the files of the fuzzers, and a working directory, since flag values may be relative paths."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    yield fuzz.ground()
    os.chdir(before)
    fuzz.remove_ground()


#: Targets that take more than about 3 s.
SLOW = {"run files", "flags of train.py"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in fuzz.targets()],
)
def test_every_input_ends_in_order(name):
    assert fuzz.run_target(name, 8 if name.startswith("flags") else 60, None) > 0


class Faulty:
    """A command that misbehaves with --fault."""

    def __init__(self, fault):
        self.fault = fault

    def get_parser(self):
        parser = Parser()
        parser.add_argument("--fault", action="store_true")
        return parser

    def main(self):
        if self.get_parser().parse_args().fault:
            return self.fault()


def refuse():
    raise UsageError("--fault: is wrong; leave it out")


def crash():
    raise KeyError("fault")


def delete():
    fuzz.ground().picture.unlink()
    refuse()


def test_a_refusal_is_in_order():
    fuzz.Command("faulty", Faulty(refuse), lambda *_: []).body(["--fault"])


@pytest.mark.parametrize("fault", [crash, delete, lambda: 3, lambda: 2])
def test_the_fuzzer_finds(fault, ground):
    """The fuzzer finds a traceback, a deleted file, an invalid status, and a refusal without a line."""
    content = ground.picture.read_bytes()
    try:
        with pytest.raises((AssertionError, KeyError)):
            fuzz.Command("faulty", Faulty(fault), lambda *_: []).body(["--fault"])
    finally:
        ground.picture.write_bytes(content)
