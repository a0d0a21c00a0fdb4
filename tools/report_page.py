"""The HTML page of tools.report, with every picture embedded."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tools.explore_page import POLICY, asset, embedded
from utils.drawing.chart import draw_curves
from utils.drawing.reliability import draw_reliability
from utils.run_files import BOUNDARY_SCORES, CALIBRATION, OFFICIAL_SCORES, is_number

#: Maximum width of a picture on the page, in pixels.
WIDTH = 640
#: Charts of the log: heading, title of the vertical axis, names of the entries.
CURVES = (
    ("Loss", "loss", ("loss", "main_loss", "auxiliary_loss")),
    ("Learning rate", "learning rate", ("lr",)),
    ("Gradient norm", "norm", ("gradient_norm",)),
    ("Speed", "images per second", ("images_per_second",)),
)
OFFICIAL = dict(
    zip(
        OFFICIAL_SCORES,
        ("IoU of classes", "iIoU of classes", "IoU of categories", "iIoU of categories"),
        strict=True,
    )
)
#: Titles of the boundary scores: column of the classes, and mean.
BOUNDARY = dict(zip(BOUNDARY_SCORES, (("BIoU", "boundary IoU"), ("BF", "boundary F score")), strict=True))
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bar: #1f6fb4; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 16px;
  overflow-wrap: break-word; }
h1 { margin: 0 0 4px; } h2 { margin: 40px 0 12px; border-bottom: 1px solid var(--line); }
h3 { margin: 20px 0 4px; font-size: 17px; }
h4 { margin: 16px 0 4px; font-size: 15px; text-wrap: balance; }
p { margin: 8px 0; max-width: 900px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: 6px 14px; }
.facts b { display: block; font-size: 21px; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { overflow-wrap: normal; } .scroll td { overflow-wrap: normal; min-width: 110px; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr + tr { border-top: 1px solid var(--soft); }
.beside { display: flex; flex-wrap: wrap; gap: 8px 56px; align-items: flex-start; }
.classes { width: 100%; max-width: 600px; }
.classes td { vertical-align: middle; overflow-wrap: break-word; }
.classes td:last-child, .classes th:last-child { padding-right: 0; }
.classes .bars { width: 45%; min-width: 40px; }
.bar { background: var(--soft); height: 10px; border-radius: 5px; }
.bar div { background: var(--bar); height: 10px; border-radius: 5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  gap: 8px 24px; }
.charts div { max-width: 560px; }
svg { width: 100%; display: block; } svg text { font-size: 13px; fill: currentColor; }
svg .grid { stroke: var(--line); }
.row { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 12px; }
.row figure { margin: 0; flex: 1 1 300px; min-width: 0; max-width: 640px; }
.row img { display: block; width: 100%; max-height: 90vh; object-fit: contain; object-position: left top; }
figcaption { font-size: 14px; margin-top: 2px; }
i.color { display: inline-block; width: 14px; height: 14px; margin-right: 7px; vertical-align: -2px;
  border: 1px solid var(--line); }
.legend span { display: inline-block; margin-right: 16px; }
.small-screen { display: none; }
@media (max-width: 700px) { .small-screen { display: block; } .classes .bars { width: 25%; } }
code, pre { font: 14px/1.5 ui-monospace, monospace; } pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--soft); padding: 10px 14px; border-radius: 8px; }
pre span { display: inline-block; max-width: 100%; vertical-align: top; }
.missing { border-left: 4px solid #d1662b; padding-left: 12px; overflow-wrap: anywhere; }
"""

Color = Sequence[int]


class Figure(NamedTuple):
    """A picture, uint8 [h, w, 3] RGB, and its caption."""

    caption: str
    picture: np.ndarray


class Example(NamedTuple):
    """A picture of the data set, its mean IoU, and the rows of figures that show it.

    Layers are drawings by name, uint8 [h, w, 3] RGB or [h, w, 4] RGBA, which the reader can lay over the
    first figure.
    """

    name: str
    score: float
    rows: list[list[Figure]]
    layers: Mapping[str, np.ndarray] = MappingProxyType({})


