"""Evaluation of a data set: scores, result files, and the archive of the test set."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, last_line, write_pair
from PIL import Image

import evaluate as command
from benchmarks.official_scores import largest_difference, official_scores
from dataset import CSDataSet, DataError
from dataset.labels import CITYSCAPES
from engine import acceleration
from engine.data.loader import Loading
from engine.evaluation import results
from engine.evaluation.evaluate import Result, evaluate
from engine.evaluation.metrics import format_confusion
from engine.evaluation.pictures import Pictures
from engine.evaluation.submission import write_archive
from engine.inference import predict_classes
from engine.runtime.distributed import World
from utils import args as flags
from utils import resources
from utils.drawing.heat_map import EDGE, draw_heat_map
from utils.errors import RunError

pytestmark = pytest.mark.usefixtures("small_network")

ONE = World(0, 1, torch.device("cpu"))


def brightness(images):
    """Classify each pixel by its brightness into three classes, at full resolution."""
    mean = images.mean(1, keepdim=True)
    return torch.cat([-(mean + 60).abs(), -mean.abs(), -(mean - 60).abs()], 1)


def predict(images):
    return predict_classes(brightness, images, [1.0], False, (33, 33), 3, 2)


@pytest.fixture
def mixed(tmp_path):
    """Write pictures of five sizes, three of the same size and one smaller than a tile."""
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
        Loading(batch_size, workers),
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
        evaluate(predict, mixed, ONE, Loading())


def test_full_disk_is_one_line(mixed):
    def keep(name, prediction):
        raise OSError(28, "No space left on device", f"{name}.png")

    with pytest.raises(RunError, match=r"png: can't be written \(No space left on device\)"):
        evaluate(predict, mixed, ONE, Loading(), keep=keep)


def test_interruption_ends_it(mixed):
    with pytest.raises(RunError, match="enough"):
        evaluate(predict, mixed, ONE, Loading(), interrupted=lambda: RunError("enough"))


def test_a_network_that_gives_nan_is_not_scored(mixed):
    def overflowing(images):
        logits = brightness(images)
        return logits * torch.where(images[:, :1] > images[:, :1].amax((2, 3), True) - 1, math.nan, 1.0)

    with pytest.raises(RunError, match="the network returns NaN"):
        evaluate(
            lambda images: predict_classes(overflowing, images, [1.0], False, None, 3), mixed, ONE, Loading()
        )


class TestReport:
    CONFUSION = torch.tensor([[90, 10, 0], [1, 3, 0], [0, 0, 0]])

    def result(self):
        first = torch.tensor([[60, 10, 0], [1, 1, 0], [0, 0, 0]])
        return Result(self.CONFUSION, None, Pictures.of(["a", "b"], [first, self.CONFUSION - first]))

    def test_files(self, tmp_path):
        names = ["road", "traffic light", "car"]
        table = results.write(str(tmp_path), self.result(), names, {"split": "val"})
        expected = sorted({*results.FILES} - {results.RELIABILITY})
        assert sorted(path.name for path in tmp_path.iterdir()) == expected
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
        colors = np.asarray(draw_heat_map([f"class {k}" for k in range(number)], confusion), int)
        picture = colors.mean(-1)
        # The upper edge of the first row of cells is the first line of that color that is so long.
        edges = (colors == EDGE).all(-1)
        top = int(np.argmax(edges.sum(1) >= 12 * number))
        left, cell = int(np.argmax(edges[top])), int(edges[top].sum()) // number

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
            (lambda path: Image.new("L", (3, 2), 7).save(path), "not L of (2, 2)"),
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
        with pytest.raises(RunError, match="two pictures are named x.png"):
            write_archive(str(tmp_path / "s.zip"), pictures, CITYSCAPES.label_ids())


SMALL = [*TINY, "--input-size", "33,33"]


def run(arguments, monkeypatch, capsys):
    """Run evaluate.py in this process; return exit status, output and last line on standard error."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = flags.exit_status(command.main)
    captured = capsys.readouterr()
    return status, captured.out, last_line(captured.err or "\n-")


