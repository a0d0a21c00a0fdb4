"""The pictures of a training sample for TensorBoard."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from networks.attention import has_attention, picture_attention
from networks.base import Network
from networks.clips import middle_frame
from utils.drawing.attention_figure import draw_attention
from utils.drawing.palette import colored


def draw_sample(
    model: Network, palette: list[int], mean: np.ndarray, image: Tensor, label: Tensor, logits: Tensor
) -> dict[str, np.ndarray]:
    """Draw image, label and prediction side by side and, if there is one, the attention of the middle pixel.

    Args:
        model: network in evaluation mode.
        palette: colors of the classes, 768 numbers.
        mean: mean that was subtracted from the image, [3].
        image: [3, h, w], BGR minus mean.
        label: class indices [h, w].
        logits: [num_classes, H, W], from training mode.

    Returns:
        Pictures uint8 [*, *, 3] in RGB, by the name of their TensorBoard entry.
    """
    pixels = middle_frame(image).permute(1, 2, 0).cpu().numpy() + mean
    picture = pixels[..., ::-1].round().clip(0, 255).astype(np.uint8)
    prediction = F.interpolate(
        logits[None].float(), size=tuple(label.shape), mode="bilinear", align_corners=True
    )[0].argmax(0)
    classes = [colored(each.cpu().numpy(), palette) for each in (label, prediction)]
    drawn = {"train/image_label_prediction": np.hstack([picture, *classes])}
    if has_attention(model) and len(image) == len(mean):  # not a clip
        middle = label.shape[0] // 2, label.shape[1] // 2
        maps = picture_attention(model, image[None], [middle])[:, 0].cpu().numpy()
        drawn["train/attention"] = np.array(draw_attention(picture, middle, maps))
    return drawn
