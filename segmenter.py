"""A trained network in Python: load a checkpoint, predict pictures, and look at the attention.

    from segmenter import Segmenter

    segmenter = Segmenter.load("snapshots/CS_scenes_60000.pth")
    prediction = segmenter.predict("street.jpg")  # .classes, .probabilities, .colors

The tools use this class too, so that their results are the same. docs/python.md has examples.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset import IMG_MEAN, clips
from dataset.classes import classes_of_checkpoint
from dataset.labels import NUM_CLASSES, ClassTable, LabelReader, choose_table
from dataset.pictures import decode_upright, load
from engine.acceleration import Speed, accelerate, autocast, choose_precision
from engine.data.transfer import subtract_mean
from engine.inference import NAN_ADVICE, NO_CLASS, predict_classes, predict_multiscale
from engine.runtime.distributed import choose_devices
from fused import using
from networks import Network, fold_batch_norm, load_weights, make_network
from networks.attention import AttentionGrid, grid_attention, has_attention, picture_attention
from networks.of_run import Description, OfRun, args_file, check_value, describe, of_flags
from networks.variants import options_of
from networks.weights import read_state_dict
from utils.drawing.palette import colored, make_palette
from utils.errors import RunError, UsageError
from utils.run_files import is_number

#: A picture: path, PIL image, uint8 RGB array [h, w, 3], or RGB tensor [3, h, w], uint8 or float in 0..1.
Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor
#: Size of the tiles of larger pictures: (height, width).
TILE = (769, 769)
#: Modes of Pillow whose conversion to RGB would lose bits.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
#: Accepted excess of a float picture over 0..1, for rounding.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Prediction:
    """The prediction of a picture.

    Attributes:
        classes: class indices (train ids), uint8 [h, w].
        probabilities: probability of each of the K classes, float32 [K, h, w]; None if not requested.
    """

    classes: np.ndarray
    probabilities: np.ndarray | None
    _palette: Sequence[int] = field(repr=False)

    @property
    def colors(self) -> np.ndarray:
        """The color of each pixel's class, uint8 RGB [h, w, 3]."""
        return colored(self.classes, self._palette)


