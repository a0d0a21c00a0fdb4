"""Compare two evaluations of the same pictures.

    python -m tools.compare RUN RUN [--out DIR]

RUN is an output folder of evaluate.py, with result.txt and pictures.npz. The command prints the scores of
both, their difference, its 95 % interval, and how sure the difference is, for each class and for the mean. It
writes compare.md, compare.json and compare.html, a page with the pictures that changed most. The intervals
are those of a paired bootstrap over the pictures: both evaluations are resampled together (docs/scores.md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from engine.evaluation import bootstrap, pictures
from engine.evaluation.bootstrap import FEW, LEVEL, RESAMPLES, Interval, Ratios
from engine.evaluation.pictures import BOUNDARY_F, BOUNDARY_IOU, INSTANCE_IOU, PICTURES, Pictures
from engine.evaluation.results import FILES, RESULT
from tools import common
from tools.report import MOST, Evaluation, prediction_path, read_prediction
from tools.report_page import Figure, document, figure_rows
from utils import args as flags
from utils import run_files
from utils.drawing.palette import colored, make_palette
from utils.errors import InputError, UsageError
from utils.files import check_outputs, check_writable, write_file

MARKDOWN, JSON, HTML = OUTPUTS = "compare.md", "compare.json", "compare.html"
#: Scores that are compared if both evaluations have them.
OTHERS = {INSTANCE_IOU: "iIoU", BOUNDARY_IOU: "boundary IoU", BOUNDARY_F: "boundary F score"}
MEAN = "mean"


class Run(NamedTuple):
    """An evaluation: its folder, result.txt and pictures.npz."""

    folder: str
    result: dict[str, Any]
    pictures: Pictures


class Row(NamedTuple):
    """A score of both evaluations; None if it does not exist."""

    name: str
    first: float | None
    second: float | None
    difference: float | None
    interval: Interval
    second_better: float

    def verdict(self) -> str:
        """Say in words which evaluation is better."""
        if self.difference is None:
            return "no score in one of them"
        if self.interval is None:
            return "too few pictures"
        if self.interval[0] > 0:
            return f"B is better: {_share(self.second_better)} of resamples"
        if self.interval[1] < 0:
            return f"A is better: {_share(1 - self.second_better)} of resamples"
        return "no difference found"

    def cells(self) -> list[str]:
        """Return the texts of a line of the table, in percent."""
        bounds = [] if self.interval is None else [f"{100 * each:+.2f}" for each in self.interval]
        scores = ["-" if score is None else f"{100 * score:.2f}" for score in (self.first, self.second)]
        difference = "-" if self.difference is None else f"{100 * self.difference:+.2f}"
        return [self.name, *scores, difference, " to ".join(bounds) or "-", self.verdict()]


HEADING = ["class", "A", "B", "B - A", "95 % interval", "result"]


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("compare", __doc__)
    add = parser.add_argument
    add("first", metavar="RUN", help="output folder of evaluate.py: A")
    add("second", metavar="RUN", help="output folder of evaluate.py: B")
    add("--out", metavar="DIR", help="folder for compare.md, .json and .html (default: that of B)")
    add(
        "--pictures",
        type=flags.number(int, 0, MOST),
        default=3,
        metavar="N",
        help="number of pictures that gained most, and that lost most, on the page (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(argv)
    first, second = read_run(args.first), read_run(args.second)
    second = second._replace(pictures=matched(first, second))
    out = args.out or args.second
    evaluations, missing = open_evaluations(first, second)
    outputs = [os.path.join(out, name) for name in OUTPUTS]
    check_outputs("--out", outputs, inputs_of((first, second), evaluations))
    check_writable("--out", out)
    tables = compared(first, second)
    for line in lines_of(first, second, tables):
        print(line)
    figures: list[str] = []
    if evaluations and args.pictures:
        try:
            figures = changed_pictures(first, second, evaluations, args.pictures)
        except InputError as error:
            missing = f"no pictures: {error}"
    if missing:
        print(missing)
    write_file(os.path.join(out, MARKDOWN), as_markdown(first, second, tables))
    write_file(os.path.join(out, JSON), as_json(first, second, tables))
    write_file(os.path.join(out, HTML), page(first, second, tables, figures, missing))
    print(f"written to {os.path.join(out, HTML)}, {MARKDOWN} and {JSON}")


# Input


def read_run(folder: str) -> Run:
    """Read the files of an evaluation.

    Raises:
        UsageError: a file is missing or damaged.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such folder; name an output folder of evaluate.py")
    result = run_files.read_result(folder)
    if result is None:
        raise UsageError(f"{folder}: has no {RESULT}; name an output folder of evaluate.py")
    found = pictures.read(folder)
    if len(result["classes"]) != found.num_classes:
        raise UsageError(
            f"{folder}: {RESULT} has {len(result['classes'])} classes and {PICTURES} {found.num_classes}; "
            "run evaluate.py again"
        )
    return Run(folder, result, found)


