"""tools.report: the page shows all results of a run and is a single file."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import CSDataSet
from dataset.labels import CITYSCAPES
from engine.evaluation import results
from engine.evaluation.evaluate import Result
from engine.evaluation.metrics import confusion_matrix, mean_iou
from engine.evaluation.pictures import Pictures
from engine.training.log import RunLog
from networks import CheckpointError
from segmenter import Segmenter
from tools import report
from utils.drawing import heat_map
from utils.drawing.chart import draw_curves
from utils.drawing.palette import contrast, ink_on, make_palette, save_indexed_png
from utils.errors import UsageError


@pytest.fixture
def finished(tmp_path: Path, scenes: Path, checkpoint: Path) -> Path:
    """Return the folder of a run whose predictions are right in a growing part of each picture."""
    folder = tmp_path / "a <run>"
    (folder / "outputs").mkdir(parents=True)
    dataset = CSDataSet(str(scenes), split="val", crop_size=None)
    confusions = []
    for number in range(len(dataset)):
        picture = dataset.picture(number, instances=False)
        prediction = np.where(picture.label == 255, 0, picture.label)
        prediction[10 * number :] = 18
        save_indexed_png(folder / f"outputs/{picture.name}.png", prediction, make_palette([]))
        confusions.append(confusion_matrix(torch.from_numpy(picture.label), torch.from_numpy(prediction), 19))
    arguments = {
        "data_dir": str(scenes),
        "data_list": None,
        "split": "val",
        "classes": None,
        "num_classes": 19,
        "ignore_label": 255,
        "restore_from": str(checkpoint),
        "recurrence": 2,
    }
    pictures = Pictures.of([pair.name for pair in dataset.pairs], confusions)
    result = Result(pictures.confusion(), None, pictures)
    results.write(str(folder), result, dataset.labels.names(), arguments)
    (folder / "args.json").write_text(
        json.dumps({"data_dir": "CS", "backbone": "resnet50", "num_steps": 40, "ohem": True, "power": 0.9})
    )
    (folder / "environment.json").write_text(json.dumps([{"step": 0, "name": "a processor"}]))
    log = RunLog(str(folder), 0, 40, 2)
    for step in (20, 40):
        log.write(step, 3.0 / step, 0.01, main_loss=1.0)
        log.score(step, step / 100, True)
    log.close()
    return folder


class Page(HTMLParser):
    """The texts, references and unclosed elements of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: list[str] = []
        self.references: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        found = dict(attributes)
        self.references += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "img":
            self.images.append((found.get("alt") or "", found.get("src") or ""))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())


def made(folder: Path, *arguments: str) -> tuple[str, Page]:
    report.main([str(folder), "--gpu", "cpu", *arguments])
    text = (folder / "report.html").read_text()
    return text, Page(text)


def test_the_page_has_all_of_it(finished: Path) -> None:
    text, page = made(finished, "--pictures", "2", "--attention", "1")
    assert not page.open and all(reference.startswith("data:image/") for reference in page.references)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Score", "Recipe", "Environment", "Curves", "Classes", "Confusion matrix", "Pictures", "Attention",
    ]  # fmt: skip
    assert "a <run>" in page.texts and "a processor" in page.texts
    assert "python train.py --data-dir CS --backbone resnet50 --num-steps 40 --ohem" in " ".join(page.texts)
    score = json.loads((finished / "result.txt").read_text())["meanIU"]
    assert f"{100 * score:.2f} %" in page.texts
    assert "best validation, step 40" in page.texts and "40.00 %" in page.texts
    # Two best and two worst pictures of three images each, attention of two pixels, the confusion matrix.
    assert len(page.images) == 4 * 3 + 2 * 3 + 1