class Report(NamedTuple):
    """Content of the page; fields are empty if a run does not have it."""

    name: str
    recipe: dict[str, Any]  # args.json
    defaults: dict[str, Any]  # of train.py's flags
    environment: list[dict[str, Any]]  # environment.json
    log: list[dict[str, Any]]  # log.jsonl; utils.run_files documents what is checked in each file
    validation: list[tuple[float, float]]  # (step, mean IoU)
    result: dict[str, Any]  # result.txt
    confusion: bytes | None  # confusion.png
    missing: list[str]  # lines about missing parts, with the reason
    colors: Sequence[Color] = ()  # RGB of the classes
    pictures: int | None = None  # number of evaluated pictures
    best: Sequence[Example] = ()
    worst: Sequence[Example] = ()
    legend: Sequence[tuple[str, Color]] = ()  # classes in the pictures
    no_confidence: str = ""  # why there is no layer of confidence
    attention: Sequence[Example] = ()
    explorer: str = ""  # HTML element of tools.explore_page.explorer


def page(report: Report) -> str:
    """Return the page as HTML that refers to no other file."""
    sections = [
        ("Score", _score(report)),
        ("Recipe", _recipe(report.recipe, report.defaults)),
        ("Environment", _environment(report.environment)),
        ("Curves", _curves(report)),
        ("Classes", _classes(report.result, report.colors)),
        ("Calibration", _calibration(report.result)),
        ("Confusion matrix", _confusion(report.confusion)),
        ("Pictures", _examples(report)),
        ("Attention", _attention(report)),
    ]
    body = [f"<h1>{escape(report.name)}</h1>", _facts(report)]
    body += [f'<p class="missing">{escape(line)}</p>' for line in report.missing]
    body += [f"<h2>{title}</h2>\n{content}" for title, content in sections if content]
    scripts = ["report"] if report.best or report.worst else []
    scripts += ["explore"] if report.explorer else []
    return document(f"CCNet: {report.name}", body, scripts)


def document(title: str, body: Sequence[str], scripts: Sequence[str] = (), style: str = "") -> str:
    """Return an HTML page in the style of the reports, which refers to no other file.

    Args:
        title: title of the window, as text.
        body: parts of the page, as HTML.
        scripts: names of files in tools/pages/, whose style and script the page has.
        style: CSS that overrides that of the reports.
    """
    styles = [STYLE, *(asset(f"{name}.css") for name in scripts), style]
    body = [*body, *(f"<script>{asset(f'{name}.js')}</script>" for name in scripts)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{POLICY}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{''.join(styles)}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


# Numbers of the run


def _facts(report: Report) -> str:
    facts = []
    if report.result.get("meanIU") is not None:
        interval = report.result.get("intervals", {}).get("meanIU")
        about = "" if interval is None else f" ({interval_text(interval)})"
        facts.append((_percent(report.result["meanIU"]), f"mean IoU{about}"))
    if report.log:
        last = report.log[-1]
        facts += [
            (f"{last['step']} of {_text(report.recipe.get('num_steps', '?'))}", "steps"),
            (f"{last['loss']:.3f}", "last loss"),
        ]
    if report.validation:
        step, score = max(report.validation, key=lambda each: each[1])
        facts.append((_percent(score), f"best validation, step {step:g}"))
    if speeds := _entries(report.log, "images_per_second"):
        facts.append((f"{statistics.median(speeds):.3g}", "images/s (median)"))
    if memory := _entries(report.log, "memory_mb"):
        facts.append((_gibibytes(max(memory) * 2**20), "peak memory in training"))
    facts += [
        (_text(report.recipe[name]), name)
        for name in ("model", "backbone", "recurrence")
        if report.recipe.get(name) is not None
    ]
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in facts)
        + "</div>"
    )


