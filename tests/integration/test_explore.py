"""tools.explore: its command, and the page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, fill, write_pair
from small_network import SmallNetwork, registered

from cc_attention import attention_maps
from segmenter import Segmenter
from tools import explore
from tools.explore_page import explorable
from utils.errors import DataError, UsageError

FLAGS = TINY[:-2]
HOSTILE = "<img src=x onerror=hacked=1>"


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    model = SmallNetwork(19)
    fill(model, seed)
    with torch.no_grad():
        model.head.cca.query_conv.weight *= 0.1  # attention over many pixels
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def tiny(tmp_path: Path, small_network: None) -> Path:
    return write_checkpoint(tmp_path / "CS_scenes_1.pth")


@pytest.fixture
def street(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (49, 65, 3), dtype=np.uint8))
    return path


def made(*arguments: object) -> str:
    """Run the command; return the page."""
    explore.main([str(argument) for argument in arguments])
    return Path(arguments[arguments.index("--out") + 1]).read_text()  # type: ignore[arg-type]


def data_of(page: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the data of a page about its networks, and about its pictures."""
    contents = [part.split("</script>")[0] for part in page.split('<script type="application/json" class="')]
    about = next(part for part in contents if part.startswith("about"))
    pictures = [part for part in contents if part.startswith("picture")]
    return json.loads(about[len('about">') :]), [json.loads(part[len('picture">') :]) for part in pictures]


# The command