def matched(first: Run, second: Run) -> Pictures:
    """Return the pictures of the second evaluation in the order of the first.

    Raises:
        UsageError: classes, pictures or labels differ.
    """
    both = f"{first.folder} and {second.folder}"
    if first.result["classes"] != second.result["classes"]:
        raise UsageError(f"{both}: have different classes; compare evaluations of one data set")
    ours, theirs = first.pictures, second.pictures
    differing = sorted({*ours.names} ^ {*theirs.names})
    if differing:
        raise UsageError(
            f"{both}: {len(differing)} pictures are in one of them only, the first is {differing[0]}; "
            "compare evaluations of the same pictures"
        )
    if len({*ours.names}) < len(ours.names) or len(ours.names) != len(theirs.names):
        raise UsageError(f"{both}: have several pictures of one name; run evaluate.py again")
    place = {name: index for index, name in enumerate(ours.names)}
    order = np.array([place[name] for name in theirs.names], np.int64)
    back = np.argsort(order)
    found = theirs._replace(
        names=ours.names,
        picture=order[theirs.picture],
        others={name: Ratios(*(part[back] for part in ratios)) for name, ratios in theirs.others.items()},
    )
    unequal = np.flatnonzero((found.labeled() != ours.labeled()).any(1))
    if unequal.size:
        raise UsageError(
            f"{both}: the labels of {len(unequal)} pictures differ, the first is {ours.names[unequal[0]]}; "
            "evaluate both with the same labels and --ignore-label"
        )
    return found


def open_evaluations(first: Run, second: Run) -> tuple[list[Evaluation], str]:
    """Return the data sets and predictions of both evaluations; or none, and a line with the reason."""
    try:
        return [Evaluation.open(run.folder, run.result) for run in (first, second)], ""
    except InputError as error:
        return [], f"no pictures: {error}"


def inputs_of(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> list[str | None]:
    """Return the files that the comparison is made from. Some may be None or missing."""
    inputs: list[str | None] = [os.path.join(run.folder, name) for run in runs for name in FILES]
    for dataset, how, predictions in evaluations:
        inputs += [prediction_path(predictions, pair.name) for pair in dataset.pairs]
        inputs += [*dataset.files(), how["data_list"], how["classes"], how["restore_from"]]
    return inputs


# Comparison


def compared(first: Run, second: Run) -> dict[str, list[Row]]:
    """Return the rows of each score that both evaluations have: the classes, and last the mean."""
    tables = {"IoU": rows_of(first.result["classes"], first.pictures.iou(), second.pictures.iou())}
    for name, title in OTHERS.items():
        if name in first.pictures.others and name in second.pictures.others:
            ratios = first.pictures.others[name], second.pictures.others[name]
            tables[title] = rows_of(first.result["classes"], *ratios)
    return tables


def rows_of(classes: Sequence[str], first: Ratios, second: Ratios) -> list[Row]:
    """Compare the scores of each class that has one, and their mean."""
    found = bootstrap.compare(first, second)

    def existing(values: np.ndarray) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values.tolist()]

    columns = [existing(values) for values in (first.scores(), second.scores(), found.difference)]
    shares = found.second_better.tolist()
    rows = [Row(*row) for row in zip([*classes, MEAN], *columns, found.intervals, shares, strict=True)]
    return [row for row in rows[:-1] if (row.first, row.second) != (None, None)] + rows[-1:]


def _about(run: Run) -> str:
    number = len(run.pictures.names)
    narrow = f"; the intervals of fewer than {FEW} pictures are too narrow" if number < FEW else ""
    return f"{number} pictures, {RESAMPLES} resamples{narrow}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


# Output


