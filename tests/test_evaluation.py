"""Scoring a data set, what it leaves, and the archive of the test set."""

from __future__ import annotations

import fnmatch
import json
import math
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
from conftest import last_line, write_pair
from PIL import Image

import evaluate as command
from benchmarks.official_scores import largest_difference, official_scores
from dataset import CSDataSet, DataError
from dataset.labels import CITYSCAPES
from engine import report
from engine.distributed import World
from engine.evaluation import Result, evaluate
from engine.inference import predict_classes
from engine.metrics import format_confusion
from utils import args as flags
from utils.errors import RunError
from utils.heat_map import draw_heat_map
from utils.submission import write_archive

ONE = World(0, 1, torch.device("cpu"))


def brightness(images):
    """A network of three classes: by the brightness of a pixel, at 1/1 of the picture's size."""
    mean = images.mean(1, keepdim=True)
    return torch.cat([-(mean + 60).abs(), -mean.abs(), -(mean - 60).abs()], 1)


def predict(images):
    return predict_classes(brightness, images, [1.0], False, (33, 33), 3, 2)


@pytest.fixture
def mixed(tmp_path):
    """Pictures of five sizes, one smaller than a tile, three of them of the same."""
    sizes = [(48, 64), (20, 90), (48, 64), (100, 34), (48, 64), (7, 9), (33, 33)]
    lines = []
    for number, size in enumerate(sizes):
        rng = np.random.default_rng(number)
        cv2.imwrite(str(tmp_path / f"{number}.png"), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        label = rng.choice(np.array([0, 1, 2, 255], np.uint8), size)
        cv2.imwrite(str(tmp_path / f"{number}_label.png"), label)
        lines.append(f"{number}.png\t{number}_label.png\n")
    (tmp_path / "list").write_text("".join(lines))
    return CSDataSet(str(tmp_path), str(tmp_path / "list"), num_classes=3)


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (3, 0), (2, 2)])
def test_sizes_may_differ_within_a_run(mixed, batch_size, workers):
    kept = {}
    result = evaluate(
        predict,
        mixed,
        ONE,
        3,
        255,
        batch_size=batch_size,
        workers=workers,
        keep=lambda name, prediction: kept.update({name: prediction}),
    )
    expected = np.zeros((3, 4), int)
    for pair in mixed.pairs:
        image = cv2.imread(mixed.path(pair.image)).astype(np.float32) - mixed.mean
        scores = brightness(torch.from_numpy(image).permute(2, 0, 1)[None])
        prediction = scores.argmax(1)[0].numpy()
        label = cv2.imread(mixed.path(pair.label), cv2.IMREAD_GRAYSCALE)
        assert kept[pair.name].dtype == np.uint8 and np.array_equal(kept[pair.name], prediction)
        for true in range(3):
            expected[true] += np.bincount(prediction[label == true], minlength=4)
    assert result.confusion.tolist() == expected[:, :3].tolist() and result.official is None


def test_damaged_picture_ends_it_with_its_error(mixed):
    (open(mixed.path("4.png"), "wb")).close()
    with pytest.raises(DataError, match="4.png: not a readable picture"):
        evaluate(predict, mixed, ONE, 3, 255)


def test_full_disk_is_one_line(mixed):
    def keep(name, prediction):
        raise OSError(28, "No space left on device", f"{name}.png")

    with pytest.raises(RunError, match=r"png: can't be written \(No space left on device\)"):
        evaluate(predict, mixed, ONE, 3, 255, keep=keep)


def test_interruption_ends_it(mixed):
    with pytest.raises(RunError, match="enough"):
        evaluate(predict, mixed, ONE, 3, 255, interrupted=lambda: RunError("enough"))


