"""The division into training and validation keeps groups together, and depends on the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.split import divide, groups_of, say_coarse, series_of, sides_of
from utils.errors import DataError


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=60).filter(lambda groups: len(set(groups)) > 1),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_groups_stay_together(groups: list[int], share: float, seed: int) -> None:
    names = [f"group {group}" for group in groups]
    chosen = divide(names, share, seed)
    val = {name for name, is_val in zip(names, chosen, strict=True) if is_val}
    train = {name for name, is_val in zip(names, chosen, strict=True) if not is_val}
    assert val and train and not val & train
    # The number is as close to the share as one more or less of the groups can make it.
    largest = max(Counter(names).values())
    assert abs(sum(chosen) - share * len(names)) <= largest
    # The order of the pictures does not matter.
    again = divide(names[::-1], share, seed)
    assert again[::-1] == chosen


def test_single_pictures_meet_the_share_and_the_seed_matters() -> None:
    names = [f"{number}.png" for number in range(100)]
    first, second = divide(names, 0.2, 0), divide(names, 0.2, 1)
    assert sum(first) == sum(second) == 20 and first != second and first == divide(names, 0.2, 0)


@pytest.mark.parametrize("seed", range(20))
def test_a_new_picture_moves_at_most_one_other(seed: int) -> None:
    names = [f"{number}.png" for number in range(100)]
    before = dict(zip(names, divide(names, seed=seed), strict=True))
    for new in ("0new.png", "zebra.png", "50b.png"):
        more = sorted([*names, new])
        after = dict(zip(more, divide(more, seed=seed), strict=True))
        assert sum(before[name] != after[name] for name in names) <= 1


def test_a_new_folder_moves_few_others() -> None:
    groups = [f"scene{number}" for number in range(50) for _ in range(1 + number % 4)]
    before = dict(zip(groups, divide(groups), strict=True))
    moved = 0
    for new in range(20):
        more = [*groups, *[f"new{new}"] * 3]
        after = dict(zip(more, divide(more), strict=True))
        moved += sum(before[name] != after[name] for name in before)
    assert moved <= 40  # of 20 * 50; a new permutation moves about a third


def test_sides() -> None:
    paths = ["Train/a.png", "x/validation/b.png", "test/c.png", "val.png", "trainer/d.png", "val2017/e.png"]
    assert sides_of(paths) == (["train", "val", "test", None, None, "val"], None)
    assert sides_of(["a.png", "test/b.png"]) == ([None, "test"], None)
    sides, note = sides_of(["train/a.png", "test/b.png"])
    assert sides == [None, "test"] and note and "none is for val" in note
    sides, note = sides_of(["train/a.png", "val/test/b.png", "val/c.png"])
    assert sides == [None] * 3 and note and "val/test/b.png is for both val and test" in note


def test_a_division_of_few_groups_is_said() -> None:
    groups = [name for name in "abcd" for _ in range(3)]
    is_val = [name in "bc" for name in groups]
    assert say_coarse(groups, is_val) == (
        "the division is coarse: of only 4 groups of pictures, b and c (6 of 12 pictures) are for validation"
    )
    assert say_coarse([*groups, "e"], [*is_val, False]) is None
    assert say_coarse(["a", "b"], [True, False]) is None  # of single pictures


def test_groups() -> None:
    assert groups_of(["a/1.png", "a/2.png", "b/1.png"]) == ["a", "a", "b"]
    assert groups_of(["1.png", "2.png"]) == ["1.png", "2.png"]
    assert groups_of(["x_01.png", "x_02.png", "y_01.png"], "^[a-z]+") == ["x", "x", "y"]
    assert groups_of(["s1/x.png", "s22/y.png"], r"s(\d+)/") == ["1", "22"]
    assert groups_of(["ab", "b"], "(a)?b") == ["a", "b"]
    with pytest.raises(DataError, match="--group z: not found in a.png"):
        groups_of(["a.png"], "z")
    with pytest.raises(DataError, match="not a regular expression"):
        groups_of(["a.png"], "(")
    with pytest.raises(DataError, match="one group"):
        divide(["a", "a"])


def test_series() -> None:
    frames = [f"{name}_{number:03d}_L.png" for name in ("north", "south9") for number in range(5)]
    assert series_of(frames) == {"north__L": 5, "south9__L": 5}
    assert series_of([f"img{number}.png" for number in range(9)]) == {}  # all are one
    assert series_of(["a.png", "b.png", "c.png", "d.png"]) == {}  # none