def test_the_page_says_how_the_score_was_obtained(finished: Path, checkpoint: Path, scenes: Path) -> None:
    _, page = made(finished, "--pictures", "0", "--attention", "0")
    said = " ".join(page.texts)
    number = len(CSDataSet(str(scenes), split="val", crop_size=None))
    assert f"{scenes}, split val, {number} pictures" in said and "recurrence 2" in said
    assert f"{checkpoint.name} in {checkpoint.parent}" in said and "not recorded" in said
    result = json.loads((finished / "result.txt").read_text())
    how = {"input_size": [33, 65], "whole": False, "scales": [0.75, 1.0], "flip": True}
    result["arguments"] |= how
    (finished / "result.txt").write_text(json.dumps(result))
    said = " ".join(made(finished, "--pictures", "0", "--attention", "0")[1].texts)
    assert "overlapping tiles of 33 x 65 pixels" in said and "0.75, 1 (averaged)" in said
    assert "averaged with the mirrored picture" in said
    result["arguments"] |= {"whole": True, "scales": [1.0], "flip": False}
    (finished / "result.txt").write_text(json.dumps(result))
    said = " ".join(made(finished, "--pictures", "0", "--attention", "0")[1].texts)
    assert "whole pictures (no tiles)" in said and "Scales 1 Flip no" in said


@pytest.mark.parametrize("value", [None, [], {"a": 1}, "x", 10**400, True])
def test_odd_ways_of_an_evaluation_are_shown_as_they_are(finished: Path, value: object) -> None:
    result = json.loads((finished / "result.txt").read_text())
    result["arguments"] |= dict.fromkeys(
        ("input_size", "whole", "scales", "flip", "model", "backbone"), value
    )
    (finished / "result.txt").write_text(json.dumps(result))
    _, page = made(finished, "--pictures", "0", "--attention", "0")
    assert "Prediction" in page.texts and not page.open


def test_the_environment_is_written_for_people(finished: Path) -> None:
    first = {
        "step": 0, "device": "cuda:0", "name": "a GPU", "memory_bytes": 85e9, "load": 0.52392578125,
        "date": "2026-11-28T19:15:35+00:00", "commit": "51f819d98312+",
    }  # fmt: skip
    (finished / "environment.json").write_text(json.dumps([first]))
    _, page = made(finished, "--pictures", "0", "--attention", "0")
    said = " ".join(page.texts)
    for words in (
        "Date 28 November 2026, 19:15 UTC", "Device GPU (cuda:0)", "Processor a GPU", "GPU memory 79.2 GiB",
        "System load at the start 0.5", "Commit 51f819d98312, with local changes",
    ):  # fmt: skip
        assert words in said
    assert "step 0" not in said and "start step" not in said.lower()
    odd = {
        "step": 20,
        "device": [1],
        "date": "today",
        "memory_bytes": "x",
        "load": None,
        "commit": 3,
        "new": 0.123456,
    }
    (finished / "environment.json").write_text(json.dumps([first, odd]))
    said = " ".join(made(finished, "--pictures", "0", "--attention", "0")[1].texts)
    assert "first start resumed after step 20" in said and "New 0.1235" in said and "today" in said


def test_classes_have_the_colors_of_the_palette(finished: Path) -> None:
    text, _ = made(finished, "--pictures", "0", "--attention", "0")
    red, green, blue = make_palette(CITYSCAPES.colors)[:3]
    assert f'<i class="color" style="background:rgb({red},{green},{blue})"></i>road' in text
    assert text.count('<i class="color"') == 19
    text, page = made(finished, "--pictures", "1", "--attention", "0")
    # One legend for all pictures, with the classes that occur in them.
    assert text.count('class="legend"') == 1 and "not scored" in page.texts


def test_attention_maps_name_their_pixel_and_its_class(finished: Path) -> None:
    _, page = made(finished, "--pictures", "0", "--attention", "1")
    captions = [text for text, _ in page.images if "cross" in text.lower()]
    assert len(captions) == 6
    assert all(re.search(r"row \d+, column \d+, label .+, prediction .+", text) for text in captions)
    assert sum("R = 2: largest weight" in text for text in captions) == 2


