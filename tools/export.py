"""A checkpoint for other runtimes: ONNX, or a program of torch.export.

    python -m tools.export --restore-from snapshots/CS_scenes_60000.pth --out ccnet.onnx
    python -m tools.export --restore-from snapshots/CS_scenes_60000.pth --out ccnet.pt2 --output logits

Pictures in, uint8 RGB [N, h, w, 3] of any size, and classes out, int32 [N, h, w]. ONNX has standard operators
alone, of opset 18; the program runs wherever PyTorch does. Before a file gets its name, its answers are
compared with the network's at sizes that it was not made with. See docs/export.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cc_attention import RecurrentCrissCrossAttention
from dataset import IMG_MEAN
from engine.inference import resize
from networks import ABN, Seg_Model
from tools import common
from utils import args as flags
from utils.errors import CheckpointError, RunError, UsageError
from utils.files import check_outputs, check_writable, replacing

#: The one that PyTorch's exporter writes by itself, without a conversion; TensorRT 10 reads 9 to 20 and more.
OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
#: Largest difference from the network's logits, relative to the largest of them.
TOLERANCE = 1e-4
#: Batch, height and width of the example, and of the pictures that are compared: other sizes, odd and even,
#: square and not.
EXAMPLE = (2, 97, 129)
COMPARED = ((1, 129, 129), (2, 96, 160), (1, 171, 90))
SMALLEST = 9  # pixels, of which 2 x 2 features are left
AXES = ("batch", "height", "width")

Run = Callable[[np.ndarray], np.ndarray]


# The network, in operators that every runtime has


class PlainAttention(nn.Module):
    """RecurrentCrissCrossAttention by matrix products and one softmax over rows and columns together.

    Heights and widths may change from call to call. In channels_last the products are of views.
    """

    def __init__(self, attention: RecurrentCrissCrossAttention):
        super().__init__()
        self.query_conv, self.key_conv = attention.query_conv, attention.key_conv
        self.value_conv, self.gamma = attention.value_conv, attention.gamma
        self.recurrence = attention.recurrence

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]"""
        for _ in range(self.recurrence):
            x = x + self.gamma * self._attend(x)
        return x

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        query, key, value = (
            conv(x).permute(0, 2, 3, 1) for conv in (self.query_conv, self.key_conv, self.value_conv)
        )  # [N, H, W, c or C]
        row = query @ key.mT  # [N, H, W, W]: (y, x) sees (y, u)
        column = query.transpose(1, 2) @ key.transpose(1, 2).mT  # [N, W, H, H]: (y, x) sees (v, x)
        line = torch.arange(height, device=x.device)
        column = column.masked_fill(line[:, None] == line, -torch.inf)  # a pixel is in its row already
        weight = torch.cat([row, column.transpose(1, 2)], dim=3).softmax(3)  # [N, H, W, W + H]
        from_row = weight[..., :width] @ value
        from_column = weight[..., width:].transpose(1, 2) @ value.transpose(1, 2)  # [N, W, H, C]
        return (from_row + from_column.transpose(1, 2)).permute(0, 3, 1, 2)


def fold(module: nn.Module) -> None:
    """Put every activated batch norm into the convolution before it, in place; its activation is left."""
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, ABN):
            assert isinstance(before, nn.Conv2d)
            before.weight, before.bias = (nn.Parameter(p.float()) for p in _fused(before, child))
            activations = {
                "relu": nn.ReLU(),
                "leaky_relu": nn.LeakyReLU(child.slope),
                "identity": nn.Identity(),
            }
            setattr(module, name, activations[child.activation])
        else:
            fold(child)
        before = child


