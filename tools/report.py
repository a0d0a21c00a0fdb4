"""Write one HTML page about a training run.

    python -m tools.report RUN_DIR [--out FILE.html]

RUN_DIR is the --snapshot-dir of a training run, with the results of evaluate.py in it or in --results. The
page shows the recipe, the environment, the curves, the scores and how they were obtained, the confusion
matrix, the best and the worst pictures with label and prediction, and attention maps. The reader can sort the
pictures, lay label, prediction, errors and confidence over them, and see what any pixel attends to. The page
is a single file that needs no network. If the run lacks a part, the page says how to get it.
"""

from __future__ import annotations

import argparse
import glob
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

import train
from dataset import CSDataSet
from dataset.labels import CITYSCAPES, ClassTable, LabelReader, choose_table, table_of_rows
from dataset.pictures import PNG_SIGNATURE, decode_image, decode_label, load
from engine.evaluation.metrics import confusion_matrix, mean_iou
from engine.evaluation.results import CONFUSION, FILES, RESULT
from networks import MODELS
from networks.models import model_flags
from networks.of_run import args_file
from networks.timm_backbone import is_timm
from networks.variants import DEPTHS
from networks.weights import read_state_dict
from segmenter import TILE, Segmenter
from tools import common
from tools.explore import describe, look
from tools.explore_page import explorable, explorer
from tools.report_page import WIDTH, Color, Example, Figure, Report, page
from utils import args as flags
from utils import run_files
from utils.drawing.attention_figure import draw_panels
from utils.drawing.palette import colored, make_palette
from utils.errors import DataError, InputError, RunError, UsageError
from utils.files import check_outputs, check_writable, read_input, write_file
from utils.progress import Progress

OUTPUTS, EVENTS = "outputs", "tensorboard"
#: Maximum number of pictures of a kind on a page.
MOST = 1000
#: Maximum number of pixels of a picture that show their attention.
CELLS = 600
#: Colors of wrong and of other pixels, RGBA.
WRONG, CLEAR = (230, 30, 40, 255), (0, 0, 0, 0)