def layers_of(text: str) -> list[dict[str, np.ndarray]]:
    """Return the layers of each picture, uint8 [h, w, 3] or [h, w, 4]."""
    found = re.findall(r'<script type="application/json">(.*?)</script></article>', text)
    return [
        {
            name: np.array(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert(mode))
            for name, uri in json.loads(layers).items()
            for mode in ["RGBA" if name == "errors" else "RGB"]
        }
        for layers in found
    ]


@pytest.mark.slow
def test_pictures_have_layers_of_errors_and_confidence(
    finished: Path, scenes: Path, checkpoint: Path
) -> None:
    result = json.loads((finished / "result.txt").read_text())
    result["arguments"] |= {"input_size": [33, 49], "whole": False, "scales": [1.0], "flip": True}
    (finished / "result.txt").write_text(json.dumps(result))
    text, page = made(finished, "--pictures", "1", "--attention", "1")
    assert "Without a layer of confidence" not in text
    dataset = CSDataSet(str(scenes), split="val", crop_size=None)
    network = Segmenter.load(checkpoint, device="cpu", say=lambda line: None)
    names = re.findall(r'<article data-name="(.*?)"', text)[:2]
    for name, layers in zip(names, layers_of(text), strict=True):
        (number,) = [each for each, pair in enumerate(dataset.pairs) if pair.name == name]
        picture = dataset.picture(number, instances=False)
        prediction = report.read_prediction(str(finished / "outputs"), name, 19)
        wrong = (prediction != picture.label) & (picture.label != 255)
        assert ((layers["errors"][..., 3] == 255) == wrong).all() and wrong.any() and not wrong.all()
        expected = network.predict(picture.image[..., ::-1].copy(), tile_size=(33, 49), flip=True)
        codes = np.rint(255 * expected.probabilities.max(0)).astype(np.uint8)
        drawn = cv2.applyColorMap(codes, cv2.COLORMAP_INFERNO)[..., ::-1]
        assert np.abs(layers["confidence"].astype(int) - drawn).max() <= 3
    # The pictures with attention maps are those of the explorer.
    (about,) = re.findall(r'class="about">(.*?)</script>', text)
    explored = [each["name"] for each in json.loads(about)["pictures"]]
    assert explored == re.findall(r'<article data-name="(.*?)"', text)[2:]
    content = json.loads(re.findall(r'class="picture">(.*?)</script>', text)[0])
    assert content["networks"][0]["grid"] == [7, 9] and len(content["networks"][0]["maps"]) == 2


def test_a_page_without_confidence_says_why(finished: Path) -> None:
    text, page = made(finished, "--pictures", "1", "--attention", "0")
    assert "Without a layer of confidence: --attention 0 does not open the checkpoint" in page.texts
    assert [list(layers) for layers in layers_of(text)] == [["errors"]] * 2 and "explorer" not in text
    result = json.loads((finished / "result.txt").read_text())
    result["arguments"]["restore_from"] = str(finished / "gone.pth")
    (finished / "result.txt").write_text(json.dumps(result))
    _, page = made(finished, "--pictures", "1")
    assert any(
        line.startswith("Without a layer of confidence: ") and "gone.pth" in line for line in page.texts
    )


