"""Put criss-cross attention between the stages of a timm network and train it for a few steps.

    python examples/timm_attention.py [NAME]

Needs `pip install timm` and the package cc_attention, nothing else of this repository. NAME is a timm network
with feature maps, such as resnet18 (the default) or convnext_tiny. The labels are random: the example shows
how the parts fit together, not a result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from cc_attention import RecurrentCrissCrossAttention


class Segmenter(nn.Module):
    """A timm backbone, criss-cross attention on its features at stride 8, and a classifier."""

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        backbone: Any = timm.create_model(name, features_only=True, pretrained=False)
        self.level = backbone.feature_info.reduction().index(8)
        channels = backbone.feature_info.channels()[self.level]
        self.backbone = backbone
        self.attention = RecurrentCrissCrossAttention(channels, recurrence=2)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes, h / 8, w / 8] for images [N, 3, h, w]."""
        features = self.backbone(images)[self.level]
        return self.classify(self.attention(features))


def main(name: str = "resnet18") -> None:
    """Train the network on random data and print the loss of each step."""
    torch.manual_seed(0)
    # channels_last is the layout of the operator: no copies.
    model = Segmenter(name, num_classes=5).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(2, 3, 64, 96).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 5, (2, 8, 12))
    for step in range(1, 6):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
