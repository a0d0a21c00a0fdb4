"""Batches on the device: what data workers give in bytes becomes what the network wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """On the device: images float32 [n, 3, h, w], labels int64 [n, h, w], and one line for each sample."""

    images: Tensor
    labels: Tensor
    records: list[str]


class Samples(NamedTuple):
    """A batch as the workers make it: images uint8 [n, h, w, 3], labels uint8 [n, h, w].

    `contents` int64 [n, 3] says where in each the picture is (dataset.transforms.Content); the rest is
    padding, which is 0 after the mean is subtracted.
    """

    images: Tensor
    labels: Tensor
    contents: Tensor
    records: list[str]


def subtract_mean(
    images: Tensor, mean: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] minus `mean` float32 [3], on the device of both."""
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
    return planes.sub_(mean[:, None, None])


class Transfer:
    """Makes batches on the device of samples, one ahead of the step that takes it.

    On a GPU on a stream of its own: the copy and the subtraction run beside the step.
    """

    def __init__(self, mean: np.ndarray, device: torch.device, memory_format: torch.memory_format):
        self.device = device
        self.mean = torch.as_tensor(mean, dtype=torch.float32, device=device)
        self.memory_format = memory_format
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # for the mean

    def __call__(self, loaded: Iterator[Samples | Exception]) -> Iterator[Batch | Exception]:
        if self.stream is None:
            for samples in loaded:
                yield samples if isinstance(samples, Exception) else self._batch(samples)
            return
        ahead: Callable[[], Batch | Exception] | None = None
        for samples in loaded:
            # Before the step that is about to be taken: at its end the process waits for the device.
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
        """Begin to make a batch; what is returned gives it to the stream of the steps."""
        if isinstance(samples, Exception):
            return lambda: samples
        with torch.cuda.stream(stream):
            batch = self._batch(samples)
            made = stream.record_event()

        def finish() -> Batch:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            # Or their memory would be used again while the step still reads it.
            for tensor in (batch.images, batch.labels):
                tensor.record_stream(current)
            return batch

        return finish
