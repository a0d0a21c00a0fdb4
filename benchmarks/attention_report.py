"""Floors, comparisons, tables and charts of benchmarks/attention.py."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.attention_peers import LEVELS, Case
from utils.files import replacing

TIMED = ("forward", "forward+backward")
#: Labels of the ratios of other families to ours.
PEERS = {
    **{name: f"best {name} / ours" for name in ("pure PyTorch", "views", "FlexAttention", "non-local")},
    "before": "before / ours",
    "heads=1": "heads=1 / ours",
}
ALLOCATED = "forward+backward allocated"
COLUMNS = (*TIMED, *(f"{name} graph" for name in TIMED), *(f"{name} peak" for name in TIMED), ALLOCATED)


# The floors


@dataclass(frozen=True)
class Work:
    """FLOP and bytes of device memory of a part of a computation."""

    flop: int
    bytes: int

    def seconds(self, flop_per_second: float, bytes_per_second: float) -> float:
        """Return the minimum time: FLOP and bytes overlap, so that the slower one decides."""
        return max(self.flop / flop_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Floor:
    """The parts of the forward and of the backward pass, which run one after the other."""

    forward: list[Work]
    backward: list[Work]

    def totals(self) -> dict[str, dict[str, int]]:
        """Return the FLOP and bytes of each pass."""
        return {
            name: {"flop": sum(part.flop for part in parts), "bytes": sum(part.bytes for part in parts)}
            for name, parts in vars(self).items()
        }

    def seconds(self, flop_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """Return the minimum time of each pass, and of both."""
        ahead, back = (
            sum(part.seconds(flop_per_second, bytes_per_second) for part in parts)
            for parts in (self.forward, self.backward)
        )
        return {"forward": ahead, "backward": back, "forward+backward": ahead + back}


def floor_of(case: Case, passes: int = 1) -> Floor:
    """Return the work of a case, if the attention takes one or several passes over its maps.

    In the formulas, e is the size of an element in bytes, c and C are the channels of query and value, and
    P is `passes`. There are S = N H W L scores, where each pixel has L = 1 + sum (n - 1) positions, over the
    sizes n of the axes attended along.

    FLOP of the attention: the forward consists of two products, query key and weight value: 2 S (c + C). The
    backward consists of five, for the scores, grad_weight, grad_value, grad_query and grad_key:
    2 S (3 c + 2 C).

    Bytes of the attention, for each pixel:

    - forward: e P (2 c + C) + e (2 P - 1) C + 4 heads (2 P - 1). Each pass reads query, key and value. Each
      writes its result, with the logarithm of the denominator of the softmax (4 bytes for each head), and all
      but the first one read those of the pass before.
    - backward: e P (2 c + 2 C) + e C + e (2 P - 1) (2 c + C) + 4 heads B, with B = 1 for one pass and 2 P
      for several. Each pass reads query, key, value, the gradient of the result, and the logarithm. The
      first one reads the result. Each writes the three gradients, and all but the first one read those of
      the pass before. If there are several, the first one writes the product of result and gradient of each
      pixel (4 bytes for each head), which the others read.

    P = 1 gives the bytes that no implementation avoids: each tensor moves once. A kernel that works line by
    line needs one pass for each axis, which is two passes for a picture.

    A module adds, for each application, a joint projection, and a residual to the attention. With p pixels,
    M = 2 c + C and weights of C M elements:

    - projection, forward: 2 p C M FLOP; reads the map and the weights, and writes M channels:
      e (p (C + M) + C M) bytes.
    - attention: the forward also reads the residual. It also writes the attention without the residual, for
      the gradient of gamma, which counts as work of the backward. Each is e p C bytes.
    - projection, backward: 4 p C M FLOP; reads the gradient of M channels, the map, the weights and the
      gradient of the residual; writes the gradients of the map and of the weights:
      e (p (M + 3 C) + 2 C M) bytes.
    """
    c, channels = case.channels
    pixels, e = math.prod(case.shape), case.dtype.itemsize
    scores = pixels * (1 + sum(case.shape[axis + 1] - 1 for axis in case.used_axes))
    joint = 2 * c + channels
    links = 2 * passes - 1  # writes of a map, and reads of what the pass before wrote
    applications = LEVELS[case.level]
    extra = e * channels if applications else 0  # a map of the residual
    ahead = e * (passes * joint + links * channels) + 4 * case.heads * links
    back = e * (passes * (2 * c + 2 * channels) + channels + links * joint)
    back += 4 * case.heads * (2 * passes if passes > 1 else 1)
    forward = [Work(2 * scores * (c + channels), pixels * (ahead + extra))]
    backward = [Work(2 * scores * (3 * c + 2 * channels), pixels * (back + extra))]
    if applications:
        product, weights = 2 * pixels * channels * joint, channels * joint
        forward.append(Work(product, e * (pixels * (channels + joint) + weights)))
        backward.append(Work(2 * product, e * (pixels * (joint + 3 * channels) + 2 * weights)))
    return Floor(forward * max(applications, 1), backward * max(applications, 1))


def floors(case: Case, flop_per_second: float, bytes_per_second: float) -> dict[str, Any]:
    """Return the entries of a report with the work of a case and its floors in seconds."""
    ideal, by_axis = floor_of(case), floor_of(case, len(case.used_axes))
    return {
        "work": ideal.totals(),
        "passes": len(case.used_axes),
        "floors": ideal.seconds(flop_per_second, bytes_per_second),
        "byte_floors": {
            "ideal": ideal.seconds(math.inf, bytes_per_second),
            "passes": by_axis.seconds(math.inf, bytes_per_second),
        },
    }


# Comparing


def number(result: dict[str, Any], column: str) -> float | None:
    """Return the median seconds, or the bytes, of a column of the results of a contender."""
    value = result.get(column)
    return value["median"] if isinstance(value, dict) else value


def best(results: dict[str, dict[str, Any]], column: str, **key: str) -> tuple[str, float] | None:
    """Return name and value of the best contender of a family or kind in a column."""
    ((field, wanted),) = key.items()
    found = [
        (name, value)
        for name, result in results.items()
        if result[field] == wanted and (value := number(result, column)) is not None
    ]
    return min(found, key=lambda pair: pair[1], default=None)


def compare(results: dict[str, dict[str, Any]], floors: dict[str, Any]) -> dict[str, Any]:
    """Return for each column our best value, and its ratios with other families and with the floors.

    Args:
        results: results by contender.
        floors: those of the function `floors`.
    """
    ratios: dict[str, Any] = {}
    for column in COLUMNS:
        ours = best(results, column, family="ours")
        if ours is None or not ours[1]:  # tiny inputs may need no new memory
            continue
        value = ours[1]
        entry: dict[str, Any] = {"ours": {"name": ours[0], "value": ours[1]}}
        for family in PEERS:
            if peer := best(results, column, family=family):
                entry[family] = {"name": peer[0], "value": peer[1], "over_ours": peer[1] / value}
        timed = column.removesuffix(" graph")
        if floor := floors["floors"].get(timed):
            entry["ours_over_floor"] = ours[1] / floor
            for name, seconds in floors["byte_floors"].items():
                entry[f"{name}_bytes_over_ours"] = seconds[timed] / value
        ratios[column] = entry
    return ratios


def float32_over_bfloat16(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the ratio of our float32 to our bfloat16 values, by the name of the case and column."""
    result: dict[str, dict[str, float]] = {}
    for wide in (case for case in cases if case["dtype"] == "float32"):
        for narrow in (c for c in cases if c["dtype"] == "bfloat16" and c["name"] == wide["name"]):
            columns = [column for column in wide["ratios"] if column in narrow["ratios"]]
            result[wide["name"]] = {
                column: wide["ratios"][column]["ours"]["value"] / narrow["ratios"][column]["ours"]["value"]
                for column in columns
            }
    return result


