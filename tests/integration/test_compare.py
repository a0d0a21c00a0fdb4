"""tools.compare: what differs between two evaluations, and how the comparison is written."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import status_of

from dataset import CSDataSet
from engine.evaluation import results
from engine.evaluation.bootstrap import Ratios
from engine.evaluation.evaluate import Result
from engine.evaluation.metrics import confusion_matrix, iou_per_class, mean_iou
from engine.evaluation.pictures import BOUNDARY_IOU, INSTANCE_IOU, Pictures
from tools import compare
from utils.drawing.palette import make_palette, save_indexed_png

CLASSES = ["sky", "<script>alert(1)</script>", "a|b *c* [x](y)"]
HOSTILE = "<img src=x onerror=alert(1)>&"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write 60 small pictures with labels of three classes and void, and their list and class table."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(60):
        rng = np.random.default_rng(number)
        name = f"{HOSTILE}{number}" if number % 2 else str(number)
        cv2.imwrite(str(folder / f"{name}.png"), rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        label = rng.choice(np.array([0, 1, 1, 2, 255], np.uint8), (12, 16))
        cv2.imwrite(str(folder / f"{name}_label.png"), label)
        lines.append(f"{name}.png\t{name}_label.png\n")
    (folder / "list").write_text("".join(lines))
    rows = [f"{name}\t{number}\t{number}\t{9 * number},8,7\n" for number, name in enumerate(CLASSES)]
    (folder / "classes.tsv").write_text("".join(["name\tid\ttrain_id\tcolor\n", *rows]))
    return folder


def evaluation(data: Path, out: Path, wrong: float, seed: int, backwards: bool = False) -> Path:
    """Write the results of a network that is wrong in a share of the pixels; class 2 is predicted well."""
    dataset = CSDataSet(str(data), str(data / "list"), crop_size=None, num_classes=3)
    (out / "outputs").mkdir(parents=True)
    names, confusions = [], []
    rng = np.random.default_rng(seed)
    for number in range(len(dataset)):
        picture = dataset.picture(number, instances=False)
        assert picture.label is not None
        share = np.where(picture.label == 2, 0.1, wrong)
        noise = rng.random(picture.label.shape) < share
        prediction = np.where(noise | (picture.label == 255), rng.integers(0, 3, noise.shape), picture.label)
        prediction = prediction.astype(np.uint8)
        save_indexed_png(out / f"outputs/{picture.name}.png", prediction, make_palette([]))
        names.append(picture.name)
        confusions.append(confusion_matrix(torch.from_numpy(picture.label), torch.from_numpy(prediction), 3))
    if backwards:
        names, confusions = names[::-1], confusions[::-1]
    found = Pictures.of(names, confusions)
    arguments = {
        "data_dir": str(data),
        "data_list": str(data / "list"),
        "split": "val",
        "classes": str(data / "classes.tsv"),
        "num_classes": 3,
        "ignore_label": 255,
        "restore_from": None,
        "recurrence": 2,
    }
    results.write(str(out), Result(found.confusion(), None, found), CLASSES, arguments)
    return out


@pytest.fixture
def runs(data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a worse and a better evaluation; pictures.npz of the second has another order."""
    return evaluation(data, tmp_path / "worse", 0.5, 1), evaluation(data, tmp_path / "better", 0.3, 2, True)


def compared(first: Path, second: Path, out: Path) -> dict:
    assert status_of(compare.main, first, second, "--out", out) == 0
    return json.loads((out / "compare.json").read_text())


