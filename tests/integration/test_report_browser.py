"""The pictures of a report in a real browser, with and without JavaScript."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tools.explore_page import NetworkText, Seen, explorable, explorer
from tools.report_page import Example, Figure, Report, page

HOSTILE = "<img src=x onerror=hacked=1>"
#: Names and scores of the best and of the worst pictures.
BEST, WORST = [("b", 0.9), (HOSTILE, 0.5)], [("a", 0.1), ("c", 0.2)]


def example(name: str, score: float) -> Example:
    """Return a picture with wrong pixels in its upper half."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    drawing = np.full((40, 60, 3), 100, np.uint8)
    wrong = np.zeros((40, 60, 4), np.uint8)
    wrong[:20] = 230, 30, 40, 255
    row = [Figure("picture", picture), Figure("label", drawing), Figure("prediction", drawing // 2)]
    return Example(name, score, [row], {"errors": wrong, "confidence": drawing})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seen = Seen(np.zeros((40, 60), np.uint8), np.ones((1, 40, 60), np.float32))
    picture = explorable("a", np.zeros((40, 60, 3), np.uint8), [seen], 640)
    report = Report(
        name="run", recipe={}, defaults={}, environment=[], log=[], validation=[], result={}, confusion=None,
        missing=[], best=[example(*each) for each in BEST], worst=[example(*each) for each in WORST],
        attention=[example("a", 0.1)],
        explorer=explorer([NetworkText("net", "", ["thing"], [9, 9, 9], "no maps")], [picture]),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(report))
    return path


@pytest.fixture
def shown(browser: Any, path: Path) -> Iterator[Any]:
    found = browser.new_page(viewport={"width": 1440, "height": 900})
    said: list[str] = []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url)
    )
    found.goto(path.as_uri())
    yield found
    assert said == [] and found.evaluate("typeof hacked") == "undefined"
    found.close()


def names(shown: Any) -> list[str]:
    """Return the names of the pictures from top to bottom."""
    tops = shown.locator(".pictures article").evaluate_all(
        "all => all.map(each => [each.getBoundingClientRect().top, each.dataset.name])"
    )
    return [name for _, name in sorted(tops)]


@pytest.mark.slow
def test_layers_lie_over_the_pictures(shown: Any) -> None:
    layers = shown.locator(".pictures img.errors")
    assert layers.count() == 4 and not layers.first.is_visible()
    shown.get_by_role("button", name="Errors").click()
    assert all(layers.nth(number).is_visible() for number in range(4))
    picture = shown.locator(".pictures .stack img").first
    assert layers.first.bounding_box() == picture.bounding_box()
    assert "Red: the prediction differs" in shown.locator(".layers").inner_text()
    # The pixels on the screen: red over the upper half only, in the strength of the slider.
    colors = {}
    for opacity in (0, 100):
        shown.locator(".layers input").fill(str(opacity))
        # Without the border, which shares pixels of the screen with the page around the picture.
        colors[opacity] = decoded(picture.screenshot())[3:-3, 3:-3]
    high = colors[0].shape[0] // 2
    assert (np.abs(colors[100][: high - 5] - [230, 30, 40]) < 8).all()
    assert np.abs(colors[100][high + 5 :] - colors[0][high + 5 :]).max() < 8
    for name in ("Label", "Prediction", "Confidence"):
        shown.get_by_role("button", name=name).click()
        assert shown.locator(f".pictures img.{name.lower()}").first.is_visible()
    shown.get_by_role("button", name="Errors").click()
    assert not layers.first.is_visible()


def decoded(content: bytes) -> np.ndarray:
    """Return a PNG file as integers [h, w, 3], RGB."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)


@pytest.mark.slow
def test_pictures_are_sorted(shown: Any) -> None:
    order, headings = shown.locator(".layers select"), shown.locator(".pictures h3")
    given = [name for name, _ in BEST + WORST]
    assert names(shown) == given and headings.count() == 2
    for text, expected in (
        ("Score, highest first", ["b", HOSTILE, "c", "a"]),
        ("Score, lowest first", ["a", "c", HOSTILE, "b"]),
        ("Name", [HOSTILE, "a", "b", "c"]),
    ):
        order.select_option(text)
        assert names(shown) == expected and not headings.first.is_visible()
    order.select_option("Best and worst")
    assert names(shown) == given and headings.nth(1).is_visible()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_no_screen_scrolls_sideways(shown: Any, width: int) -> None:
    shown.set_viewport_size({"width": width, "height": 844})
    shown.evaluate("document.querySelector('.explorer').explorer.ready")
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.locator(".explorer .stage").is_visible()


@pytest.mark.slow
def test_without_javascript_the_figures_are_there(browser: Any, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(path.as_uri())
    figures = plain.locator(".pictures figure img")
    assert figures.count() == 12 and all(figures.nth(number).is_visible() for number in range(12))
    assert plain.locator(".layers").count() == 0
    assert "Choosing pixels needs JavaScript." in plain.locator(".explorer").inner_text()
    context.close()
