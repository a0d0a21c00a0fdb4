"""Criss-cross attention modules, as used in CCNet's head, and their forms for videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from cc_attention.ops import criss_cross_attention, in_transform, joins, joint_attention, to_channels_last
from cc_attention.reference import autocast_enabled, cast_for_autocast


def _operand(x: Tensor, channels: int, dim: int, module: str) -> Tensor:
    """Return x [N, channels, ...] of `dim` dimensions in channels_last; raise RuntimeError otherwise."""
    if has_torch_function((x,)):
        return handle_torch_function(_operand, (x,), x, channels, dim, module)
    if x.dim() != dim or x.shape[1] != channels:
        sizes = "H, W" if dim == 4 else "T, H, W"
        raise RuntimeError(f"{module}: x must be [N, {channels}, {sizes}], got shape {list(x.shape)}")
    return to_channels_last(x)


class _Attention(nn.Module):
    """The layers and the computation that the modules share."""

    convolution: type[nn.Conv2d] | type[nn.Conv3d]
    dim: int  # of the maps

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        if in_dim < 8:
            raise ValueError(
                f"{type(self).__name__} needs in_dim >= 8 (query and key get in_dim // 8), got {in_dim}"
            )
        self.query_conv = self.convolution(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = self.convolution(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = self.convolution(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attend(self, x: Tensor) -> Tensor:
        """Apply the attention once to x [N, in_dim, ...]."""
        # Convert once for all three convolutions; a no-op if the network runs in channels_last.
        x = _operand(x, self.in_dim, self.dim, type(self).__name__)
        layers = (self.query_conv, self.key_conv, self.value_conv)
        if not (joins(x) and self._are_as_made(layers)):
            # torch.vmap does not let autocast cast the weights for an input that is cast already.
            plain = x.to(self.gamma.dtype) if in_transform() and autocast_enabled(x) else x
            query, key, value = (self.project(layer, plain) for layer in layers)
            return criss_cross_attention(query, key, value, residual=x, gamma=self.gamma)
        # One convolution reads x once, and its gradient is one map.
        parameters = [getattr(layer, name) for name in ("weight", "bias") for layer in layers]
        if autocast_enabled(x):
            x, *parameters = cast_for_autocast(x, *parameters)
        convolution = F.conv2d if self.convolution is nn.Conv2d else F.conv3d
        weight, bias = torch.cat(parameters[:3]), torch.cat(parameters[3:])
        projection = self.project(lambda maps: convolution(maps, weight, bias), x)
        return joint_attention(projection, self.in_dim // 8, x, self.gamma)

    def project(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply the layer of query, key or value, a 1x1 convolution, to the map x [N, in_dim, ...]."""
        return layer(x)

    def _are_as_made(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether nothing has replaced or wrapped the layers: then their weights suffice."""
        # A private function of PyTorch: where it is missing, the layers are called.
        if getattr(nn.modules.module, "_has_any_global_hook", lambda: True)():
            return False
        channels = (self.in_dim // 8, self.in_dim // 8, self.in_dim)
        sides = 2 if self.convolution is nn.Conv2d else 3
        ones, zeros = (1,) * sides, (0,) * sides
        for layer, expected in zip(layers, channels, strict=True):
            hooks = (
                layer._forward_hooks,
                layer._forward_pre_hooks,
                layer._backward_hooks,
                layer._backward_pre_hooks,
            )
            if type(layer) is not self.convolution or any(hooks) or "forward" in vars(layer):
                return False
            shape = (layer.in_channels, layer.out_channels, layer.groups, layer.padding_mode)
            geometry = (layer.kernel_size, layer.stride, layer.dilation, layer.padding)
            if shape != (self.in_dim, expected, 1, "zeros") or geometry != (ones, ones, ones, zeros):
                return False
            if layer.bias is None:
                return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention.

        Args:
            x: [N, in_dim, H, W] or, for the 3-D form, [N, in_dim, T, H, W].

        Returns:
            Map in the shape of x, channels_last. In an autocast region, it has the dtype of the region,
            unless x is float64.

        Raises:
            RuntimeError: x has another shape.
        """
        return self.attend(x)


class _RecurrentAttention(_Attention):
    """A module that applies the attention `recurrence` times."""

    def __init__(self, in_dim: int, recurrence: int) -> None:
        if recurrence < 0:
            raise ValueError(f"recurrence must be 0 or more, got {recurrence}")
        super().__init__(in_dim)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention `recurrence` times.

        Args:
            x: [N, in_dim, H, W] or, for the 3-D form, [N, in_dim, T, H, W].

        Returns:
            Map in the shape of x, channels_last; x itself if recurrence is 0. In an autocast region, it has
            the dtype of the region, unless x is float64.

        Raises:
            RuntimeError: x has another shape.
        """
        for _ in range(self.recurrence):
            x = self.attend(x)
        return x


class CrissCrossAttention(_Attention):
    """Criss-cross attention with 1x1 convolutions for query, key and value, and a residual connection.

    The module computes ``x + gamma * criss_cross_attention(query_conv(x), key_conv(x), value_conv(x))``.
    gamma is learned and starts at 0, so a new module is the identity.

    Source: CCNet, arXiv 1811.11721, eq. 1-2. Parameters are named as in cc_attention/functions.py of the
    original CCNet repository.

    Args:
        in_dim: number of input channels, at least 8; query and key have in_dim // 8 channels.

    Raises:
        ValueError: in_dim is below 8, so query and key would have no channels.
    """

    convolution = nn.Conv2d
    dim = 4


class RecurrentCrissCrossAttention(_RecurrentAttention, CrissCrossAttention):
    """Recurrent criss-cross attention (RCCA): CrissCrossAttention applied repeatedly with shared weights.

    With recurrence 2, every pixel receives information from every other pixel. The information passes through
    the two pixels where the row of one crosses the column of the other.

    Source: CCNet, arXiv 1811.11721, section 3.3, without the convolutions around the attention.

    Args:
        in_dim: number of input channels, at least 8.
        recurrence: number of applications, R in the paper; 0 is the identity.

    Raises:
        ValueError: in_dim is below 8, or recurrence is negative.
    """

    def __init__(self, in_dim: int, recurrence: int = 2) -> None:
        super().__init__(in_dim, recurrence)


class CrissCrossAttention3d(_Attention):
    """Criss-cross attention of a video: `CrissCrossAttention` over [N, in_dim, T, H, W].

    Each pixel attends to its row and its column in its frame, and to the same place in all frames.

    Source: CCNet, arXiv 1811.11721v2 (TPAMI), section on 3-D criss-cross attention. The authors have not
    released code for it.

    Args:
        in_dim: number of input channels, at least 8; query and key have in_dim // 8 channels.

    Raises:
        ValueError: in_dim is below 8.
    """

    convolution = nn.Conv3d
    dim = 5


class RecurrentCrissCrossAttention3d(_RecurrentAttention, CrissCrossAttention3d):
    """CrissCrossAttention3d applied repeatedly with shared weights.

    With recurrence 3, every pixel receives information from every other pixel of the video. With recurrence
    2, it receives none from pixels that differ in frame, row and column.

    Args:
        in_dim: number of input channels, at least 8.
        recurrence: number of applications; 0 is the identity.

    Raises:
        ValueError: in_dim is below 8, or recurrence is negative.
    """

    def __init__(self, in_dim: int, recurrence: int = 3) -> None:
        super().__init__(in_dim, recurrence)