def test_the_page_is_one_file_with_both_networks(
    tiny: Path, street: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = write_checkpoint(tmp_path / "CS_scenes_2.pth", 1), tmp_path / "page.html"
    (tmp_path / "args.json").write_text('{"model": "small", "backbone": "small", "recurrence": 1}')
    page = made(tiny, street, "--beside", other, "--out", out, "--gpu", "cpu", "--recurrence", "2")
    about, (picture,) = data_of(page)
    assert "http:" not in page and "https:" not in page and "src=" not in page
    assert "default-src 'none'" in page
    assert [each["note"] for each in about["networks"]] == [
        "small, small, recurrence 2", "small, small, recurrence 1",
    ]  # fmt: skip
    assert [len(each["maps"]) for each in picture["networks"]] == [2, 1]
    assert picture["networks"][0]["grid"] == [7, 9] == picture["networks"][0]["features"]
    said = capsys.readouterr().out
    assert "1 picture: the page will take less than 1 MiB" in said and f"{out}: 1 picture, 0.1 MiB" in said


def test_without_attention_the_page_says_so(tiny: Path, street: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    about, (picture,) = data_of(made(tiny, street, "--out", out, *FLAGS, "--recurrence", "0"))
    assert about["networks"][0]["noMaps"] == "Recurrence 0 has no attention, so there are no maps."
    assert "maps" not in picture["networks"][0] and "<h1>Predictions</h1>" in out.read_text()


def test_the_pictures_of_the_run_are_the_default(tiny: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no args.json that says where its data set is; name pictures"):
        made(tiny, "--out", tmp_path / "page.html", *FLAGS)
    flags = {"model": "small", "backbone": "small", "recurrence": 2}
    (tmp_path / "args.json").write_text(json.dumps(flags | {"data_dir": str(tmp_path / "gone")}))
    with pytest.raises(UsageError, match=r"its data set can't be used \(.*gone.*\); name pictures"):
        made(tiny, "--out", tmp_path / "page.html", *FLAGS)
    (tmp_path / "args.json").write_text(json.dumps(flags | {"data_dir": str(scenes)}))
    about, pictures = data_of(made(tiny, "--out", tmp_path / "page.html", *FLAGS))
    # Four of the five validation pictures, the first and the last among them.
    names = [each["name"] for each in about["pictures"]]
    assert len(pictures) == 4 and names[0].endswith("_000000") and names[-1].endswith("_000004")


def test_what_can_t_be_shown_takes_one_line(
    tiny: Path, street: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(UsageError, match="--out: would replace its own input"):
        made(tiny, street, "--out", street, *FLAGS)
    with pytest.raises(UsageError, match="--out: would replace its own input"):
        made(tiny, street, "--out", tiny, *FLAGS)
    (tmp_path / "damaged.png").write_bytes(street.read_bytes()[:99])
    with pytest.raises(DataError, match=r"damaged.png"):
        made(tiny, street, tmp_path / "damaged.png", "--out", out, *FLAGS)
    with pytest.raises(UsageError, match="video.mp4: is a video or camera"):
        (tmp_path / "video.mp4").write_bytes(b"")
        made(tiny, tmp_path / "video.mp4", "--out", out, *FLAGS)
    with pytest.raises(SystemExit):
        made(tiny, street, "--grid", "4x4", "--out", out)
    monkeypatch.setattr(explore, "MOST_BYTES", 2**14)
    with pytest.raises(UsageError, match=r"1 picture: the page would take .*--grid smaller than 7,9"):
        made(tiny, street, "--out", out, *FLAGS)
    assert not out.exists()


@pytest.mark.slow
def test_clips_are_refused(street: Path, tmp_path: Path, checkpoint: Path) -> None:
    flags = ["--out", tmp_path / "page.html", "--gpu", "cpu"]
    with pytest.raises(UsageError, match="--clip 3: maps over several frames are not drawn; add --model"):
        made(checkpoint, street, *flags, "--model", "ccnet3d")


def test_the_estimate_is_an_upper_bound(tiny: Path, tmp_path: Path) -> None:
    """Noise is what compresses worst."""
    write_pair(tmp_path, "val", 1, (160, 320))
    (path,) = tmp_path.rglob("*leftImg8bit.png")
    page = made(tiny, path, "--out", tmp_path / "page.html", *FLAGS)
    network = Segmenter.load(tiny, model="small", backbone="small", device="cpu", say=lambda line: None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError) as caught:
        patch.setattr(explore, "MOST_BYTES", 0)
        explore.check_size([explore.PictureFile(str(path), "a")], [network], None)
    (bound,) = [int(word) for word in str(caught.value).split() if word.isdigit()][1:2]
    assert len(page) <= (bound + 1) * 2**20


# The page in a browser


class Shown:
    """A page in a browser, what it said and what it asked for."""

    def __init__(self, page: Any, path: Path):
        self.page = page
        self.said: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri())
        self.ready()

    def ready(self) -> None:
        """Wait for the picture."""
        self.page.evaluate("document.querySelector('.explorer').explorer.ready")

    def explorer(self, expression: str) -> Any:
        return self.page.evaluate(f"(() => {{ const e = document.querySelector('.explorer').explorer;"
                                  f" return {expression}; }})()")  # fmt: skip

    def click(self, panel: int, pixel: tuple[int, int]) -> None:
        """Click a pixel of the picture in a panel."""
        stage = self.page.locator(".stage").nth(panel)
        box, size = stage.bounding_box(), self.explorer("e.picture.size")
        place = [(at + 0.5) / many for at, many in zip(pixel, size, strict=True)]
        stage.click(position={"x": place[1] * box["width"], "y": place[0] * box["height"]})
        assert self.explorer("e.pixel") == list(pixel)

    def weights(self, view: int, recurrence: int) -> np.ndarray:
        """Return the map that a panel of a network shows."""
        found = self.explorer(f"[e.views[{view}].maps.weightsOf({recurrence}, e.views[{view}].cell),"
                              f" e.views[{view}].maps.down.cells]")  # fmt: skip
        return np.array(found[0]).reshape(found[1], -1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Segmenter]]:
    folder = tmp_path_factory.mktemp("networks")
    with registered():
        paths = [write_checkpoint(folder / f"CS_scenes_{seed}.pth", seed) for seed in (1, 2)]
        yield [
            Segmenter.load(path, model="small", backbone="small", device="cpu", say=lambda line: None)
            for path in paths
        ]


PICTURES = [np.random.default_rng(seed).integers(0, 256, (49, 65, 3), dtype=np.uint8) for seed in (3, 4)]


@pytest.fixture(scope="module")
def path(networks: list[Segmenter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a page with two networks, the second with a coarse grid, and with hostile names."""
    ready = []
    for name, picture in zip(("street", HOSTILE), PICTURES, strict=True):
        seen = [
            explore.look(network, picture, grid, 2048)
            for network, grid in zip(networks, (None, (3, 4)), strict=True)
        ]
        ready.append(explorable(name, picture, seen, 1024))
    about = [explore.describe(network) for network in networks]
    about[0] = about[0]._replace(names=[f"{HOSTILE}{index}" for index in range(19)])
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(explore.page(about, ready))
    return path


@pytest.fixture
def shown(browser: Any, path: Path) -> Iterator[Shown]:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    found = Shown(page, path)
    yield found
    # Whatever a test does, the page reports no error and asks for nothing.
    assert found.said == [] and page.evaluate("typeof hacked") == "undefined"
    assert all(url.startswith("data:image/jpeg") for url in found.requests if url != path.as_uri())
    page.close()


def expected_maps(network: Segmenter, picture: np.ndarray, feature: tuple[int, int]) -> np.ndarray:
    """Return the maps [R, H, W] of a pixel of the features."""
    taken: list[torch.Tensor] = []
    hook = network.model.head.cca.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    network.predict(picture)
    hook.remove()
    return attention_maps(network.model.head.cca, taken[0], [feature])[:, 0].numpy()


def assert_quantized(found: np.ndarray, exact: np.ndarray) -> None:
    np.testing.assert_allclose(found, exact, atol=exact.max() * (1 / 255 + 1 / 510**2 + 1e-4))
    assert found.max() == pytest.approx(exact.max(), rel=1e-4)


@pytest.mark.slow
def test_a_click_shows_the_maps_and_the_class_of_the_pixel(shown: Shown, networks: list[Segmenter]) -> None:
    probabilities = networks[0].predict(PICTURES[0]).probabilities
    for panel, pixel in ((0, (40, 10)), (1, (3, 60)), (4, (17, 33))):
        shown.click(panel, pixel)
        feature = tuple(round(at * few / many) for at, few, many in zip(pixel, (6, 8), (48, 64), strict=True))
        exact = expected_maps(networks[0], PICTURES[0], feature)
        for recurrence in range(2):
            assert_quantized(shown.weights(0, recurrence), exact[recurrence])
        first, second = probabilities[:, pixel[0], pixel[1]].argsort()[:-3:-1]
        text = shown.page.locator(".readout").first.inner_text()
        said = f"{HOSTILE}{first} {100 * probabilities[first, pixel[0], pixel[1]]:.0f}"[:-1]
        assert said in text and f"{HOSTILE}{second} " in text
        spoken = shown.page.locator("[aria-live]").inner_text()
        assert spoken.startswith(f"row {pixel[0]}, column {pixel[1]}: ") and "R = 2: largest weight" in spoken


@pytest.mark.slow
def test_a_coarse_grid_shows_the_nearest_pixel(shown: Shown, networks: list[Segmenter]) -> None:
    # Cells of 7/3 x 9/4 features. The center of feature 2, at 2.5, is in the second cell of both axes, whose
    # middle is in feature 3; the middles of the last cells are in features 5 and 7.
    for pixel, feature in (((47, 63), (5, 7)), ((16, 16), (3, 3))):
        shown.click(0, pixel)
        exact = expected_maps(networks[1], PICTURES[0], feature)
        means = exact.repeat(3, 1).repeat(4, 2).reshape(2, 3, 7, 4, 9).mean((2, 4))
        for recurrence in range(2):
            assert_quantized(shown.weights(1, recurrence), means[recurrence])
        said = shown.page.locator(".readout").nth(1).inner_text()
        assert f"maps of row {8 * feature[0]}, column {8 * feature[1]}" in said


@pytest.mark.slow
def test_the_drawing_is_bright_where_the_weights_are(shown: Shown, networks: list[Segmenter]) -> None:
    shown.click(1, (40, 10))
    exact = expected_maps(networks[0], PICTURES[0], (5, 1))
    for recurrence in range(2):
        content, width = shown.explorer(
            f"(c => [Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data), c.width])"
            f"(e.views[0].heats[{recurrence}].canvas)"
        )
        drawn = np.array(content).reshape(-1, width, 4)
        light = drawn[..., :3].sum(-1)
        at = np.unravel_index(light.argmax(), light.shape)
        peak = np.unravel_index(exact[recurrence].argmax(), (7, 9))
        assert light.max() > 600 and abs(at[0] - 8 * peak[0]) <= 4 and abs(at[1] - 8 * peak[1]) <= 4
        # Between brightness and weight there is one monotonic curve: compare at the features.
        order = exact[recurrence].ravel().argsort()
        lights = light[::8, ::8].ravel()[order].astype(int)
        assert np.diff(lights).min() >= -12
    first = shown.explorer("Array.from(e.views[0].heats[0].pixels)")
    assert len(set(np.array(first).reshape(-1, width)[0:1, 24:].ravel())) == 1  # beside the cross: no weight


@pytest.mark.slow
def test_keys_move_the_pixel(shown: Shown) -> None:
    stage = shown.page.locator(".stage").first
    shown.click(0, (24, 32))
    stage.focus()
    for key, pixel in (
        ("ArrowRight", [24, 40]), ("ArrowDown", [32, 40]), ("Shift+ArrowLeft", [32, 39]),
        ("Shift+ArrowUp", [31, 39]), ("ArrowLeft", [31, 32]), ("ArrowUp", [24, 32]),
    ):  # fmt: skip
        shown.page.keyboard.press(key)
        assert shown.explorer("e.pixel") == pixel, key
    assert stage.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    for _ in range(9):
        shown.page.keyboard.press("ArrowUp")
        shown.page.keyboard.press("Shift+ArrowRight")
    assert shown.explorer("e.pixel[0]") == 0
    assert "choose a pixel with the arrow keys" in stage.get_attribute("aria-label")


@pytest.mark.slow
def test_pictures_overlays_and_classes_can_be_chosen(shown: Shown, networks: list[Segmenter]) -> None:
    classes = networks[0].predict(PICTURES[1]).classes
    shown.page.locator(".choose button").nth(1).click()
    shown.ready()
    assert HOSTILE in shown.page.locator(".stage").first.get_attribute("aria-label")
    assert shown.page.locator(".choose [aria-pressed=true]").count() == 1
    assert shown.page.locator(".choose button").nth(1).inner_text().strip() == HOSTILE
    drawn = "Array.from(e.views[0].prediction.content.data)"
    colors = np.reshape(networks[0].palette, (256, 3))
    found = np.array(shown.explorer(drawn)).reshape(49, 65, 4)
    assert (found[..., :3] == colors[classes]).all() and (found[..., 3] == 255).all()
    # A class in the legend, with the share of its pixels, highlights itself.
    button = shown.page.locator(".legend").first.locator("button").first
    common = np.bincount(classes.ravel()).argmax()
    assert f"{100 * (classes == common).mean():.1f} %" in button.inner_text()
    button.click()
    shown.page.mouse.move(0, 0)
    opacities = np.array(shown.explorer(drawn)).reshape(49, 65, 4)[..., 3]
    assert ((opacities == 255) == (classes == common)).all()
    button.click()
    shown.page.locator("select.overlay").select_option("confidence")
    assert (np.array(shown.explorer(drawn)).reshape(49, 65, 4)[..., :3] != colors[classes]).any()
    shown.page.locator("input.opacity").fill("20")
    assert shown.explorer("e.views[1].prediction.canvas.style.opacity") == "0.2"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_no_screen_scrolls_sideways(shown: Shown, width: int) -> None:
    shown.page.set_viewport_size({"width": width, "height": 844})
    assert shown.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.click(2, (24, 32))  # the panels are there, and can be clicked
