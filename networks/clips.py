"""Clips: pictures whose channels are those of several consecutive frames of a video.

A clip of T frames, T odd, is a tensor [N, 3 * T, h, w] with the channels of the first frame first. The labels
are those of the middle frame. So everything between the files and the network (augmentation, transfer,
memory format, tiles, scales, mirroring) treats a clip like a picture, and all frames alike.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

#: Channels of a frame.
CHANNELS = 3


def middle_frame(images: Tensor) -> Tensor:
    """Return the middle frames [..., 3, h, w] of clips [..., 3 * T, h, w]."""
    first = (images.shape[-3] // CHANNELS) // 2 * CHANNELS
    return images.narrow(-3, first, CHANNELS)


def features_of_clips(
    features: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a backbone to each frame of clips.

    Args:
        features: function from images [N, 3, h, w] to the outputs of layer3 and layer4, each [N, C, H, W].
        images: [N, 3 * T, h, w].

    Returns:
        The output of layer3 for the middle frame, [N, C, H, W], which the auxiliary head needs, and that of
        layer4 for all frames, [N, T, C, H, W]. For T = 1, both are those of `features`.
    """
    number, frames = images.shape[0], images.shape[1] // CHANNELS
    if frames == 1:
        return features(images)
    layer3, layer4 = features(images.unflatten(1, (frames, CHANNELS)).flatten(0, 1))
    return layer3.unflatten(0, (number, frames))[:, frames // 2], layer4.unflatten(0, (number, frames))
