"""Measure how long the page of tools.explore takes from a click to the drawn maps.

    python -m benchmarks.explore [--size 1024x2048] [--clicks N] [--out FILE.json]

The page shows a random picture, with ResNet-50, random weights, R = 2 and the default grid. Chromium clicks
random pixels of it. Measured are, for each click:

- page: from before the click is sent until the maps are on the canvases and the browser has drawn the next
  frame;
- Segmenter.attention: the maps of the same pixel, computed by the network at the size of the features, not
  drawn.

Both are measured in turn, in one run, and so is Segmenter.attention_grid, which computes the maps of all
pixels of the page. The exit status is 1 if the median of the page is over 100 ms.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from networks import Seg_Model
from segmenter import Segmenter
from tools import explore
from tools.common import end
from tools.explore_page import Seen, explorable
from utils import args as flags
from utils.environment import machine
from utils.errors import UsageError
from utils.files import check_output_file, write_file

#: Maximum median of the milliseconds from a click to the drawn maps.
BAR = 100.0
#: Waits until the browser has drawn the frame that follows.
DRAWN = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))"


def open_network(folder: str) -> Segmenter:
    """Return CCNet with ResNet-50 and random weights, whose attention covers many pixels."""
    torch.manual_seed(0)
    model = Seg_Model(19, backbone="resnet50")
    path = os.path.join(folder, "random.pth")
    torch.save(model.state_dict(), path)
    return Segmenter.load(path, device="cpu", recurrence=2, say=lambda line: None)


def measured(path: Path, network: Segmenter, picture: np.ndarray, clicks: int) -> dict[str, list[float]]:
    """Return the milliseconds of each click on the page, and of the same maps by the network."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium")
    if browser_path is None:
        raise UsageError("benchmarks.explore: there is no chromium; apt-get install chromium")
    times: dict[str, list[float]] = {"opening": [], "page": [], "segmenter": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        begin = time.perf_counter()
        page.goto(path.as_uri())
        page.evaluate("document.querySelector('.explorer').explorer.ready")
        page.evaluate(DRAWN)
        times["opening"].append(1000 * (time.perf_counter() - begin))
        stage = page.locator(".explorer .stage").first
        box: Any = stage.bounding_box()
        random.seed(0)
        for _ in range(clicks):
            place = random.random(), random.random()
            begin = time.perf_counter()
            page.mouse.click(box["x"] + place[1] * box["width"], box["y"] + place[0] * box["height"])
            page.evaluate(DRAWN)
            times["page"].append(1000 * (time.perf_counter() - begin))
            row, column = page.evaluate("document.querySelector('.explorer').explorer.pixel")
            if len(times["segmenter"]) < 2:  # they take seconds each, and differ little
                begin = time.perf_counter()
                network.attention(picture, [(row, column)])
                times["segmenter"].append(1000 * (time.perf_counter() - begin))
        browser.close()
    return times


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = flags.Parser("python -m benchmarks.explore", __doc__)
    parser.add_argument("--size", default="1024x2048", metavar="HxW", help="size of the picture")
    parser.add_argument("--clicks", type=flags.positive_int, default=50, metavar="N", help="number of clicks")
    parser.add_argument("--out", metavar="FILE", help="result as JSON")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    height, width = flags.size(args.size.replace("x", ","))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        network = open_network(folder)
        begin = time.perf_counter()
        weights, features = network.attention_grid(picture, most=explore.CELLS)
        computing = time.perf_counter() - begin
        # The class does not matter for the time.
        classes = np.random.default_rng(1).integers(0, 19, (height, width), dtype=np.uint8)
        seen = Seen(classes, np.full((19, height, width), 1 / 19, np.float32), weights.numpy(), features)
        path = Path(folder) / "page.html"
        content = explore.page(
            [explore.describe(network)], [explorable("noise", picture, [seen], explore.LONGEST)]
        )
        path.write_text(content)
        print(f"page of {len(content) / 2**20:.1f} MiB", flush=True)
        times = measured(path, network, picture, args.clicks)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "machine": machine("cpu"),
        "size": [height, width],
        "grid": list(weights.shape[1:3]),
        "recurrence": len(weights),
        "page_mib": len(content) / 2**20,
        "seconds_of_attention_grid": computing,
        "milliseconds": times,
        "median_milliseconds": medians,
        "attention_to_click": medians["segmenter"] / medians["page"],
        "grid_to_attention": 1000 * computing / medians["segmenter"],
    }
    print(
        f"opening the page {medians['opening']:.0f} ms; click to drawn maps {medians['page']:.1f} ms "
        f"(slowest of {args.clicks}: {max(times['page']):.1f} ms); Segmenter.attention "
        f"{medians['segmenter']:.0f} ms: {result['attention_to_click']:.0f} times as long; "
        f"Segmenter.attention_grid {computing:.1f} s: {result['grid_to_attention']:.2f} times the attention "
        "of one pixel"
    )
    if args.out:
        write_file(args.out, json.dumps(result, indent=1) + "\n")
    return 1 if medians["page"] > BAR else 0


if __name__ == "__main__":
    end(main)
