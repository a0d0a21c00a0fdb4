"""The programs of examples/ run unchanged."""

from __future__ import annotations

import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import write_pair
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from examples import attention_maps, mask_rcnn, predict_folder


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


def test_attention_in_mask_rcnn() -> None:
    """The attention changes nothing at first, sits before the last block of res4, and is trained."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = MaskRCNN(backbone, num_classes=3, min_size=64, max_size=96).eval()
    image = torch.rand(3, 48, 72)
    with torch.no_grad():
        before = model.backbone(image[None])
        attention = mask_rcnn.add_attention(model)
        after = model.backbone(image[None])
        assert model([image])[0].keys() == {"boxes", "labels", "scores", "masks"}
    for name, features in before.items():
        torch.testing.assert_close(features, after[name])
    assert list(model.backbone.body["layer3"]).index(attention) == 1
    assert (attention.in_dim, attention.recurrence) == (256, 2)
    target = mask_rcnn.random_target(48, 72)
    assert target["masks"].sum(dim=(1, 2)).tolist() == [28 * 24, 36 * 24]
    assert mask_rcnn.train_step(model, [image], [target]) > 0
    assert attention.gamma.item() != 0
