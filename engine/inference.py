"""Prediction of pictures: in one piece, by overlapping tiles, at several scales (original: evaluate.py).

Everything is computed in bands of lines, so that the classes of a picture of any size need the logits of a
band alone. Lines are rows where the picture is at least as high as wide, else columns. All logits of a
picture are its bands joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor], Tensor | Sequence[Tensor]]

OVERLAP = 1 / 3
#: Lines of a band where no tile gives its length.
WHOLE_BAND = 256
#: In place of a class where the network gives NaN; no class has this number.
NO_CLASS = 255
NAN_ADVICE = "its finite weights overflow float32, so check the checkpoint"


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners aligned: [N, C, h, w] -> [N, C, *size]."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def tile_offsets(size: int, tile: int, stride: int) -> list[int]:
    """Where the tiles of one axis begin: `stride` apart, the last one moved back to the border."""
    if size <= tile:
        return [0]
    number = math.ceil((size - tile) / stride) + 1
    return [min(index * stride, size - tile) for index in range(number)]


def predict_whole(model: Model, image: Tensor) -> Tensor:
    """Logits of whole images.

    Args:
        model: [N, 3, h, w] -> logits [N, C, any, any], or a sequence whose first entry they are.
        image: [N, 3, h, w].

    Returns:
        logits [N, C, h, w], in the image's dtype or float32, whichever is more precise, on its device.
    """
    return resize(_network(model, image), image.shape[2:])


def predict_sliding(
    model: Model, image: Tensor, tile_size: tuple[int, int], num_classes: int, tile_batch: int = 1
) -> Tensor:
    """Logits of images, averaged over overlapping tiles.

    Both axes advance by ceil(tile height * 2/3), as the original's, but never by more than the tile is wide.
    Images smaller than the tile are padded with zeros at the bottom and right. Every image of a batch is
    scored by its own logits.

    Args:
        model: see `predict_whole`.
        image: [N, 3, h, w].
        tile_size: (height, width).
        num_classes: C.
        tile_batch: how many tiles, of all images together, go through the network at once. Tiles are summed
            in the same order whatever it is.

    Returns:
        logits [N, C, h, w], dtype and device as of `predict_whole`. Memory: twice that.

    Raises:
        ValueError: a `tile_batch` below 1.
    """
    logits = _tiled(model, _picture(image), tile_size, num_classes, tile_batch)
    return _join(logits, tile_size, lambda band: band)


def predict_multiscale(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    tile_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    tile_batch: int = 1,
) -> Tensor:
    """Logits averaged over resized images, and over their mirror images too.

    Args:
        model: see `predict_whole`.
        image: [N, 3, h, w].
        scales: factors of height and width; each prediction is resized back before it is averaged.
        flip: average with the mirrored (left to right) prediction of the mirrored image.
        tile_size: predict by tiles of this (height, width); None in one piece.
        num_classes: C, needed with `tile_size`.
        tile_batch: see `predict_sliding`.

    Returns:
        logits [N, C, h, w], dtype and device as of `predict_whole`. Memory: twice that, and what
        `predict_classes` needs.

    Raises:
        ValueError: no scale, tiles without `num_classes`, or a `tile_batch` below 1.
    """
    logits = _multiscale(model, image, scales, flip, tile_size, num_classes, tile_batch)
    return _join(logits, tile_size, lambda band: band)


def predict_classes(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    tile_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    tile_batch: int = 1,
) -> Tensor:
    """The class of the greatest logit of `predict_multiscale`, without ever holding all logits.

    Memory besides image, result and what the network takes while it runs: a few times N * C * tile * shorter
    side, where `tile` is the tile's extent along the longer axis, times scale ** 2 above scale 1; and for
    each pair of scale and flip the network's outputs, at their own size, for the tiles that meet a band and
    up to `tile_batch` * N to either side. In one piece: 256 lines in place of `tile`, and the whole outputs.

    Args:
        model: see `predict_whole`.
        image: [N, 3, h, w].
        scales, flip, tile_size, num_classes, tile_batch: see `predict_multiscale`; at most 255 classes.

    Returns:
        classes uint8 [N, h, w]; of equal logits the lowest class, NO_CLASS where a logit is NaN.

    Raises:
        ValueError: as `predict_multiscale`.
    """
    logits = _multiscale(model, image, scales, flip, tile_size, num_classes, tile_batch)
    return _join(logits, tile_size, _classes).squeeze(1)


def _classes(logits: Tensor) -> Tensor:
    """Return the class of the greatest logit, NO_CLASS where one is NaN.

    Shape: [N, C, h, w] -> uint8 [N, 1, h, w].
    """
    greatest, classes = logits.max(1, keepdim=True)
    return classes.to(torch.uint8).masked_fill_(greatest.isnan(), NO_CLASS)


class _Lines(NamedTuple):
    """Pictures or logits [N, C, h, w] that are computed when they are read, in bands of lines.

    `read(start, stop)` gives lines start..stop of `axis`, at least one: [N, C, stop - start, w] for axis 2,
    [N, C, h, stop - start] for axis 3. Bands are read one after the other, from the near or the far end.
    """

    axis: int
    size: tuple[int, int]
    read: Callable[[int, int], Tensor]

    @property
    def length(self) -> int:
        return self.size[self.axis - 2]


def _join(lines: _Lines, tile_size: tuple[int, int] | None, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """All lines, each band passed through `finish` as soon as it is read."""
    band = tile_size[lines.axis - 2] if tile_size else WHOLE_BAND
    starts = range(0, lines.length, band)
    bands = [finish(lines.read(start, min(start + band, lines.length))) for start in starts]
    return torch.cat(bands, lines.axis)


def _multiscale(
    model: Model,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
    tile_size: tuple[int, int] | None,
    num_classes: int | None,
    tile_batch: int,
) -> _Lines:
    if not scales:
        raise ValueError("scales: give at least one")
    if tile_size is None:
        predict: Callable[[_Lines], _Lines] = partial(_whole, model)
    elif num_classes is None:
        raise ValueError("num_classes: prediction by tiles needs it")
    else:
        predict = partial(_tiled, model, tile_size=tile_size, num_classes=num_classes, tile_batch=tile_batch)

    picture = _picture(image)
    height, width = picture.size
    predictions = []
    for scale in scales:
        scaled = _resized(picture, (max(1, round(height * scale)), max(1, round(width * scale))))
        logits = predict(scaled)
        if flip:
            logits = _mean([logits, _mirrored(predict(_mirrored(scaled)))])
        predictions.append(_resized(logits, picture.size))
    return _mean(predictions)


def _network(model: Model, image: Tensor) -> Tensor:
    """The network's logits at their own size, in the precision in which they are summed."""
    outputs = model(image)
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    return logits.to(image.device, torch.promote_types(image.dtype, torch.float32))


