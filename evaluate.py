"""Evaluate CCNet: mean IoU, the official Cityscapes scores, and a picture of every prediction.

    python evaluate.py --data-dir CS --restore-from snapshots/CS_scenes_60000.pth --gpu 0 --recurrence 2

Writes result.txt, scores.txt, confusion.png and outputs/ beside the checkpoint; with --split test, which has
no labels, the archive that the benchmark's server takes. See --help for all flags.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

import numpy as np
import torch

from dataset import CSDataSet
from dataset.labels import LABELS, choose_table
from dataset.layout import LABEL_IDS, instances_of
from engine.evaluation import results
from engine.evaluation.evaluate import Keep, evaluate
from engine.evaluation.metrics import CityscapesEvaluation, OfficialScores
from engine.evaluation.submission import check_names, write_archive
from engine.inference import predict_classes
from engine.runtime import distributed
from networks import MODELS, load_weights, match_weights
from networks.variants import DEPTHS, options_of
from networks.weights import read_state_dict
from utils import args as flags
from utils.drawing.palette import make_palette, save_gray_png, save_indexed_png
from utils.errors import DataError, UsageError
from utils.files import check_outputs, check_writable, unwritable
from utils.resources import LEAST_BYTES, check_fits

#: The folder of the colored predictions; the split without labels, and what its predictions are gathered in.
OUTPUTS, TEST, SUBMISSION = "outputs", "test", "submission"
#: Of the flags: what was evaluated, and how.
DESCRIPTION = (
    "data_dir", "data_list", "split", "classes", "num_classes", "ignore_label", "model", "backbone",
    "recurrence", "restore_from", "input_size", "whole", "scales", "flip",
)  # fmt: skip


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(
        description="Evaluate CCNet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data-dir",
        required=True,
        help="data set in the Cityscapes layout, or what --data-list is relative to",
    )
    add("--data-list", help="file of 'image<TAB>label' lines; without it the layout's --split")
    add(
        "--split",
        default="val",
        help="folder of the layout; test has no labels, and makes an archive to submit",
    )
    add("--classes", metavar="TABLE", help="what the labels of another data set mean: docs/own_data.md")
    add("--num-classes", type=flags.classes, help="number of train ids; those of --classes, or 19")
    add("--ignore-label", type=flags.label, default=255, help="train id of void pixels")
    add("--model", choices=sorted(MODELS), default="ccnet", help="network")
    add("--backbone", choices=sorted(DEPTHS), default="resnet101", help="backbone")
    add("--recurrence", type=flags.recurrence, default=2, help="how often the attention is applied")
    add("--restore-from", metavar="FILE", help="checkpoint; random weights without it")
    add("--input-size", type=flags.size, default=(769, 769), metavar="H,W", help="tile")
    add(
        "--whole",
        type=flags.boolean,
        nargs="?",
        const=True,
        default=False,
        help="whole pictures instead of tiles",
    )
    flags.add_averaging(parser)
    add(
        "--batch-size",
        type=flags.batch,
        default=1,
        help="pictures of a size at once, for each process",
    )
    add(
        "--tile-batch",
        type=flags.batch,
        metavar="N",
        help="tiles at once, for each process; without it 4 on a GPU, 1 on the CPU, or --batch-size if more",
    )
    add("--num-workers", type=flags.workers, default=2, help="processes that read pictures, for each process")
    add("--output-dir", help="where the results go; without it beside the checkpoint")
    add("--gpu", metavar="IDS", help="such as 0,1,2,3, or cpu; without it every visible GPU, or the CPU")
    add("--nproc", type=flags.processes, metavar="N", help="run N processes on the CPU")
    # torch.distributed.launch passes it; the environment says the same.
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = get_parser().parse_args()
    _, args.num_classes = choose_table(args.classes, args.num_classes)
    if args.output_dir is None:
        args.output_dir = os.path.dirname(args.restore_from) if args.restore_from else "snapshots"
    devices = distributed.choose_devices(args.gpu, args.nproc)
    return distributed.run(devices, check=lambda: check(args), body=lambda world: run(args, world))


def check(args: argparse.Namespace) -> None:
    """Everything that can be known before the first picture; also makes the folder for the predictions.

    Raises:
        InputError: one line that says which flag or file is wrong.
    """
    weights = read_state_dict(args.restore_from) if args.restore_from else None
    with torch.device("meta"):
        model = make_model(args, weights)
    if weights:
        print(match_weights(model, args.restore_from, complete=True, state=weights)[0], flush=True)
    else:
        print("no --restore-from: evaluating random weights", flush=True)
    dataset = make_dataset(args)
    lacking = lacks_for_instances(dataset)
    print(dataset.check(instances=lacking is None), flush=True)
    if lacking:
        print(lacking, flush=True)
    if args.split == TEST:
        check_names(dataset.source, [pair.name for pair in dataset.pairs])
    if distributed.choose_devices(args.gpu, args.nproc)[0].type == "cpu":
        largest = max(dataset.sizes(), key=math.prod) if args.whole else args.input_size
        pixels = math.prod(largest) * (max(args.scales) ** 2 if args.whole else 1)
        check_fits("--input-size, --scales, --whole", int(LEAST_BYTES * pixels))
    check_written(args, dataset)


def check_written(args: argparse.Namespace, dataset: CSDataSet) -> None:
    """See that all results can be written and replace nothing that is read; makes their folders.

    Raises:
        UsageError: naming the file.
    """
    names = [pair.name for pair in dataset.pairs]
    written = [output(args, name) for name in names]
    if args.split == TEST:
        written += [submitted(args, name) for name in names]
    files = [f"{SUBMISSION}.zip"] if args.split == TEST else results.FILES
    written += [os.path.join(args.output_dir, name) for name in files]
    inputs = [args.data_list, args.classes, args.restore_from, *dataset.files()]
    flag = f"--output-dir {args.output_dir}"
    check_outputs(flag, written, inputs)
    for folder in sorted({os.path.dirname(path) for path in written}):
        check_writable("--output-dir", folder or ".")


def make_dataset(args: argparse.Namespace) -> CSDataSet:
    return CSDataSet(
        args.data_dir,
        args.data_list,
        crop_size=None,
        scale=False,
        mirror=False,
        ignore_label=args.ignore_label,
        num_classes=args.num_classes,
        split=args.split,
        table=choose_table(args.classes, None)[0],
        labeled=args.split != TEST,
    )


def has_cityscapes_classes(dataset: CSDataSet) -> bool:
    """Return whether predictions are scored, and by the benchmark's classes."""
    return dataset.labeled and dataset.labels.is_cityscapes()


