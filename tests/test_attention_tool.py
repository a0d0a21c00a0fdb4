"""tools/attention, and how it draws."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import last_line
from conftest import run as run_command
from PIL import Image

from dataset import IMG_MEAN, DataError
from networks import Seg_Model
from networks.attention import picture_attention
from tools import attention
from utils.args import UsageError
from utils.attention_figure import draw_attention


@pytest.fixture
def street(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (49, 65, 3), dtype=np.uint8))
    return path


def run(checkpoint: Path, street: Path, *arguments: str) -> None:
    attention.main(
        [
            str(street),
            "--restore-from",
            str(checkpoint),
            "--gpu",
            "cpu",
            "--out",
            str(street.parent),
            *arguments,
        ]
    )


def test_the_arrays_are_the_network_s_maps(checkpoint: Path, street: Path) -> None:
    run(checkpoint, street, "--pixel", "40,8", "--pixel", "0,64")
    model = Seg_Model(19, backbone="resnet50").eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    image = torch.from_numpy(cv2.imread(str(street)) - IMG_MEAN).float().permute(2, 0, 1)[None]
    maps = picture_attention(model, image, [(40, 8), (0, 64)]).numpy()
    for number, name in enumerate(("street_40_8", "street_0_64")):
        saved = np.load(street.parent / f"{name}.npy")
        np.testing.assert_allclose(saved, maps[:, number], atol=1e-6)
        np.testing.assert_allclose(saved.sum((1, 2)), 1, atol=1e-5)
        assert Image.open(street.parent / f"{name}.png").width == 3 * 65 * 5 + 2 * 6


def test_one_recurrence_without_a_pixel_shows_the_middle(checkpoint: Path, street: Path) -> None:
    run(checkpoint, street, "--recurrence", "1")
    assert np.load(street.parent / "street_24_32.npy").shape[0] == 1


def test_maps_lie_where_they_belong() -> None:
    weights = np.zeros((1, 5, 9), np.float32)
    weights[0, 1, 6] = 1.0
    figure = np.array(draw_attention(np.zeros((41, 81, 3), np.uint8), (20, 40), weights))
    panel = figure[: 41 * 4, 81 * 4 + 6 :].sum(-1)  # enlarged fourfold
    row, column = np.unravel_index(np.argmax(np.where(panel < 3 * 250, panel, 0)), panel.shape)
    assert abs(row - 10 * 4) < 6 and abs(column - 60 * 4) < 6


def test_what_can_t_be_shown(checkpoint: Path, street: Path) -> None:
    with pytest.raises(UsageError, match="49 rows and 65 columns"):
        run(checkpoint, street, "--pixel", "49,0")
    with pytest.raises(UsageError, match="leaves the attention out"):
        run(checkpoint, street, "--recurrence", "0")
    with pytest.raises(DataError, match="no such file"):
        run(checkpoint, street.parent / "gone.png")


def test_wrong_flags_take_one_line(checkpoint: Path, street: Path) -> None:
    for arguments, words in (
        ([checkpoint, "--pixel", "x"], "give row,column"),
        ([street], "not a checkpoint"),
        ([checkpoint, "--gpu", "99"], "there is no GPU 99"),
    ):
        result = run_command("tools.attention", street, "--restore-from", *arguments)
        assert result.returncode == 2 and words in last_line(result.stderr)
        assert "Traceback" not in result.stderr
