"""One page about a run, to look at and to send around.

    python -m tools.report RUN_DIR [--out FILE.html]

RUN_DIR is the --snapshot-dir of a training run, with the results of evaluate.py in it or in --results. The
page has the recipe, the environment, the curves, the scores of the classes, the confusion matrix, the best
and the worst pictures with label and prediction, and attention maps. It is a single file that needs no
network; what the run does not have is left out, and the page says how to get it.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

import train
from dataset import IMG_MEAN, CSDataSet
from dataset.labels import choose_table
from dataset.pictures import decode_label, load
from engine.metrics import confusion_matrix, mean_iou
from engine.report import CONFUSION, RESULT
from engine.transfer import subtract_mean
from networks.attention import picture_attention
from networks.weights import read_state_dict
from tools import common
from tools.report_page import Example, Report, page
from utils import args as flags
from utils.attention_figure import draw_attention
from utils.errors import InputError, UsageError
from utils.files import check_writable, replacing
from utils.palette import colored, make_palette
from utils.progress import Progress

LOG, ENVIRONMENT, OUTPUTS = "log.jsonl", "environment.json", "outputs"


class Scored(NamedTuple):
    """A picture of the data set, and the mean IoU of its prediction."""

    number: int  # in the data set
    score: float


def get_parser() -> argparse.ArgumentParser:
    parser = common.Parser("report", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", help="folder of a training run")
    add("--out", metavar="FILE", help="the page; without it RUN_DIR/report.html")
    add("--results", metavar="DIR", help="where evaluate.py wrote to, if not to RUN_DIR")
    add("--pictures", type=flags.count, default=3, help="best and worst, of each (default: %(default)s)")
    add("--attention", type=flags.count, default=2, help="attention examples (default: %(default)s)")
    add("--restore-from", metavar="FILE", help="checkpoint for the attention; without it the evaluated one")
    add("--gpu", metavar="ID", help="a GPU's number, or cpu; without it the first GPU, or the CPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if not os.path.isdir(args.run):
        raise UsageError(f"{args.run}: no such folder; name the --snapshot-dir of a run")
    results = args.results or args.run
    recipe, result = read_json(args.run, common.RECIPE, dict), read_json(results, RESULT, dict)
    common.choose_device(args.gpu)
    if args.restore_from:
        read_state_dict(args.restore_from)
    if not recipe and not result:
        raise UsageError(
            f"{args.run}: has neither {common.RECIPE} nor {RESULT}; name the --snapshot-dir of a run"
        )
    out = args.out or os.path.join(args.run, "report.html")
    check_writable("--out", os.path.dirname(out) or ".")
    report = Report(
        name=os.path.basename(os.path.abspath(args.run)),
        recipe=recipe or {},
        defaults=vars(train.get_parser().parse_args(["--data-dir", ""])),
        environment=read_json(args.run, ENVIRONMENT, list) or [],
        log=read_log(os.path.join(args.run, LOG)),
        validation=read_validation(os.path.join(args.run, "tensorboard")),
        result=result or {},
        confusion=read_bytes(os.path.join(results, CONFUSION)),
        missing=[],
    )
    if result:
        try:
            report = with_examples(report, args, results)
        except InputError as error:
            # Run and data may have parted; the rest of the page stands by itself.
            report.missing.append(f"no pictures: {error}")
    else:
        report.missing.append(
            f"no scores and pictures: there is no {RESULT} in {results}; evaluate.py writes it"
        )
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(page(report))
    print(f"{out}: {os.path.getsize(out) / 2**20:.1f} MiB")
    for line in report.missing:
        print(line)


# What a run leaves


def read_json(folder: str, name: str, kind: type) -> Any:
    """The content, of that kind; None where there is no such file."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: can't be read ({error}); mend it or take it away") from error
    if not isinstance(content, kind):
        raise UsageError(f"{path}: holds a {type(content).__name__}; mend it or take it away")
    return content


def read_bytes(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def read_log(path: str) -> list[dict[str, Any]]:
    """The lines of log.jsonl; a last one that a killed run left unfinished is none."""
    entries = []
    for line in (read_bytes(path) or b"").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"step", "loss"} <= entry.keys():
            entries.append(entry)
    return entries


def read_validation(folder: str) -> list[tuple[float, float]]:
    """(step, mean IoU) of the validations, from TensorBoard's files; of a repeated step the last."""
    scores: dict[float, float] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "events.*")), key=os.path.getmtime):
        for event in read_events(path):
            for value in event.summary.value:
                if value.tag == "val/mean_iou":
                    scores[float(event.step)] = value.simple_value
    return sorted(scores.items())


