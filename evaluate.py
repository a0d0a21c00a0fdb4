"""Evaluate CCNet: mean IoU, the official Cityscapes scores, and a picture of every prediction.

    python evaluate.py --data-dir CS --restore-from snapshots/CS_scenes_60000.pth --gpu 0

The command writes result.txt, scores.txt, pictures.npz, confusion.png and outputs/ next to the checkpoint
(docs/scores.md). With --split test without labels, submission.zip for the benchmark server replaces the
scores. Network and classes are those of the run that wrote the checkpoint (args.json in its folder), unless a
flag overrides them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fused
from dataset import CSDataSet, recognition
from dataset.classes import choose_classes, classes_of_checkpoint
from dataset.folder_pair import LISTS
from dataset.labels import CITYSCAPES, LABELS, ClassTable, rows_of_table
from dataset.transforms import factor_of
from engine.acceleration import accelerate
from engine.data.loader import Loading
from engine.evaluation import results
from engine.evaluation.evaluate import More, Result, evaluate
from engine.evaluation.metrics import CityscapesEvaluation, OfficialScores
from engine.evaluation.submission import check_names, write_archive
from engine.inference import predict_classes, predict_confidence
from engine.options import EvaluateOptions, ValuesOf, add_flags, for_device
from engine.runtime import distributed
from networks import MODELS, Network, fold_batch_norm, load_weights, make_network, match_weights
from networks.models import backbone_name
from networks.of_run import Description, args_file, describe, of_flags
from networks.variants import options_of
from networks.weights import read_state_dict
from utils import args as flags
from utils.drawing.palette import make_palette, save_gray_png, save_indexed_png
from utils.errors import DataError, UsageError
from utils.files import check_outputs, check_writable, unwritable
from utils.resources import check_fits

#: Folder of the colored predictions; folder of the label-id predictions of a split without labels.
OUTPUTS, SUBMISSION = "outputs", "submission"
Weights = dict[str, Tensor] | None

#: Accepted values of flags that depend on other packages.
CHOICES: ValuesOf = {"model": MODELS, "backbone": backbone_name, "dataset": recognition.NAMES}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of evaluate.py."""
    parser = flags.Parser("evaluate.py", __doc__)
    add_flags(parser, EvaluateOptions, CHOICES, reads_checkpoint=True)
    return parser


def main() -> int:
    """Parse the flags, check them, and evaluate; return the exit status."""
    args = get_parser().parse_args()
    with distributed.reported_once():
        options, table, notes = resolve(args, read_weights(args.restore_from))
        devices = distributed.choose_devices(options.gpu, options.nproc)
        options, chosen = for_device(options, devices[0])
    return distributed.run(
        devices,
        check=lambda: check(options, table, devices[0], [*notes, *chosen]),
        body=lambda world: run(options, table, world),
    )


def read_weights(path: str | None) -> Weights:
    """Return the state dict of --restore-from; None without the flag."""
    return read_state_dict(path) if path else None


def resolve(
    args: argparse.Namespace, weights: Weights
) -> tuple[EvaluateOptions, ClassTable | None, list[str]]:
    """Return the options, the class table, and notes on flags that differ from the run of the checkpoint.

    Raises:
        InputError: a flag or file is invalid. The message names the flag or file.
    """
    given = {name: getattr(args, name) for name in Description._fields}
    recorded = of_flags(given) if weights is None else describe(args.restore_from, weights, given)
    found = recorded.description
    if found.classes != given["classes"] and not os.path.isfile(str(found.classes)):
        raise UsageError(
            f"{args_file(args.restore_from)}: names the class table {found.classes}, which does not "
            "exist; give --classes"
        )
    if weights is not None and (recorded.labels is not None or found.classes is not None):
        table = classes_of_checkpoint(args.restore_from, recorded.labels, found.classes, found.num_classes)
        num_classes = len((table or CITYSCAPES).classes)
    else:
        # If nothing is recorded about the run, a published data set, or the labels of a folder pair, tell the
        # classes.
        unknown = weights is not None and not recorded.run and given["num_classes"] is None
        place = place_of(args)
        told = unknown and (place.data is not None or (args.data_list is None and place.is_pair))
        classes = choose_classes(
            args.data_dir,
            args.data_list,
            found.classes,
            None if told else found.num_classes,
            args.dataset,
        )
        table, num_classes = classes.table, classes.number
        if found.num_classes not in (None, num_classes):
            raise UsageError(
                f"--data-dir {args.data_dir}: has labels of {num_classes} classes, but the network has "
                f"{found.num_classes}; give the table that it was trained with as --classes"
            )
    check_list(args, recorded.run)
    vars(args).update(found._replace(num_classes=num_classes)._asdict())
    if args.output_dir is None:
        args.output_dir = os.path.dirname(args.restore_from) if args.restore_from else "snapshots"
    return EvaluateOptions.of(args), table, recorded.notes


