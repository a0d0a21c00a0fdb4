"""Training of a small network, which takes minutes on a CPU, with the loader, losses and step of train.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from dataset import CSDataSet
from engine.data.loader import Loading, train_batches
from engine.evaluation.evaluate import evaluate
from engine.evaluation.metrics import mean_iou
from engine.inference import predict_classes
from engine.runtime.distributed import World
from engine.training.optimizer import make_optimizer
from engine.training.schedule import poly_lr, set_learning_rate, warm_up
from engine.training.step import Criterion, StepOptions, Stepper
from networks import Network
from networks.heads.parts import convolution_norm

#: Channels of layer3 and layer4 of the backbone, and of the attention.
CHANNELS, WIDTH = (32, 64), 64
#: Settings of the training.
BATCH, LEARNING_RATE, WARMUP = 8, 4e-3, 20
WORLD = World(0, 1, torch.device("cpu"))


class SmallNetwork(Network):
    """A network of the papers on a backbone of five convolutions with output stride 8.

    Args:
        head: class of the main head (networks/heads/).
        num_classes: number of classes.
        consistency: channels of the features for the category-consistent loss; 0 without this loss.
    """

    channels = CHANNELS

    def __init__(self, head: Callable[..., nn.Module], num_classes: int, consistency: int = 0):
        nn.Module.__init__(self)
        sizes = (3, 16, 24, *CHANNELS)
        layers = [convolution_norm(few, many, 3, "torch", "relu") for few, many in pairwise(sizes)]
        for layer in layers[:3]:
            layer[0].stride = (2, 2)  # type: ignore[assignment]
        self.until_layer3 = nn.Sequential(*layers[:3])
        self.layer4 = nn.Sequential(layers[3], convolution_norm(CHANNELS[1], CHANNELS[1], 3, "torch", "relu"))
        self.add_heads(head, num_classes, 0.1, "torch", dsn_channels=WIDTH, channels=WIDTH)
        if consistency:
            self.add_consistency(consistency)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [N, 32, H, W] and [N, 64, H, W] of images [N, 3, h, w]."""
        x = self.until_layer3(images / 64)
        return x, self.layer4(x)


def train(model: SmallNetwork, criterion: Criterion, data: CSDataSet, seed: int, steps: int) -> SmallNetwork:
    """Train a network on the crops of a data set, and return it in evaluation mode."""
    optimizer = make_optimizer("adamw", model.train(), LEARNING_RATE, 0.9, 1e-2, False)
    stepper = Stepper(model, criterion, optimizer, WORLD, StepOptions(seed=seed))
    for step, batch in enumerate(train_batches(data, seed, range(steps), WORLD, Loading(BATCH)), 1):
        if isinstance(batch, Exception):
            raise batch
        rate = poly_lr(LEARNING_RATE, step - 1, steps, 0.9) * warm_up(step - 1, WARMUP)
        set_learning_rate(optimizer, rate)
        stepper.step(step, batch)
    return model.eval()


def score(model: SmallNetwork, data: CSDataSet) -> float:
    """Return the mean IoU on a data set in percent, with each picture predicted whole."""
    result = evaluate(lambda images: predict_classes(model, images, [1.0], False), data, WORLD, Loading(1))
    return 100 * mean_iou(result.confusion)