# Tables and charts


def title(case: dict[str, Any]) -> str:
    """Return name and dtype of a case."""
    return f"{case['name']} {case['dtype']}"


def _is_memory(column: str) -> bool:
    return column.endswith(("peak", "allocated"))


def show(case: dict[str, Any]) -> None:
    """Print a case as a table: milliseconds and megabytes, comparisons, and failures."""
    columns = [column for column in COLUMNS if any(column in r for r in case["contenders"].values())]
    headings = [f"{column} {'MB' if _is_memory(column) else 'ms'}" for column in columns] + ["error"]
    lines: list[tuple[str, list[float | None], str]] = []  # name, values in the units of the headings, error

    scales = [1e-6 if _is_memory(column) else 1e3 for column in columns]
    for name, result in case["contenders"].items():
        found = [number(result, column) for column in columns]
        scaled = [
            value if value is None else value * scale for value, scale in zip(found, scales, strict=True)
        ]
        lines.append((name, scaled, f"{result['error']:.0e}" if "error" in result else "-"))

    def add(name: str, values: list[float | None]) -> None:
        if any(value is not None for value in values):
            lines.append((name, values, ""))

    byte_floors = {"ideal": "ideal bytes", "passes": f"{case['passes']}-pass bytes"}
    limits = {"floor": case["floors"]}
    limits |= {label: case["byte_floors"][name] for name, label in byte_floors.items()}
    timed = [column.removesuffix(" graph") for column in columns]
    for name, seconds in limits.items():
        add(name, [1e3 * seconds[column] if column in seconds else None for column in timed])
    ratios = [case["ratios"].get(column, {}) for column in columns]
    for family, label in PEERS.items():
        add(label, [ratio.get(family, {}).get("over_ours") for ratio in ratios])
    add("ours / floor", [ratio.get("ours_over_floor") for ratio in ratios])
    for name, label in byte_floors.items():
        add(f"{label} / ours", [ratio.get(f"{name}_bytes_over_ours") for ratio in ratios])

    print(f"\n{title(case)}, channels {case['channels'][0]}/{case['channels'][1]}")
    width = max(len(name) for name, *_ in lines)
    print("  ".join([" " * (width + 2), *headings]))
    for name, values, error in lines:
        cells = ["-" if value is None else f"{value:.4g}" for value in values] + [error]
        print(
            f"  {name:<{width}}"
            + "".join(f"  {cell:>{len(head)}}" for cell, head in zip(cells, headings, strict=True))
        )
    for name, result in case["contenders"].items():
        for why in dict.fromkeys(result["failed"].values()):
            missing = ", ".join(column for column, reason in result["failed"].items() if reason == why)
            print(f"  {name}: {missing}: {why}")
    sys.stdout.flush()