def lacks_for_instances(dataset: CSDataSet) -> str | None:
    """Return the line that says why the official scores of instances are left out.

    They need Cityscapes' classes, label ids and instance ids. None where all is there; empty where nobody
    expects them, as of other classes.
    """
    if not has_cityscapes_classes(dataset):
        return ""
    if dataset.has_instances():
        return None
    paths = [dataset.path(pair.label) for pair in dataset.pairs]
    if lacking := [path for path in paths if not path.endswith(LABEL_IDS)]:
        what = f"{len(lacking)} of {len(paths)} labels are not *{LABEL_IDS}, the first is {lacking[0]}"
    else:
        lacking = [path for path in map(instances_of, paths) if not os.path.isfile(path)]
        what = (
            f"{len(lacking)} of {len(paths)} files of instance ids are missing, the first is {lacking[0]}; "
            "unpack the whole gtFine_trainvaltest.zip"
        )
    return f"averageScoreInstClasses and averageScoreInstCategories are left out: {what}"


def make_model(args: argparse.Namespace, weights: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    """The network, in the variant that `weights` are of."""
    return MODELS[args.model](
        args.num_classes,
        recurrence=args.recurrence,
        backbone=args.backbone,
        **options_of(weights),
    )


def restore(args: argparse.Namespace) -> torch.nn.Module:
    """The network with the checkpoint's weights, random ones where there is none."""
    weights = read_state_dict(args.restore_from) if args.restore_from else None
    model = make_model(args, weights)
    if weights:
        load_weights(model, args.restore_from, complete=True, state=weights)
    return model


def run(args: argparse.Namespace, world: distributed.World) -> None:
    """Evaluate one process's share of the pictures; rank 0 prints and writes the result."""
    torch.manual_seed(0)  # the same random weights on all processes, where there is no checkpoint
    model = restore(args)
    model.to(world.device).eval()
    dataset = make_dataset(args)
    lacking = lacks_for_instances(dataset)
    tile_size = None if args.whole else args.input_size
    tile_batch = args.tile_batch or max(args.batch_size, 4 if world.device.type == "cuda" else 1)
    result = evaluate(
        lambda images: predict_classes(
            model, images, args.scales, args.flip, tile_size, args.num_classes, tile_batch
        ),
        dataset,
        world,
        args.num_classes,
        args.ignore_label,
        official=CityscapesEvaluation(LABELS) if lacking is None else None,
        batch_size=args.batch_size,
        workers=args.num_workers,
        keep=keeper(args, dataset),
    )

    # Ground truth that is not scored here counts in the official scores, unless it is void.
    if result.official is None and has_cityscapes_classes(dataset) and args.ignore_label >= args.num_classes:
        scores = CityscapesEvaluation(LABELS).pixel_scores(result.confusion)
        result = result._replace(official=OfficialScores(**scores))

    def finish() -> None:
        try:
            if args.split == TEST:
                submit(args, dataset)
            else:
                print(
                    results.write(
                        args.output_dir,
                        result,
                        dataset.labels.names(),
                        {name: getattr(args, name) for name in DESCRIPTION},
                    )
                )
        except OSError as error:
            raise unwritable(error) from error
        except DataError as error:  # a picture that is gone by now
            raise UsageError(str(error)) from error

    world.on_main(finish)


def keeper(args: argparse.Namespace, dataset: CSDataSet) -> Keep:
    """Writes a prediction as a colored picture, and for the test split as one of label ids too."""
    palette = make_palette(dataset.labels.colors())
    label_ids = dataset.labels.label_ids()

    def keep(name: str, prediction: np.ndarray) -> None:
        save_indexed_png(output(args, name), prediction, palette)
        if args.split == TEST:
            save_gray_png(submitted(args, name), label_ids[prediction])

    return keep


def output(args: argparse.Namespace, name: str) -> str:
    """The file of the colored prediction of a picture."""
    return os.path.join(args.output_dir, OUTPUTS, f"{name}.png")


def submitted(args: argparse.Namespace, name: str) -> str:
    """The file of label ids of a picture: the server goes by the beginning, <city>_<sequence>_<frame>."""
    return os.path.join(args.output_dir, SUBMISSION, f"{name}_labelIds.png")


def submit(args: argparse.Namespace, dataset: CSDataSet) -> None:
    """Check the pictures of label ids, and put them into one archive."""
    sizes = [
        (submitted(args, pair.name), size) for pair, size in zip(dataset.pairs, dataset.sizes(), strict=True)
    ]
    path = os.path.join(args.output_dir, f"{SUBMISSION}.zip")
    write_archive(path, sizes, dataset.labels.label_ids())
    print(f"{path}: {len(sizes)} pictures of label ids, each of its picture's size")


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
