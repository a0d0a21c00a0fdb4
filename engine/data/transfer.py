"""Conversion of uint8 samples from the data workers to float batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch on the device.

    Attributes:
        images: float32 [n, 3, h, w], BGR minus mean.
        labels: train ids, int64 [n, h, w].
        records: a one-line description of each sample, for the log.
    """

    images: Tensor
    labels: Tensor
    records: list[str]


class Samples(NamedTuple):
    """A batch as the data workers return it.

    Attributes:
        images: uint8 [n, h, w, 3], BGR.
        labels: train ids, uint8 [n, h, w].
        contents: bounds (bottom, left, right) of the part ``[:bottom, left:right]`` of each crop that shows
            the image, int64 [n, 3] (dataset.transforms.Content). The other pixels are padding, which is set
            to 0 after the mean is subtracted.
        records: a one-line description of each sample, for the log.
    """

    images: Tensor
    labels: Tensor
    contents: Tensor
    records: list[str]


def subtract_mean(
    images: Tensor, mean: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Convert images to float, subtract the mean, and move the channels to dimension 1.

    Args:
        images: uint8 [n, h, w, 3].
        mean: float32 [3], on the device of the images.
        memory_format: memory format of the result.

    Returns:
        float32 [n, 3, h, w], on the same device.
    """
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
    return planes.sub_(mean[:, None, None])


class Transfer:
    """Move batches to the device, one batch ahead of the training step.

    On a GPU, a separate stream copies the batch and subtracts the mean, concurrently with the step.

    Args:
        mean: BGR mean to subtract, [3].
        device: device of the batches.
        memory_format: memory format of the images.
    """

    def __init__(self, mean: np.ndarray, device: torch.device, memory_format: torch.memory_format):
        self.device = device
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
        self.memory_format = memory_format
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # for the mean

    def __call__(self, loaded: Iterator[Samples | Exception]) -> Iterator[Batch | Exception]:
        """Yield each item of `loaded` as a batch on the device; errors are passed on unchanged."""
        if self.stream is None:
            for samples in loaded:
                yield samples if isinstance(samples, Exception) else self._batch(samples)
            return
        ahead: Callable[[], Batch | Exception] | None = None
        for samples in loaded:
            # Start this batch before yielding the previous one: a step ends by waiting for the device.
            following = self._begin(self.stream, samples)
            if ahead is not None:
                yield ahead()
            ahead = following
        if ahead is not None:
            yield ahead()

    def _batch(self, samples: Samples) -> Batch:
        images = samples.images.to(self.device, non_blocking=True)
        images = subtract_mean(images, self.mean, self.memory_format)
        for image, (bottom, left, right) in zip(images, samples.contents.tolist(), strict=True):
            image[:, bottom:] = 0
            image[:, :, :left] = 0
            image[:, :, right:] = 0
        return Batch(images, samples.labels.to(self.device, non_blocking=True).long(), samples.records)

    def _begin(
        self, stream: torch.cuda.Stream, samples: Samples | Exception
    ) -> Callable[[], Batch | Exception]:
        """Start to convert a batch.

        Returns:
            A function that makes the compute stream wait for the conversion, and returns the batch.
        """
        if isinstance(samples, Exception):
            return lambda: samples
        with torch.cuda.stream(stream):
            batch = self._batch(samples)
            converted = stream.record_event()

        def finish() -> Batch:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(converted)
            # Otherwise the allocator could reuse the memory of the tensors while the step still reads it.
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(current)
            return batch

        return finish


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy `tensor` to the host; return a function that waits for the copy and returns the copy."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event(blocking=True)
    there.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        there.synchronize()
        return copy

    return wait