class Scored(NamedTuple):
    """A picture of the data set, and the mean IoU of its prediction."""

    number: int  # index in the data set
    score: float


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("report", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", help="folder of a training run")
    add("--out", metavar="FILE", help="page to write (default: RUN_DIR/report.html)")
    add("--results", metavar="DIR", help="output folder of evaluate.py (default: RUN_DIR)")
    add(
        "--pictures",
        type=flags.number(int, 0, MOST),
        default=3,
        metavar="N",
        help="number of best and of worst pictures (default: %(default)s)",
    )
    add(
        "--attention",
        type=flags.number(int, 0, MOST),
        default=2,
        metavar="N",
        help="number of pictures with attention maps, on which the reader can choose pixels. With 0, the "
        "checkpoint is not opened, and the best and worst pictures have no confidence (default: %(default)s)",
    )
    add(
        "--restore-from",
        metavar="FILE",
        help="checkpoint for attention maps and confidence (default: the evaluated one)",
    )
    add("--gpu", metavar="ID", help="number of a GPU, or cpu (default: the first GPU, or the CPU)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(argv)
    if not os.path.isdir(args.run):
        raise UsageError(f"{args.run}: no such folder; name the --snapshot-dir of a run")
    results = args.results or args.run
    recipe, result = run_files.read_arguments(args.run), run_files.read_result(results)
    common.choose_device(args.gpu)
    if args.restore_from:
        read_state_dict(args.restore_from)
    if not recipe and not result:
        raise UsageError(
            f"{args.run}: has neither {run_files.ARGUMENTS} nor {RESULT}; name the --snapshot-dir of a run"
        )
    missing: list[str] = []
    evaluation = None
    if result:
        try:
            evaluation = Evaluation.open(results, result)
        except InputError as error:
            # The data set may have been moved; the rest of the page does not need it.
            missing.append(f"no pictures: {error}")
    else:
        missing.append(
            f"no scores and pictures: there is no {RESULT} in {results}; run evaluate.py to write it"
        )
    out = args.out or os.path.join(args.run, "report.html")
    check_outputs("--out", [out], inputs_of(args.run, results, args.restore_from, evaluation))
    check_writable("--out", os.path.dirname(out) or ".")
    log, odd = run_files.read_log(args.run)
    if odd:
        path = os.path.join(args.run, run_files.LOG)
        missing.append(f"{path}: skipped {odd} of {odd + len(log)} lines, which are not entries of a log")
    report = Report(
        name=os.path.basename(os.path.abspath(args.run)),
        recipe=recipe,
        defaults=defaults_of(recipe.get("model")),
        environment=run_files.read_environment(args.run),
        log=log,
        validation=read_validation(os.path.join(args.run, EVENTS)),
        result=result or {},
        confusion=read_confusion(os.path.join(results, CONFUSION), missing),
        missing=missing,
        colors=class_colors(results, result) if result else (),
        pictures=len(evaluation.dataset) if evaluation else None,
    )
    if evaluation:
        try:
            report = with_examples(report, args, evaluation)
        except InputError as error:
            report.missing.append(f"no pictures: {error}")
    write_file(out, page(report))
    print(f"{out}: {os.path.getsize(out) / 2**20:.1f} MiB")
    for line in report.missing:
        print(line)


def defaults_of(model: Any) -> dict[str, Any]:
    """Return the flags that train.py has for a model if none is given."""
    defaults = vars(train.get_parser().parse_args(["--data-dir", "."]))
    known = isinstance(model, str) and model in MODELS
    return defaults | model_flags(model if known else defaults["model"])


class Evaluation(NamedTuple):
    """An evaluation: its data set, its arguments and its predictions."""

    dataset: CSDataSet
    arguments: dict[str, Any]  # "arguments" of result.txt
    predictions: str  # folder

    @classmethod
    def open(cls, results: str, result: dict[str, Any]) -> Evaluation:
        """Return the evaluation that wrote `result`.

        Raises:
            DataError, UsageError: `result` does not describe it, or its data set no longer exists.
        """
        how = run_files.arguments_of(results, result)
        dataset = CSDataSet(
            how["data_dir"],
            how["data_list"],
            crop_size=None,
            scale=False,
            mirror=False,
            ignore_label=how["ignore_label"],
            num_classes=how["num_classes"],
            split=how["split"],
            table=table_of(results, result, how),
            dataset=how.get("dataset"),
        )
        return cls(dataset, how, os.path.join(results, OUTPUTS))


def inputs_of(
    run: str, results: str, checkpoint: str | None, evaluation: Evaluation | None
) -> list[str | None]:
    """Return the files that the page is made from. Some may be None or missing."""
    names = (run_files.ARGUMENTS, run_files.ENVIRONMENT, run_files.LOG)
    inputs: list[str | None] = [os.path.join(run, name) for name in names]
    inputs += [os.path.join(results, name) for name in FILES]
    inputs += event_files(os.path.join(run, EVENTS))
    if evaluation:
        dataset, how, predictions = evaluation
        inputs += [prediction_path(predictions, pair.name) for pair in dataset.pairs]
        inputs += [*dataset.files(), how["data_list"], how["classes"]]
        checkpoint = checkpoint or how["restore_from"]
    if checkpoint:
        inputs += [checkpoint, args_file(checkpoint)]
    return inputs


# Files of a run


def read_confusion(path: str, missing: list[str]) -> bytes | None:
    """Return the content of a PNG file.

    Args:
        path: the file.
        missing: receives a line if the file is damaged.

    Returns:
        None if the file is missing or damaged.
    """
    if not os.path.lexists(path):
        return None
    try:
        content = read_input(path)
        if decode_image(load(path)) is not None and content.startswith(PNG_SIGNATURE):
            return content
        missing.append(f"no confusion matrix: {path} is not a PNG file; run evaluate.py again")
    except (OSError, DataError) as error:
        missing.append(f"no confusion matrix: {path} can't be read ({error}); run evaluate.py again")
    return None


def table_of(results: str, result: dict[str, Any], how: dict[str, Any]) -> ClassTable | None:
    """Return the class table of an evaluation; None for the classes of Cityscapes.

    Raises:
        DataError: the table is invalid.
    """
    if (rows := result.get("labels")) is not None:
        return table_of_rows(os.path.join(results, RESULT), rows)
    return choose_table(how["classes"], how["num_classes"])[0]


def class_colors(results: str, result: dict[str, Any]) -> Sequence[Color]:
    """Return the RGB colors of the classes of a result; empty if its class table no longer exists."""
    try:
        how = run_files.arguments_of(results, result)
        colors = LabelReader(table_of(results, result, how), num_classes=how["num_classes"]).colors()
    except InputError:
        colors = list(CITYSCAPES.colors) if result["classes"] == list(CITYSCAPES.names) else []
    palette = make_palette(colors)
    number = len(result["classes"]) if colors else 0
    return [palette[3 * index : 3 * index + 3] for index in range(min(number, 255))]


def event_files(folder: str) -> list[str]:
    """Return the TensorBoard files of a folder, oldest first."""
    found = [
        path for path in glob.glob(os.path.join(glob.escape(folder), "events.*")) if os.path.isfile(path)
    ]
    return sorted(found, key=os.path.getmtime)


def read_validation(folder: str) -> list[tuple[float, float]]:
    """Return (step, mean IoU) of the validations in TensorBoard files; the last one of a repeated step."""
    scores: dict[float, float] = {}
    for path in event_files(folder):
        for event in read_events(path):
            for value in event.summary.value:
                if value.tag == "val/mean_iou" and run_files.is_number(value.simple_value, 0, 1):
                    scores[float(event.step)] = value.simple_value
    return sorted(scores.items())


def read_events(path: str) -> Iterator[Any]:
    """Yield the events of a TensorBoard file.

    Each record consists of length (8 bytes), checksum (4 bytes), content and checksum.
    """
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    try:
        content = read_input(path)
    except OSError:
        return
    position = 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        record = content[position + 12 : position + 12 + length]
        position += 16 + length
        try:
            event = Event.FromString(record)
        except DecodeError:  # damaged, or the run is still writing
            return
        yield event


# Pictures


def with_examples(report: Report, args: argparse.Namespace, evaluation: Evaluation) -> Report:
    """Return the report with its best and worst pictures, and with attention maps.

    Raises:
        DataError, UsageError: pictures, labels, predictions or the checkpoint no longer exist.
    """
    dataset, how, predictions = evaluation
    scored = score_pictures(dataset, predictions)
    ranked = sorted((each for each in scored if not np.isnan(each.score)), key=lambda each: -each.score)
    half = (len(ranked) + 1) // 2
    best, worst = ranked[:half][: args.pictures], ranked[half:][::-1][: args.pictures]
    palette = make_palette(dataset.labels.colors())
    occurring = np.zeros(256, bool)

    network = None
    checkpoint = args.restore_from or how["restore_from"]
    no_confidence = "--attention 0 does not open the checkpoint" if checkpoint else "there is no checkpoint"
    if args.attention and checkpoint:
        try:
            network, no_confidence = open_evaluated(checkpoint, how, args.gpu), ""
        except InputError as error:
            report.missing.append(f"no attention: {error}")
            no_confidence = str(error)

    def shown(several: list[Scored]) -> list[Example]:
        nonlocal no_confidence
        examples = []
        for number, score in several:
            picture = dataset.picture(number, instances=False)
            assert picture.label is not None
            prediction = read_prediction(predictions, picture.name, dataset.labels.num_classes)
            occurring[np.unique(picture.label)] = occurring[np.unique(prediction)] = True
            row = [
                Figure("picture", picture.image[..., ::-1]),
                Figure("label", colored(picture.label, palette)),
                Figure("prediction", colored(prediction, palette)),
            ]
            wrong = (prediction != picture.label) & (picture.label != dataset.labels.ignore_label)
            layers = {"errors": np.where(wrong[..., None], WRONG, CLEAR).astype(np.uint8)}
            if network is not None and not no_confidence:
                try:
                    layers["confidence"] = confidence_of(network, evaluation, number)
                except (InputError, RunError) as error:
                    no_confidence = str(error)
            examples.append(Example(picture.name, score, [row], layers))
        return examples

    report = report._replace(best=shown(best), worst=shown(worst), no_confidence=no_confidence)
    names = [*enumerate(dataset.labels.names()), (dataset.labels.ignore_label, "not scored")]
    report = report._replace(
        legend=[(name, palette[3 * index : 3 * index + 3]) for index, name in names if occurring[index]]
    )
    if network is None:
        return report
    try:
        examples, explorer_of_them = attention_of(network, args.attention, evaluation, ranked)
    except (InputError, RunError) as error:
        report.missing.append(f"no attention: {error}")
        return report
    return report._replace(attention=examples, explorer=explorer_of_them)


def open_evaluated(checkpoint: str, how: dict[str, Any], gpu: str | None) -> Segmenter:
    """Return the network of a checkpoint, as it was evaluated.

    Args:
        checkpoint: path of the checkpoint.
        how: arguments of the evaluation.
        gpu: value of --gpu.

    Raises:
        InputError: the checkpoint can't be used, or its weights are not those of the evaluated network.
    """
    backbone = how.get("backbone")
    return common.open_network(
        argparse.Namespace(
            restore_from=checkpoint,
            model=how.get("model") if how.get("model") in [*MODELS] else None,
            backbone=backbone if is_timm(backbone) or backbone in [*DEPTHS] else None,
            recurrence=how["recurrence"],
            num_classes=how["num_classes"],
            classes=how["classes"],
            gpu=gpu,
        )
    )


def prediction_options(how: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Segmenter.predict` for an evaluation; none for what is not recorded."""
    size = how.get("input_size")
    options: dict[str, Any] = {"tile_size": tuple(size) if isinstance(size, list) else TILE}
    if how.get("whole"):
        options["tile_size"] = None
    return options | {name: how[name] for name in ("scales", "flip") if how.get(name) is not None}


def confidence_of(network: Segmenter, evaluation: Evaluation, number: int) -> np.ndarray:
    """Return a drawing of the probability of the predicted class, uint8 RGB [h, w, 3]; brighter is higher.

    Args:
        network: the evaluated network.
        evaluation: the data set, and how it was evaluated.
        number: index of the picture in the data set.

    Raises:
        InputError, RunError: see `Segmenter.predict`.
    """
    dataset = evaluation.dataset
    picture: Any = dataset.path(dataset.pairs[number].image)
    if network.frames.clip == 1:
        picture = cv2.cvtColor(dataset.picture(number, instances=False).image, cv2.COLOR_BGR2RGB)
    prediction = network.predict(picture, **prediction_options(evaluation.arguments))
    codes = np.rint(255 * prediction.probabilities.max(0)).astype(np.uint8)
    return cv2.applyColorMap(codes, cv2.COLORMAP_INFERNO)[..., ::-1]


def score_pictures(dataset: CSDataSet, predictions: str) -> list[Scored]:
    """Return the mean IoU of each picture, over the classes that occur in its label or prediction.

    Raises:
        DataError, UsageError: a label or prediction is missing, damaged, or of a wrong size.
    """
    progress = Progress(len(dataset))
    scored = []
    for index, pair in enumerate(dataset.pairs):
        label = torch.from_numpy(dataset.labels.read(load(dataset.path(pair.label))))
        prediction = torch.from_numpy(read_prediction(predictions, pair.name, dataset.labels.num_classes))
        if label.shape != prediction.shape:
            raise UsageError(
                f"{prediction_path(predictions, pair.name)}: its size differs from that of the label; "
                "run evaluate.py again"
            )
        confusion = confusion_matrix(
            label, prediction, dataset.labels.num_classes, dataset.labels.ignore_label
        )
        scored.append(Scored(index, mean_iou(confusion)))
        progress.show(index + 1)
    return scored


def prediction_path(folder: str, name: str) -> str:
    """Return the path of the prediction of a picture."""
    return os.path.join(folder, f"{name}.png")


def read_prediction(folder: str, name: str, num_classes: int) -> np.ndarray:
    """Return the classes of a picture, uint8 [h, w].

    Raises:
        DataError: the file is missing or damaged.
        UsageError: it does not hold classes.
    """
    path = prediction_path(folder, name)
    classes = decode_label(load(path))
    if classes.ndim != 2 or classes.dtype != np.uint8 or classes.max(initial=0) >= num_classes:
        raise UsageError(f"{path}: not a prediction of {num_classes} classes; run evaluate.py again")
    return classes


def attention_of(
    network: Segmenter, number_of_pictures: int, evaluation: Evaluation, ranked: list[Scored]
) -> tuple[list[Example], str]:
    """Return attention maps of pictures from all ranks, computed by the network as it was evaluated.

    Args:
        network: the evaluated network.
        number_of_pictures: number of pictures, with two pixels each.
        evaluation: the data set and its predictions.
        ranked: the pictures, ordered by score.

    Returns:
        The examples, and an explorer of the same pictures as HTML. Both are empty without attention.
    """
    if not network.attends or not ranked:
        return [], ""
    dataset = evaluation.dataset
    number_of_pictures = min(number_of_pictures, len(ranked))
    options = prediction_options(evaluation.arguments)
    examples, ready = [], []
    for index in np.linspace(0, len(ranked) - 1, number_of_pictures + 2).round().astype(int)[1:-1]:
        picture = dataset.picture(ranked[index].number, instances=False)
        prediction = read_prediction(evaluation.predictions, picture.name, dataset.labels.num_classes)
        height, width = picture.image.shape[:2]
        pixels = [(height // 2, width // 3), (2 * height // 3, 2 * width // 3)]
        shown = cv2.cvtColor(picture.image, cv2.COLOR_BGR2RGB)
        rows = []
        for pixel, maps in zip(pixels, network.attention(shown, pixels), strict=True):
            where = describe_pixel(pixel, picture.label, prediction, dataset.labels.names())
            first, *others = draw_panels(shown, pixel, maps)
            row = [Figure(f"Cross: {where}", np.array(first.image))]
            row += [Figure(f"{caption}; cross: {where}", np.array(panel)) for caption, panel in others]
            rows.append(row)
        examples.append(Example(picture.name, ranked[index].score, rows))
        seen = look(network, shown, None, CELLS, **options)
        ready.append(explorable(picture.name, shown, [seen], WIDTH))
    return examples, explorer([describe(network)], ready)


def describe_pixel(
    pixel: tuple[int, int], label: np.ndarray | None, prediction: np.ndarray, names: Sequence[str]
) -> str:
    """Return the position of a pixel and the names of its true and its predicted class."""
    true = 255 if label is None else int(label[pixel])
    true_name = names[true] if true < len(names) else "none (not scored)"
    return f"row {pixel[0]}, column {pixel[1]}, label {true_name}, prediction {names[prediction[pixel]]}"


if __name__ == "__main__":
    common.end(main)