def test_the_median_speed_and_the_peak_of_memory(finished: Path) -> None:
    entries = [
        {"step": step, "loss": 1, "lr": 1, "images_per_second": speed, "memory_mb": 1024 + step}
        for step, speed in ((1, 4.0), (2, 0.5), (3, 5.0))
    ]
    (finished / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    said = " ".join(made(finished, "--pictures", "0", "--attention", "0")[1].texts)
    assert "4 images/s (median)" in said and "1.0 GiB peak memory" in said


def test_a_narrow_screen_shows_all(finished: Path) -> None:
    """No element is wider than the screen: charts and figures wrap, and the matrix scrolls."""
    text, _ = made(finished, "--pictures", "1", "--attention", "1")
    assert "minmax(min(100%, 340px), 1fr)" in text and 'class="scroll"><img' in text
    assert not re.search(r"[^-]width: (?:[4-9]\d\d|\d{4,})px", text)


def test_best_and_worst_by_their_own_scores(finished: Path, scenes: Path) -> None:
    _, page = made(finished, "--pictures", "2", "--attention", "0")
    dataset = CSDataSet(str(scenes), split="val", crop_size=None)
    scores = {}
    for number in range(len(dataset)):
        picture = dataset.picture(number, instances=False)
        prediction = cv2.imread(str(finished / f"outputs/{picture.name}.png"), cv2.IMREAD_UNCHANGED)
        prediction = report.read_prediction(str(finished / "outputs"), picture.name, 19)
        confusion = confusion_matrix(torch.from_numpy(picture.label), torch.from_numpy(prediction), 19)
        scores[picture.name] = mean_iou(confusion)
    ranked = sorted(scores, key=lambda name: -scores[name])
    lines = [line for line in page.texts if ": mean IoU " in line]
    expected = [*ranked[:2], *ranked[:2:-1]]
    assert lines == [f"{name}: mean IoU {100 * scores[name]:.2f} %" for name in expected]


def test_a_run_without_results_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "result.txt").unlink()
    (finished / "confusion.png").unlink()
    text, _ = made(finished)
    assert "there is no result.txt" in text and "Best pictures" not in text and "Curves" in text
    assert "run evaluate.py to write it" in capsys.readouterr().out


def test_data_that_is_gone_costs_the_pictures_alone(finished: Path) -> None:
    result = json.loads((finished / "result.txt").read_text())
    result["arguments"]["data_dir"] = str(finished / "gone")
    (finished / "result.txt").write_text(json.dumps(result))
    text, _ = made(finished)
    assert "no pictures: " in text and "Best pictures" not in text and "Confusion matrix" in text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(UsageError, match="has neither args.json nor result.txt"):
        report.main([str(tmp_path)])
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(UsageError, match="args.json: can't be read"):
        report.main([str(tmp_path)])


def test_events_of_a_run_that_is_still_writing(finished: Path) -> None:
    (events,) = (finished / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-7])
    assert report.read_validation(str(finished / "tensorboard")) == [(20.0, pytest.approx(0.2))]


def test_a_checkpoint_that_is_gone_costs_the_attention_alone(finished: Path) -> None:
    result = json.loads((finished / "result.txt").read_text())
    result["arguments"]["restore_from"] = str(finished / "gone.pth")
    (finished / "result.txt").write_text(json.dumps(result))
    text, _ = made(finished)
    assert "no attention: " in text and "Best pictures" in text


def test_the_attention_is_of_the_evaluated_recurrence(finished: Path) -> None:
    result = json.loads((finished / "result.txt").read_text())
    result["arguments"]["recurrence"] = 1
    (finished / "result.txt").write_text(json.dumps(result))
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        draw = report.draw_panels
        patch.setattr(report, "draw_panels", lambda *a: seen.append(len(a[2])) or draw(*a))
        made(finished, "--attention", "1")
    assert seen == [1, 1]


def test_wrong_flags_are_not_swallowed(finished: Path) -> None:
    with pytest.raises(UsageError, match="there is no GPU 99"):
        report.main([str(finished), "--gpu", "99"])
    with pytest.raises(CheckpointError, match="no such file"):
        report.main([str(finished), "--gpu", "cpu", "--restore-from", "nonsense"])


def test_a_run_without_a_score_and_odd_lines(finished: Path) -> None:
    result = json.loads((finished / "result.txt").read_text())
    result |= {"meanIU": None, "IU_array": [None] * 19}
    (finished / "result.txt").write_text(json.dumps(result))
    with (finished / "log.jsonl").open("a") as file:
        file.write('12\n{"step": 60')
    (events,) = (finished / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:60] + bytes(range(40)) * 3)
    text, _ = made(finished, "--pictures", "1", "--attention", "0")
    assert "Classes" in text
    (finished / "args.json").write_text("[1]")
    with pytest.raises(UsageError, match="args.json: holds a list"):
        report.main([str(finished), "--gpu", "cpu"])