class Page(HTMLParser):
    """Tags, references and texts of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_better_one_is_found(runs, tmp_path, capsys):
    found = compared(*runs, tmp_path / "out")
    said = capsys.readouterr().out
    totals = [json.loads((run / "result.txt").read_text()) for run in runs]
    rows = found["scores"]["IoU"]
    assert [row["name"] for row in rows] == [*CLASSES, "mean"]
    for index, row in enumerate(rows[:-1]):
        assert row["first"] == pytest.approx(totals[0]["IU_array"][index])
        assert row["second"] == pytest.approx(totals[1]["IU_array"][index])
    mean = rows[-1]
    assert mean["difference"] == pytest.approx(totals[1]["meanIU"] - totals[0]["meanIU"])
    assert 0 < mean["interval"][0] < mean["difference"] < mean["interval"][1]
    assert mean["result"] == "B is better: 100.0 % of resamples" and mean["second_better"] == 1
    assert found["pictures"] == 60 and found["resamples"] == 1000 and "too narrow" not in said
    assert "B is better: 100.0 % of resamples" in said and f"{100 * mean['difference']:+.2f}" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.html",
        "compare.json",
        "compare.md",
    ]
    back = compared(*runs[::-1], tmp_path / "back")["scores"]["IoU"][-1]
    assert back["result"] == "A is better: 100.0 % of resamples"
    assert back["difference"] == pytest.approx(-mean["difference"])


def test_no_difference_between_evaluations_of_one_network(runs, tmp_path):
    """The same predictions, and those of another random sample of the same kind, which differ a little."""
    found = compared(runs[0], runs[0], tmp_path / "out")
    for row in found["scores"]["IoU"]:
        assert row["difference"] == 0 and row["interval"] == [0, 0] and row["result"] == "no difference found"
    assert "Pictures that changed most" not in (tmp_path / "out/compare.html").read_text()
    other = evaluation(tmp_path / "data", tmp_path / "same kind", 0.5, 7)
    row = compared(runs[0], other, tmp_path / "out")["scores"]["IoU"][-1]
    assert row["difference"] != 0 and row["result"] == "no difference found"


def test_the_page_is_a_single_file_and_names_are_text(runs, tmp_path):
    compared(*runs, tmp_path / "out")
    text = (tmp_path / "out/compare.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("img") % 4 == 0
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert CLASSES[1] in page.texts and any(HOSTILE in part for part in page.texts)
    means = {}
    for letter, run in zip("AB", runs, strict=True):
        archive = np.load(run / "pictures.npz", allow_pickle=False)
        for index, name in enumerate(archive["names"]):
            confusion = np.zeros((3, 3), int)
            mine = archive["picture"] == index
            confusion[archive["label"][mine], archive["prediction"][mine]] = archive["pixels"][mine]
            means[letter, str(name)] = mean_iou(torch.from_numpy(confusion))
    names = sorted({name for _, name in means}, key=lambda name: means["A", name] - means["B", name])
    shown = re.findall(r"<h4>(.*?): mean IoU A ([\d.]+) % and B ([\d.]+) %</h4>", text)
    lost = sum(means["B", name] < means["A", name] for name in names)
    assert len(shown) == page.tags.count("img") // 4 == 3 + min(3, lost)
    best = f"{100 * means['A', names[0]]:.1f}", f"{100 * means['B', names[0]]:.1f}"
    assert shown[0][1:] == best
    assert {"picture", "label", "prediction A", "prediction B"} < set(page.texts)


def test_names_break_no_line_of_the_table(runs, tmp_path):
    compared(*runs, tmp_path / "out")
    lines = (tmp_path / "out/compare.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(CLASSES) + 1 and {line.count("|") for line in table} == {7}
    assert not any(sign in line for line in table for sign in ("<script", "*c*", "[x]"))


def test_boundary_and_instance_scores_are_compared_where_both_have_them(runs, tmp_path):
    for run, right in zip(runs, (0.5, 0.6), strict=True):
        found = compare.read_run(str(run)).pictures
        rng = np.random.default_rng(0)
        denominator = rng.integers(50, 100, (60, 3)).astype(float)
        denominator[:, 0] = 0
        others = {BOUNDARY_IOU: Ratios(denominator * right, denominator)}
        if run == runs[0]:
            others[INSTANCE_IOU] = others[BOUNDARY_IOU]
        found._replace(others=others).write(str(run / "pictures.npz"))
    found = compared(*runs, tmp_path / "out")["scores"]
    assert list(found) == ["IoU", "boundary IoU"]
    rows = found["boundary IoU"]
    assert [row["name"] for row in rows] == [*CLASSES[1:], "mean"]  # the first class has no such score
    assert rows[-1]["difference"] == pytest.approx(0.1)


def test_what_is_gone_costs_the_pictures_alone(runs, tmp_path, capsys):
    (runs[1] / "outputs/0.png").unlink()
    for path in (runs[1] / "outputs").iterdir():
        path.unlink()
    found = compared(*runs, tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no pictures")]
    assert "outputs" in line and len(found["scores"]["IoU"]) == 4
    shutil.rmtree(tmp_path / "data")
    compared(*runs, tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no pictures")]
    text = (tmp_path / "out/compare.html").read_text()
    assert str(tmp_path / "data") in line and "no pictures" in text and "<img" not in text


def changed(folder: Path, **entries: object) -> None:
    result = json.loads((folder / "result.txt").read_text())
    (folder / "result.txt").write_text(json.dumps(result | entries))


def without(folder: Path, number: int) -> None:
    """Leave the last pictures out of pictures.npz."""
    archive = dict(np.load(folder / "pictures.npz", allow_pickle=False))
    archive["names"] = archive["names"][:-number]
    kept = archive["picture"] < len(archive["names"])
    archive |= {name: archive[name][kept] for name in ("picture", "label", "prediction", "pixels")}
    np.savez(folder / "pictures.npz", **archive)


def relabeled(folder: Path) -> None:
    archive = dict(np.load(folder / "pictures.npz", allow_pickle=False))
    archive["pixels"][0] += 1
    np.savez(folder / "pictures.npz", **archive)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: (run / "pictures.npz").unlink(), "pictures.npz: is missing; run evaluate.py"),
        (lambda run: (run / "result.txt").unlink(), "has no result.txt"),
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: changed(run, classes=["x", "y", "z"]), "have different classes"),
        (
            lambda run: changed(run, classes=["x"], IU_array=[0], intervals={}),
            "has 1 classes and pictures.npz 3",
        ),
        (lambda run: without(run, 4), "4 pictures are in one of them only"),
        (relabeled, "the labels of 1 pictures differ"),
        (lambda run: (run / "pictures.npz").write_bytes(b"x"), "pictures.npz: can't be read"),
    ],
)
def test_runs_that_can_not_be_compared(runs, tmp_path, capsys, damage, words):
    damage(runs[1])
    assert status_of(compare.main, *runs, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0] and str(runs[1]) in error[0]
    assert not (tmp_path / "out").exists()


def test_an_input_is_not_replaced(runs, capsys):
    (runs[1] / "compare.md").symlink_to(runs[0] / "result.txt")
    before = (runs[0] / "result.txt").read_bytes()
    assert status_of(compare.main, *runs) == 2
    assert "--out" in capsys.readouterr().err and (runs[0] / "result.txt").read_bytes() == before


def test_few_pictures_are_said_to_be_few(runs, capsys):
    for run in runs:
        found = compare.read_run(str(run)).pictures
        first = sorted(found.names)[:10]
        confusions = [torch.eye(3, dtype=torch.int64) * (index + 1) for index in range(10)]
        Pictures.of(first, confusions).write(str(run / "pictures.npz"))
    assert status_of(compare.main, *runs) == 0
    assert "10 pictures, 1000 resamples; the intervals of fewer than 50" in capsys.readouterr().out
    assert (runs[1] / "compare.md").exists()  # the folder of the second, by default


def test_scores_of_a_picture_are_over_its_classes(runs):
    """A picture's own mean IoU is that of its confusion matrix."""
    found = compare.read_run(str(runs[0])).pictures
    scores = found.iou().of_pictures()
    for index in range(5):
        confusion = torch.zeros(3, 3, dtype=torch.int64)
        mine = found.picture == index
        confusion[found.label[mine], found.prediction[mine]] = torch.from_numpy(found.pixels[mine])
        np.testing.assert_allclose(scores[index, :-1], iou_per_class(confusion).numpy())
        assert scores[index, -1] == pytest.approx(mean_iou(confusion)) and not math.isnan(scores[index, -1])