def read_events(path: str) -> Iterator[Any]:
    """The events of a file of TensorBoard's, records of length (8 bytes), checksum (4), content, checksum."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content = read_bytes(path) or b""
    position = 0
    while position + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        record = content[position + 12 : position + 12 + length]
        position += 16 + length
        try:
            event = Event.FromString(record)
        except DecodeError:  # damaged, or the end of a run that is still writing
            return
        yield event


# Pictures


def with_examples(report: Report, args: argparse.Namespace, results: str) -> Report:
    """The report with its best and worst pictures, and with attention maps.

    Raises:
        DataError, UsageError: the data set, its predictions or the checkpoint are not there any more.
    """
    how = report.result.get("arguments")
    if not how:
        raise UsageError(
            f"{os.path.join(results, RESULT)}: does not say what was evaluated; run evaluate.py again"
        )
    dataset = CSDataSet(
        how["data_dir"],
        how["data_list"],
        crop_size=None,
        scale=False,
        mirror=False,
        ignore_label=how["ignore_label"],
        num_classes=how["num_classes"],
        split=how["split"],
        table=choose_table(how["classes"], None)[0],
    )
    predictions = os.path.join(results, OUTPUTS)
    scored = score_pictures(dataset, predictions)
    ranked = sorted((each for each in scored if not np.isnan(each.score)), key=lambda each: -each.score)
    half = (len(ranked) + 1) // 2
    best, worst = ranked[:half][: args.pictures], ranked[half:][::-1][: args.pictures]
    palette = make_palette(dataset.labels.colors())

    def shown(several: list[Scored]) -> list[Example]:
        examples = []
        for number, score in several:
            picture = dataset.picture(number, instances=False)
            assert picture.label is not None
            prediction = read_prediction(predictions, picture.name)
            examples.append(
                Example(
                    picture.name,
                    score,
                    [picture.image[..., ::-1], colored(picture.label, palette), colored(prediction, palette)],
                )
            )
        return examples

    report = report._replace(
        best=shown(best),
        worst=shown(worst),
        legend=list(zip(dataset.labels.names(), np.array(palette).reshape(256, 3).tolist(), strict=False)),
    )
    checkpoint = args.restore_from or how["restore_from"]
    if not args.attention or not checkpoint:
        return report
    try:
        return report._replace(
            attention=attention_of(args.gpu, args.attention, checkpoint, how, dataset, ranked)
        )
    except InputError as error:
        report.missing.append(f"no attention: {error}")
        return report


def score_pictures(dataset: CSDataSet, predictions: str) -> list[Scored]:
    """The mean IoU of every picture by itself, over the classes that occur in its label or prediction."""
    progress = Progress(len(dataset))
    scored = []
    for index, pair in enumerate(dataset.pairs):
        label = torch.from_numpy(dataset.labels.read(load(dataset.path(pair.label))))
        prediction = torch.from_numpy(read_prediction(predictions, pair.name))
        if label.shape != prediction.shape:
            raise UsageError(
                f"{os.path.join(predictions, pair.name)}.png: of another size than its label; "
                "run evaluate.py again"
            )
        confusion = confusion_matrix(
            label, prediction, dataset.labels.num_classes, dataset.labels.ignore_label
        )
        scored.append(Scored(index, mean_iou(confusion)))
        progress.show(index + 1)
    return scored


def read_prediction(folder: str, name: str) -> np.ndarray:
    """uint8 [h, w]"""
    return decode_label(load(os.path.join(folder, f"{name}.png"))).astype(np.uint8)


def attention_of(
    gpu: str | None,
    number_of_pictures: int,
    checkpoint: str,
    how: dict[str, Any],
    dataset: CSDataSet,
    ranked: list[Scored],
) -> list[Example]:
    """Attention of pixels of pictures spread over the ranks, by the network as it was evaluated."""
    network = common.open_network(
        argparse.Namespace(
            restore_from=checkpoint, classes=how["classes"], recurrence=how["recurrence"], gpu=gpu
        )
    )
    if network.recurrence == 0 or not ranked:
        return []
    mean = torch.tensor(IMG_MEAN, device=network.device)
    examples = []
    for index in np.linspace(0, len(ranked) - 1, number_of_pictures + 2).round().astype(int)[1:-1]:
        picture = dataset.picture(ranked[index].number, instances=False)
        height, width = picture.image.shape[:2]
        pixels = [(height // 2, width // 3), (2 * height // 3, 2 * width // 3)]
        image = subtract_mean(torch.from_numpy(picture.image)[None].to(network.device), mean)
        maps = picture_attention(network.model, image, pixels).cpu().numpy()
        figures = [
            np.array(draw_attention(cv2.cvtColor(picture.image, cv2.COLOR_BGR2RGB), pixel, maps[:, number]))
            for number, pixel in enumerate(pixels)
        ]
        examples.append(Example(picture.name, ranked[index].score, figures))
    return examples


if __name__ == "__main__":
    common.end(main)