def _picture(x: Tensor, axis: int | None = None) -> _Lines:
    """Lines of a tensor [N, C, h, w], along its longer axis where none is given."""
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
    # In floating point, as the original: 129 gives 87, exact thirds would give 86.
    stride = math.ceil(tile_size[0] * (1 - OVERLAP))
    tops = tile_offsets(image.size[0], tile_size[0], stride)
    lefts = tile_offsets(image.size[1], tile_size[1], min(stride, tile_size[1]))
    places = [(top, left) for top in tops for left in lefts]
    along, across = image.axis - 2, 3 - image.axis  # indices of a place, a size
    tile_lines = tile_size[along]

    # The network gets tiles in the order in which bands need them; they are summed row by row on either axis.
    ordered = sorted(places, key=lambda place: place[along])
    groups = [ordered[first : first + tile_batch] for first in range(0, len(ordered), tile_batch)]
    outputs: dict[tuple[int, int], Tensor] = {}

    def covered(x: Tensor, place: tuple[int, int]) -> Tensor:
        """What a tile covers of the lines `x`, across them."""
        return x.narrow(across + 2, place[across], min(tile_size[across], image.size[across] - place[across]))

    def crop(place: tuple[int, int]) -> Tensor:
        tile = covered(image.read(place[along], min(place[along] + tile_lines, image.length)), place)
        return F.pad(tile, (0, tile_size[1] - tile.shape[3], 0, tile_size[0] - tile.shape[2]))

    def run(group: list[tuple[int, int]]) -> None:
        # As many places of N images fill N calls, so that only the very last call may be smaller.
        tiles = torch.cat([crop(place) for place in group])
        logits = torch.cat([_network(model, part) for part in tiles.split(tile_batch)])
        outputs.update(zip(group, logits.chunk(len(group)), strict=True))

    def read(start: int, stop: int) -> Tensor:
        def needed(place: tuple[int, int]) -> bool:
            return place[along] < stop and place[along] + tile_lines > start

        # Bands go one way: what this one does not need is done with, and no tile is predicted twice.
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
    """As `resize`, a band at a time."""
    if lines.size == size:
        return lines
    axis, last, last_target = lines.axis, lines.length - 1, size[lines.axis - 2] - 1
    step = last / last_target if last_target else 0.0

    def read(start: int, stop: int) -> Tensor:
        # Along the axis each line is mixed from the two lines of the source around it.
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


def _mirrored(lines: _Lines) -> _Lines:
    """Left to right; columns are read from the other end."""

    def read(start: int, stop: int) -> Tensor:
        if lines.axis == 3:
            start, stop = lines.length - stop, lines.length - start
        return lines.read(start, stop).flip(-1)

    return lines._replace(read=read)


def _mean(several: list[_Lines]) -> _Lines:
    if len(several) == 1:
        return several[0]

    def read(start: int, stop: int) -> Tensor:
        return reduce(torch.add, (lines.read(start, stop) for lines in several)) / len(several)

    return several[0]._replace(read=read)
