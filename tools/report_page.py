"""The page of tools/report: HTML with everything in it."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from utils.drawing.chart import draw_curves
from utils.run_files import OFFICIAL_SCORES, is_number

#: Pixels that a picture is wide at most.
WIDTH = 640
#: Of the log: title, and entries.
CURVES = (
    ("Loss", ("loss", "main_loss", "auxiliary_loss")),
    ("Learning rate", ("lr",)),
    ("Norm of the gradient", ("gradient_norm",)),
    ("Images per second", ("images_per_second",)),
)
OFFICIAL = dict(
    zip(
        OFFICIAL_SCORES,
        ("IoU of classes", "iIoU of classes", "IoU of categories", "iIoU of categories"),
        strict=True,
    )
)
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bar: #1f6fb4; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 40px 0 12px; border-bottom: 1px solid var(--line); }
h3 { margin: 16px 0 4px; font-size: 15px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.facts div { border: 1px solid var(--line); border-radius: 8px; padding: 8px 16px; }
.facts b { display: block; font-size: 22px; }
table { border-collapse: collapse; }
td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr { border-top: 1px solid var(--soft); }
.bar { background: var(--soft); width: 260px; height: 10px; border-radius: 5px; margin-top: 7px; }
.bar div { background: var(--bar); height: 10px; border-radius: 5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 20px; }
svg { width: 100%; } svg text { font-size: 12px; fill: currentColor; } svg .grid { stroke: var(--line); }
.row { display: flex; gap: 6px; } .row figure { margin: 0; flex: 1; min-width: 0; } img { max-width: 100%; }
.row img { width: 100%; } figcaption { font-size: 12px; opacity: .75; }
.legend span { display: inline-block; margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 13px; height: 13px; margin-right: 5px; vertical-align: -2px;
  border: 1px solid var(--line); }
code, pre { font: 13px/1.5 ui-monospace, monospace; } pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--soft); padding: 10px 14px; border-radius: 8px; }
.missing { border-left: 4px solid #d1662b; padding-left: 12px; }
"""


class Example(NamedTuple):
    """A picture of the data set: its mean IoU, and pictures uint8 [h, w, 3] RGB."""

    name: str
    score: float
    pictures: list[np.ndarray]


class Report(NamedTuple):
    """What the page shows; empty where a run does not have it."""

    name: str
    recipe: dict[str, Any]  # args.json
    defaults: dict[str, Any]  # of train.py's flags
    environment: list[dict[str, Any]]  # environment.json
    log: list[dict[str, Any]]  # log.jsonl; utils.run_files has what is sure of each file
    validation: list[tuple[float, float]]  # (step, mean IoU)
    result: dict[str, Any]  # result.txt
    confusion: bytes | None  # confusion.png
    missing: list[str]  # lines that say what and why
    best: Sequence[Example] = ()
    worst: Sequence[Example] = ()
    legend: Sequence[tuple[str, list[int]]] = ()
    attention: Sequence[Example] = ()


def page(report: Report) -> str:
    """The whole page, which refers to nothing outside of it."""
    sections = [
        ("Recipe", _recipe(report.recipe, report.defaults)),
        ("Environment", _environment(report.environment)),
        ("Curves", _curves(report)),
        ("Classes", _classes(report.result)),
        ("Confusion matrix", _image(report.confusion, "png") if report.confusion else ""),
        ("Best pictures", _examples(report.best, report.legend)),
        ("Worst pictures", _examples(report.worst, report.legend)),
        ("Attention", _attention(report.attention)),
    ]
    body = [f"<h1>{escape(report.name)}</h1>", _facts(report)]
    body += [f'<p class="missing">{escape(line)}</p>' for line in report.missing]
    body += [f"<h2>{title}</h2>\n{content}" for title, content in sections if content]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>CCNet: {escape(report.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _facts(report: Report) -> str:
    facts = []
    if report.result.get("meanIU") is not None:
        facts.append((_percent(report.result["meanIU"]), "mean IoU"))
    if report.log:
        last = report.log[-1]
        facts += [
            (f"{last['step']} of {report.recipe.get('num_steps', '?')}", "steps"),
            (f"{last['loss']:.3f}", "last loss"),
        ]
    if report.validation:
        step, score = max(report.validation, key=lambda each: each[1])
        facts.append((_percent(score), f"best validation, step {step:g}"))
    for name in ("backbone", "recurrence"):
        if name in report.recipe:
            facts.append((str(report.recipe[name]), name))
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in facts)
        + "</div>"
    )


