"""The tests of the loss kernels catch a sample of the planted bugs of tests/kernels/planted_loss_bugs.py."""

import pytest
from emulator import COMPILER
from planted_loss_bugs import BUGS, Bug, caught

SAMPLE = ("sum: no barrier", "gradient: row of others")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_place_of_each_bug_is_there(bug: Bug) -> None:
    assert bug.plant()


@pytest.mark.build
@pytest.mark.slow
@pytest.mark.parametrize("bug", [b for b in BUGS if b.name in SAMPLE], ids=lambda bug: bug.name)
def test_bugs_are_caught(bug: Bug) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    assert caught(bug.plant()) is not None
