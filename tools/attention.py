"""Draw the attention maps of pixels.

    python -m tools.attention PICTURE --restore-from CKPT [--pixel ROW,COLUMN ...] [--out DIR]

For each pixel, DIR receives a figure as in the paper, NAME_ROW_COLUMN.png: the picture with a cross at the
pixel, and the attention map after each recurrence. For ccnet, the first map is the softmax over the row and
the column of the pixel, and the second one is the product of two such steps and covers the whole picture. For
nonlocal, all maps cover the whole picture. The weights are written to NAME_ROW_COLUMN.npy: float32 [R, H, W]
at the resolution of the head. Each map sums to 1.
"""

from __future__ import annotations

import argparse
import os

import cv2
import numpy as np

from dataset.pictures import decode_upright, load
from tools import common
from tools.sources import PictureFile, find
from utils import args as flags
from utils.drawing.attention_figure import draw_attention
from utils.errors import UsageError
from utils.files import check_outputs, check_writable, replacing


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("attention", __doc__)
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="picture, folder of pictures, or list of pictures")
    add(
        "--pixel",
        type=flags.pair(flags.count, "a pixel; give row,column such as 120,340"),
        action="append",
        dest="pixels",
        metavar="ROW,COLUMN",
        help="pixel, counted from 0 at the top left; may be given several times (default: the middle)",
    )
    add("--out", default="attention", metavar="DIR", help="output folder (default: %(default)s)")
    common.add_network_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(argv)
    pictures, videos = find(args.pictures, leave_out=os.path.realpath(args.out))
    if videos:
        raise UsageError(f"{videos[0].path}: is a video or camera; name pictures")
    network = common.open_network(args)
    if network.description.recurrence is None:
        raise UsageError(
            f"{args.restore_from}: is of the model {network.description.model}, which has no attention to "
            "draw; name a checkpoint of ccnet or nonlocal"
        )
    if network.frames.clip > 1:
        raise UsageError(
            f"--clip {network.frames.clip}: maps over several frames are not drawn; add --model ccnet "
            f"--recurrence {network.description.recurrence}, which takes the same weights and single pictures"
        )
    if not network.attends:
        raise UsageError("--recurrence 0: there is no attention to draw; give 1 or more")
    chosen = [pixels_of(args.pixels, picture) for picture in pictures]
    stems = [
        [os.path.join(args.out, f"{name}_{row}_{column}") for row, column in pixels]
        for (_, name), pixels in zip(pictures, chosen, strict=True)
    ]
    results = [f"{stem}{ending}" for several in stems for stem in several for ending in (".png", ".npy")]
    listed = [path for path in args.pictures if os.path.isfile(path)]
    check_outputs("--out", results, [*(path for path, _ in pictures), *listed, *network.files])
    check_writable("--out", args.out)
    for (path, _), pixels, of_pixels in zip(pictures, chosen, stems, strict=True):
        picture = cv2.cvtColor(decode_upright(load(path)), cv2.COLOR_BGR2RGB)
        maps = network.attention(picture, pixels)
        for pixel, stem, of_pixel in zip(pixels, of_pixels, maps, strict=True):
            os.makedirs(os.path.dirname(stem) or ".", exist_ok=True)
            with replacing(f"{stem}.npy") as temporary:
                np.save(temporary, of_pixel)
            with replacing(f"{stem}.png") as temporary:
                draw_attention(picture, pixel, of_pixel).save(temporary)
            print(f"{stem}.png and .npy: {'x'.join(map(str, of_pixel.shape))}", flush=True)


def pixels_of(asked: list[tuple[int, int]] | None, picture: PictureFile) -> list[tuple[int, int]]:
    """Return the pixels to draw: those of --pixel, or the middle of the picture.

    Raises:
        DataError: the picture can't be read.
        UsageError: a pixel lies outside of the picture.
    """
    height, width = decode_upright(load(picture.path)).shape[:2]
    for row, column in asked or []:
        if row >= height or column >= width:
            raise UsageError(
                f"--pixel {row},{column}: {picture.path} has {height} rows and {width} columns, from 0; "
                "give a pixel inside of it"
            )
    return asked or [(height // 2, width // 2)]


if __name__ == "__main__":
    common.end(main)
