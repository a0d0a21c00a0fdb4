"""Networks of other projects, which compute the same function as ours or one of the same kind.

mmsegmentation's CCNet is the same network as ours in the variant "mmseg". benchmarks/get_peers.sh installs it
into a folder of its own. torchvision's FCN and DeepLabV3 are other networks on the same backbone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.labels import NUM_CLASSES
from engine.inference import predict_whole
from loss import CriterionDSN
from networks import Seg_Model
from networks.convert import from_batch_norm, mmseg_names
from networks.weights import SHIFT

#: Networks of torchvision, by the part of the name before the backbone.
TORCHVISION = {"FCN": "fcn", "DeepLabV3": "deeplabv3"}
#: mmsegmentation's configuration, by backbone.
CONFIGURATIONS = {
    "resnet50": "ccnet_r50-d8_4xb2-40k_cityscapes-769x769.py",
    "resnet101": "ccnet_r101-d8_4xb2-40k_cityscapes-769x769.py",
}
#: Value of gamma, which starts at 0. Products with zeros would be faster.
GAMMA = 0.5
#: Maximum relative difference of logits and loss between networks that compute the same function.
TOLERANCE = 1e-3


class MMSegmentation:
    """mmsegmentation's CCNet with random weights, in training mode.

    Args:
        site: folder of benchmarks/get_peers.sh.
        backbone: "resnet50" or "resnet101".
        device: device of the network.

    Raises:
        ImportError: mmsegmentation can't be imported from the folder, or lacks this backbone.
    """

    def __init__(self, site: str, backbone: str, device: torch.device):
        self.backbone = backbone
        if backbone not in CONFIGURATIONS:
            raise ImportError(f"has no CCNet on {backbone}")
        if site not in sys.path:
            sys.path.append(site)  # after the packages of this environment
        # Imports print notes and warnings about optional packages.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                import mmseg
                from mmengine.config import Config
                from mmseg.registry import MODELS
                from mmseg.utils import register_all_modules
            except Exception as error:  # some import of an import may fail in any way
                raise ImportError(
                    f"can't be imported from {site} ({error}); run benchmarks/get_peers.sh with a new folder"
                ) from error
            register_all_modules()
            logging.disable(logging.WARNING)
            folder = Path(mmseg.__path__[0]) / ".mim/configs/ccnet"
            config = Config.fromfile(folder / CONFIGURATIONS[backbone]).model
            config.pretrained = config.data_preprocessor = None
            for part in (config.backbone, config.decode_head, config.auxiliary_head):
                part.norm_cfg = {"type": "BN", "requires_grad": True}  # one process
            torch.manual_seed(0)
            self.network = MODELS.build(config)
            logging.disable(logging.NOTSET)
        self.version = mmseg.__version__
        with torch.no_grad():
            self.network.decode_head.cca.gamma.scale.fill_(GAMMA)
        self.network.to(device).train()

    def copied(self) -> Seg_Model:
        """Return our network with the same weights, on the CPU."""
        state = from_batch_norm(mmseg_names("mmsegmentation", self.network.state_dict()))
        ours = Seg_Model(NUM_CLASSES, backbone=self.backbone, variant="mmseg")
        missing, _ = ours.load_state_dict(state, strict=False)
        assert missing == [SHIFT], missing
        return ours

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [N, C, h, w] of images [N, 3, h, w], at the size of the images."""
        size = tuple(images.shape[2:])
        return self.network.encode_decode(images, [{"img_shape": size}] * len(images))

    def labelled(self, labels: Tensor) -> list[Any]:
        """Return labels [N, h, w] in the form that `loss` takes."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = []
        for label in labels:
            sample = SegDataSample(metainfo={"img_shape": tuple(label.shape)})
            sample.gt_sem_seg = PixelData(data=label[None])
            samples.append(sample)
        return samples

    def loss(self, images: Tensor, samples: list[Any]) -> Tensor:
        """Return the sum of the weighted losses of both heads."""
        losses = self.network.loss(images, samples)
        return torch.stack([value for name, value in losses.items() if "loss" in name]).sum()


@torch.no_grad()
def differences(peer: MMSegmentation, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Compare mmsegmentation's network with ours, with the same weights, in evaluation mode, on the CPU.

    Args:
        peer: the network.
        images: [N, 3, h, w].
        labels: class indices [N, h, w], none of them ignored: mmsegmentation's mean counts ignored pixels.

    Returns:
        Relative differences: "logits", of the largest one, after upsampling; "loss".
    """
    ours = peer.copied().eval()
    peer.network.eval()
    theirs, own = peer.logits(images), predict_whole(ours, images)
    their_loss = peer.loss(images, peer.labelled(labels))
    own_loss = CriterionDSN()(ours(images), labels)
    return {
        "logits": float((theirs - own).abs().max() / own.abs().max()),
        "loss": float((their_loss - own_loss).abs() / own_loss),
    }


def torchvision(backbone: str, device: torch.device) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Return functions that build networks of torchvision, which map images to logits at their size.

    Raises:
        ImportError: torchvision is not installed, or is built for another version of PyTorch.
    """
    try:
        from torchvision.models import segmentation
    except RuntimeError as error:
        raise ImportError(str(error)) from error

    def make(build: Callable[..., nn.Module]) -> Callable[[Tensor], Tensor]:
        network = build(weights=None, weights_backbone=None, num_classes=NUM_CLASSES).to(device).eval()
        return lambda images: network(images)["out"]

    found = {name: getattr(segmentation, f"{part}_{backbone}", None) for name, part in TORCHVISION.items()}
    return {name: partial(make, build) for name, build in found.items() if build}