class TestTestSplit:
    @pytest.fixture
    def unlabeled(self, tmp_path):
        """Write three pictures of the test split, whose labels are void as in the benchmark."""
        for number, size in enumerate([(48, 64), (48, 64), (40, 40)]):
            _, label = write_pair(tmp_path / "data", "test", number, size)
            cv2.imwrite(str(tmp_path / "data" / label), np.zeros(size, np.uint8))
        return tmp_path / "data"

    def check(self, folder, output):
        names = [f"ulm_000000_{number:06d}" for number in range(3)]
        with zipfile.ZipFile(folder / "submission.zip") as archive:
            assert archive.namelist() == [f"{name}_labelIds.png" for name in names]
            for name, size in zip(names, [(48, 64), (48, 64), (40, 40)], strict=True):
                # The official evaluation finds the prediction of a picture by this pattern.
                assert len(fnmatch.filter(archive.namelist(), f"{name}*.png")) == 1
                with archive.open(f"{name}_labelIds.png") as file, Image.open(file) as picture:
                    ids = np.asarray(picture)
                train_ids = np.asarray(Image.open(folder / "outputs" / f"{name}.png"))
                assert ids.shape == size and np.array_equal(ids, CITYSCAPES.label_ids()[train_ids])
        assert "3 pictures of label ids" in output and not (folder / "result.txt").exists()

    def test_layout(self, unlabeled, tmp_path, monkeypatch, capsys):
        arguments = ["--data-dir", unlabeled, "--split", "test", *SMALL, "--output-dir", tmp_path / "out"]
        status, output, _ = run(arguments, monkeypatch, capsys)
        assert status == 0 and "3 pictures in 1 folder, none missing" in output
        self.check(tmp_path / "out", output)

    def test_list_of_pictures_alone(self, unlabeled, tmp_path, monkeypatch, capsys):
        """A list of pictures without labels needs --split test, as the error says."""
        listing = tmp_path / "test.lst"
        names = [f"leftImg8bit/test/ulm/ulm_000000_{number:06d}_leftImg8bit.png\n" for number in range(3)]
        listing.write_text("".join(names))
        arguments = [
            "--data-dir",
            unlabeled,
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

    def test_picture_that_is_in_the_list_twice(self, unlabeled, tmp_path, monkeypatch, capsys):
        listing = tmp_path / "test.lst"
        listing.write_text("leftImg8bit/test/ulm/ulm_000000_000001_leftImg8bit.png\n" * 2)
        arguments = [
            "--data-dir",
            unlabeled,
            "--data-list",
            listing,
            *SMALL,
            "--output-dir",
            tmp_path / "out",
        ]
        status, _, line = run([*arguments, "--split", "test"], monkeypatch, capsys)
        assert status == 2 and "test.lst: lists ulm_000000_000001 twice" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("failing", ["write", "keep"])
    def test_full_disk_is_one_line(self, unlabeled, tmp_path, monkeypatch, capsys, failing):
        def full(*_):
            raise OSError(28, "No space left on device")

        if failing == "write":
            monkeypatch.setattr(command, "write_archive", full)
        else:
            monkeypatch.setattr(command, "save_indexed_png", full)
        arguments = ["--data-dir", unlabeled, "--split", "test", *SMALL, "--output-dir", tmp_path / "out"]
        status, _, line = run(arguments, monkeypatch, capsys)
        assert status == 1 and "the results: can't be written (No space left on device)" in line


def test_class_table_names_colors_and_reads_the_labels_of_another_set(tmp_path, monkeypatch, capsys):
    """A list and a class table suffice to evaluate another data set, whose labels are colors."""
    rng = np.random.default_rng(0)
    (tmp_path / "classes.tsv").write_text(
        "name\tid\ttrain_id\tcolor\nwood\t-\t0\t9,8,7\nmeadow\t-\t1\t0,200,0\nrest\t-\t255\t0,0,0\n"
    )
    colors = np.array([(9, 8, 7), (0, 200, 0), (0, 0, 0)], np.uint8)
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
        Image.fromarray(colors[rng.integers(0, 3, (40, 56))]).save(tmp_path / f"{number}_label.png")
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
    """The scores that evaluate.py writes are those of the official scripts for the files that it wrote."""
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


def labeled(folder, number):
    """Write pictures with label and instance ids; return the paths of the label ids."""
    rng = np.random.default_rng(9)
    paths = []
    for index in range(number):
        _, label = write_pair(folder, "val", index, (48, 64))
        ids = cv2.imread(str(folder / label), cv2.IMREAD_GRAYSCALE)
        ids[:9, :20], ids[20:30, 40:50] = 29, 0  # a caravan and void, which are not scored
        cv2.imwrite(str(folder / label), ids)
        instances = np.where(ids >= 24, ids.astype(np.uint16) * 1000 + rng.integers(3), ids)
        cv2.imwrite(str(folder / label.replace("labelIds", "instanceIds")), instances.astype(np.uint16))
        paths.append(folder / label)
    return paths


def test_scores_without_instance_ids_are_the_official_ones_and_the_file_is_named(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", exc_type=ImportError)
    truths = labeled(tmp_path / "data", 3)
    arguments = ["--data-dir", tmp_path / "data", *SMALL, "--output-dir", tmp_path / "out"]
    predictions = []
    assert run(arguments, monkeypatch, capsys)[0] == 0
    whole = json.loads((tmp_path / "out/result.txt").read_text())
    for number in range(3):
        name = f"ulm_000000_{number:06d}.png"
        train_ids = np.asarray(Image.open(tmp_path / "out/outputs" / name))
        Image.fromarray(CITYSCAPES.label_ids()[train_ids]).save(tmp_path / name)
        predictions.append(str(tmp_path / name))
    theirs = official_scores([str(path) for path in truths], predictions)
    missing = truths[1].with_name(truths[1].name.replace("labelIds", "instanceIds"))
    missing.unlink()
    status, output, _ = run(arguments, monkeypatch, capsys)
    assert status == 0
    (line,) = [line for line in output.splitlines() if "omitted" in line]
    assert "averageScoreInstClasses and averageScoreInstCategories are omitted: 1 of 3" in line
    assert str(missing) in line and output.count("averageScoreCategories ") == 1
    ours = json.loads((tmp_path / "out/result.txt").read_text())
    assert "averageScoreInstClasses" not in ours and "classInstScores" not in ours
    for name in ("averageScoreClasses", "averageScoreCategories"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12) == pytest.approx(whole[name], abs=1e-12)
    for name in ("classScores", "categoryScores"):
        for key, value in ours[name].items():
            their = theirs[name][key]
            assert value == (None if math.isnan(their) else pytest.approx(their, abs=1e-12))


def test_labels_of_train_ids_have_the_scores_of_pixels(tmp_path, monkeypatch, capsys):
    truths = labeled(tmp_path / "data", 2)
    arguments = ["--data-dir", tmp_path / "data", *SMALL, "--output-dir", tmp_path / "out"]
    assert run(arguments, monkeypatch, capsys)[0] == 0
    whole = json.loads((tmp_path / "out/result.txt").read_text())
    table = CITYSCAPES.train_ids().astype(np.uint8)
    for path in truths:
        train_ids = table[cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)]
        cv2.imwrite(str(path).replace("labelIds", "labelTrainIds"), train_ids)
        path.unlink()
    status, output, _ = run(arguments, monkeypatch, capsys)
    assert status == 0 and "omitted: 2 of 2 labels are not *_labelIds.png, the first is" in output
    ours = json.loads((tmp_path / "out/result.txt").read_text())
    for name in ("meanIU", "averageScoreClasses", "averageScoreCategories", "categoryScores"):
        assert ours[name] == whole[name]


class TestWritten:
    """No result replaces an input, a folder or a special file."""

    @pytest.fixture
    def listed(self, tmp_path):
        """Make a data set in the folders of results: pictures in outputs/, labels in submission/."""
        for folder in ("outputs", "submission"):
            (tmp_path / folder).mkdir()
        rng = np.random.default_rng(0)
        for name in "ab":
            picture = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / f"outputs/{name}.png"), picture)
            cv2.imwrite(str(tmp_path / f"submission/{name}_labelIds.png"), np.full((40, 40), 7, np.uint8))
        lines = [f"outputs/{name}.png\tsubmission/{name}_labelIds.png\n" for name in "ab"]
        (tmp_path / "scores.txt").write_text("".join(lines))
        (tmp_path / "list").write_text("".join(lines))
        return tmp_path

    @pytest.mark.parametrize(
        "place, flags, words",
        [
            (".", ["--data-list", "list"], "outputs/a.png"),
            ("run", ["--data-list", "list"], "outputs/a.png"),
            ("other", ["--data-list", "scores.txt"], "scores.txt"),
            ("third", ["--data-list", "list", "--split", "test"], "submission/a_labelIds.png"),
            ("fourth", ["--data-list", "list"], "result.txt is a FIFO"),
            ("fifth", ["--data-list", "list"], "outputs/b.png is a folder"),
            ("sixth", ["--data-list", "list", "--split", "test"], "submission.zip is a device"),
        ],
    )
    def test_refused(self, listed, place, flags, words, monkeypatch, capsys):
        monkeypatch.chdir(listed)
        out = listed / place
        if place != ".":
            (out / "outputs").mkdir(parents=True)
        if place == "run":
            (out / "outputs").rmdir()
            (out / "outputs").symlink_to("../outputs")
        elif place == "other":
            os.link(listed / "scores.txt", out / "scores.txt")
        elif place == "third":  # where label ids are pictures too
            (listed / "list").write_text("submission/a_labelIds.png\n")
            (out / "submission").symlink_to("../submission")
            words = "submission/a_labelIds_labelIds.png"
            os.link(listed / "submission/a_labelIds.png", listed / words)
        elif place == "fourth":
            os.mkfifo(out / "result.txt")
        elif place == "fifth":
            (out / "outputs/b.png").mkdir()
        elif place == "sixth":
            (out / "submission.zip").symlink_to("/dev/null")
        before = {path: path.read_bytes() for path in listed.rglob("*") if path.is_file()}
        status, _, line = run(["--data-dir", ".", *flags, *SMALL, "--output-dir", place], monkeypatch, capsys)
        assert status == 2 and "--output-dir" in line and words in line
        assert {path: path.read_bytes() for path in listed.rglob("*") if path.is_file()} == before

    def test_names_that_an_archive_has_no_room_for(self, tmp_path, monkeypatch, capsys):
        folder = tmp_path / "data/leftImg8bit/test/ulm"
        folder.mkdir(parents=True)
        picture = cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
        arguments = [
            "--data-dir",
            tmp_path / "data",
            "--split",
            "test",
            *SMALL,
            "--output-dir",
            tmp_path / "out",
        ]
        odd = folder / "ulm\udcff_leftImg8bit.png"
        odd.write_bytes(picture)
        status, _, line = run(arguments, monkeypatch, capsys)
        assert status == 2 and "ulm\\udcff" in line and "is not valid UTF-8" in line
        odd.unlink()
        long = tmp_path / "data" / f"{'n' * 250}.png"  # and _labelIds behind it is more than a name can have
        long.write_bytes(picture)
        (tmp_path / "list").write_text(f"{long.name}\n")
        status, _, line = run([*arguments, "--data-list", tmp_path / "list"], monkeypatch, capsys)
        assert status == 2 and "name too long" in line and not (tmp_path / "out").exists()
        (folder / "ulm道_leftImg8bit.png").write_bytes(picture)
        (folder / "ULM道_leftImg8bit.png").write_bytes(picture)
        assert run(arguments, monkeypatch, capsys)[0] == 0
        with zipfile.ZipFile(tmp_path / "out/submission.zip") as archive:
            assert archive.namelist() == ["ULM道_labelIds.png", "ulm道_labelIds.png"]