def place_of(args: argparse.Namespace | EvaluateOptions) -> recognition.Place:
    """Return the layout of --data-dir."""
    return recognition.recognize(args.data_dir, args.dataset, args.data_list is not None)


def check_list(args: argparse.Namespace, run: Mapping[str, Any]) -> None:
    """Check that pictures for training are not evaluated, where a folder pair would be divided at random.

    Raises:
        UsageError: the run was trained with a list, and no list is given.
    """
    lists = [os.path.join(args.data_dir, name) for name in LISTS.values()]
    if (
        run.get("data_list")
        and args.data_list is None
        and place_of(args).is_pair
        and not any(map(os.path.isfile, lists))
    ):
        raise UsageError(
            f"--data-list: required, because the run was trained with --data-list {run['data_list']}; "
            f"without a list, {args.data_dir} would be divided differently"
        )


def check(options: EvaluateOptions, table: ClassTable | None, device: torch.device, notes: list[str]) -> None:
    """Check everything that can be known before the first picture, and create the folders of the results.

    Raises:
        InputError: a flag or file is invalid. The message names the flag or file.
    """
    options.check()
    print(*notes, sep="\n", end="\n" if notes else "", flush=True)
    weights = read_weights(options.restore_from)
    with torch.device("meta"):
        model = make_model(options, weights)
    if weights:
        print(match_weights(model, str(options.restore_from), complete=True, state=weights)[0], flush=True)
    else:
        print("no --restore-from: evaluating random weights", flush=True)
    dataset = make_dataset(options, table)
    missing = dataset.missing_for_instances()
    print(*dataset.taken, dataset.check(instances=missing is None), sep="\n", flush=True)
    if missing:
        print(f"averageScoreInstClasses and averageScoreInstCategories are omitted: {missing}", flush=True)
    if not dataset.labeled:
        check_names(dataset.source, [pair.name for pair in dataset.pairs])
    if device.type == "cpu":
        largest = max(dataset.sizes(), key=math.prod) if options.whole else options.input_size
        pixels = math.prod(largest) * (max(scales_of(options, largest)) ** 2 if options.whole else 1)
        check_fits("--input-size, --scales, --whole", pixels * options.frames["clip"])
    check_outputs_of(options, dataset)


def check_outputs_of(options: EvaluateOptions, dataset: CSDataSet) -> None:
    """Check that the results can be written and overwrite no input, and create their folders.

    Raises:
        UsageError: a file can't be written or is an input. The message names the file.
    """
    written = [output(options, pair.name) for pair in dataset.pairs]
    files: tuple[str, ...] = results.FILES
    if not dataset.labeled:
        written += [submitted(options, pair.name) for pair in dataset.pairs]
        files = (f"{SUBMISSION}.zip",)
    written += [os.path.join(options.output_dir, name) for name in files]
    inputs = [options.data_list, options.classes, options.restore_from, *dataset.files()]
    check_outputs(f"--output-dir {options.output_dir}", written, inputs)
    for folder in sorted({os.path.dirname(path) for path in written}):
        check_writable("--output-dir", folder or ".")


