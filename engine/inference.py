"""Prediction of whole pictures, by overlapping tiles, and at several scales.

Two terms of this module:

- Line: a row of a picture that is at least as high as wide, or a column of a picture that is wider than high.
- Band: several consecutive lines.

Logits are computed band by band, so that predicting the classes of a picture needs no memory for the logits
of the whole picture. The logits of a picture are the concatenation of its bands.

The commands use `predict_classes`. The functions that return logits, `predict_whole`, `predict_sliding` and
`predict_multiscale`, are public: they are for other programs.

Source: evaluate.py of the original CCNet repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fused

Model = Callable[[Tensor], Tensor | Sequence[Tensor]]

OVERLAP = 1 / 3
#: Lines per band for whole-image prediction; with tiles, a band is as long as a tile.
WHOLE_BAND = 256
#: Predicted class of a pixel for which the network returns a NaN logit; no class has this index.
NO_CLASS = 255
NAN_ADVICE = "its weights are finite but overflow float32; check the checkpoint"


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize [N, C, h, w] to [N, C, *size], bilinear with aligned corners."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def tile_offsets(size: int, tile: int, stride: int) -> list[int]:
    """Return the offsets of the tiles along one axis.

    Tiles are `stride` apart. The last tile is moved back so that it ends at the border.
    """
    if size <= tile:
        return [0]
    number = math.ceil((size - tile) / stride) + 1
    return [min(index * stride, size - tile) for index in range(number)]


def predict_whole(model: Model, image: Tensor) -> Tensor:
    """Predict the logits of whole images.

    Args:
        model: network that maps [N, 3, h, w] to logits [N, C, any, any], or to a sequence whose first entry
            is the logits.
        image: images [N, 3, h, w].

    Returns:
        Logits [N, C, h, w] on the device of the image, in the dtype of the image or float32, whichever is
        more precise.
    """
    return resize(_network(model, image), image.shape[2:])


def predict_sliding(
    model: Model, image: Tensor, tile_size: tuple[int, int], num_classes: int, tile_batch: int = 1
) -> Tensor:
    """Predict the logits of images, averaged over overlapping tiles.

    As in the original CCNet repository, the stride of both axes is ceil(tile height * 2/3). Horizontally, the
    stride is at most the width of a tile. Images smaller than a tile are padded with zeros at the bottom and
    right.

    Args:
        model: see `predict_whole`.
        image: images [N, 3, h, w].
        tile_size: (height, width) of a tile.
        num_classes: number of classes, C.
        tile_batch: number of tiles, of all images together, to predict at once. The number does not change
            the order in which tiles are summed.

    Returns:
        Logits [N, C, h, w], with dtype and device as in `predict_whole`. The prediction needs memory for
        twice the logits.

    Raises:
        ValueError: `tile_batch` is less than 1.
    """
    logits = _tiled(model, _picture(image), tile_size, num_classes, tile_batch)
    return _join(logits, tile_size, lambda band: band)


def predict_multiscale(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool | Sequence[int],
    tile_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    tile_batch: int = 1,
) -> Tensor:
    """Predict the logits of images, averaged over scales and, optionally, mirror images.

    Args:
        model: see `predict_whole`.
        image: images [N, 3, h, w].
        scales: factors of height and width. Each prediction is resized back before averaging.
        flip: whether to predict also the image mirrored left to right. The prediction of the mirrored image
            is mirrored back before averaging. If left and right parts are classes, give the class that each
            class has in a mirrored image instead of True.
        tile_size: (height, width) of the tiles; None predicts whole images.
        num_classes: number of classes, C; required with `tile_size`.
        tile_batch: see `predict_sliding`.

    Returns:
        Logits [N, C, h, w], with dtype and device as in `predict_whole`. The prediction needs memory for
        twice the logits, in addition to the memory that `predict_classes` needs.

    Raises:
        ValueError: `scales` is empty, `num_classes` is missing with tiles, or `tile_batch` is less than 1.
    """
    logits = _multiscale(model, image, scales, flip, tile_size, num_classes, tile_batch)
    return _join(logits, tile_size, lambda band: band)


def predict_classes(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool | Sequence[int],
    tile_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    tile_batch: int = 1,
) -> Tensor:
    """Predict the class with the largest logit of `predict_multiscale`, without storing all logits.

    Memory, in addition to the image, the result and the activations of the network:

    - O(N * C * b * s * max(1, scale) ** 2) for the logits of a band. Here b is the extent of a tile along the
      longer axis of the image, s is the shorter side of the image, and scale is the largest scale.
    - For each combination of scale and flip, the outputs of the network, at their own size. The outputs are
      kept for the tiles that overlap a band, and for up to `tile_batch` * N further tiles before and after
      it.

    Without tiles, b is 256 (WHOLE_BAND), and the outputs are those of the whole images.

    If each image is predicted once, at its own size, whole or as one tile, the fused operator
    (`fused.active`) computes the classes without the logits of a band. Where the two largest logits differ
    by no more than rounding, the class may then be the other one of the two.

    Args:
        model: see `predict_whole`.
        image: images [N, 3, h, w].
        scales: see `predict_multiscale`.
        flip: see `predict_multiscale`.
        tile_size: see `predict_multiscale`.
        num_classes: see `predict_multiscale`; at most 255.
        tile_batch: see `predict_sliding`.

    Returns:
        Classes, uint8 [N, h, w]. Ties give the lowest class index; pixels with a NaN logit give NO_CLASS.

    Raises:
        ValueError: see `predict_multiscale`.
    """
    if _predicted_once(image, scales, flip, tile_size, num_classes, tile_batch):
        return _classes_of_outputs(model, image, tile_size, tile_batch)
    logits = _multiscale(model, image, scales, flip, tile_size, num_classes, tile_batch)
    return _join(logits, tile_size, _classes).squeeze(1)


def predict_confidence(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool | Sequence[int],
    tile_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    tile_batch: int = 1,
) -> tuple[Tensor, Tensor]:
    """Predict the classes as `predict_classes` does, and their confidences, without the fused operator.

    The confidence is the softmax probability of the class, computed from the averaged logits
    (`predict_multiscale`). The arguments are those of `predict_classes`.

    Returns:
        Classes, uint8 [N, h, w], and confidences from 0 to 1 [N, h, w], NaN where a logit is NaN or the
        largest one is infinite.

    Raises:
        ValueError: see `predict_multiscale`.
    """
    logits = _multiscale(model, image, scales, flip, tile_size, num_classes, tile_batch)
    # Class indices up to 255 are exact in the dtype of the logits.
    classes, confidence = _join(logits, tile_size, _confident_classes).unbind(1)
    return classes.to(torch.uint8), confidence


def _confident_classes(logits: Tensor) -> Tensor:
    """Return classes and confidences: [N, C, h, w] -> [N, 2, h, w] in the dtype of the logits."""
    greatest = logits.amax(1, keepdim=True)
    confidence = (logits - greatest).exp_().sum(1, keepdim=True).reciprocal_()
    return torch.cat([_classes(logits).to(logits.dtype), confidence], 1)


def _predicted_once(
    image: Tensor,
    scales: Sequence[float],
    flip: bool | Sequence[int],
    tile_size: tuple[int, int] | None,
    num_classes: int | None,
    tile_batch: int,
) -> bool:
    """Return whether the fused operator can compute the classes: one prediction per image, at its size.

    Wrong arguments also give False: `_multiscale` raises their errors.
    """
    size = tuple(image.shape[2:])
    if not fused.applies(image) or flip or [_scaled(size, scale) for scale in scales] != [size]:
        return False
    if tile_size is None:
        return True
    valid = num_classes is not None and tile_batch >= 1
    return valid and size[0] <= tile_size[0] and size[1] <= tile_size[1]


def _classes_of_outputs(
    model: Model, image: Tensor, tile_size: tuple[int, int] | None, tile_batch: int
) -> Tensor:
    """Return the classes of images that the network predicts whole, or as one tile each."""
    height, width = image.shape[2:]
    if tile_size is None:
        return fused.upsampled_classes(_network(model, image), (height, width))
    logits = _network_in_batches(model, _padded(image, tile_size), tile_batch)
    return fused.upsampled_classes(logits, tile_size)[:, :height, :width].contiguous()


def _classes(logits: Tensor) -> Tensor:
    """Return the class with the largest logit, or NO_CLASS where a logit is NaN.

    Shape: [N, C, h, w] -> uint8 [N, 1, h, w].
    """
    greatest, classes = logits.max(1, keepdim=True)
    return classes.to(torch.uint8).masked_fill_(greatest.isnan(), NO_CLASS)


class _Lines(NamedTuple):
    """Pictures or logits [N, C, h, w] that are computed lazily, in bands of lines.

    Attributes:
        axis: axis of the lines, 2 (rows) or 3 (columns).
        size: (h, w).
        read: function of (start, stop) that returns lines start to stop - 1, at least one. The shape is
            [N, C, stop - start, w] for axis 2, and [N, C, h, stop - start] for axis 3. Bands must be read in
            order, from either end.
    """

    axis: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]

    @property
    def length(self) -> int:
        """Number of lines."""
        return self.size[self.axis - 2]


def _join(lines: _Lines, tile_size: tuple[int, int] | None, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Read all lines in bands, apply `finish` to each band once it is read, and concatenate the results."""
    band = tile_size[lines.axis - 2] if tile_size else WHOLE_BAND
    starts = range(0, lines.length, band)
    bands = [finish(lines.read(start, min(start + band, lines.length))) for start in starts]
    return torch.cat(bands, lines.axis)