def test_a_tile_beyond_all_memory_is_refused(tmp_path, monkeypatch, capsys):
    write_pair(tmp_path / "data", "val", 0, (48, 64))
    monkeypatch.setattr(resources, "LEAST_BYTES", 2**60)
    arguments = ["--data-dir", tmp_path / "data", *SMALL, "--output-dir", tmp_path / "out"]
    for flag in ([], ["--whole"]):
        status, _, line = run([*arguments, *flag], monkeypatch, capsys)
        assert status == 2 and "--input-size" in line and "GiB of memory" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_network")
def test_lower_precision_and_another_layout_change_few_pixels(tmp_path, monkeypatch, capsys):
    labeled(tmp_path / "data", 2)
    predicted, said = {}, {}
    monkeypatch.setattr(acceleration, "has_fast_bf16", lambda device: True)
    for name, flags_ in {
        "float32": [],
        "again": [],
        "layout": ["--channels-last"],
        "bf16": ["--amp", "bf16", "--channels-last"],
        "auto": ["--amp", "auto", "--channels-last"],
    }.items():
        arguments = ["--data-dir", tmp_path / "data", *SMALL, "--output-dir", tmp_path / name, *flags_]
        status, said[name], _ = run(arguments, monkeypatch, capsys)
        assert status == 0
        files = sorted((tmp_path / name / "outputs").iterdir())
        predicted[name] = np.stack([np.asarray(Image.open(path)) for path in files])
    same = {name: (each == predicted["float32"]).mean() for name, each in predicted.items()}
    assert same["again"] == 1 and same["layout"] > 0.99 and 0.8 < same["bf16"] < 1
    assert same["auto"] == same["bf16"] and "--amp auto: bf16, " in said["auto"]
    assert json.loads((tmp_path / "auto/result.txt").read_text())["arguments"]["amp"] == "bf16"