def _entries(log: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Return the values of an entry of the log that are numbers."""
    return [entry[name] for entry in log if is_number(entry.get(name))]


def _score(report: Report) -> str:
    """Describe how the score was obtained."""
    found = report.result.get("arguments")
    if report.result.get("meanIU") is None or not isinstance(found, dict):
        return ""
    rows = [
        ("Data", _data(found, report.pictures)),
        ("Network", _network(found)),
        ("Checkpoint", _checkpoint(found.get("restore_from"))),
        ("Prediction", _prediction(found)),
        ("Precision", _text(found.get("amp") or "float32")),
    ]
    if "scales" in found:
        scales = _text(found["scales"]).replace(",", ", ")
        averaged = isinstance(found["scales"], list) and len(found["scales"]) > 1
        rows.append(("Scales", f"{scales} (averaged)" if averaged else scales))
    if "flip" in found:
        rows.append(("Flip", "averaged with the mirrored picture" if found["flip"] else "no"))
    if "ignore_label" in found:
        rows.append(("Not scored", f"pixels with label {_text(found['ignore_label'])}"))
    note = "<p>Mean IoU over the classes that occur in labels or predictions. It was obtained as follows:</p>"
    return note + _table(rows)


def _data(found: dict[str, Any], pictures: int | None) -> str:
    which = (
        f"list {_text(found['data_list'])}"
        if found.get("data_list")
        else f"split {_text(found.get('split'))}"
    )
    number = "" if pictures is None else f", {pictures} pictures"
    return f"{_text(found.get('data_dir'))}, {which}{number}"


def _network(found: dict[str, Any]) -> str:
    parts = [_text(found[name]) for name in ("model", "backbone") if name in found]
    if found.get("recurrence") is not None:
        parts.append(f"recurrence {_text(found['recurrence'])}")
    return ", ".join(parts)


def _checkpoint(path: Any) -> str:
    if not isinstance(path, str):
        return "none: random weights"
    folder, name = os.path.split(path)
    return f"{name} in {folder}" if folder else name


def _prediction(found: dict[str, Any]) -> str:
    if found.get("whole"):
        return "whole pictures (no tiles)"
    size = found.get("input_size")
    if isinstance(size, list) and len(size) == 2:
        return f"overlapping tiles of {_text(size[0])} x {_text(size[1])} pixels"
    return "not recorded; run evaluate.py again to see it"


def _recipe(recipe: dict[str, Any], defaults: dict[str, Any]) -> str:
    if not recipe:
        return ""
    rows = "".join(
        f"<tr><td><code>--{escape(name.replace('_', '-'))}</code></td><td>{escape(_text(value))}</td></tr>"
        for name, value in recipe.items()
        if value is not None and name != "local_rank"
    )
    # Each flag in one piece: a browser would break lines within "--".
    command = " ".join(
        f"<span>{escape(part)}</span>" for part in ["python train.py", *_flags(recipe, defaults)]
    )
    return f"<pre>{command}</pre><details><summary>All flags</summary><table>{rows}</table></details>"


def _flags(recipe: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Return the flags that differ from their defaults, as on a command line."""
    parts = []
    for name, value in recipe.items():
        if _text(value) == _text(defaults.get(name)):
            continue
        flag = f"--{name.replace('_', '-')}"
        parts.append(flag if value is True else f"{flag} {shlex.quote(_text(value))}")
    return parts


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value)


# The machine


def _device(value: Any) -> str:
    return "CPU" if value == "cpu" else f"GPU ({value})"


def _date(value: Any) -> str:
    moment = datetime.datetime.fromisoformat(value)
    zone = "" if moment.tzinfo is None else f" {moment.tzname()}"
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def _commit(value: Any) -> str:
    return f"{value[:-1]}, with local changes" if value.endswith("+") else str(value)


def _gibibytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB"


#: Rows of the table by entry of environment.json: title and format.
ENVIRONMENT: dict[str, tuple[str, Callable[[Any], str]]] = {
    "date": ("Date", _date),
    "device": ("Device", _device),
    "name": ("Processor", str),
    "memory_bytes": ("GPU memory", _gibibytes),
    "capability": ("Compute capability", str),
    "multiprocessors": ("Multiprocessors", lambda value: f"{value:d}"),
    "l2_bytes": ("L2 cache", lambda value: f"{value / 2**20:.0f} MiB"),
    "processes": ("Processes", lambda value: f"{value:d}"),
    "threads": ("CPU threads per process", lambda value: f"{value:d}"),
    "load": ("System load at the start", lambda value: f"{value:.1f}"),
    "torch": ("PyTorch", str),
    "cuda": ("CUDA", str),
    "python": ("Python", str),
    "commit": ("Commit", _commit),
}


