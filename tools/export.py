"""Export a checkpoint to ONNX, or to a program of torch.export.

    python -m tools.export --restore-from snapshots/CS_scenes_60000.pth --out ccnet.onnx
    python -m tools.export --restore-from snapshots/CS_scenes_60000.pth --out ccnet.pt2 --output logits

Input: pictures, uint8 RGB [N, h, w, 3] of any size. Output: classes, int32 [N, h, w]. ONNX files contain only
standard operators of opset 18. Programs of torch.export run in PyTorch. Before a file is kept, its outputs
are compared with those of the network for inference (networks.fold_batch_norm), at sizes other than that of
the export. See docs/export.md.
"""

from __future__ import annotations

import argparse
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

from cc_attention import RecurrentCrissCrossAttention
from dataset import IMG_MEAN
from engine.inference import resize
from engine.options import ToolOptions, add_flags
from networks import MODELS, Network, fold_batch_norm
from networks.heads import RCCAHead
from networks.models import backbone_name
from networks.timm_backbone import TimmBackbone, TimmNetwork, is_timm
from segmenter import Segmenter
from tools import common
from utils.errors import CheckpointError, RunError, UsageError
from utils.files import check_outputs, check_writable, replacing

#: Native opset of PyTorch's exporter, written without a conversion. TensorRT 10 reads 9 to 20 and more.
OPSET = 18
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
#: Maximum difference from the logits of the network, relative to the largest logit.
TOLERANCE = 1e-4
#: Batch, height and width of the example for the export, and of the compared pictures, which have other
#: sizes: odd and even, square and not.
EXAMPLE = (2, 97, 129)
COMPARED = ((1, 129, 129), (2, 96, 160), (1, 171, 90))
SMALLEST = 9  # minimum side in pixels: gives 2x2 features
AXES = ("batch", "height", "width")

Run = Callable[[np.ndarray], np.ndarray]


# The network in operators that every runtime supports


class PlainAttention(nn.Module):
    """RecurrentCrissCrossAttention as matrix products and one softmax over row and column.

    Height and width may change from call to call. With channels_last inputs, the products use views.
    """

    def __init__(self, attention: RecurrentCrissCrossAttention):
        super().__init__()
        self.query_conv, self.key_conv = attention.query_conv, attention.key_conv
        self.value_conv, self.gamma = attention.value_conv, attention.gamma
        self.recurrence = attention.recurrence

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention `recurrence` times to x [N, C, H, W]; the result has the same shape."""
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
        column = column.masked_fill(line[:, None] == line, -torch.inf)  # a pixel is already in its row
        weight = torch.cat([row, column.transpose(1, 2)], dim=3).softmax(3)  # [N, H, W, W + H]
        from_row = weight[..., :width] @ value
        from_column = weight[..., width:].transpose(1, 2) @ value.transpose(1, 2)  # [N, W, H, C]
        return (from_row + from_column.transpose(1, 2)).permute(0, 3, 1, 2)


class TimmTrunk(nn.Module):
    """The features of a network of timm for the main head, from RGB minus mean."""

    def __init__(self, backbone: TimmBackbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of x [N, 3, h, w]."""
        return self.backbone.of_normalized(x * self.backbone.scale.flip(0).view(3, 1, 1))[1]