# Damaged runs


def damaged(result: dict, change) -> str:
    change(result)
    return json.dumps(result)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(meanIU="x"), "meanIU is not a score"),
        (lambda r: r.update(meanIU=float("nan")), "can't be read"),
        (lambda r: r.update(meanIU=1e30), "meanIU is not a score"),
        (lambda r: r.update(meanIU=True), "meanIU is not a score"),
        (lambda r: r.pop("meanIU"), "has no meanIU"),
        (lambda r: r["IU_array"].pop(), "18 scores for 19 classes"),
        (lambda r: r.update(IU_array={}), "IU_array is not a list"),
        (lambda r: r.update(IU_array=["a"] * 19), "IU_array is not a list"),
        (lambda r: r.update(classes=[[]] * 19), "classes is not a list of names"),
        (lambda r: r.update(classInstScores=[1]), "classInstScores"),
        (lambda r: r.update(averageScoreCategories="x"), "averageScoreCategories is not a score"),
    ],
)
def test_a_damaged_result_is_named(finished: Path, change, words: str) -> None:
    path = finished / "result.txt"
    path.write_text(damaged(json.loads(path.read_text()), change))
    with pytest.raises(UsageError, match=rf"result.txt: .*{words}.*; fix or delete the file"):
        made(finished, "--pictures", "0", "--attention", "0")
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(arguments=[1]),
        lambda r: r.pop("arguments"),
        lambda r: r["arguments"].pop("data_dir"),
        lambda r: r["arguments"].update(data_dir="a\0b"),
        lambda r: r["arguments"].update(data_dir=7),
        lambda r: r["arguments"].update(data_list="\ud800"),
        lambda r: r["arguments"].update(num_classes=10**30),
        lambda r: r["arguments"].update(num_classes=True),
        lambda r: r["arguments"].update(ignore_label=None),
        lambda r: r["arguments"].update(recurrence=[]),
        lambda r: r["arguments"].pop("data_list"),
    ],
)
def test_damaged_arguments_cost_the_pictures_alone(finished: Path, change) -> None:
    path = finished / "result.txt"
    path.write_text(damaged(json.loads(path.read_text()), change))
    text, _ = made(finished, "--pictures", "1", "--attention", "1")
    assert "no pictures: " in text and "does not say what was evaluated" in text and "Classes" in text


@pytest.mark.parametrize("content", ['["abc"]', "[1, 2]", "{}", "3", "[" * 100_000])
def test_a_damaged_environment_is_named(finished: Path, content: str) -> None:
    (finished / "environment.json").write_text(content)
    with pytest.raises(UsageError, match=r"environment.json: .*; fix or delete the file"):
        made(finished, "--pictures", "0", "--attention", "0")


def test_odd_values_of_the_recipe_and_the_log_are_shown_or_left_out(finished: Path) -> None:
    (finished / "args.json").write_text(
        json.dumps({"a <b>": {"c": [None]}, "num_steps": [1], "\udcff": 10**400})
    )
    (finished / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "lr": "x"}\n'
        '{"step": 9223372036854775807, "loss": -1e38, "lr": 1, "main_loss": "y"}\n'
        "\x00\xff\n"
    )
    (finished / "outputs/ulm_000000_000002.png").write_bytes(b"")
    (finished / "confusion.png").write_bytes((finished / "confusion.png").read_bytes()[:99])
    text, page = made(finished, "--pictures", "1", "--attention", "0")
    assert "log.jsonl: skipped 2 of 3 lines" in text and "no confusion matrix: " in text
    assert "no pictures: " in text and "Confusion matrix" not in text and not page.open


@pytest.mark.parametrize("value", [19, 255])
def test_predictions_of_other_classes_are_named(finished: Path, value: int) -> None:
    picture = finished / "outputs/ulm_000000_000002.png"
    save_indexed_png(picture, np.full((48, 64), value, np.uint8), make_palette([]))
    text, _ = made(finished, "--pictures", "1", "--attention", "0")
    assert "ulm_000000_000002.png: not a prediction of 19 classes; run evaluate.py again" in text


