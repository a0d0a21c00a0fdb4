"""The tool tools.attention and its drawings."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import last_line
from conftest import run as run_command
from PIL import Image

from dataset import IMG_MEAN
from networks import CheckpointError, Seg_Model
from networks.attention import picture_attention
from tools import attention
from utils.drawing.attention_figure import draw_attention, panel_size
from utils.errors import UsageError


@pytest.fixture
def street(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (49, 65, 3), dtype=np.uint8))
    return path


def run(checkpoint: Path, pictures: Path | list[Path], *arguments: str) -> None:
    """Run the command with its results beside the first picture."""
    pictures = pictures if isinstance(pictures, list) else [pictures]
    given = [*map(str, pictures), "--out", str(pictures[0].parent), "--restore-from", str(checkpoint)]
    attention.main([*given, "--gpu", "cpu", *arguments])


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
    with pytest.raises(UsageError, match="there is no attention to draw"):
        run(checkpoint, street, "--recurrence", "0")
    with pytest.raises(UsageError, match="no such file"):
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


def test_pictures_of_equal_names_have_results_each(checkpoint: Path, street: Path) -> None:
    other = street.parent / "other" / "street.png"
    other.parent.mkdir()
    other.write_bytes(street.read_bytes())
    (street.parent / "both.txt").write_text(f"{street.name}\n{other}\n")
    run(checkpoint, street.parent / "both.txt", "--pixel", "1,2")
    assert len(list(street.parent.rglob("street_1_2.npy"))) == 2


def ink_height(strip: np.ndarray) -> int:
    """Height of the black letters in a white strip [h, w, 3]: rows with ink in the first line of text."""
    rows = (strip.min(-1) < 100).any(1)
    first = int(np.argmax(rows))
    return int(np.argmin(np.append(rows[first:], False)))


@pytest.mark.parametrize("size", [(128, 256), (1024, 2048), (375, 1242), (1600, 400), (97, 97)])
def test_captions_and_cross_are_legible_on_a_screen(size: tuple[int, int]) -> None:
    """The figure is shown 1200 pixels wide and 900 high at most."""
    pixel = size[0] // 2, size[1] // 3
    maps = np.ones((2, 5, 9), np.float32)
    figure = draw_attention(np.full((*size, 3), 90, np.uint8), pixel, maps)
    shown = min(1, 1200 / figure.width, 900 / figure.height)
    height, width = panel_size(size, 3)
    array = np.array(figure)
    caption = array[height : height + round(40 / shown), :width]
    assert ink_height(caption) * shown >= 9
    # White arms of the cross along its row, in the picture.
    row = int((pixel[0] + 0.5) * height / size[0])
    white = (array[row, :width] == 255).all(-1)
    assert 14 <= white.sum() * shown <= 60
    column = int((pixel[1] + 0.5) * width / size[1])
    beside = array[row - round(60 * height / size[0] / 3) : row + 1, column - round(6 / shown)]
    assert (beside == 255).all(-1).sum() * shown < 6  # a line, no block


def test_wide_pictures_are_stacked_and_captions_wrapped() -> None:
    maps = np.ones((2, 5, 9), np.float32)
    wide = draw_attention(np.zeros((375, 1242, 3), np.uint8), (9, 9), maps)
    assert wide.width == 1242 and wide.height > 3 * 375
    tall = draw_attention(np.zeros((1600, 400, 3), np.uint8), (9, 9), maps, "a class of a long name")
    assert tall.width < 1600 < tall.height


@pytest.mark.parametrize("size", [(300, 1), (1, 9000), (1, 1), (5000, 40)])
def test_odd_pictures_can_be_drawn(size: tuple[int, int]) -> None:
    figure = draw_attention(np.zeros((*size, 3), np.uint8), (0, 0), np.ones((2, 2, 2), np.float32))
    assert max(figure.size) <= 3 * 4096 + 12 and min(figure.size) > 0


def test_checkpoints_and_recipes_that_do_not_fit(checkpoint: Path, street: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    folder = street.parent / "run"
    folder.mkdir()
    for name in ("head.bottleneck.3.weight", "head.bottleneck.3.bias"):
        state[name] = state[name].repeat(16, *[1] * (state[name].dim() - 1))
    torch.save(state, folder / "many.pth")
    with pytest.raises(CheckpointError, match="has 304 classes"):
        run(folder / "many.pth", street)
    (folder / "args.json").write_text('{"recurrence": "2"}')
    (folder / "CS_scenes_1.pth").write_bytes(checkpoint.read_bytes())
    with pytest.raises(UsageError, match="recurrence is '2'"):
        run(folder / "CS_scenes_1.pth", street)


def test_a_moved_class_table_is_spoken_of(
    checkpoint: Path, street: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = street.parent / "run"
    folder.mkdir()
    (folder / "args.json").write_text('{"recurrence": 1, "classes": "gone.tsv"}')
    (folder / "CS_scenes_1.pth").write_bytes(checkpoint.read_bytes())
    run(folder / "CS_scenes_1.pth", street)
    assert "gone.tsv, the class table of the run, is missing or has changed" in capsys.readouterr().out


def test_nothing_that_is_read_is_replaced_and_all_is_looked_at_first(checkpoint: Path, street: Path) -> None:
    """Nothing is written if a figure would replace an input, or a pixel lies outside one of the pictures."""
    other = street.parent / "street_24_32.png"
    other.write_bytes(street.read_bytes())
    with pytest.raises(UsageError, match="--out: would replace its own input .*street_24_32.png"):
        run(checkpoint, [street, other])
    small = street.parent / "a" / "small.png"
    small.parent.mkdir()
    assert cv2.imwrite(str(small), np.zeros((20, 20, 3), np.uint8))
    with pytest.raises(UsageError, match="--pixel 40,8: .*small.png has 20 rows"):
        run(checkpoint, [street, small], "--pixel", "40,8")
    assert other.read_bytes() == street.read_bytes() and not list(street.parent.rglob("*.npy"))
