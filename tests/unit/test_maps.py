"""Attention maps against the rows of attention matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cc_attention import CrissCrossAttention, RecurrentCrissCrossAttention, attention_maps
from networks import Seg_Model
from networks.attention import head_pixel, picture_attention


def matrix(module: CrissCrossAttention, x: Tensor) -> Tensor:
    """Return [HW, HW] by definition: row u has the softmax of pixel u over its row and column."""
    _, _, h, w = x.shape
    query, key = (convolution(x)[0].flatten(1) for convolution in (module.query_conv, module.key_conv))
    y, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    seen = (y[:, None] == y) | (column[:, None] == column)
    return (query.T @ key).masked_fill(~seen, -torch.inf).softmax(1)


def made(recurrence: int) -> tuple[RecurrentCrissCrossAttention, Tensor]:
    torch.manual_seed(0)
    module = RecurrentCrissCrossAttention(16, recurrence).double()
    nn.init.constant_(module.gamma, 0.7)
    return module, torch.randn(1, 16, 5, 7, dtype=torch.float64)


@torch.no_grad()
def test_maps_are_rows_of_the_product_of_the_recurrences() -> None:
    module, x = made(3)
    pixels = [(0, 0), (2, 3), (4, 6)]
    maps = attention_maps(module, x, pixels)
    assert maps.shape == (3, 3, 5, 7) and maps.dtype == torch.float64
    product = torch.eye(35, dtype=torch.float64)
    for recurrence in range(3):
        product = matrix(module, x) @ product
        for number, (row, column) in enumerate(pixels):
            torch.testing.assert_close(maps[recurrence, number].flatten(), product[row * 7 + column])
        x = CrissCrossAttention.forward(module, x)


def test_the_first_map_is_a_cross_and_the_second_reaches_all() -> None:
    module, x = made(2)
    first, second = attention_maps(module, x, [(1, 4)])[:, 0]
    cross = torch.zeros(5, 7, dtype=torch.bool)
    cross[1], cross[:, 4] = True, True
    assert ((first > 0) == cross).all() and (second > 0).all()
    torch.testing.assert_close(torch.stack([first.sum(), second.sum()]), torch.ones(2, dtype=torch.float64))


def test_a_plain_module_and_one_without_recurrence() -> None:
    module, x = made(0)
    assert attention_maps(module, x, [(0, 0)]).shape == (0, 1, 5, 7)
    assert attention_maps(CrissCrossAttention(16).double(), x, [(0, 0)]).shape == (1, 1, 5, 7)


def test_maps_within_inference_mode_and_half_precision() -> None:
    module, x = made(2)
    expected = attention_maps(module, x, [(3, 3)])
    with torch.inference_mode():
        assert torch.equal(attention_maps(module, x * 1, [(3, 3)]), expected)
    half = attention_maps(module.bfloat16(), x.bfloat16(), [(3, 3)])
    assert half.dtype == torch.float32 and (half - expected).abs().max() < 0.02


@pytest.mark.parametrize("pixel", [(5, 0), (0, 7), (-1, 0)])
def test_pixels_outside_are_refused(pixel: tuple[int, int]) -> None:
    module, x = made(1)
    with pytest.raises(ValueError, match="outside"):
        attention_maps(module, x, [pixel])
    with pytest.raises(ValueError, match="one image"):
        attention_maps(module, x.repeat(2, 1, 1, 1), [(0, 0)])
    with pytest.raises(ValueError, match=r"one image \[1, 16, H, W\], got shape \[1, 15, 5, 7\]"):
        attention_maps(module, x[:, 1:], [(0, 0)])


def test_pixels_of_a_picture_find_theirs_in_the_head() -> None:
    assert head_pixel((0, 0), (97, 65), (1, 1, 13, 9)) == (0, 0)
    assert head_pixel((96, 64), (97, 65), (1, 1, 13, 9)) == (12, 8)
    assert head_pixel((8, 20), (97, 65), (1, 1, 13, 9)) == (1, 2)
    assert head_pixel((0, 0), (1, 1), (1, 1, 1, 1)) == (0, 0)


def test_the_network_s_maps_are_those_of_its_head() -> None:
    torch.manual_seed(0)
    model = Seg_Model(3, backbone="resnet50").eval()
    image = torch.randn(1, 3, 49, 65)
    taken: list[Tensor] = []
    model.head.cca.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad():
        model(image)
    maps = picture_attention(model, image, [(48, 32)])
    height, width = taken[0].shape[2:]
    assert maps.shape == (2, 1, height, width)
    torch.testing.assert_close(maps, attention_maps(model.head.cca, taken[0], [(height - 1, width // 2)]))
    with pytest.raises(ValueError, match="49 rows and 65 columns"):
        picture_attention(model, image, [(49, 0)])
