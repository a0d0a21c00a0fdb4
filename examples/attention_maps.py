"""Draw what pixels of a picture attend to, after one pass of the attention and after two.

    python examples/attention_maps.py snapshots/mini/CS_scenes_300.pth picture.png out.png 60,100 90,20

Run from the repository root, with the environment activated. Each ROW,COLUMN becomes one row of the figure.
`python -m tools.attention` does the same with more options.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from dataset import IMG_MEAN
from dataset.pictures import decode_upright, load
from examples.predict_folder import load_network
from networks.attention import picture_attention
from utils.drawing.attention_figure import draw_attention


def main(checkpoint: str, picture: str, out: str, *pixels: str) -> None:
    """Draw the attention of the network in `checkpoint` for some pixels of `picture` into the file `out`."""
    model = load_network(checkpoint)
    bgr = decode_upright(load(picture))
    image = torch.from_numpy(bgr - IMG_MEAN).permute(2, 0, 1).float()[None]
    places = [(int(row), int(column)) for row, column in (text.split(",") for text in pixels)]
    maps = picture_attention(model, image, places)  # [passes, pixels, H, W], at the resolution of the head
    figures = [
        np.asarray(draw_attention(bgr[..., ::-1], place, maps[:, number].numpy()))
        for number, place in enumerate(places)
    ]
    cv2.imwrite(out, np.vstack(figures)[..., ::-1])
    print(f"{out}: {len(places)} pixels, {len(maps)} passes")


if __name__ == "__main__":
    main(*sys.argv[1:])