def plot(report: dict[str, Any], path: str) -> None:
    """Draw a bar chart with a panel for each case and time.

    Each bar is the best time of a kind of contender, with or without a CUDA graph.
    """
    colors = {
        "ours": (31, 119, 180),
        "pure PyTorch": (150, 150, 150),
        "views": (110, 110, 110),
        "FlexAttention": (138, 79, 176),
        "before": (110, 164, 205),
        "heads=1": (110, 164, 205),
        "non-local": (214, 158, 96),
    }
    ink, pale = (30, 30, 30), (222, 222, 222)
    bold, plain = ImageFont.load_default(17), ImageFont.load_default(14)
    panels = []  # (title, floor in ms, [(kind, family, ms)])
    for case in report["cases"]:
        kinds = {result["kind"]: result["family"] for result in case["contenders"].values()}
        for action in TIMED:
            bars = []
            for kind, family in kinds.items():
                found = [best(case["contenders"], c, kind=kind) for c in (action, f"{action} graph")]
                if values := [value for _, value in filter(None, found)]:
                    bars.append((kind, family, 1e3 * min(values)))
            if bars:
                panels.append((f"{title(case)}, {action}", 1e3 * case["floors"][action], bars))
    bar, column, left, scale = 24, 640, 165, 350
    height = 70 + 24 * max((len(bars) for _, _, bars in panels), default=0)
    picture = Image.new("RGB", (2 * column, 60 + height * ((len(panels) + 1) // 2)), "white")
    draw = ImageDraw.Draw(picture)
    about = report["machine"]
    draw.text((16, 10), "Criss-cross attention: milliseconds, logarithmic scale, lower is better", ink, bold)
    text = "dashed: floor, at the rate of PyTorch's matrix products"
    draw.text((16, 34), f"{about['name']}, PyTorch {about['torch']}; {text}", ink, plain)
    for index, (heading, floor, bars) in enumerate(panels):
        x, y = column * (index % 2), 60 + height * (index // 2)
        draw.text((x + 16, y + 12), heading, ink, bold)
        times = [floor, *(ms for _, _, ms in bars)]
        low, high = math.log(min(times) / 2), math.log(max(times))
        top = y + 42
        for row, (kind, family, ms) in enumerate(bars):
            middle = top + bar * row + bar // 2
            end = x + left + round(scale * (math.log(ms) - low) / (high - low))
            draw.text((x + left - 8, middle), kind, ink, plain, anchor="rm")
            draw.rectangle((x + left, middle - 8, end, middle + 8), colors[family])
            draw.text((end + 6, middle), f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}", ink, plain, anchor="lm")
        bottom = top + bar * len(bars)
        draw.line((x + left, top, x + left, bottom), pale)
        at = x + left + round(scale * (math.log(floor) - low) / (high - low))
        for dash in range(top, bottom, 8):
            draw.line((at, dash, at, dash + 4), ink)
    with replacing(path) as temporary:
        picture.save(temporary)
