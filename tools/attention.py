"""Look at what pixels attend to.

    python -m tools.attention PICTURE --restore-from CKPT [--pixel ROW,COLUMN ...] [--out DIR]

The figure of the paper, for any checkpoint and any pixel: the picture with a cross, and the attention after
each recurrence. After one it is the softmax over the pixel's row and column; after two the exact product of
both, by which every pixel of the picture is reached. For each pixel DIR gets a figure, NAME_ROW_COLUMN.png,
and the weights, NAME_ROW_COLUMN.npy: float32 [R, H, W], at the head's resolution, each map adding up to 1.
"""

from __future__ import annotations

import argparse
import os

import cv2
import numpy as np
import torch

from dataset import IMG_MEAN
from dataset.pictures import decode_upright, load
from engine.data.transfer import subtract_mean
from networks.attention import picture_attention
from tools import common
from tools.sources import PictureFile, find
from utils import args as flags
from utils.drawing.attention_figure import draw_attention
from utils.errors import UsageError
from utils.files import check_outputs, check_writable, replacing


def pixel(text: str) -> tuple[int, int]:
    """Parse 'row,column'."""
    try:
        row, column = (int(flags.count(part)) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{flags.quoted(text)} is not a pixel; give row,column such as 120,340"
        ) from None
    return row, column


def get_parser() -> argparse.ArgumentParser:
    parser = common.Parser("attention", __doc__)
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="picture, or folder or list of pictures")
    add(
        "--pixel",
        type=pixel,
        action="append",
        dest="pixels",
        metavar="ROW,COLUMN",
        help="counted from 0 at the top left; may be given several times; without it the middle",
    )
    add("--out", default="attention", metavar="DIR", help="folder of the results (default: %(default)s)")
    common.add_network_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    pictures, videos = find(args.pictures, leave_out=os.path.realpath(args.out))
    if videos:
        raise UsageError(f"{videos[0].path}: is no picture; name pictures")
    network = common.open_network(args)
    if network.recurrence == 0:
        raise UsageError("--recurrence 0: leaves the attention out; give 1 or more")
    chosen = [pixels_of(args.pixels, picture) for picture in pictures]
    stems = [
        [os.path.join(args.out, f"{name}_{row}_{column}") for row, column in pixels]
        for (_, name), pixels in zip(pictures, chosen, strict=True)
    ]
    results = [f"{stem}{ending}" for several in stems for stem in several for ending in (".png", ".npy")]
    listed = [path for path in args.pictures if os.path.isfile(path)]
    check_outputs("--out", results, [*(path for path, _ in pictures), *listed, *network.files])
    check_writable("--out", args.out)
    mean = torch.tensor(IMG_MEAN, device=network.device)
    for (path, _), pixels, of_pixels in zip(pictures, chosen, stems, strict=True):
        picture = decode_upright(load(path))
        image = subtract_mean(torch.from_numpy(picture)[None].to(network.device), mean)
        maps = picture_attention(network.model, image, pixels).cpu().numpy()
        shown = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        for number, (pixel, stem) in enumerate(zip(pixels, of_pixels, strict=True)):
            os.makedirs(os.path.dirname(stem) or ".", exist_ok=True)
            with replacing(f"{stem}.npy") as temporary:
                np.save(temporary, maps[:, number])
            with replacing(f"{stem}.png") as temporary:
                draw_attention(shown, pixel, maps[:, number]).save(temporary)
            print(f"{stem}.png and .npy: {'x'.join(map(str, maps[:, number].shape))}", flush=True)


def pixels_of(asked: list[tuple[int, int]] | None, picture: PictureFile) -> list[tuple[int, int]]:
    """Return the pixels to look at in a picture: those asked for, or the middle.

    Raises:
        DataError: the picture can't be read.
        UsageError: it has no such pixel.
    """
    height, width = decode_upright(load(picture.path)).shape[:2]
    for row, column in asked or []:
        if row >= height or column >= width:
            raise UsageError(
                f"--pixel {row},{column}: {picture.path} has {height} rows and {width} columns, from 0; "
                "give a pixel in it"
            )
    return asked or [(height // 2, width // 2)]


if __name__ == "__main__":
    common.end(main)
