"""Folding of activated batch norm into convolutions, for inference."""

from __future__ import annotations

import copy

import torch
from torch import nn

from networks.abn import ABN
from networks.ccnet import Seg_Model
from networks.convert import convolution_before

#: Modules that compute the activations of ABN. They overwrite the output of the convolution.
ACTIVATIONS = {
    "identity": nn.Identity,
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(ABN.slope, inplace=True),
}


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a network for inference, with activated batch norm folded into the convolutions.

    The copy gives the same logits up to rounding: conv(x) becomes the normalized value directly, and the
    activation remains. The auxiliary head of CCNet is left out, so the copy returns [logits]. Its state dict
    has other entries than a checkpoint.

    Args:
        model: network whose modules are named as in CCNet: bn1 follows conv1, and an ABN in a sequence
            follows its convolution. It is not changed.

    Returns:
        The copy, in evaluation mode.
    """
    if isinstance(model, Seg_Model):
        dsn, model.dsn = model.dsn, None  # not copied
        try:
            folded = copy.deepcopy(model)
        finally:
            model.dsn = dsn
    else:
        folded = copy.deepcopy(model)
    folded.eval()
    for name, norm in list(folded.named_modules()):
        if not isinstance(norm, ABN):
            continue
        convolution = folded.get_submodule(convolution_before(name))
        if not isinstance(convolution, nn.Conv2d) or len(norm.weight) != convolution.out_channels:
            continue
        scale = (norm.weight.double().abs() + norm.eps) / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() - norm.running_mean.double() * scale
        if convolution.bias is not None:
            bias += convolution.bias.double() * scale
        weight = convolution.weight
        convolution.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        weight.copy_(weight.double() * scale.view(-1, 1, 1, 1))
        folded.set_submodule(name, ACTIVATIONS[norm.activation]())
    return folded