class Exported(nn.Module):
    """The exported network: uint8 RGB pictures [N, h, w, 3] to classes or logits.

    It has no auxiliary head.

    Args:
        model: the network, which is copied.
        output: "classes" for int32 [N, h, w], "logits" for [N, C, H, W] at 1/8 size.
    """

    mean: Tensor

    def __init__(self, model: Network, output: str):
        super().__init__()
        model = fold_batch_norm(model)
        mean = torch.from_numpy(IMG_MEAN)
        self.head = model.head
        if isinstance(self.head, RCCAHead):
            self.head.cca = PlainAttention(self.head.cca)  # type: ignore[assignment]
        self.output = output
        if isinstance(model, TimmNetwork):
            self.register_buffer("mean", (mean - model.backbone.shift).flip(0))
            self.trunk: nn.Module = TimmTrunk(model.backbone)
            return
        if model.shift is not None:
            mean = mean - model.shift
        # The network expects BGR: reverse the input channels of the first convolution.
        model.conv1.weight = nn.Parameter(model.conv1.weight.detach().flip(1))
        self.register_buffer("mean", mean.flip(0))
        relu = nn.ReLU()
        stem = [model.get_submodule(f"conv{number + 1}") for number in range(len(model.variant.stem))]
        # Replace ceil_mode, in which runtimes differ, by zeros after the last row and column. They change no
        # maximum of values after a ReLU.
        ceil = [nn.ZeroPad2d((0, 1, 0, 1))] if model.variant.ceil_mode else []
        self.trunk = nn.Sequential(
            *(layer for convolution in stem for layer in (convolution, relu)),
            *ceil,
            nn.MaxPool2d(3, stride=2, padding=1),
            *(model.layer1, model.layer2, model.layer3, model.layer4),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Predict pictures, uint8 RGB [N, h, w, 3]."""
        x = (pictures.to(torch.float32) - self.mean).permute(0, 3, 1, 2)
        logits = self.head(self.trunk(x))
        if self.output == "logits":
            return logits
        logits = F.interpolate(logits, size=pictures.shape[1:3], mode="bilinear", align_corners=True)
        # int32, because some runtimes can't convert integers to uint8.
        return logits.argmax(1).to(torch.int32)


def trace(model: nn.Module) -> torch.export.ExportedProgram:
    """Export a network as a program for any batch size, height and width."""
    example = torch.zeros(*EXAMPLE, 3, dtype=torch.uint8)
    batch, height, width = (
        torch.export.Dim(axis, min=low) for axis, low in zip(AXES, (1, SMALLEST, SMALLEST), strict=True)
    )
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: batch, 1: height, 2: width},))


# The files


def require_packages(out: str) -> None:
    """Raise UsageError if a package for ONNX is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"--out {out}: ONNX needs the package {name}; run pip install {' '.join(PACKAGES)}"
            ) from error


def write_onnx(program: torch.export.ExportedProgram, path: str, output: str, about: dict[str, str]) -> None:
    """Write a program as an ONNX file.

    Args:
        program: the network.
        path: file to write.
        output: name of the output.
        about: metadata by name.

    Raises:
        RunError: the file would contain non-standard operators, another opset, or a fixed size.
    """
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
            entry.ClearField("metadata_props")  # notes of the exporter
            if hasattr(entry, "doc_string"):
                entry.ClearField("doc_string")
    name_axes(model.graph)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, about)
    opsets = {(entry.domain, entry.version) for entry in model.opset_import}
    domains = {node.domain for node in model.graph.node}
    if domains != {""} or opsets != {("", OPSET)} or model.functions:
        raise RunError(
            f"{path}: this PyTorch writes operators of {sorted(domains)}, opsets {sorted(opsets)}; try "
            "another version of PyTorch"
        )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def name_axes(graph: Any) -> None:
    """Name the axes of inputs and outputs.

    Raises:
        RunError: an axis of the pictures has a fixed size.
    """
    dimensions = graph.input[0].type.tensor_type.shape.dim
    names = {}
    for axis, dimension in zip(AXES, dimensions, strict=False):
        if not dimension.dim_param:
            raise RunError(
                f"this PyTorch fixes the {axis} to {dimension.dim_value}; try another version of PyTorch"
            )
        names[dimension.dim_param] = axis
    for values in (graph.input, graph.output):
        for value in values:
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param in names:
                    dimension.dim_param = names[dimension.dim_param]
    del graph.value_info[:]  # sizes between the layers use the exporter's names


def open_onnx(path: str) -> Run:
    """Return a function that runs an ONNX file on pictures."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pictures: session.run(None, {"pictures": pictures})[0]


def open_program(path: str) -> Run:
    """Return a function that runs a program of torch.export on pictures."""
    module = torch.export.load(path).module()

    def run(pictures: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(pictures)).numpy()

    return run


def compare(run: Run, model: Network, output: str) -> float:
    """Return the largest difference from the logits of the network, relative to the largest logit.

    For classes, the difference is that between the largest logit of a pixel and the logit of its class.

    Args:
        run: the exported network.
        model: the network.
        output: "classes" or "logits".

    Returns:
        Infinity if an output has a wrong shape, an invalid class or a nan; nan if the logits of the network
        are not finite.
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
    """Return the difference for one output; may be nan."""
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