def test_a_page_replaces_nothing_that_it_shows(finished: Path, scenes: Path, checkpoint: Path) -> None:
    (finished / "list").write_text("")
    os.link(checkpoint, finished / "other name")
    shown = [
        *(finished / name for name in ("args.json", "environment.json", "log.jsonl", "result.txt")),
        *(finished / name for name in ("confusion.png", "scores.txt", "outputs/ulm_000000_000001.png")),
        *finished.glob("tensorboard/*"),
        scenes / "leftImg8bit/val/ulm/ulm_000000_000001_leftImg8bit.png",
        scenes / "gtFine/val/ulm/ulm_000000_000001_gtFine_labelIds.png",
        finished / "other name",
    ]
    for path in shown:
        before = path.read_bytes()
        with pytest.raises(UsageError, match="--out: would replace its own input"):
            report.main([str(finished), "--gpu", "cpu", "--out", str(path)])
        assert path.read_bytes() == before
    # The page itself may be replaced.
    for _ in range(2):
        made(finished, "--pictures", "0", "--attention", "0")


# Confusion matrices


@pytest.mark.parametrize("number", [2, 19, 150])
def test_digits_of_a_confusion_matrix_stand_out(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str]] = []
    monkeypatch.setattr(
        heat_map, "ink_on", lambda color: drawn.append((color, ink_on(color))) or ink_on(color)
    )
    rng = np.random.default_rng(0)
    confusion = (rng.random((number, number)) ** 4 * 1000).astype(int) + np.diag([700 * number] * number)
    picture = heat_map.draw_heat_map([f"class {index}" for index in range(number)], confusion)
    assert len(drawn) >= number and max(picture.size) < 5000
    assert all(contrast(color, ink) >= 4.5 for color, ink in drawn)
    dark, light = contrast((8, 48, 107), (255, 255, 255)), contrast((230, 230, 240), (0, 0, 0))
    assert dark > 10 and light > 10 and ink_on((8, 48, 107)) == (255, 255, 255) != ink_on((230, 230, 240))


def test_gray_rows_are_explained_where_there_are_some() -> None:
    confusion = np.array([[3, 1], [0, 0]])
    gray = heat_map.draw_heat_map(["a", "b"], confusion)
    full = heat_map.draw_heat_map(["a", "b"], confusion + 1)
    assert gray.height == full.height + 22
    grays = [(np.array(each) == heat_map.GRAY).all(-1).sum() for each in (gray, full)]
    assert grays[0] > 40 * 80 and grays[1] < 100  # in the second, at edges of letters alone


# Curves


def test_curves_go_through_their_points() -> None:
    svg = ElementTree.fromstring(draw_curves({"a": [(0, 1.0), (10, 3.0), (20, 2.0)], "b & c": [(20, 2.0)]}))
    line = next(svg.iter("polyline"))
    points = [tuple(map(float, each.split(","))) for each in (line.get("points") or "").split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)
    assert points[0][1] > points[2][1] > points[1][1]  # y grows downwards
    assert points[0][1] - points[2][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)
    assert "b & c" in [text.text for text in svg.iter("text")]


def test_axes_have_titles() -> None:
    svg = ElementTree.fromstring(draw_curves({"a": [(0, 1.0), (60000, 3.0)]}, y_title="loss"))
    texts = [text.text for text in svg.iter("text")]
    assert "step" in texts and "loss" in texts and "60k" in texts


def test_curves_without_values_and_long_ones() -> None:
    assert draw_curves({"a": [], "b": [(1, float("nan"))]}) == ""
    svg = ElementTree.fromstring(draw_curves({"a": [(step, 5.0) for step in range(10000)]}))
    points = (next(svg.iter("polyline")).get("points") or "").split()
    assert 300 < len(points) <= 400 and len({each.split(",")[1] for each in points}) == 1
