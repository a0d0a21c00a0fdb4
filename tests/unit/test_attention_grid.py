"""Attention of a grid of pixels against the maps of single pixels, and how a page encodes it."""

from __future__ import annotations

import json
from math import lcm

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_network import Narrow, SmallNetwork, registered
from torch import Tensor

from networks import Network, attention
from networks.attention import choose_grid, grid_attention, middles, picture_attention
from networks.heads import NonLocalHead
from tools.explore_page import NetworkText, Seen, embedded, explorable, explorer, quantized


def network(head: str) -> Network:
    torch.manual_seed(0)
    with registered():
        model = SmallNetwork(3) if head == "ccnet" else Narrow(NonLocalHead, 3, recurrence=2)
    model.head.context.gamma.data.fill_(0.7)
    return model.eval()


IMAGE = torch.randn(1, 3, 33, 49, generator=torch.Generator().manual_seed(1))  # features of 5 x 7


def enlarged_means(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Average maps [..., H, W] over equal cells: repeat each pixel until the cells have whole pixels."""
    height, width = maps.shape[-2:]
    down, across = lcm(height, rows), lcm(width, columns)
    fine = maps.double().repeat_interleave(down // height, -2).repeat_interleave(across // width, -1)
    return fine.unflatten(-1, (columns, -1)).mean(-1).unflatten(-2, (rows, -1)).mean(-2)


@pytest.mark.parametrize("head", ["ccnet", "nonlocal"])
@pytest.mark.parametrize("grid", [None, (5, 7), (99, 99), (2, 3), (1, 1), (4, 7)])
def test_maps_are_those_of_the_middle_pixels_averaged_over_the_cells(
    head: str, grid: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * 35 * 4)  # blocks of 4 pixels
    model = network(head)
    weights, size = grid_attention(model, IMAGE, grid)
    rows, columns = min((grid or (5, 7))[0], 5), min((grid or (5, 7))[1], 7)
    assert size == (5, 7) and weights.shape == (2, rows, columns, rows, columns)
    for row in range(rows):
        for column in range(columns):
            # The feature nearest to the middle of the cell, and its pixel: 33 rows have 5 features, 8 apart.
            down, across = int((row + 0.5) * 5 / rows), int((column + 0.5) * 7 / columns)
            expected = picture_attention(model, IMAGE, [(8 * down, 8 * across)])[:, 0]
            found = weights[:, row, column]
            torch.testing.assert_close(found.double(), enlarged_means(expected, rows, columns))


@given(st.integers(1, 300), st.integers(1, 600), st.integers(1, 4096))
def test_grids_have_no_more_cells_than_asked_and_no_more_than_features(
    height: int, width: int, most: int
) -> None:
    rows, columns = choose_grid((height, width), None, most)
    assert 1 <= rows <= height and 1 <= columns <= width and rows * columns <= most
    if height * width <= most:
        assert (rows, columns) == (height, width)


def test_the_default_grid_of_cityscapes() -> None:
    assert choose_grid((129, 257)) == (32, 64)
    assert middles(2, 5) == [1, 3] and middles(5, 5) == [0, 1, 2, 3, 4]


NORMAL = st.just(0.0) | st.floats(2**-60, 1, width=32)


@given(st.lists(NORMAL, min_size=1, max_size=20), st.sampled_from([1, 1e-3, 1e-15]))
def test_quantized_weights_are_within_their_error(values: list[float], factor: float) -> None:
    weights = np.array(values, np.float32)[None, None] * np.float32(factor)
    codes, largest = quantized(weights)
    decoded = largest[..., None, None].astype(np.float64) * (codes / 255.0) ** 2
    error = np.abs(decoded - weights).max()
    assert error <= weights.max() * (1 / 255 + 1 / 510**2 + 1e-5)
    # Zero stays zero, and the largest weight is exact.
    assert (codes[weights == 0] == 0).all()
    assert weights.max() == 0 or codes.max() == 255


def test_names_stay_text() -> None:
    hostile = "</script><script>hacked = 1</script><!--"
    seen = Seen(np.zeros((4, 6), np.uint8), np.ones((1, 4, 6), np.float32))
    picture = explorable(hostile, np.zeros((4, 6, 3), np.uint8), [seen], 99)
    text = explorer([NetworkText(hostile, hostile, [hostile], [0, 0, 0])], [picture])
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<!--" not in text
    about = json.loads(text.split('class="about">')[1].split("</script>")[0])
    assert about["networks"][0]["names"] == [hostile] and about["pictures"][0]["name"] == hostile
    assert json.loads(embedded("\udcff\u2028")) == "\udcff\u2028"  # of a file name that is not UTF-8


def test_pictures_are_encoded_at_their_size_on_the_page() -> None:
    classes = np.arange(6, dtype=np.uint8)[None].repeat(4, 0) // 3
    probabilities = np.stack([np.where(classes == index, 0.75, 0.25) for index in (0, 1)]).astype(np.float32)
    content = json.loads(
        explorable("a", np.zeros((4, 6, 3), np.uint8), [Seen(classes, probabilities)], 3).content
    )
    (found,) = content["networks"]
    assert content["size"] == [4, 6] and content["shown"] == [2, 3]
    assert found["shares"] == [[0, 0.5], [1, 0.5]] and "maps" not in found