def _fused(convolution: nn.Conv2d, norm: ABN) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias in float64."""
    mean, variance, weight, bias = (
        t.detach().double() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    own = None if convolution.bias is None else convolution.bias.detach().double()
    return fuse_conv_bn_weights(
        convolution.weight.detach().double(), own, mean, variance, norm.eps, weight.abs() + norm.eps, bias
    )


class Exported(nn.Module):
    """uint8 RGB pictures [N, h, w, 3] -> classes int32 [N, h, w], or logits [N, C, H, W] at 1/8 size.

    Takes over the parts of `model`, which is changed; the auxiliary head is left out.
    """

    mean: Tensor

    def __init__(self, model: Seg_Model, output: str):
        super().__init__()
        fold(model)
        mean = torch.from_numpy(IMG_MEAN)
        if model.shift is not None:
            mean = mean - model.shift
        # The network wants BGR: its first convolution takes the channels in the other order.
        model.conv1.weight = nn.Parameter(model.conv1.weight.detach().flip(1))
        self.register_buffer("mean", mean.flip(0))
        relu = nn.ReLU()
        stem = [model.get_submodule(f"conv{number + 1}") for number in range(len(model.variant.stem))]
        # For ceil_mode, which runtimes take differently: zeros behind the last row and column. After a ReLU
        # they change no maximum.
        ceil = [nn.ZeroPad2d((0, 1, 0, 1))] if model.variant.ceil_mode else []
        self.trunk = nn.Sequential(
            *(layer for convolution in stem for layer in (convolution, relu)),
            *ceil,
            nn.MaxPool2d(3, stride=2, padding=1),
            *(model.layer1, model.layer2, model.layer3, model.layer4),
        )
        model.head.cca = PlainAttention(model.head.cca)  # type: ignore[assignment]
        self.head = model.head
        self.output = output

    def forward(self, pictures: Tensor) -> Tensor:
        x = (pictures.to(torch.float32) - self.mean).permute(0, 3, 1, 2)
        logits = self.head(self.trunk(x))
        if self.output == "logits":
            return logits
        logits = F.interpolate(logits, size=pictures.shape[1:3], mode="bilinear", align_corners=True)
        # int32, since not every runtime makes uint8 of integers.
        return logits.argmax(1).to(torch.int32)


def trace(model: nn.Module) -> torch.export.ExportedProgram:
    """As a program for any batch, height and width."""
    example = torch.zeros(*EXAMPLE, 3, dtype=torch.uint8)
    batch, height, width = (
        torch.export.Dim(axis, min=low) for axis, low in zip(AXES, (1, SMALLEST, SMALLEST), strict=True)
    )
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch, 1: height, 2: width},))


# The files


def require_packages(out: str) -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"--out {out}: ONNX needs the package {name}; pip install {' '.join(PACKAGES)}"
            ) from error


def write_onnx(program: torch.export.ExportedProgram, path: str, output: str, about: dict[str, str]) -> None:
    """Raises RunError where it would hold anything but standard operators of OPSET, or a fixed size."""
    import onnx

    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=OPSET,
        input_names=["pictures"],
        output_names=[output],
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    for entries in (model.graph.node, model.graph.input, model.graph.output, model.graph.value_info):
        for entry in entries:
            entry.ClearField("metadata_props")  # the exporter's own notes
            if hasattr(entry, "doc_string"):
                entry.ClearField("doc_string")
    name_axes(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, about)
    opsets = {(entry.domain, entry.version) for entry in model.opset_import}
    domains = {node.domain for node in model.graph.node}
    if domains != {""} or opsets != {("", OPSET)} or model.functions:
        raise RunError(f"{path}: this PyTorch writes operators of {sorted(domains)}, opsets {sorted(opsets)}")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def name_axes(graph: Any) -> None:
    """Raises RunError where an axis of the pictures has a fixed size."""
    dimensions = graph.input[0].type.tensor_type.shape.dim
    names = {}
    for axis, dimension in zip(AXES, dimensions, strict=False):
        if not dimension.dim_param:
            raise RunError(f"the exporter fixed the {axis} to {dimension.dim_value}")
        names[dimension.dim_param] = axis
    for values in (graph.input, graph.output):
        for value in values:
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param in names:
                    dimension.dim_param = names[dimension.dim_param]
    del graph.value_info[:]  # between the layers sizes are expressions of the exporter's names


def open_onnx(path: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {"pictures": pictures})[0]


def open_program(path: str) -> Run:
    module = torch.export.load(path).module()

    def run(pictures: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(pictures)).numpy()

    return run


def compare(run: Run, model: Seg_Model, output: str) -> float:
    """Return the largest difference from the network's logits over the largest of them, at COMPARED.

    Of classes: how far the logit of one that was answered is below the highest. Infinite where the answer is
    of another shape, is no class, or has a nan; nan where the network's own logits are not finite.
    """
    worst = 0.0
    generator = np.random.default_rng(0)
    for n, height, width in COMPARED:
        pictures = generator.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
        images = torch.from_numpy(pictures[..., ::-1].astype(np.float32) - IMG_MEAN).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model(images.contiguous())[0]
        if not logits.isfinite().all():
            return math.nan
        share = _difference(torch.from_numpy(run(pictures)), logits, (height, width), output)
        worst = max(worst, math.inf if math.isnan(share) else share)
    return worst


def _difference(answer: Tensor, logits: Tensor, size: tuple[int, int], output: str) -> float:
    """`compare` for one answer; may be nan."""
    scale = logits.abs().max()
    if output == "logits":
        if answer.shape != logits.shape:
            return math.inf
        difference = (answer - logits).abs().max()
    else:
        logits = resize(logits, size)
        if answer.shape != logits[:, 0].shape or not 0 <= answer.min() <= answer.max() < logits.shape[1]:
            return math.inf
        difference = (logits.amax(1) - logits.gather(1, answer.long().unsqueeze(1)).squeeze(1)).max()
    return 0.0 if difference == 0 else float(difference / scale)


def about(network: common.Network, output: str) -> dict[str, str]:
    """What a user of the file has to know, as text by name."""
    return {
        "network": f"CCNet {network.backbone}, R={network.recurrence}",
        "input": "uint8 [batch, height, width, 3]",
        "channel_order": "RGB",
        "mean": f"{json.dumps(IMG_MEAN[::-1].tolist())}, of R, G and B; subtracted in the network",
        "output": "logits float32 [batch, class, height / 8, width / 8]"
        if output == "logits"
        else "classes int32 [batch, height, width]",
        "classes": json.dumps(network.labels.names()),
        "colors": json.dumps(network.labels.colors()),
    }


def get_parser() -> argparse.ArgumentParser:
    parser = common.Parser("export", __doc__)
    add = parser.add_argument
    add("--restore-from", metavar="FILE", required=True, help="checkpoint")
    add("--out", metavar="FILE", required=True, help="what to write, .onnx or .pt2")
    add(
        "--output",
        choices=("classes", "logits"),
        default="classes",
        help="classes at the picture's size (without it), or logits at 1/8 of it",
    )
    add(
        "--classes",
        metavar="TABLE",
        help="names of the classes; without it as the checkpoint's run, or Cityscapes'",
    )
    add(
        "--recurrence",
        type=flags.recurrence,
        help="how often the attention is applied; without it as in the checkpoint's run, or 2",
    )
    parser.set_defaults(gpu="cpu")  # where the network runs that the file is compared with
    return parser


def main() -> None:
    args = get_parser().parse_args()
    ending = os.path.splitext(args.out)[1]
    if ending not in (".onnx", ".pt2"):
        raise UsageError(f"--out {args.out}: ends in neither .onnx nor .pt2; give one of them")
    if ending == ".onnx":
        require_packages(args.out)
    network = common.open_network(args)
    check_outputs("--out", [args.out], network.files)
    check_writable("--out", os.path.dirname(args.out) or ".")
    print(
        f"{args.restore_from}: {network.backbone}, R={network.recurrence}, {network.num_classes} classes",
        flush=True,
    )
    export(network, args.out, args.output)


def export(network: common.Network, out: str, output: str) -> None:
    """Write and compare; nothing is left where they differ.

    Raises:
        CheckpointError: the network's logits are not finite.
        RunError: they differ by more than TOLERANCE.
    """
    begin = time.monotonic()
    program = trace(Exported(copy.deepcopy(network.model), output).eval())
    known = about(network, output)
    with replacing(out) as temporary:
        if out.endswith(".onnx"):
            write_onnx(program, temporary, output, known)
            run = open_onnx(temporary)
        else:
            # By way of memory: torch aborts the process where the disk refuses a write of its own.
            content = io.BytesIO()
            torch.export.save(program, content, extra_files=known)
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
            run = open_program(temporary)
        print(f"written after {time.monotonic() - begin:.0f} s; comparing", flush=True)
        worst = compare(run, network.model, output)
        if math.isnan(worst):
            raise CheckpointError(
                f"{network.path}: its network gives nan or inf, the weights are too large; take another one"
            )
        sizes = ", ".join(f"{n}x{height}x{width}" for n, height, width in COMPARED)
        if not worst <= TOLERANCE:
            raise RunError(
                f"{out}: not written, its logits differ from the network's by {worst:.1e} of the largest, "
                f"allowed are {TOLERANCE:g} (pictures of {sizes}); try another PyTorch or onnxruntime"
            )
    print(
        f"{out}: {os.path.getsize(out) / 1e6:.1f} MB; largest difference from the network {worst:.1e} of the "
        f"largest logit (pictures of {sizes})"
    )


if __name__ == "__main__":
    common.end(main)