def lines_of(first: Run, second: Run, tables: dict[str, list[Row]]) -> list[str]:
    """Return the comparison as lines of text."""
    lines = [f"A: {first.folder}", f"B: {second.folder}"]
    lines.append(_about(first))
    for title, rows in tables.items():
        cells = [HEADING, *(row.cells() for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", title]
        for name, *values, verdict in cells:
            numbers = "".join(f"  {value:>{width}}" for value, width in zip(values, widths[1:], strict=False))
            lines.append(f"{name:<{widths[0]}}{numbers}  {verdict}")
    return [*lines, ""]


def as_markdown(first: Run, second: Run, tables: dict[str, list[Row]]) -> str:
    """Return the comparison as Markdown; names can't start a cell, a line or an element."""

    def text(value: str) -> str:
        plain = "".join(f"&#{ord(letter)};" if letter in "|\\`*_[]~" else letter for letter in value)
        return " ".join(escape(plain, quote=False).replace("&amp;#", "&#").split())

    lines = ["# Comparison", "", f"- A: {text(first.folder)}", f"- B: {text(second.folder)}"]
    lines.append(f"- {_about(first)}")
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(HEADING)} |", "|---|---:|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(map(text, row.cells()))} |" for row in rows]
    return "\n".join([*lines, ""])


def as_json(first: Run, second: Run, tables: dict[str, list[Row]]) -> str:
    """Return the comparison as JSON; scores from 0 to 1, and null if there is none."""
    content = {
        "first": first.folder,
        "second": second.folder,
        "pictures": len(first.pictures.names),
        "level": LEVEL,
        "resamples": RESAMPLES,
        "scores": {
            title: [row._asdict() | {"result": row.verdict()} for row in rows]
            for title, rows in tables.items()
        },
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def page(first: Run, second: Run, tables: dict[str, list[Row]], figures: Sequence[str], missing: str) -> str:
    """Return the comparison as an HTML page that refers to no other file."""
    body = ["<h1>Comparison</h1>", f"<p>A: {escape(first.folder)}</p><p>B: {escape(second.folder)}</p>"]
    body.append(f"<p>Scores in percent. {_about(first)}.</p>")
    if missing:
        body.append(f'<p class="missing">{escape(missing)}</p>')
    for title, rows in tables.items():
        lines = [_table_row("th", HEADING), *(_table_row("td", row.cells()) for row in rows)]
        table = f"<table>{''.join(lines)}</table>"
        body.append(f'<h2>{escape(title)}</h2><div class="scroll">{table}</div>')
    if figures:
        body += ["<h2>Pictures that changed most</h2>", *figures]
    return document("CCNet: comparison", body)


def _table_row(tag: str, cells: Sequence[str]) -> str:
    """Return a row of an HTML table: between the first and the last cell, all are numbers."""
    first, *numbers, last = map(escape, cells)
    middle = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in numbers)
    return f"<tr><{tag}>{first}</{tag}>{middle}<{tag}>{last}</{tag}></tr>"


def changed_pictures(first: Run, second: Run, evaluations: Sequence[Evaluation], most: int) -> list[str]:
    """Return the pictures whose mean IoU changed most, as HTML: picture, label, and both predictions.

    Raises:
        DataError, UsageError: a picture, label or prediction no longer exists.
    """
    means = [run.pictures.iou().of_pictures()[:, -1] for run in (first, second)]
    change = means[1] - means[0]
    order = [int(index) for index in np.argsort(change, kind="stable") if change[index] != 0]
    order = [index for index in order if not math.isnan(change[index])]
    gained = [index for index in order[::-1] if change[index] > 0][:most]
    lost = [index for index in order if change[index] < 0][:most]
    dataset = evaluations[0].dataset
    places = {pair.name: index for index, pair in enumerate(dataset.pairs)}
    palette = make_palette(dataset.labels.colors())
    parts = []
    for title, chosen in (("B is better", gained), ("A is better", lost)):
        parts += [f"<h3>{title}</h3>"] if chosen else []
        for index in chosen:
            name = first.pictures.names[index]
            if name not in places:
                raise UsageError(f"{name}: is no longer in the data set; run evaluate.py again")
            picture = dataset.picture(places[name], instances=False)
            assert picture.label is not None
            figures = [
                Figure("picture", picture.image[..., 2::-1]),
                Figure("label", colored(picture.label, palette)),
            ]
            for letter, evaluation in zip("AB", evaluations, strict=True):
                classes = read_prediction(evaluation.predictions, name, dataset.labels.num_classes)
                figures.append(Figure(f"prediction {letter}", colored(classes, palette)))
            scores = " and ".join(
                f"{letter} {_share(mean[index])}" for letter, mean in zip("AB", means, strict=True)
            )
            parts.append(f"<h4>{escape(name)}: mean IoU {scores}</h4>{figure_rows([figures])}")
    return parts


if __name__ == "__main__":
    common.end(main)
