"""Draw what pixels of a picture attend to, after one pass of the attention and after two.

    python examples/attention_maps.py snapshots/mini/CS_scenes_300.pth picture.png out.png 60,100 90,20

Run from the repository root, with the environment activated. Each ROW,COLUMN becomes one row of the figure.
`python -m tools.attention` does the same with more options.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from segmenter import Segmenter, as_rgb
from utils.drawing.attention_figure import draw_attention


def main(checkpoint: str, picture: str, out: str, *pixels: str) -> None:
    """Draw the attention of the network in `checkpoint` for some pixels of `picture` into the file `out`."""
    segmenter = Segmenter.load(checkpoint)
    image = as_rgb(picture).numpy()  # uint8 [h, w, 3], turned as its orientation tag says
    places = [(int(row), int(column)) for row, column in (text.split(",") for text in pixels)]
    maps = segmenter.attention(image, places)  # [pixels, passes, H, W], at the resolution of the features
    rows = [
        np.asarray(draw_attention(image, place, of_pixel))
        for place, of_pixel in zip(places, maps, strict=True)
    ]
    Image.fromarray(np.vstack(rows)).save(out)
    print(f"{out}: {len(places)} pixels, {maps.shape[1]} passes")


if __name__ == "__main__":
    main(*sys.argv[1:])