def run(options: EvaluateOptions, table: ClassTable | None, world: distributed.World) -> None:
    """Evaluate the pictures of this process; rank 0 prints and writes the result."""
    fused.use(options.fused)
    torch.manual_seed(0)  # the same random weights on all processes, if there is no checkpoint
    weights = read_weights(options.restore_from)
    model = make_model(options, weights)
    if weights:
        load_weights(model, str(options.restore_from), complete=True, state=weights)
    model = fold_batch_norm(model).to(world.device)
    network = accelerate(model, world.device, options.speed)
    dataset = make_dataset(options, table)
    tile_size = None if options.whole else options.input_size
    tile_batch = options.tile_batch or max(options.batch_size, 4 if world.device.type == "cuda" else 1)
    predict = predict_confidence if options.calibration and dataset.labeled else predict_classes
    official = CityscapesEvaluation(LABELS) if dataset.missing_for_instances() is None else None
    result = evaluate(
        lambda images: predict(
            network,
            images,
            scales_of(options, images.shape[2:]),
            options.flip and (dataset.labels.mirrored() or True),
            tile_size,
            options.num_classes,
            tile_batch,
        ),
        dataset,
        world,
        Loading(options.batch_size, options.num_workers),
        more=More(official, options.boundary),
        keep=lambda name, prediction: keep(options, dataset, name, prediction),
    )
    # With an --ignore-label below K, a class is ignored here that the official scores count.
    if (
        result.official is None
        and dataset.has_cityscapes_classes()
        and options.ignore_label >= options.num_classes
    ):
        scores = CityscapesEvaluation(LABELS).pixel_scores(result.confusion)
        result = result._replace(official=OfficialScores(**scores))
    world.on_main(lambda: write(options, dataset, result))


def scales_of(options: EvaluateOptions, size: Sequence[int]) -> Sequence[float]:
    """Return the scales at which a picture of (height, width) `size` is predicted."""
    if not options.short_sides:
        return options.scales
    height, width = size
    return [factor_of((height, width), side, options.long_side) for side in options.short_sides]


def make_dataset(options: EvaluateOptions, table: ClassTable | None) -> CSDataSet:
    """Return the data set to evaluate on."""
    return CSDataSet(
        options.data_dir,
        options.data_list,
        crop_size=None,
        scale=False,
        mirror=False,
        ignore_label=options.ignore_label,
        num_classes=options.num_classes,
        split=options.split,
        table=table,
        labeled=recognition.has_labels(place_of(options), options.split, options.data_list is not None),
        dataset=options.dataset,
        **options.frames,
    )


def make_model(options: EvaluateOptions, weights: Weights) -> Network:
    """Return the network in the variant of `weights`."""
    return make_network(
        options.model,
        options.num_classes,
        options.recurrence,
        backbone=options.backbone,
        **options_of(weights),
    )


def output(options: EvaluateOptions, name: str) -> str:
    """Return the path of the colored prediction of a picture."""
    return os.path.join(options.output_dir, OUTPUTS, f"{name}.png")


def submitted(options: EvaluateOptions, name: str) -> str:
    """Return the path of the label ids. The server reads <city>_<sequence>_<frame> from the file name."""
    return os.path.join(options.output_dir, SUBMISSION, f"{name}_labelIds.png")


def keep(options: EvaluateOptions, dataset: CSDataSet, name: str, prediction: np.ndarray) -> None:
    """Write a prediction as a colored picture and, for the test split, as label ids."""
    save_indexed_png(output(options, name), prediction, make_palette(dataset.labels.colors()))
    if not dataset.labeled:
        save_gray_png(submitted(options, name), dataset.labels.label_ids()[prediction])


def write(options: EvaluateOptions, dataset: CSDataSet, result: Result) -> None:
    """Write the scores or, for the test split, the archive of the predicted label ids."""
    try:
        if not dataset.labeled:
            sizes = [
                (submitted(options, pair.name), size)
                for pair, size in zip(dataset.pairs, dataset.sizes(), strict=True)
            ]
            path = os.path.join(options.output_dir, f"{SUBMISSION}.zip")
            write_archive(path, sizes, dataset.labels.label_ids())
            print(f"{path}: {len(sizes)} pictures of label ids, each as large as its input")
        else:
            table = dataset.labels.table
            rows = None if table is None else rows_of_table(table)
            names = dataset.labels.names()
            print(results.write(options.output_dir, result, names, options.noted(), rows))
    except OSError as error:
        raise unwritable(error) from error
    except DataError as error:  # a picture that was removed during the evaluation
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