def about(network: Segmenter, output: str) -> dict[str, str]:
    """Return the metadata of the file, as text by name."""
    return {
        "network": network_name(network),
        "input": "uint8 [batch, height, width, 3]",
        "channel_order": "RGB",
        "mean": f"{json.dumps(IMG_MEAN[::-1].tolist())}, of R, G and B; subtracted in the network",
        "output": "logits float32 [batch, class, height / 8, width / 8]"
        if output == "logits"
        else "classes int32 [batch, height, width]",
        "classes": json.dumps(network.names),
        "colors": json.dumps(network.labels.colors()),
    }


def network_name(network: Segmenter) -> str:
    """Return the model, the backbone and the recurrence, if the model has one."""
    model, backbone, recurrence = network.description[:3]
    return f"{model} {backbone}" + ("" if recurrence is None else f", R={recurrence}")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("export", __doc__)
    add = parser.add_argument
    add_flags(parser, ToolOptions, {"model": MODELS, "backbone": backbone_name}, reads_checkpoint=True)
    add("--out", metavar="FILE", required=True, help="file to write, .onnx or .pt2")
    add(
        "--output",
        choices=("classes", "logits"),
        default="classes",
        help="classes at the size of the picture, or logits at 1/8 of it (default: %(default)s)",
    )
    parser.set_defaults(gpu="cpu")  # device of the network for the comparison
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    ending = os.path.splitext(args.out)[1]
    if ending not in (".onnx", ".pt2"):
        raise UsageError(f"--out {args.out}: does not end in .onnx or .pt2; give one of them")
    if ending == ".onnx":
        require_packages(args.out)
    network = common.open_network(args)
    if network.description.clip is not None:
        raise UsageError(
            f"{args.restore_from}: is of the model {network.description.model}, which can't be exported; "
            f"add --model ccnet --recurrence {network.description.recurrence}, which takes pictures"
        )
    check_outputs("--out", [args.out], network.files)
    check_writable("--out", os.path.dirname(args.out) or ".")
    print(f"{args.restore_from}: {network_name(network)}, {network.num_classes} classes", flush=True)
    export(network, args.out, args.output)


def export(network: Segmenter, out: str, output: str) -> None:
    """Export a network and compare the outputs. Keep the file only if they agree.

    Args:
        network: the network.
        out: file to write.
        output: "classes" or "logits".

    Raises:
        CheckpointError: logits of the network are not finite.
        RunError: outputs differ by more than TOLERANCE.
    """
    begin = time.monotonic()
    try:
        program = trace(Exported(network.model, output).eval())
    except Exception as error:
        if not is_timm(network.description.backbone):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--backbone {network.description.backbone}: torch.export can't write it for pictures of any "
            f"size ({reason}); use another network"
        ) from error
    known = about(network, output)
    with replacing(out) as temporary:
        if out.endswith(".onnx"):
            write_onnx(program, temporary, output, known)
            run = open_onnx(temporary)
        else:
            # Write from memory: torch aborts the process if the disk refuses a write.
            content = io.BytesIO()
            torch.export.save(program, content, extra_files=known)
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
            run = open_program(temporary)
        print(f"written after {time.monotonic() - begin:.0f} s; comparing", flush=True)
        worst = compare(run, network.model, output)
        if math.isnan(worst):
            raise CheckpointError(
                f"{network.path}: the network gives nan or inf; use a checkpoint with smaller weights"
            )
        sizes = ", ".join(f"{n}x{height}x{width}" for n, height, width in COMPARED)
        if not worst <= TOLERANCE:
            raise RunError(
                f"{out}: not written, because its outputs differ by {worst:.1e} of the largest logit, more "
                f"than {TOLERANCE:g} (pictures of {sizes}); try another version of PyTorch or onnxruntime"
            )
    print(
        f"{out}: {os.path.getsize(out) / 1e6:.1f} MB; largest difference from the network {worst:.1e} of the "
        f"largest logit (pictures of {sizes})"
    )


if __name__ == "__main__":
    common.end(main)
