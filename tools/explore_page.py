"""The interactive part of pages: pictures with their prediction, and what each pixel attends to.

The page holds the pictures, predictions and maps as JSON in script elements, which the browser does not
execute. tools/pages/explore.js reads them and draws; docs/explore.md describes the format.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

#: Folder of the style sheets and scripts that pages embed.
PAGES = Path(__file__).resolve().parent / "pages"
#: Width of the pictures in the list of pictures, in pixels.
THUMBNAIL = 144
#: Forbids the page every request; what it shows is in the page itself.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)


class NetworkText(NamedTuple):
    """Description of a network on the page.

    Attributes:
        title: the checkpoint.
        note: model, backbone and recurrence.
        names: names of the classes.
        palette: RGB colors of the classes, one after the other.
        no_maps: why there are no attention maps; empty if there are.
    """

    title: str
    note: str
    names: Sequence[str]
    palette: Sequence[int]
    no_maps: str = ""


class Seen(NamedTuple):
    """Prediction and attention maps of a network for a picture of h x w pixels.

    Attributes:
        classes: class of each pixel, uint8 [h, w].
        probabilities: float32 [K, h, w].
        weights: attention of a grid of pixels, float32 [R, rows, columns, rows, columns]
            (`networks.attention.grid_attention`); None without attention.
        features: height and width of the features that the grid divides.
    """

    classes: np.ndarray
    probabilities: np.ndarray
    weights: np.ndarray | None = None
    features: tuple[int, int] = (0, 0)


class Explorable(NamedTuple):
    """A picture of the page, ready to be embedded."""

    name: str
    thumbnail: str
    content: str  # JSON


def asset(name: str) -> str:
    """Return the text of a style sheet or script in tools/pages."""
    return (PAGES / name).read_text(encoding="utf-8")


def embedded(value: Any) -> str:
    """Return a value as JSON that can stand in a script element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def explorable(name: str, picture: np.ndarray, seen: Sequence[Seen], longest: int) -> Explorable:
    """Encode a picture and what the networks make of it.

    Args:
        name: name of the picture.
        picture: uint8 RGB [h, w, 3].
        seen: what each network makes of the picture.
        longest: maximum length of the longer side on the page. Larger pictures are reduced, and their classes
            and probabilities sampled.
    """
    size = picture.shape[:2]
    factor = min(1.0, longest / max(size))
    shown = [max(1, round(side * factor)) for side in size]
    content = {
        "size": size,
        "shown": shown,
        "jpeg": _jpeg(picture, (shown[1], shown[0])),
        "networks": [_encoded(each, shown) for each in seen],
    }
    small = (THUMBNAIL, max(1, min(2 * THUMBNAIL, round(THUMBNAIL * size[0] / size[1]))))
    return Explorable(name, _jpeg(picture, small), embedded(content))


def explorer(networks: Sequence[NetworkText], pictures: Sequence[Explorable]) -> str:
    """Return the explorer as an HTML element; the page needs explore.css and explore.js besides."""
    colors = [np.reshape(each.palette, (-1, 3))[: len(each.names)].tolist() for each in networks]
    about = {
        "networks": [
            {"title": each.title, "note": each.note, "names": list(each.names), "noMaps": each.no_maps}
            | {"colors": of_network}
            for each, of_network in zip(networks, colors, strict=True)
        ],
        "pictures": [{"name": each.name, "thumbnail": each.thumbnail} for each in pictures],
        "heat": base64.b64encode(_heat()).decode(),
    }
    scripts = [_script("about", embedded(about)), *(_script("picture", each.content) for each in pictures)]
    return (
        '<div class="explorer">\n'
        '<noscript><p class="missing">Choosing pixels needs JavaScript.</p></noscript>\n'
        + "\n".join(scripts)
        + "\n</div>"
    )


def packed(values: np.ndarray) -> str:
    """Return an array as text: its bytes in C order, little-endian, compressed by zlib, in base64."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(zlib.compress(little.tobytes(), 6)).decode()


def quantized(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize maps to 8 bits, on a square-root scale that keeps small weights apart.

    Args:
        weights: float32 [..., rows, columns], not negative.

    Returns:
        Codes uint8 [..., rows, columns], and the largest weight of each map, float32 [...]. A weight is
        largest * (code / 255) ** 2, with an error of at most largest * (1 / 255 + 1 / 510 ** 2).
    """
    largest = weights.max((-2, -1))
    relative = weights / np.maximum(largest, np.finfo(np.float32).tiny)[..., None, None]
    return np.rint(255 * np.sqrt(relative)).astype(np.uint8), largest.astype(np.float32)


def _encoded(seen: Seen, shown: Sequence[int]) -> dict[str, Any]:
    """Return what a network makes of a picture, for JSON."""
    size = seen.classes.shape
    rows, columns = (
        (2 * np.arange(few) + 1) * many // (2 * few) for few, many in zip(shown, size, strict=True)
    )
    sampled = seen.probabilities[:, rows[:, None], columns]
    classes = seen.classes[rows[:, None], columns]
    ranked = torch.from_numpy(sampled).topk(min(2, len(sampled)), 0).indices.numpy()
    # A class of the prediction is the first one, also if another one has the same probability.
    second = np.where(ranked[0] == classes, ranked[-1], ranked[0])
    numbers = np.bincount(seen.classes.ravel(), minlength=len(seen.probabilities))
    found: dict[str, Any] = {
        "classes": packed(classes),
        "confidence": packed(_percentile(sampled, classes)),
        "second": packed(second.astype(np.uint8)) if len(sampled) > 1 else None,
        "secondConfidence": packed(_percentile(sampled, second)),
        "shares": [
            [int(index), float(numbers[index] / numbers.sum())]
            for index in np.argsort(-numbers, kind="stable")
            if numbers[index]
        ],
    }
    if seen.weights is not None:
        codes, largest = quantized(seen.weights)
        found |= {
            "grid": seen.weights.shape[1:3],
            "features": seen.features,
            "maps": [packed(of_recurrence) for of_recurrence in codes],
            "largest": [packed(of_recurrence) for of_recurrence in largest],
        }
    return found


def _percentile(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the probability of the class of each pixel, uint8 [h, w] in units of 1/255."""
    chosen = np.take_along_axis(probabilities, classes[None].astype(np.intp), 0)[0]
    return np.rint(255 * np.clip(chosen, 0, 1)).astype(np.uint8)


def _heat() -> bytes:
    """Return the color map of the attention, 256 RGB colors."""
    return cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)[
        :, 0, ::-1
    ].tobytes()


def _jpeg(picture: np.ndarray, size: tuple[int, int]) -> str:
    """Return a picture as a data URI, at a size (width, height)."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _script(name: str, content: str) -> str:
    return f'<script type="application/json" class="{name}">{content}</script>'
