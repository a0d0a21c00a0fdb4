"""The tests of the kernels catch a sample of the planted bugs of tests/kernels/planted_bugs.py."""

import pytest
from emulator import COMPILER
from planted_bugs import SUITES
from planting import Bug, Suite

SAMPLE = (
    *("forward: values without a barrier", "backward: dS without a barrier", "general: weights overtake"),
    *("float32 forward: pieces without a barrier", "float32 backward: delta without a barrier"),
    *("norm: partial sums without a barrier", "norm: channels beyond the end"),
    *("loss: sum: no barrier", "loss: gradient: row of others"),
)
PLACES = [pytest.param(suite, bug, id=bug.name) for suite in SUITES for bug in suite.bugs]


@pytest.mark.parametrize("suite, bug", PLACES)
def test_the_place_of_each_bug_is_there(suite: Suite, bug: Bug) -> None:
    assert suite.plant(bug)


@pytest.mark.build
@pytest.mark.parametrize("suite, bug", [place for place in PLACES if place.id in SAMPLE])
def test_bugs_are_caught(suite: Suite, bug: Bug) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler here for the emulator")
    assert suite.caught(bug) is not None