def _multiscale(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool | Sequence[int],
    tile_size: tuple[int, int] | None,
    num_classes: int | None,
    tile_batch: int,
) -> _Lines:
    if not scales:
        raise ValueError("scales: give at least one")
    if tile_size is None:
        predict: Callable[[_Lines], _Lines] = partial(_whole, model)
    elif num_classes is None:
        raise ValueError("num_classes: required for prediction by tiles")
    else:
        predict = partial(_tiled, model, tile_size=tile_size, num_classes=num_classes, tile_batch=tile_batch)

    picture = _picture(image)
    predictions = []
    for scale in scales:
        scaled = _resized(picture, _scaled(picture.size, scale))
        logits = predict(scaled)
        if flip:
            classes = None if flip is True else flip
            logits = _mean([logits, _mirrored(predict(_mirrored(scaled)), classes)])
        predictions.append(_resized(logits, picture.size))
    return _mean(predictions)


def _scaled(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Return the height and width of an image at a scale."""
    height, width = size
    return max(1, round(height * scale)), max(1, round(width * scale))


def _network(model: Model, image: Tensor) -> Tensor:
    """Return the logits of the network at their own size, converted to the accumulation dtype.

    The accumulation dtype is the dtype of the image or float32, whichever is more precise.
    """
    outputs = model(image)
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    return logits.to(image.device, torch.promote_types(image.dtype, torch.float32))


def _network_in_batches(model: Model, tiles: Tensor, tile_batch: int) -> Tensor:
    """Return the logits of all tiles, at most `tile_batch` of which are predicted at once."""
    return torch.cat([_network(model, part) for part in tiles.split(tile_batch)])


def _padded(image: Tensor, tile_size: tuple[int, int]) -> Tensor:
    """Pad with zeros at the bottom and right to the size of a tile."""
    return F.pad(image, (0, tile_size[1] - image.shape[3], 0, tile_size[0] - image.shape[2]))


def _picture(x: Tensor, axis: int | None = None) -> _Lines:
    """Return a tensor [N, C, h, w] as lines, numbered along `axis` or, by default, along its longer axis."""
    height, width = x.shape[2:]
    axis = axis or (2 if height >= width else 3)
    return _Lines(axis, (height, width), lambda start, stop: x.narrow(axis, start, stop - start))


def _whole(model: Model, image: _Lines) -> _Lines:
    logits = _network(model, image.read(0, image.length))
    return _resized(_picture(logits, image.axis), image.size)


def _tiled(
    model: Model, image: _Lines, tile_size: tuple[int, int], num_classes: int, tile_batch: int
) -> _Lines:
    if tile_batch < 1:
        raise ValueError(f"tile_batch: must be at least 1, not {tile_batch}")
    # In floating point, as in the original CCNet repository: a height of 129 gives 87, where exact arithmetic
    # gives 86.
    stride = math.ceil(tile_size[0] * (1 - OVERLAP))
    tops = tile_offsets(image.size[0], tile_size[0], stride)
    lefts = tile_offsets(image.size[1], tile_size[1], min(stride, tile_size[1]))
    places = [(top, left) for top in tops for left in lefts]
    along, across = image.axis - 2, 3 - image.axis  # indices into a place or a size
    tile_lines = tile_size[along]

    # Tiles are predicted in the order in which bands need them. They are summed row by row for either axis.
    ordered = sorted(places, key=lambda place: place[along])
    groups = [ordered[first : first + tile_batch] for first in range(0, len(ordered), tile_batch)]
    outputs: dict[tuple[int, int], Tensor] = {}

    def covered(x: Tensor, place: tuple[int, int]) -> Tensor:
        """Return the part of each line of `x` that a tile covers."""
        return x.narrow(across + 2, place[across], min(tile_size[across], image.size[across] - place[across]))

    def crop(place: tuple[int, int]) -> Tensor:
        tile = covered(image.read(place[along], min(place[along] + tile_lines, image.length)), place)
        return _padded(tile, tile_size)

    def run(group: list[tuple[int, int]]) -> None:
        # `tile_batch` places of N images fill N calls, so that only the last call of all may be smaller.
        tiles = torch.cat([crop(place) for place in group])
        logits = _network_in_batches(model, tiles, tile_batch)
        outputs.update(zip(group, logits.chunk(len(group)), strict=True))

    def read(start: int, stop: int) -> Tensor:
        def needed(place: tuple[int, int]) -> bool:
            return place[along] < stop and place[along] + tile_lines > start

        # Bands are read in order: outputs that this band does not need are never needed again, and no tile
        # is predicted twice.
        for group in groups:
            if not any(map(needed, group)):
                for place in group:
                    outputs.pop(place, None)
            elif group[0] not in outputs:
                run(group)

        size = list(image.size)
        size[along] = stop - start
        like = next(iter(outputs.values()))
        total = like.new_zeros(like.shape[0], num_classes, *size)
        visits = like.new_zeros(1, 1, *size)
        for place in filter(needed, places):
            first, last = max(place[along], start), min(place[along] + tile_lines, stop)
            logits = resize(outputs[place], tile_size).narrow(image.axis, first - place[along], last - first)
            window = covered(total.narrow(image.axis, first - start, last - first), place)
            window += logits.narrow(across + 2, 0, window.shape[across + 2])
            covered(visits.narrow(image.axis, first - start, last - first), place).add_(1)
        return total.div_(visits)

    return _Lines(image.axis, image.size, read)


def _resized(lines: _Lines, size: tuple[int, int]) -> _Lines:
    """Resize lines lazily. Reading all lines gives the result of `resize`, up to rounding."""
    if lines.size == size:
        return lines
    axis, last, last_target = lines.axis, lines.length - 1, size[lines.axis - 2] - 1
    step = last / last_target if last_target else 0.0

    def read(start: int, stop: int) -> Tensor:
        # Along the axis, each line is interpolated between two adjacent lines of the source.
        position = torch.arange(start, stop, dtype=torch.float64) * step
        lower = position.long().clamp(max=last)
        upper = (lower + 1).clamp(max=last)
        first = int(lower[0])
        source = lines.read(first, int(upper[-1]) + 1)
        band = source.to(torch.promote_types(source.dtype, torch.float32))
        band = resize(band, (band.shape[2], size[1]) if axis == 2 else (size[0], band.shape[3]))
        weight = (position - lower).to(band).view((-1, 1) if axis == 2 else (-1,))
        before, after = (band.index_select(axis, (index - first).to(band.device)) for index in (lower, upper))
        return before.lerp(after, weight).to(source.dtype)

    return _Lines(axis, size, read)


def _mirrored(lines: _Lines, channels: Sequence[int] | None = None) -> _Lines:
    """Mirror lines left to right. Lines that are columns are read from the other end.

    Args:
        lines: lines of an image or of logits.
        channels: channel from which each channel of the result is taken; None for the same.
    """

    def read(start: int, stop: int) -> Tensor:
        if lines.axis == 3:
            start, stop = lines.length - stop, lines.length - start
        flipped = lines.read(start, stop).flip(-1)
        return flipped if channels is None else flipped[:, channels]

    return lines._replace(read=read)


def _mean(several: list[_Lines]) -> _Lines:
    if len(several) == 1:
        return several[0]

    def read(start: int, stop: int) -> Tensor:
        return reduce(torch.add, (lines.read(start, stop) for lines in several)) / len(several)

    return several[0]._replace(read=read)