class Segmenter:
    """A network in evaluation mode, with the names and colors of its classes. Create it with `load`.

    Attributes:
        model: the network, a copy for inference (`networks.fold_batch_norm`), which returns [logits]. Its
            input is BGR in 0..255 minus `dataset.IMG_MEAN`, float [N, 3, h, w].
        device: device of the network.
        amp: precision of the computation: "bf16", "fp16", or None for float32.
        path: the checkpoint; None for random weights.
        description: model, backbone, recurrence, number of classes, and frames of a clip.
        frames: finds the frames around a picture file, for a network that takes clips.
        labels: the classes.
        run: recorded flags of the training run; empty if unknown.
        files: files that were read or looked for: checkpoint, args.json, class table.
    """

    def __init__(
        self,
        model: Network,
        description: Description,
        labels: LabelReader,
        device: torch.device,
        speed: Speed,
    ):
        self.device = device
        self.amp, _ = choose_precision(speed.amp, device)
        self.model = fold_batch_norm(model).to(device)
        self._fused = speed.fused
        self._network = accelerate(self.model, device, speed._replace(amp=self.amp))
        self.path: str | None = None
        self.description = description
        self.labels = labels
        self.run: dict[str, Any] = {}
        self.files: list[str] = []
        self._palette = make_palette(labels.colors())
        self.frames = clips.Frames(description.clip or 1, description.clip_stride or 1)
        self._mean = torch.tensor(IMG_MEAN, device=self.device).repeat(self.frames.clip)

    @classmethod
    def load(  # noqa: PLR0913
        cls,
        path: str | os.PathLike | None,
        *,
        device: str | torch.device | None = None,
        amp: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
        fused: str = "auto",
        say: Callable[[str], object] = lambda line: warnings.warn(line, stacklevel=3),
        **flags: Any,
    ) -> Segmenter:
        """Load a checkpoint.

        Network and classes are those that the file itself describes (tools.convert --to safetensors writes
        such a file), those of the args.json next to it, or those that the weights show.

        Args:
            path: file of torch.save or safetensors; None for a network with random weights.
            device: device such as "cuda:1" or "cpu"; by default the first GPU, or else the CPU.
            amp: precision of the computation: "bf16", "fp16" (on a GPU), "auto" for bf16 if the device has
                fast products of it, or None for float32.
            channels_last: whether to store tensors as [N, h, w, C].
            compile: whether to compile the network with torch.compile.
            cuda_graph: whether to record the kernels of the network once for each size of its input.
            fused: "on" to choose classes with the fused operator, "off" for PyTorch's own, "auto" for the
                fused operator on a CPU. Probabilities do not need it.
            say: function that gets a line about each flag that differs from the recorded one, and about the
                precision that "auto" chooses.
            **flags: model, backbone, recurrence, num_classes, classes (path of a class table), clip or
                clip_stride, as the flags of evaluate.py. They override what is recorded.

        Raises:
            InputError: a file or argument is invalid. The message names it.
        """
        device = _device(device)
        amp, note = choose_precision(amp, device)
        if unknown := set(flags) - set(Description._fields):
            raise TypeError(f"unknown option {min(unknown)}; known are {', '.join(Description._fields)}")
        for name, value in flags.items():
            if value is not None:
                check_value("Segmenter.load", name, value)
        state = None if path is None else read_state_dict(path)
        path = None if path is None else os.fspath(path)
        recorded = of_flags(flags) if path is None or state is None else describe(path, state, flags)
        for line in [*recorded.notes, *([note] if note else [])]:
            say(line)
        found = recorded.description
        table, classes = _table(path, recorded, flags.get("classes"), say)
        number = found.num_classes or (NUM_CLASSES if table is None else len(table.classes))
        found = found._replace(classes=classes, num_classes=number)
        model = make_network(
            found.model, number, found.recurrence, backbone=found.backbone, **options_of(state)
        )
        if path is not None:
            load_weights(model, path, complete=True, state=state)
        labels = LabelReader(table, num_classes=number)
        speed = Speed(amp, channels_last, compile, cuda_graph, fused)
        segmenter = cls(model, found, labels, device, speed)
        segmenter.path, segmenter.run = path, recorded.run
        if path is not None:
            segmenter.files = [path, args_file(path), *filter(None, [classes])]
        return segmenter

    @property
    def names(self) -> list[str]:
        """Names of the classes."""
        return self.labels.names()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.labels.num_classes

    @property
    def palette(self) -> list[int]:
        """RGB colors of the classes, one after the other, as in the palette of a mode P picture."""
        return self._palette

    @property
    def attends(self) -> bool:
        """Whether the network has an attention to look at (see `attention`)."""
        return has_attention(self.model) and self.frames.clip == 1

    def predict(
        self,
        picture: Picture | list[Picture] | tuple[Picture, ...],
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile_size: tuple[int, int] | None = TILE,
        probabilities: bool = True,
    ) -> Any:
        """Predict a picture of any size, or a list of pictures.

        The pictures of a list are predicted one after the other, so that the result of a picture does not
        depend on the others.

        Args:
            picture: path, PIL image, uint8 RGB array [h, w, 3], or RGB tensor [3, h, w], uint8 or float in
                0..1. Files and PIL images are turned as their orientation tag says. Floats are rounded to
                1/255, the precision of a file. A network that takes clips of T frames finds the frames around
                a path (`dataset.clips.Frames`). Otherwise, it takes a uint8 RGB array [h, w, 3 * T], with the
                channels of the first frame first. The prediction is that of the middle frame.
            scales: average the predictions at these scales.
            flip: whether to average each prediction with that of the mirrored picture.
            tile_size: (height, width) of the overlapping tiles in which larger pictures are predicted; None
                to predict every picture as a whole.
            probabilities: whether to return probabilities, which take 4 K bytes a pixel.

        Returns:
            A `Prediction`, or a list of them for a list.

        Raises:
            DataError: a file can't be read.
            UsageError: an array or tensor is not a picture. The message says why.
            RunError: the network gives NaN.
        """
        if isinstance(picture, (list, tuple)):
            options = {"scales": scales, "flip": flip, "tile_size": tile_size, "probabilities": probabilities}
            return [self.predict(each, **cast(Any, options)) for each in picture]
        _check_averaging(scales, tile_size)
        image = self._image(picture)
        fits = tile_size is None or all(
            side <= tile for side, tile in zip(image.shape[2:], tile_size, strict=True)
        )
        flips = flip and (self.labels.mirrored() or True)
        averaging = (scales, flips, None if fits else tile_size, self.num_classes)
        with torch.inference_mode(), using(self._fused):
            if probabilities:
                logits = predict_multiscale(self._network, image, *averaging)[0]
                classes, shares = logits.argmax(0).to(torch.uint8), logits.softmax(0)
                finite = bool(shares.isfinite().all())
            else:
                classes, shares = predict_classes(self._network, image, *averaging)[0], None
                finite = bool((classes != NO_CLASS).all())
        if not finite:
            raise RunError(f"{self.path or 'random weights'}: the network gives NaN; {NAN_ADVICE}")
        return Prediction(
            classes.cpu().numpy(), None if shares is None else shares.cpu().numpy(), self._palette
        )

    def attention(self, picture: Picture, pixels: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return what pixels of a picture attend to, after each of the R passes of the attention.

        Args:
            picture: see `predict`. The whole picture is processed at once.
            pixels: P pairs (row, column) of the picture.

        Returns:
            float32 [P, R, H, W]. H and W are the size of the features, about h / 8 and w / 8. Each map sums
            to 1. With criss-cross attention, the first one covers the row and the column of the pixel, the
            following ones the whole picture. With non-local attention, all cover the whole picture. R is 0
            for ccnet and nonlocal with recurrence 0.

        Raises:
            DataError, UsageError: see `predict`; also if a pixel is outside of the picture, or the model has
                no attention.
        """
        self._check_attention()
        image = self._image(picture)
        try:
            with torch.inference_mode(), autocast(self.device, self.amp):
                maps = picture_attention(self.model, image, pixels)
        except ValueError as error:
            raise UsageError(f"pixels: {error}") from error
        return maps.float().transpose(0, 1).cpu().numpy()

    def attention_grid(
        self, picture: Picture, grid: tuple[int, int] | None = None, most: int = 2048
    ) -> AttentionGrid:
        """Return what a grid of pixels attends to, after each of the R passes of the attention.

        Args:
            picture: see `predict`. The whole picture is processed at once.
            grid: rows and columns; by default square cells, as many as `most` allows.
            most: maximum number of cells without `grid`.

        Returns:
            Weights float32 [R, rows, columns, rows, columns] on the CPU, and the size (H, W) of the features;
            see `networks.attention.grid_attention`.

        Raises:
            DataError, UsageError: see `attention`.
        """
        self._check_attention()
        image = self._image(picture)
        with torch.inference_mode(), autocast(self.device, self.amp):
            found = grid_attention(self.model, image, grid, most)
        return found._replace(weights=found.weights.float().cpu())

    def _check_attention(self) -> None:
        """Raise UsageError unless the network has an attention over single pictures."""
        if self.description.recurrence is None:
            raise UsageError(f"attention: the model {self.description.model} has none; load another one")
        if self.frames.clip > 1:
            raise UsageError(
                f"attention: maps of clips of {self.frames.clip} frames are not drawn; load the network with "
                f'model="ccnet", recurrence={self.description.recurrence}, which takes single pictures'
            )

    def _image(self, picture: Picture) -> Tensor:
        """Return the input of the network for a picture, float32 [1, 3 * T, h, w] on the device."""
        number = self.frames.clip
        if number > 1 and isinstance(picture, (str, os.PathLike)):
            picture = clips.read_rgb(self.frames.of(os.fspath(picture)))
        rgb = as_rgb(picture, number).to(self.device)
        bgr = rgb.unflatten(-1, (number, 3)).flip(-1).flatten(-2)
        return subtract_mean(bgr[None], self._mean)


def as_rgb(picture: Picture, frames: int = 1) -> Tensor:
    """Return a picture as uint8 RGB [h, w, 3], or a clip of several frames as [h, w, 3 * frames].

    Args:
        picture: see `Segmenter.predict`.
        frames: number of frames.

    Raises:
        DataError: a file can't be read.
        UsageError: an array or tensor is not a picture. The message says why.
    """
    if frames > 1:
        wanted = f"an array uint8 [h, w, {3 * frames}], RGB, or a path"
        if not isinstance(picture, np.ndarray):
            raise UsageError(f"picture: the network takes clips of {frames} frames; give {wanted}")
    else:
        wanted = "uint8 [h, w, 3], RGB"
    if isinstance(picture, (str, os.PathLike)):
        return torch.from_numpy(cv2.cvtColor(decode_upright(load(os.fspath(picture))), cv2.COLOR_BGR2RGB))
    if isinstance(picture, Image.Image):
        if picture.mode in DEEP_MODES:
            raise UsageError(f"picture: is of mode {picture.mode}; convert it to 8 bits per channel")
        return torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB")))
    if isinstance(picture, np.ndarray):
        right = picture.ndim == 3 and picture.shape[2] == 3 * frames and picture.dtype == np.uint8
        if not right or not picture.size:
            raise UsageError(f"picture: an array {picture.dtype} {list(picture.shape)}; give {wanted}")
        return torch.from_numpy(np.require(picture, requirements=["C", "W"]))
    if isinstance(picture, Tensor):
        return _of_tensor(picture.detach())
    raise UsageError(
        f"picture: of type {type(picture).__name__}; give a path, a PIL image, an array or a tensor"
    )


def _of_tensor(picture: Tensor) -> Tensor:
    kind = f"a tensor {str(picture.dtype).removeprefix('torch.')} {list(picture.shape)}"
    if picture.dim() == 4:
        raise UsageError(f"picture: {kind}, a batch; give a list of tensors [3, h, w]")
    if picture.dim() != 3 or picture.shape[0] != 3 or not picture.numel():
        raise UsageError(f"picture: {kind}; give [3, h, w], RGB")
    if picture.is_floating_point():
        low, high = (float(value) for value in picture.float().aminmax())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also true for nan
            raise UsageError(
                f"picture: {kind} with values from {low:g} to {high:g}; give RGB from 0 to 1, not normalized"
            )
        picture = picture.float().mul(255).round().clamp(0, 255).to(torch.uint8)
    if picture.dtype != torch.uint8:
        raise UsageError(f"picture: {kind}; give uint8, or float from 0 to 1")
    return picture.permute(1, 2, 0)


def _check_averaging(scales: Sequence[float], tile_size: Sequence[int] | None) -> None:
    """Raise UsageError unless the arguments of `Segmenter.predict` are possible."""
    sides = [] if tile_size is None else list(tile_size) if isinstance(tile_size, (list, tuple)) else [0]
    if tile_size is not None and (
        len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)
    ):
        raise UsageError(f"tile_size {tile_size!r}: give (height, width) in pixels, or None")
    if (
        not isinstance(scales, (list, tuple))
        or not scales
        or not all(is_number(s, 1e-2, 1e2) for s in scales)
    ):
        raise UsageError(f"scales {scales!r}: give a list of factors such as [0.75, 1, 1.25]")


def _device(device: str | torch.device | None) -> torch.device:
    """Return a device; the first GPU, or else the CPU, for None."""
    if device is None:
        return choose_devices(None, None)[0]
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r}: not a device; give one such as cuda:0 or cpu") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device!r}: there is no such GPU; give another, or cpu")
    return found


def _table(
    path: str | None, recorded: OfRun, asked: str | None, say: Callable[[str], object]
) -> tuple[ClassTable | None, str | None]:
    """Return the class table of a network, None for Cityscapes, and its file if there is one.

    Args:
        path: the checkpoint.
        recorded: what is known about it.
        asked: table that the caller asks for.
        say: function that gets a line if the recorded table can't be used.

    Raises:
        InputError: the table is invalid, or `asked` has another number of classes than the network.
    """
    found, path = recorded.description, str(path)
    if recorded.labels is None and found.classes != asked and not _fits(found):
        # Do not guess: wrong names and colors of classes would go unnoticed.
        say(f"{found.classes}: the class table of the run is missing or has changed; give --classes")
        return None, None
    return classes_of_checkpoint(path, recorded.labels, found.classes, found.num_classes), found.classes


def _fits(found: Description) -> bool:
    """Return whether the class table of a run exists and has as many classes as the network."""
    if not os.path.isfile(str(found.classes)):
        return False
    table, _ = choose_table(found.classes, None)
    return table is not None and len(table.classes) == found.num_classes
