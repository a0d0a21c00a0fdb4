"""Folding of activated batch norm into convolutions, for inference."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from networks.abn import ABN, Activation
from networks.base import Network

NetworkT = TypeVar("NetworkT", bound=nn.Module)


@torch.no_grad()
def fold_batch_norm(model: NetworkT) -> NetworkT:
    """Return a copy of a network for inference, with each activated batch norm folded into its convolution.

    The activations remain. The logits are the same up to rounding. The auxiliary head is left out: the copy
    returns [logits]. Its state dict has other entries than a checkpoint, so do not save it as one.

    Args:
        model: a `Network`, or another one in which an `ABN` that directly follows a convolution in the order
            of the submodules is applied to its output, which nothing else reads. Other ABNs are kept. The
            network is not changed.

    Returns:
        The copy, in evaluation mode.
    """
    folded = copy.deepcopy(model)
    if isinstance(folded, Network):
        folded.dsn = None
    _fold(folded)
    return folded.eval()


def _fold(module: nn.Module) -> None:
    """Fold each ABN below `module`, in place."""
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, ABN) and isinstance(before, nn.Conv2d) and _fits(before, child):
            before.weight, before.bias = _fused(before, child)
            setattr(module, name, Activation(child.activation, child.slope))
        else:
            _fold(child)
        before = child


def _fits(convolution: nn.Conv2d, norm: ABN) -> bool:
    return convolution.out_channels == len(norm.weight)


def _fused(convolution: nn.Conv2d, norm: ABN) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight and bias of the folded convolution, computed in float64."""
    mean, variance, weight, bias = (
        t.double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    own = None if convolution.bias is None else convolution.bias.double()
    fused = fuse_conv_bn_weights(
        convolution.weight.double(), own, mean, variance, norm.eps, weight.abs() + norm.eps, bias
    )
    dtype = convolution.weight.dtype
    return nn.Parameter(fused[0].to(dtype)), nn.Parameter(fused[1].to(dtype))