def _environment(starts: list[dict[str, Any]]) -> str:
    if not starts:
        return ""
    present = dict.fromkeys(name for start in starts for name in start if name != "step")
    names = [name for name in ENVIRONMENT if name in present]
    names += [name for name in present if name not in ENVIRONMENT]
    heading = ""
    if len(starts) > 1:
        heading = "".join(f"<th>{escape(_start(start.get('step')))}</th>" for start in starts)
        heading = f"<tr><th></th>{heading}</tr>"
    rows = "".join(
        f"<tr><th>{escape(_title(name))}</th>"
        + "".join(
            f"<td>{escape(_formatted(name, start[name]) if name in start else '')}</td>" for start in starts
        )
        + "</tr>"
        for name in names
    )
    return f'<div class="scroll"><table>{heading}{rows}</table></div>'


def _start(step: Any) -> str:
    return "first start" if step == 0 else f"resumed after step {_text(step)}"


def _title(name: str) -> str:
    return ENVIRONMENT[name][0] if name in ENVIRONMENT else name.replace("_", " ").capitalize()


def _formatted(name: str, value: Any) -> str:
    """Write an entry of environment.json; an odd one as it is."""
    try:
        if name in ENVIRONMENT and value is not None:
            return ENVIRONMENT[name][1](value)
    except (TypeError, ValueError, AttributeError, OverflowError):
        pass
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else _text(value)


# Scores


def _curves(report: Report) -> str:
    charts = [("Validation", draw_curves({"mean IoU": report.validation}, y_title="mean IoU"))]
    for title, unit, names in CURVES:
        curves = {
            name: [(entry["step"], entry[name]) for entry in report.log if is_number(entry.get(name))]
            for name in names
        }
        shown = {name.replace("_", " "): points for name, points in curves.items()}
        charts.append((title, draw_curves(shown, y_title=unit)))
    drawn = "".join(f"<div><h3>{title}</h3>{chart}</div>" for title, chart in charts if chart)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _classes(result: dict[str, Any], colors: Sequence[Color]) -> str:
    if not result.get("IU_array"):
        return ""
    instances, intervals = result["classInstScores"], result.get("intervals", {})
    bounds = intervals.get("IU_array")
    boundary = {keys: titles for keys, titles in BOUNDARY.items() if keys[1] in result}
    rows = []
    for number, (name, iou) in enumerate(zip(result["classes"], result["IU_array"], strict=True)):
        bar = f'<div class="bar"><div style="width:{100 * (iou or 0):.1f}%"></div></div>'
        swatch = _swatch(colors[number]) if number < len(colors) else ""
        cells = f'<td>{swatch}{escape(name)}</td><td class="bars">{bar}</td>' + _number(iou)
        if bounds:
            cells += f'<td class="number">{interval_text(bounds[number])}</td>'
        cells += _number(instances.get(name)) if instances else ""
        cells += "".join(_number(result[of_classes][number]) for _, of_classes in boundary)
        rows.append(f"<tr>{cells}</tr>")
    titles = ["IoU", *(["95 % interval"] if bounds else []), *(["iIoU"] if instances else [])]
    titles += [title for title, _ in boundary.values()]
    heading = '<tr><th>class</th><th class="bars"></th>'
    heading += "".join(f'<th class="number">{title}</th>' for title in titles) + "</tr>"
    means = {name: title for name, title in OFFICIAL.items() if name in result} or {"meanIU": "mean IoU"}
    means |= {mean: f"mean {title}" for (mean, _), (_, title) in boundary.items()}
    averages = ""
    for name, title in means.items():
        # Without an ignored class, the official IoU of the classes is the mean IoU.
        same = name == "averageScoreClasses" and result[name] == result["meanIU"]
        text = interval_text(intervals.get("meanIU" if same else name))
        shown = f'<td class="number">{text}</td>' if intervals else ""
        averages += f"<tr><td>{title}</td>{_number(result.get(name))}{shown}</tr>"
    notes = []
    if bounds:
        notes.append(
            "95 % interval: in 95 of 100 samples of pictures, it holds the score of infinitely many such "
            f"pictures; from {escape(_text(intervals.get('resamples')))} resamples."
        )
    if None in result["IU_array"]:
        notes.append("No IoU: the class occurs neither in labels nor in predictions.")
    if instances:
        notes.append("iIoU: IoU in which objects count equally, regardless of their size.")
    return (
        f'<div class="beside"><table class="classes">{heading}{"".join(rows)}</table>'
        f"<div><h3>Averages</h3><table>{averages}</table></div></div>"
        + "".join(f"<p>{note}</p>" for note in notes)
    )