class TestReport:
    CONFUSION = torch.tensor([[90, 10, 0], [1, 3, 0], [0, 0, 0]])

    def test_files(self, tmp_path):
        table = report.write(
            str(tmp_path), Result(self.CONFUSION, None), ["road", "traffic light", "car"], {"split": "val"}
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(report.FILES)
        scores = json.loads((tmp_path / "result.txt").read_text())
        assert scores["classes"] == ["road", "traffic light", "car"]
        assert scores["confusion"] == self.CONFUSION.tolist()
        assert scores["IU_array"] == [90 / 101, 3 / 14, None]
        assert scores["meanIU"] == pytest.approx((90 / 101 + 3 / 14) / 2)
        text = (tmp_path / "scores.txt").read_text()
        assert (
            text.startswith(table.split("averageScore")[0].split("mean IoU")[0]) and "traffic light" in text
        )
        assert "90.0  10.0" in text and "25.0  75.0" in text
        assert Image.open(tmp_path / "confusion.png").size[0] > 200
        assert f"mean IoU {scores['meanIU']:.4f}" in table

    def test_text_of_the_confusion_matrix(self):
        rows = [line.split() for line in format_confusion(["a", "b b", "c"], self.CONFUSION).splitlines()]
        assert rows[1:] == [
            ["0", "1", "2"],
            ["0", "a", "90.0", "10.0", "."],
            ["1", "b", "b", "25.0", "75.0", "."],
            ["2", "c", "-", "-", "-"],
        ]

    @pytest.mark.parametrize("number", [1, 3, 150])
    def test_heat_map_is_darker_where_more_was_predicted(self, number):
        confusion = np.zeros((number, number), int)
        confusion[0, 0] = 80
        if number > 1:
            confusion[0, 1], confusion[1, 1] = 20, 5
        picture = np.asarray(
            draw_heat_map([f"class {k}" for k in range(number)], confusion).convert("L"), int
        )
        height, width = picture.shape
        cell = min(40, 2000 // number)
        left, top = width - 16 - number * cell if number == 150 else None, height - 16 - number * cell
        if left is None:  # a wide title makes room on the right: find the first cell
            row = picture[top + 3]
            left = int(np.argmax(row < 200))

        def shade(row, column):
            inner = picture[top + row * cell + 1 : top + row * cell + 5, left + column * cell + 1 :][:, :4]
            return np.median(inner)

        if number > 1:
            assert shade(1, 1) < shade(0, 0) < shade(0, 1) < shade(1, 0)
        else:
            assert shade(0, 0) < 60


class TestArchive:
    def picture(self, folder, name, ids):
        path = folder / name
        Image.fromarray(np.asarray(ids, np.uint8)).save(path)
        return str(path), np.asarray(ids).shape

    def test_holds_the_pictures_under_their_names(self, tmp_path):
        pictures = [self.picture(tmp_path, f"{name}_labelIds.png", [[7, 8], [33, 7]]) for name in "ab"]
        write_archive(str(tmp_path / "s.zip"), pictures, CITYSCAPES.label_ids())
        with zipfile.ZipFile(tmp_path / "s.zip") as archive:
            assert archive.namelist() == ["a_labelIds.png", "b_labelIds.png"]
            assert archive.read("a_labelIds.png") == (tmp_path / "a_labelIds.png").read_bytes()

    @pytest.mark.parametrize(
        "damage, words",
        [
            (lambda path: path.unlink(), "not a readable prediction"),
            (lambda path: path.write_bytes(path.read_bytes()[:45]), "not a readable prediction"),
            (lambda path: Image.new("L", (3, 2), 7).save(path), "expected L of (2, 2)"),
            (lambda path: Image.new("RGB", (2, 2)).save(path), "RGB of"),
            (lambda path: Image.new("L", (2, 2), 255).save(path), "holds 255"),
        ],
    )
    def test_wrong_picture_leaves_the_archive_that_was(self, tmp_path, damage, words):
        pictures = [self.picture(tmp_path, name, [[7, 8], [33, 7]]) for name in ("a.png", "b.png")]
        (tmp_path / "s.zip").write_text("earlier")
        damage(tmp_path / "b.png")
        with pytest.raises(RunError) as error:
            write_archive(str(tmp_path / "s.zip"), pictures, CITYSCAPES.label_ids())
        assert words in str(error.value) and "b.png" in str(error.value)
        assert (tmp_path / "s.zip").read_text() == "earlier"

    def test_names_that_clash(self, tmp_path):
        for folder in "ab":
            (tmp_path / folder).mkdir()
        pictures = [self.picture(tmp_path / folder, "x.png", [[7]]) for folder in "ab"]
        with pytest.raises(RunError, match="x.png would be in it twice"):
            write_archive(str(tmp_path / "s.zip"), pictures, CITYSCAPES.label_ids())


SMALL = "--gpu cpu --backbone resnet50 --num-workers 0 --input-size 33,33".split()


def run(arguments, monkeypatch, capsys):
    """Exit status, output and last line on standard error of evaluate.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = flags.exit_status(command.main)
    captured = capsys.readouterr()
    return status, captured.out, last_line(captured.err or "\n-")


class TestTestSplit:
    @pytest.fixture
    def unlabelled(self, tmp_path):
        """Three pictures of the test split, of which the labels are void alone, as the benchmark's are."""
        for number, size in enumerate([(48, 64), (48, 64), (40, 40)]):
            _, label = write_pair(tmp_path / "data", "test", number, size)
            cv2.imwrite(str(tmp_path / "data" / label), np.zeros(size, np.uint8))
        return tmp_path / "data"

    def check(self, folder, output):
        names = [f"ulm_000000_{number:06d}" for number in range(3)]
        with zipfile.ZipFile(folder / "submission.zip") as archive:
            assert archive.namelist() == [f"{name}_labelIds.png" for name in names]
            for name, size in zip(names, [(48, 64), (48, 64), (40, 40)], strict=True):
                # The pattern by which the official evaluation finds a prediction, one for each picture.
                assert len(fnmatch.filter(archive.namelist(), f"{name}*.png")) == 1
                with archive.open(f"{name}_labelIds.png") as file, Image.open(file) as picture:
                    ids = np.asarray(picture)
                train_ids = np.asarray(Image.open(folder / "outputs" / f"{name}.png"))
                assert ids.shape == size and np.array_equal(ids, CITYSCAPES.label_ids()[train_ids])
        assert "3 pictures of label ids" in output and not (folder / "result.txt").exists()

    def test_layout(self, unlabelled, tmp_path, monkeypatch, capsys):
        arguments = ["--data-dir", unlabelled, "--split", "test", *SMALL, "--output-dir", tmp_path / "out"]
        status, output, _ = run(arguments, monkeypatch, capsys)
        assert status == 0 and "3 pictures in 1 folders, none missing" in output
        self.check(tmp_path / "out", output)

    def test_list_of_pictures_alone(self, unlabelled, tmp_path, monkeypatch, capsys):
        """As the original's test.lst; without --split test it is an error that says so."""
        listing = tmp_path / "test.lst"
        names = [f"leftImg8bit/test/ulm/ulm_000000_{number:06d}_leftImg8bit.png\n" for number in range(3)]
        listing.write_text("".join(names))
        arguments = [
            "--data-dir",
            unlabelled,
            "--data-list",
            listing,
            *SMALL,
            "--output-dir",
            tmp_path / "out",
        ]
        status, _, line = run(arguments, monkeypatch, capsys)
        assert status == 2 and "test.lst:1:" in line and "--split test" in line
        status, output, _ = run([*arguments, "--split", "test"], monkeypatch, capsys)
        assert status == 0
        self.check(tmp_path / "out", output)

    def test_picture_that_is_in_the_list_twice(self, unlabelled, tmp_path, monkeypatch, capsys):
        listing = tmp_path / "test.lst"
        listing.write_text("leftImg8bit/test/ulm/ulm_000000_000001_leftImg8bit.png\n" * 2)
        arguments = [
            "--data-dir",
            unlabelled,
            "--data-list",
            listing,
            *SMALL,
            "--output-dir",
            tmp_path / "out",
        ]
        status, _, line = run([*arguments, "--split", "test"], monkeypatch, capsys)
        assert status == 2 and "test.lst: ulm_000000_000001 is in it twice" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("failing", ["write", "keep"])
    def test_full_disk_is_one_line(self, unlabelled, tmp_path, monkeypatch, capsys, failing):
        def full(*_):
            raise OSError(28, "No space left on device")

        if failing == "write":
            monkeypatch.setattr(command, "write_archive", full)
        else:
            monkeypatch.setattr(command, "save_indexed_png", full)
        arguments = ["--data-dir", unlabelled, "--split", "test", *SMALL, "--output-dir", tmp_path / "out"]
        status, _, line = run(arguments, monkeypatch, capsys)
        assert status == 1 and "the results: can't be written (No space left on device)" in line


def test_class_table_names_colours_and_reads_the_labels_of_another_set(tmp_path, monkeypatch, capsys):
    """A set of one's own with labels of colours: a list and a table are all that it takes."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes.tsv").write_text(
        "name\tid\ttrain_id\tcolor\nwood\t-\t0\t9,8,7\nmeadow\t-\t1\t0,200,0\nrest\t-\t255\t0,0,0\n"
    )
    colours = np.array([(9, 8, 7), (0, 200, 0), (0, 0, 0)], np.uint8)
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
        Image.fromarray(colours[rng.integers(0, 3, (40, 56))]).save(tmp_path / f"{number}_label.png")
    (tmp_path / "list").write_text("0.jpg\t0_label.png\n1.jpg\t1_label.png\n")
    arguments = [
        "--data-dir",
        tmp_path,
        "--data-list",
        tmp_path / "list",
        *SMALL,
        "--output-dir",
        tmp_path / "o",
    ]
    status, _, line = run(arguments, monkeypatch, capsys)
    assert status == 2 and "--classes" in line
    status, output, _ = run([*arguments, "--classes", tmp_path / "classes.tsv"], monkeypatch, capsys)
    assert status == 0 and "meadow" in output
    result = json.loads((tmp_path / "o/result.txt").read_text())
    assert result["classes"] == ["wood", "meadow"] and "averageScoreClasses" not in result
    void = sum((np.asarray(Image.open(tmp_path / f"{k}_label.png")) == 0).all(-1).sum() for k in range(2))
    assert np.sum(result["confusion"]) == 2 * 40 * 56 - void
    assert Image.open(tmp_path / "o/outputs/0.png").getpalette()[:6] == [9, 8, 7, 0, 200, 0]
    status, _, line = run(
        [*arguments, "--classes", tmp_path / "classes.tsv", "--num-classes", 3], monkeypatch, capsys
    )
    assert status == 2 and "--num-classes 3" in line


def test_official_scores_of_written_predictions(tmp_path, monkeypatch, capsys):
    """Of the files, through evaluate.py: pictures with instances, groups, caravans and void."""
    pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", exc_type=ImportError)
    data, truths, predictions = tmp_path / "data", [], []
    rng = np.random.default_rng(5)
    for number in range(3):
        _, label = write_pair(data, "val", number, (48, 64))
        ids = cv2.imread(str(data / label), cv2.IMREAD_GRAYSCALE)
        ids[:9, :20], ids[20:30, 40:50], ids[40:, :5] = 29, 0, 3
        instances = np.where(ids >= 24, ids.astype(np.uint16) * 1000 + rng.integers(3), ids)
        instances[:, :30] = np.where(ids[:, :30] == 26, 26, instances[:, :30])  # a group of cars
        cv2.imwrite(str(data / label), ids)
        cv2.imwrite(str(data / label.replace("labelIds", "instanceIds")), instances.astype(np.uint16))
        truths.append(str(data / label))
    arguments = ["--data-dir", data, *SMALL, "--output-dir", tmp_path / "out"]
    assert run(arguments, monkeypatch, capsys)[0] == 0
    for number in range(3):
        name = f"ulm_000000_{number:06d}.png"
        train_ids = np.asarray(Image.open(tmp_path / "out/outputs" / name))
        Image.fromarray(CITYSCAPES.label_ids()[train_ids]).save(tmp_path / name)
        predictions.append(str(tmp_path / name))
    ours = json.loads((tmp_path / "out/result.txt").read_text())
    theirs = official_scores(truths, predictions)
    assert largest_difference(ours, theirs) < 1e-12 and not math.isnan(theirs["averageScoreInstClasses"])
    theirs["classScores"]["car"] += 1e-6
    assert largest_difference(ours, theirs) > 1e-7