def _recipe(recipe: dict[str, Any], defaults: dict[str, Any]) -> str:
    if not recipe:
        return ""
    rows = "".join(
        f"<tr><td><code>--{escape(name.replace('_', '-'))}</code></td><td>{escape(_text(value))}</td></tr>"
        for name, value in recipe.items()
        if value is not None and name != "local_rank"
    )
    command = " ".join(["python train.py", *_flags(recipe, defaults)])
    return f"<pre>{escape(command)}</pre><details><summary>all flags</summary><table>{rows}</table></details>"


def _flags(recipe: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Of a command line: what is not as it is by itself."""
    parts = []
    for name, value in recipe.items():
        if _text(value) == _text(defaults.get(name)):
            continue
        flag = f"--{name.replace('_', '-')}"
        parts.append(flag if value is True else f"{flag} {shlex.quote(_text(value))}")
    return parts


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _environment(starts: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for start in starts for name in start))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(_text(start.get(name, '')))}</td>" for start in starts)
        + "</tr>"
        for name in names
    )
    return f"<table>{rows}</table>" if starts else ""


def _curves(report: Report) -> str:
    charts = []
    for title, names in CURVES:
        curves = {
            name: [(entry["step"], entry[name]) for entry in report.log if is_number(entry.get(name))]
            for name in names
        }
        charts.append((title, draw_curves(curves)))
    charts.insert(0, ("Mean IoU of the validations", draw_curves({"mean IoU": report.validation})))
    drawn = "".join(f"<div><h3>{title}</h3>{chart}</div>" for title, chart in charts if chart)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _classes(result: dict[str, Any]) -> str:
    if not result.get("IU_array"):
        return ""
    instances = result["classInstScores"]
    rows = []
    for name, iou in zip(result["classes"], result["IU_array"], strict=True):
        bar = f'<div class="bar"><div style="width:{100 * (iou or 0):.1f}%"></div></div>'
        cells = f"<td>{escape(name)}</td><td>{bar}</td>" + _number(iou)
        rows.append(f"<tr>{cells}{_number(instances.get(name)) if instances else ''}</tr>")
    heading = '<tr><th>class</th><th></th><th class="number">IoU</th>'
    heading += '<th class="number">iIoU</th></tr>' if instances else "</tr>"
    averages = (
        "".join(
            f"<tr><td>{title}</td>{_number(result[name])}</tr>"
            for name, title in OFFICIAL.items()
            if name in result
        )
        or f"<tr><td>mean IoU</td>{_number(result['meanIU'])}</tr>"
    )
    return f"<table>{heading}{''.join(rows)}</table><h3>Averages</h3><table>{averages}</table>"


def _number(value: float | None) -> str:
    return f'<td class="number">{"" if value is None else _percent(value)}</td>'


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _examples(examples: Sequence[Example], legend: Sequence[tuple[str, list[int]]]) -> str:
    if not examples:
        return ""
    spans = "".join(
        f'<span><i style="background:rgb({red},{green},{blue})"></i>{escape(name)}</span>'
        for name, (red, green, blue) in legend
    )
    rows = "".join(
        f"<h3>{escape(example.name)}: mean IoU {_percent(example.score)}</h3>"
        + _row(example.pictures, ("picture", "label (black: not scored)", "prediction"))
        for example in examples
    )
    return f'<p class="legend">{spans}</p>{rows}'


def _row(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> str:
    figures = "".join(
        f"<figure>{_picture(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for picture, caption in zip(pictures, captions, strict=True)
    )
    return f'<div class="row">{figures}</div>'


def _attention(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    note = (
        "<p>What the pixel at the cross gathers: after one recurrence from its row and column, after two, by "
        "the product of both, from everywhere. Brightness is the root of the weight over the largest.</p>"
    )
    rows = "".join(
        f"<h3>{escape(example.name)}</h3>"
        + "".join(f"<p>{_picture(figure, 'attention maps', 3 * WIDTH)}</p>" for figure in example.pictures)
        for example in examples
    )
    return note + rows


def _picture(picture: np.ndarray, text: str, width: int = WIDTH) -> str:
    """Scaled down to the width; photographs as JPEG, pictures of few colors as PNG."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    few = image.getcolors(256) is not None
    if image.width > width:
        size = width, max(1, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if few:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    return _image(buffer.getvalue(), "png" if few else "jpeg", text)


def _image(content: bytes, kind: str, text: str = "") -> str:
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(text)}">'
