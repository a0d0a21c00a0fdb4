"""One training step of the real network in float64 on --nproc processes: its loss and gradients into a file.

    python tests/one_step.py OUT --nproc 2 [--nan SAMPLE]

Run by test_step.py.
"""

from __future__ import annotations

import argparse
import sys

import torch
from conftest import fill

from engine import distributed
from engine.step import Stepper
from loss import CriterionDSN
from networks import Seg_Model, synchronise
from utils.args import exit_status

SAMPLES, CLASSES, SIZE = 4, 5, 33


def batch(nan: int | None) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Four samples with more and more void, so that the mean of the processes' means is another number."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) * 60
    labels = torch.randint(0, CLASSES, (SAMPLES, SIZE, SIZE), generator=generator)
    for sample in range(SAMPLES):
        labels[sample, : sample * 9] = 255
    if nan is not None:
        images[nan, 0, 3, 3] = float("nan")
    return images, labels, [f"picture {sample}" for sample in range(SAMPLES)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--nan", type=int)
    args = parser.parse_args()

    def body(world: distributed.World) -> None:
        model = Seg_Model(CLASSES, backbone="resnet50", dropout=0).double()
        fill(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        synchronise(model, world)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        parallel = world.data_parallel(model, all_used=True)
        stepper = Stepper(model, parallel, CriterionDSN(), optimizer, world)
        images, labels, records = batch(args.nan)
        share = slice(world.rank * SAMPLES // world.size, (world.rank + 1) * SAMPLES // world.size)
        try:
            report = stepper.step(7, images[share], labels[share], records[share])
        finally:
            unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            print("unchanged" if unchanged else "changed")
        if world.is_main:
            gradients = {name: weight.grad for name, weight in model.named_parameters()}
            torch.save({"loss": report.loss, "norm": report.gradient_norm, "gradients": gradients}, args.out)

    return distributed.run(distributed.choose_devices(None, args.nproc), lambda: None, body)


if __name__ == "__main__":
    sys.exit(exit_status(main))