def _calibration(result: dict[str, Any]) -> str:
    found = result.get("calibration")
    if not found or found["expectedCalibrationError"] is None:
        return ""
    buffer = io.BytesIO()
    draw_reliability(*(found[name] for name in CALIBRATION)).save(buffer, "PNG")
    note = f"<p>Expected calibration error: {_percent(found['expectedCalibrationError'])}</p>"
    return f'{note}<div class="scroll">{_image(buffer.getvalue(), "png", "reliability plot")}</div>'


def interval_text(interval: Sequence[float] | None) -> str:
    """Write an interval of scores in percent; nothing if there is none."""
    return "" if interval is None else f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f} %"


def _number(value: float | None) -> str:
    return f'<td class="number">{"" if value is None else _percent(value)}</td>'


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
        + "</table>"
    )


def _swatch(color: Color) -> str:
    red, green, blue = color
    return f'<i class="color" style="background:rgb({red},{green},{blue})"></i>'


def _confusion(content: bytes | None) -> str:
    if content is None:
        return ""
    # At its own size, in which its numbers can be read; a narrow screen scrolls.
    note = '<p class="small-screen">Scroll sideways to see all classes.</p>'
    return f'{note}<div class="scroll">{_image(content, "png", "confusion matrix")}</div>'


# Pictures


def _examples(report: Report) -> str:
    if not report.best and not report.worst:
        return ""
    spans = "".join(f"<span>{_swatch(color)}{escape(name)}</span>" for name, color in report.legend)
    content = f'<p class="legend">{spans}</p>'
    if report.no_confidence:
        content += f"<p>Without a layer of confidence: {escape(report.no_confidence)}</p>"
    shown = ""
    for title, examples in (("Best pictures", report.best), ("Worst pictures", report.worst)):
        shown += f"<h3>{title}</h3>" if examples else ""
        shown += "".join(map(_example, examples))
    return f'{content}<div class="pictures">{shown}</div>'


def _attention(report: Report) -> str:
    if not report.attention:
        return ""
    note = (
        "<p>Weights with which the pixel at the cross gathers the other pixels. R = 1: after one recurrence; "
        "in ccnet, pixels of its row and column. R = 2: after two recurrences (the product of both maps), "
        "all pixels. "
        "Brightness is the square root of weight / largest weight of the map.</p>"
    )
    content = note + "".join(map(_example, report.attention))
    if report.explorer:
        content += (
            "<h3>Other pixels</h3><p>Click a pixel, or move the cross with the arrow keys. Confidence is the "
            f"probability of the predicted class.</p>{report.explorer}"
        )
    return content


def _example(example: Example) -> str:
    layers = {name: _data_uri(*_reduced(picture)) for name, picture in example.layers.items()}
    data = f'<script type="application/json">{embedded(layers)}</script>' if layers else ""
    heading = f"<h4>{escape(example.name)}: mean IoU {_percent(example.score)}</h4>"
    return (
        f'<article data-name="{escape(example.name)}" data-score="{example.score}">'
        f"{heading}{figure_rows(example.rows)}{data}</article>"
    )


def figure_rows(rows: Sequence[Sequence[Figure]]) -> str:
    """Return rows of pictures with their captions, as HTML with every picture embedded."""
    return "".join(
        '<div class="row">'
        + "".join(
            f"<figure>{_picture(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, picture in row
        )
        + "</div>"
        for row in rows
    )


def _picture(picture: np.ndarray, text: str) -> str:
    """Embed a picture, reduced to WIDTH."""
    return _image(*_reduced(picture), text)


def _reduced(picture: np.ndarray) -> tuple[bytes, str]:
    """Encode a picture, reduced to WIDTH: photographs as JPEG, pictures of few colors as PNG.

    Returns:
        The content of the file, and "jpeg" or "png".
    """
    image = Image.fromarray(np.ascontiguousarray(picture))
    few = image.getcolors(256) is not None
    if image.width > WIDTH:
        size = WIDTH, max(1, round(image.height * WIDTH / image.width))
        image = image.resize(size, Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if image.mode == "RGBA":
        image.save(buffer, "PNG", optimize=True)
    elif few:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue(), "png" if few or image.mode == "RGBA" else "jpeg"


def _image(content: bytes, kind: str, text: str = "") -> str:
    return f'<img src="{_data_uri(content, kind)}" alt="{escape(text)}">'


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
