"""Write one HTML page on which each pixel shows what it attends to.

    python -m tools.explore CHECKPOINT [PICTURE ...] [--beside CHECKPOINT] [--out FILE.html]

The page shows each picture with its prediction. For the pixel that is clicked, or chosen with the arrow keys,
it shows the class, its probability, and the attention map after each recurrence. With --beside, it shows the
same pixel in a second network. The page is a single file that needs no network and no server.

A PICTURE is a picture, a folder, or a list, as for tools.predict. Without one, the page has some validation
pictures of the data set that args.json next to the checkpoint names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dataset import CSDataSet
from dataset.pictures import decode_upright, load, read_header
from engine.options import ClassOptions, NetworkOptions, add_flags
from networks import MODELS
from networks.attention import choose_grid
from networks.models import backbone_name
from segmenter import TILE, Segmenter
from tools import common
from tools.explore_page import Explorable, NetworkText, Seen, explorable, explorer
from tools.report_page import document
from tools.sources import PictureFile, find
from utils import args as flags
from utils.errors import InputError, UsageError
from utils.files import check_output_file, write_file
from utils.progress import Progress

#: Number of validation pictures if none is named.
FEW = 4
#: Maximum number of cells of the grid by default.
CELLS = 2048
#: Maximum length of the longer side of a picture on the page.
LONGEST = 1024
#: Maximum size of a page in bytes. Browsers take longer than some seconds to open larger ones.
MOST_BYTES = 300 * 2**20
#: Ratio of the sides of a picture and its features.
STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(NetworkOptions, ClassOptions):
    """Options for the network of the checkpoint."""


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("explore", __doc__)
    add = parser.add_argument
    add("restore_from", metavar="CHECKPOINT", help="checkpoint of the network")
    add("pictures", nargs="*", metavar="PICTURE", help="picture, folder of pictures, or list of pictures")
    add("--out", default="explore.html", metavar="FILE", help="page to write (default: %(default)s)")
    add("--beside", metavar="CHECKPOINT", help="second checkpoint, for the same pictures and pixels")
    add(
        "--grid",
        type=flags.pair(flags.positive_int, "a grid; give rows,columns such as 32,64"),
        metavar="ROWS,COLUMNS",
        help="number of pixels that show their attention (default: square cells, 32,64 for a picture twice "
        "as wide as high, at most one for each pixel of the features)",
    )
    add(
        "--input-size",
        type=flags.size,
        default=TILE,
        metavar="H,W",
        help="size of the tiles of the prediction (default: 769,769)",
    )
    add("--whole", action="store_true", help="predict every picture as a whole, without tiles")
    add_flags(parser, ExploreOptions, {"model": MODELS, "backbone": backbone_name}, reads_checkpoint=True)
    add("--gpu", metavar="ID", help="GPU id, or cpu; by default the first GPU, or the CPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(argv)
    pictures, videos = find(args.pictures, leave_out="")
    if videos:
        raise UsageError(f"{videos[0].path}: is a video or camera; name pictures")
    networks = [open_checked(args)]
    if args.beside:
        networks.append(open_checked(argparse.Namespace(restore_from=args.beside, gpu=args.gpu)))
    pictures = pictures or validation_pictures(networks[0])
    inputs = [*(path for path, _ in pictures), *args.pictures, *(f for each in networks for f in each.files)]
    check_output_file("--out", args.out, inputs)
    check_size(pictures, networks, args.grid)

    progress, ready = Progress(len(pictures)), []
    for number, (path, name) in enumerate(pictures, 1):
        picture = cv2.cvtColor(decode_upright(load(path)), cv2.COLOR_BGR2RGB)
        tile_size = None if args.whole else args.input_size
        seen = [look(network, picture, args.grid, CELLS, tile_size=tile_size) for network in networks]
        ready.append(explorable(name, picture, seen, LONGEST))
        progress.show(number)
    content = page([describe(network) for network in networks], ready)
    write_file(args.out, content)
    print(f"{args.out}: {counted(len(ready))}, {os.path.getsize(args.out) / 2**20:.1f} MiB")


def open_checked(args: argparse.Namespace) -> Segmenter:
    """Load the network of the flags.

    Raises:
        InputError: a flag or file is invalid, or the network takes clips.
    """
    network = common.open_network(args)
    if network.frames.clip > 1:
        raise UsageError(
            f"--clip {network.frames.clip}: maps over several frames are not drawn; add --model ccnet "
            f"--recurrence {network.description.recurrence}, which takes the same weights and single pictures"
        )
    return network


def validation_pictures(network: Segmenter) -> list[PictureFile]:
    """Return some validation pictures of the data set of a network, from its whole range.

    Raises:
        UsageError: the data set is not recorded, or can't be read.
    """
    run, advice = network.run, "name pictures after the checkpoint"
    if not isinstance(run.get("data_dir"), str):
        raise UsageError(f"{network.path}: there is no args.json that says where its data set is; {advice}")
    lists = run.get("val_list")
    try:
        dataset = CSDataSet(
            run["data_dir"],
            lists if isinstance(lists, str) else None,
            crop_size=None,
            scale=False,
            mirror=False,
            num_classes=network.num_classes,
            split="val",
            dataset=run["dataset"] if isinstance(run.get("dataset"), str) else None,
        )
    except InputError as error:
        raise UsageError(f"{network.path}: its data set can't be used ({error}); {advice}") from error
    number = min(FEW, len(dataset))
    chosen = [dataset.pairs[index] for index in np.linspace(0, len(dataset) - 1, number).round().astype(int)]
    return [PictureFile(dataset.path(pair.image), pair.name) for pair in chosen]


def check_size(
    pictures: Sequence[PictureFile], networks: Sequence[Segmenter], asked: tuple[int, int] | None
) -> None:
    """Print the largest possible size of the page.

    Raises:
        DataError: a picture can't be read.
        UsageError: the page would be too large.
    """
    total = 0.0
    for path, _ in pictures:
        header = read_header(path)
        height, width = header.height, header.width
        pixels = height * width * min(1.0, LONGEST / max(height, width)) ** 2
        rows, columns = choose_grid((height // STRIDE + 1, width // STRIDE + 1), asked, CELLS)
        # Predictions and maps are compressed, but some hardly become smaller; base64 adds a third.
        total += 4 / 3 * pixels
        for network in networks:
            recurrence = (network.description.recurrence or 0) if network.attends else 0
            total += 4 / 3 * (4 * pixels + recurrence * (rows * columns) ** 2)
    said = f"at most {total / 2**20:.0f} MiB" if total >= 2**20 else "less than 1 MiB"
    if total > MOST_BYTES:
        chosen = ",".join(map(str, asked or (rows, columns)))
        raise UsageError(
            f"{counted(len(pictures))}: the page would take {said}, and browsers hardly open more than "
            f"{MOST_BYTES >> 20}; name fewer pictures, or give a --grid smaller than {chosen}"
        )
    print(f"{counted(len(pictures))}: the page will take {said}", flush=True)


def counted(number: int) -> str:
    """Write a number of pictures: "1 picture" or "2 pictures"."""
    return "1 picture" if number == 1 else f"{number} pictures"


def look(
    network: Segmenter,
    picture: np.ndarray,
    asked: tuple[int, int] | None,
    cells: int,
    **options: object,
) -> Seen:
    """Return what a network makes of a picture.

    Args:
        network: the network.
        picture: uint8 RGB [h, w, 3].
        asked: rows and columns of the grid of pixels that attend; None for square cells.
        cells: maximum number of cells if `asked` is None.
        **options: arguments of `Segmenter.predict`.
    """
    prediction = network.predict(picture, **options)  # type: ignore[arg-type]
    if not network.attends:
        return Seen(prediction.classes, prediction.probabilities)
    weights, size = network.attention_grid(picture, asked, cells)
    return Seen(prediction.classes, prediction.probabilities, weights.numpy(), size)


def describe(network: Segmenter) -> NetworkText:
    """Return what the page says about a network."""
    found = network.description
    folder, name = os.path.split(network.path or "random weights")
    parts = [found.model, found.backbone]
    if found.recurrence is not None:
        parts.append(f"recurrence {found.recurrence}")
    reason = ""
    if not network.attends:
        what = f"the model {found.model} has" if found.recurrence is None else "recurrence 0 has"
        reason = f"{what} no attention, so there are no maps."
        reason = reason[0].upper() + reason[1:]
    title = f"{name} in {folder}" if folder else name
    return NetworkText(title, ", ".join(parts), network.names, network.palette, reason)


def page(networks: Sequence[NetworkText], pictures: Sequence[Explorable]) -> str:
    """Return the page as HTML that refers to no other file."""
    title = " and ".join(each.title for each in networks)
    heading = "Predictions" if all(each.no_maps for each in networks) else "What pixels attend to"
    body = [f"<h1>{heading}</h1>", explorer(networks, pictures)]
    return document(f"CCNet: {title}", body, ["explore"], "body { max-width: 1680px; }")


if __name__ == "__main__":
    common.end(main)
