"""Use the fused attention in mmsegmentation's CCNet and train it for a few steps.

    python examples/mmseg_attention.py

Needs mmsegmentation, mmcv and the package cc_attention, nothing else of this repository. In a configuration
of mmsegmentation, import this module by `custom_imports` and write type="FusedCCHead" instead of "CCHead".
The labels are random: the example shows how the parts fit together, not a result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from mmseg.models.decode_heads import CCHead
from mmseg.registry import MODELS
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from cc_attention import CrissCrossAttention


@MODELS.register_module()
class FusedCCHead(CCHead):
    """mmsegmentation's CCHead with the fused attention.

    The head applies `cca` once for each recurrence. Checkpoints of CCHead can be loaded.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.cca = CrissCrossAttention(self.channels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """Rename the gamma of mmcv's module, a scalar, before the weights are loaded."""
        scalar = state_dict.pop(f"{prefix}cca.gamma.scale", None)
        if scalar is not None:
            state_dict[f"{prefix}cca.gamma"] = scalar.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *more)


def main() -> None:
    """Train the network on random data and print the loss of each step."""
    torch.manual_seed(0)
    norm = {"type": "BN"}
    model: nn.Module = MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {
                "type": "ResNetV1c",
                "depth": 18,
                "dilations": (1, 1, 2, 4),
                "strides": (1, 2, 1, 1),
                "norm_cfg": norm,
            },
            "decode_head": {
                "type": "FusedCCHead",
                "in_channels": 512,
                "in_index": 3,
                "channels": 64,
                "recurrence": 2,
                "num_classes": 5,
                "norm_cfg": norm,
                "align_corners": False,
            },
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(2, 3, 64, 96)
    labels = torch.randint(0, 5, (2, 64, 96))
    for step in range(1, 6):
        logits = nn.functional.interpolate(model(images), labels.shape[1:], mode="bilinear")
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
