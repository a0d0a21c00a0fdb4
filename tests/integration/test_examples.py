"""The programs of examples/ run unchanged."""

from __future__ import annotations

import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import write_pair

from examples import attention_maps, predict_folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_pair(tmp_path, "val", 0, (40, 56))
    return tmp_path / "leftImg8bit/val/ulm"


def test_a_folder_is_predicted(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    predict_folder.main(str(checkpoint), str(pictures), str(tmp_path / "out"))
    (written,) = (tmp_path / "out").iterdir()
    assert cv2.imread(str(written)).shape == (40, 56, 3)


def test_attention_maps_are_drawn(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    (picture,) = pictures.iterdir()
    attention_maps.main(str(checkpoint), str(picture), str(tmp_path / "out.png"), "3,4", "30,50")
    one, two = np.vsplit(cv2.imread(str(tmp_path / "out.png")), 2)
    assert one.shape == two.shape and not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("example", "package"),
    [
        ("timm_attention", "timm"),
        ("smp_attention", "segmentation_models_pytorch"),
        ("mmseg_attention", "mmseg"),
    ],
)
def test_another_network_learns(example: str, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(package)
    importlib.import_module(f"examples.{example}").main()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0]
