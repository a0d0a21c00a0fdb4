"""Put recurrent criss-cross attention into torchvision's Mask R-CNN, as in the COCO experiment of the paper.

    python examples/mask_rcnn.py [--pretrained] [IMAGE]

Needs the package cc_attention and torchvision, nothing else of this repository. The attention (R=2) is
inserted before the last residual block of the fourth stage (res4, `layer3` in torchvision). The paper does
not say where it was; non-local networks (arXiv 1711.07971) take this place in the same experiment. gamma
starts at 0, so a pretrained network gives the same results until it is trained further.

The paper reports, on COCO val2017, box and mask AP 38.2 and 34.8 for ResNet-50, and 39.3 and 36.1 with
attention (CCNet, arXiv 1811.11721, table 7). This example does not train on COCO: it takes one step on a
random target, after it has shown what the network finds in IMAGE with --pretrained.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import MaskRCNN, MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from cc_attention import RecurrentCrissCrossAttention


def add_attention(model: MaskRCNN, recurrence: int = 2) -> RecurrentCrissCrossAttention:
    """Insert attention into a Mask R-CNN with a ResNet, in place; return the attention."""
    *blocks, last = model.backbone.body["layer3"]
    attention = RecurrentCrissCrossAttention(last.conv1.in_channels, recurrence)
    model.backbone.body["layer3"] = nn.Sequential(*blocks, attention, last)
    return attention


def random_target(height: int, width: int) -> dict[str, Tensor]:
    """Return boxes, labels and masks of two rectangles."""
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8]]) * torch.tensor([width, height] * 2)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    masks = [(columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1) for x0, y0, x1, y1 in boxes]
    return {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": torch.stack(masks).byte()}


def train_step(model: MaskRCNN, images: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
    """Take one training step with the paper's settings for the optimizer; return the loss."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.02, momentum=0.9, weight_decay=1e-4)
    loss = sum(model.train()(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main(*arguments: str) -> None:
    """Add the attention, detect objects in IMAGE if it is given, and take one training step."""
    torch.manual_seed(0)
    pretrained, paths = "--pretrained" in arguments, [name for name in arguments if name != "--pretrained"]
    weights = MaskRCNN_ResNet50_FPN_Weights.COCO_V1 if pretrained else None
    model = maskrcnn_resnet50_fpn(weights=weights, weights_backbone=None, min_size=128, max_size=192)
    if paths:
        model.transform.min_size, model.transform.max_size = (800,), 1333
    attention = add_attention(model)
    image = decode_image(paths[0], ImageReadMode.RGB) / 255 if paths else torch.rand(3, 96, 144)
    with torch.no_grad():
        found = model.eval()([image])[0]
    names = weights.meta["categories"] if weights else None
    print(f"{len(found['scores'])} objects, masks {list(found['masks'].shape)}")
    for score, label in zip(found["scores"].tolist()[:10], found["labels"].tolist(), strict=False):
        print(f"  {names[label] if names else label}: {score:.2f}")
    loss = train_step(model, [image], [random_target(*image.shape[1:])])
    print(f"loss {loss:.3f}, gamma {attention.gamma.item():.2g} after one step")


if __name__ == "__main__":
    main(*sys.argv[1:])
