"""Put criss-cross attention into a network of segmentation_models_pytorch and train it for a few steps.

    python examples/smp_attention.py [ENCODER]

Needs `pip install segmentation-models-pytorch` and the package cc_attention, nothing else of this repository.
ENCODER is an encoder of segmentation_models_pytorch, such as resnet18 (the default). The labels are random:
the example shows how the parts fit together, not a result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from cc_attention import RecurrentCrissCrossAttention


class Attended(nn.Module):
    """An encoder whose deepest feature map passes through criss-cross attention."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder
        self.output_stride = encoder.output_stride  # the decoder asks for it
        self.attention = RecurrentCrissCrossAttention(encoder.out_channels[-1], recurrence=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of the encoder, the deepest one with attention."""
        *features, deepest = self.encoder(images)
        return [*features, self.attention(deepest)]


def main(encoder: str = "resnet18") -> None:
    """Train the network on random data and print the loss of each step."""
    torch.manual_seed(0)
    model = smp.FPN(encoder, encoder_weights=None, classes=5)
    model.encoder = Attended(model.encoder)
    model = model.to(memory_format=torch.channels_last)  # the layout of the operator: no copies
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(2, 3, 64, 96).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 5, (2, 64, 96))
    for step in range(1, 6):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
