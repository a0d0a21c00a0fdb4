"""Write the generated data set (`python -m dataset.mini OUT`)."""

from __future__ import annotations

import argparse
import re
import sys

from dataset import mini
from dataset.mini import SIZES
from utils import args as flags
from utils.errors import UsageError
from utils.files import unwritable


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    (low_h, low_w), (high_h, high_w) = SIZES
    if match is None or not (low_h <= int(match[1]) <= high_h and low_w <= int(match[2]) <= high_w):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a size; give HxW from {low_h}x{low_w} to {high_h}x{high_w}, such as 128x256"
        )
    return int(match[1]), int(match[2])


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = flags.Parser(prog="python -m dataset.mini", description=(mini.__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="folder to write: new, empty, or with the same data set")
    number = flags.number(int, 1, 999_999)
    parser.add_argument("--train", type=number, default=120, help="number of training pictures")
    parser.add_argument("--val", type=number, default=24, help="number of validation pictures")
    parser.add_argument(
        "--size", type=_size, default=(128, 256), help="size of the pictures, HEIGHTxWIDTH (default: 128x256)"
    )
    parser.add_argument(
        "--layout", choices=mini.LAYOUTS, default=mini.CITYSCAPES, help="data set whose layout to write"
    )
    parser.add_argument("--seed", type=flags.seed, default=0, help="seed of the data set")
    parser.add_argument(
        "--video",
        action="store_true",
        help="hide parts of each picture, and write the frames before and after it, which show them",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = get_parser().parse_args(argv)
    if args.video and args.layout != mini.CITYSCAPES:
        raise UsageError(
            f"--video: has the layout of Cityscapes, not --layout {args.layout}; omit one of them"
        )
    what = f"{args.train} training and {args.val} validation pictures of {args.size[0]}x{args.size[1]}"
    try:
        written = mini.write(args.out, args.train, args.val, args.size, args.seed, args.layout, args.video)
    except OSError as error:
        raise unwritable(error) from error
    print(f"{args.out}: {'wrote' if written else 'already holds'} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
