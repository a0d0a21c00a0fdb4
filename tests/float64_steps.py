"""Take training steps in float64 on --nproc processes; write losses, dropout masks and gradients to a file.

    python tests/float64_steps.py OUT --nproc 2 [--small] [--nan SAMPLE]

test_distributed_step.py runs it. The real network takes one step, then its two heads on one convolution take
twenty. With --small only the latter are used.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from conftest import fill
from torch import nn

from engine.data.transfer import Batch
from engine.runtime import distributed
from engine.training.step import StepOptions, Stepper
from loss import CriterionDSN
from networks import ABN, ChannelDropout, Seg_Model, synchronize
from networks.heads import RCCAHead
from utils.args import exit_status

SAMPLES, CLASSES, SIZE = 4, 5, 33
#: Number of steps of each network.
STEPS = {"real": 1, "small": 20}


class SmallModel(nn.Module):
    """The heads of CCNet, with few channels, on the features of one convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, stride=4, padding=2)
        self.head = RCCAHead(16, CLASSES, channels=32)
        self.dsn = nn.Sequential(ABN(16), ChannelDropout(16, 0.1), nn.Conv2d(16, CLASSES, 1))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(images)
        return [self.head(x), self.dsn(x)]


def batch(nan: int | None) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return four samples with more and more void, so that averaging the processes' means is wrong."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) * 60
    labels = torch.randint(0, CLASSES, (SAMPLES, SIZE, SIZE), generator=generator)
    for sample in range(SAMPLES):
        labels[sample, : sample * 9] = 255
    if nan is not None:
        images[nan, 0, 3, 3] = float("nan")
    return images, labels, [f"picture {sample}" for sample in range(SAMPLES)]


def take_steps(network: str, nan: int | None, world: distributed.World) -> dict[str, Any]:
    """Take the steps of one network; return its losses, masks and gradients on rank 0."""
    model = (SmallModel() if network == "small" else Seg_Model(CLASSES, backbone="resnet50")).double()
    fill(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    synchronize(model, world.statistics())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    parallel = world.data_parallel(model, all_used=True)
    stepper = Stepper(parallel, CriterionDSN(), optimizer, world, StepOptions(seed=3))
    layers = [module for module in model.modules() if isinstance(module, ChannelDropout)]
    masks: dict[ChannelDropout, list[torch.Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: masks[layer].append(layer.kept.clone()))
    images, labels, records = batch(nan)
    share = slice(world.rank * SAMPLES // world.size, (world.rank + 1) * SAMPLES // world.size)
    losses = []
    try:
        for step in range(7, 7 + STEPS[network]):
            result = stepper.step(step, Batch(images[share], labels[share], records[share]))
            losses.append(result.numbers().loss)
    finally:
        unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        print("unchanged" if unchanged else "changed")
    shares = world.gather([torch.stack(each) for each in masks.values()])
    return {
        "losses": losses,
        "norm": result.numbers().gradient_norm,
        "gradients": {name: weight.grad for name, weight in model.named_parameters()},
        # For each layer, [steps, samples, channels].
        "masks": [torch.cat(each, 1) for each in zip(*shares, strict=True)],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--nan", type=int)
    args = parser.parse_args()

    def body(world: distributed.World) -> None:
        networks = ["small"] if args.small else list(STEPS)
        content = {network: take_steps(network, args.nan, world) for network in networks}
        if world.is_main:
            torch.save(content, args.out)

    return distributed.run(distributed.choose_devices(None, args.nproc), lambda: None, body)


if __name__ == "__main__":
    sys.exit(exit_status(main))
