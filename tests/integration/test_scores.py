"""evaluate.py: intervals, boundary scores, calibration, and the scores of each picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import TINY, last_line, mean_of, write_pair
from conftest import run as run_command
from PIL import Image

import evaluate as command
from dataset import CSDataSet
from engine.evaluation import bootstrap, pictures
from engine.evaluation.boundary import count_boundary
from engine.evaluation.pictures import BOUNDARY_F, BOUNDARY_IOU, INSTANCE_IOU
from tools import report
from utils import args as flags
from utils import run_files
from utils.errors import UsageError

pytestmark = pytest.mark.usefixtures("small_network")
MORE = ["--boundary", "--calibration"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five pictures of two sizes with labels and instances."""
    folder = tmp_path_factory.mktemp("scores") / "CS"
    for number in range(5):
        _, label = write_pair(folder, "val", number, (48, 64) if number % 2 else (40, 72))
        ids = cv2.imread(str(folder / label), cv2.IMREAD_GRAYSCALE)
        instances = np.where(ids >= 24, ids.astype(np.uint16) * 1000 + 1, ids).astype(np.uint16)
        cv2.imwrite(str(folder / label.replace("labelIds", "instanceIds")), instances)
    return folder


def evaluated(data: Path, out: Path, *more: object) -> str:
    """Run evaluate.py in this process; return what it prints."""
    given = ["--data-dir", data, *TINY, "--input-size", "33,33", "--output-dir", out, *more]
    done = run_command("tests/small/evaluate.py", *given)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("plain")
    return out, evaluated(data, out)


@pytest.fixture(scope="module")
def more(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("more")
    return out, evaluated(data, out, *MORE)


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.txt").read_text())


def predictions(data: Path, out: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return name, label and written prediction of each picture."""
    dataset = CSDataSet(str(data), split="val", crop_size=None)
    found = []
    for number in range(len(dataset)):
        picture = dataset.picture(number, instances=False)
        found.append(
            (picture.name, picture.label, np.asarray(Image.open(out / f"outputs/{picture.name}.png")))
        )
    return found


def test_pictures_are_those_of_the_data_set_in_order(data, plain):
    out, _ = plain
    found, written = pictures.read(str(out)), predictions(data, out)
    assert found.names == [name for name, _, _ in written]
    for index, (_, label, prediction) in enumerate(written):
        expected = np.zeros((19, 19), int)
        valid = label != 255
        np.add.at(expected, (label[valid], prediction[valid]), 1)
        mine = found.picture == index
        own = np.zeros((19, 19), int)
        own[found.label[mine], found.prediction[mine]] = found.pixels[mine]
        assert np.array_equal(own, expected)
    assert found.confusion().tolist() == result_of(out)["confusion"]


def test_intervals_are_in_all_results(plain):
    out, said = plain
    result, found = result_of(out), pictures.read(str(out))
    *classes, mean = bootstrap.intervals(found.iou())
    intervals = result["intervals"]
    assert (intervals["level"], intervals["resamples"], intervals["pictures"]) == (0.95, 1000, 5)
    assert intervals["meanIU"] == pytest.approx(list(mean))
    assert [each and tuple(each) for each in intervals["IU_array"]] == classes
    assert intervals["meanIU"][0] <= result["meanIU"] <= intervals["meanIU"][1]
    of_instances = bootstrap.intervals(found.others[INSTANCE_IOU])
    assert intervals["averageScoreInstClasses"] == pytest.approx(list(of_instances[-1]))
    assert set(intervals["classInstScores"]) == set(result["classes"])
    assert intervals["averageScoreCategories"] and intervals["averageScoreInstCategories"]
    line = last_line(said)
    assert line.startswith(f"mean IoU {result['meanIU']:.4f}, written to {out / 'result.txt'}")
    assert line.endswith(f"(95 % interval {mean[0]:.4f} to {mean[1]:.4f})") and mean_of(line) == mean_of(said)
    shown = f"{100 * mean[0]:.2f} - {100 * mean[1]:.2f}"
    assert shown in (out / "scores.txt").read_text() and shown in said
    assert "meanBoundaryIU" not in result and "calibration" not in result
    assert not (out / "reliability.png").exists()


def test_boundary_scores_are_those_of_the_written_predictions(data, plain, more):
    out, said = more
    counts = [count_boundary(label, prediction, 19) for _, label, prediction in predictions(data, out)]
    intersection, union, f, scored = (np.sum(part, 0) for part in zip(*counts, strict=True))
    result = result_of(out)
    with np.errstate(invalid="ignore"):
        expected = {"boundaryIU_array": intersection / union, "boundaryF_array": f / scored}
    for name, values in expected.items():
        found = np.array(result[name], float)
        np.testing.assert_allclose(found, values, rtol=1e-12)
        mean = {"boundaryIU_array": "meanBoundaryIU", "boundaryF_array": "meanBoundaryF"}[name]
        assert result[mean] == pytest.approx(np.nanmean(values))
        assert result["intervals"][mean][0] <= result[mean] <= result["intervals"][mean][1]
        assert len(result["intervals"][name]) == 19
    found = pictures.read(str(out))
    assert {BOUNDARY_IOU, BOUNDARY_F} < set(found.others)
    assert "BIoU" in said and "BF" in said
    # The flags change no other score.
    for name in ("meanIU", "IU_array", "confusion", "averageScoreInstClasses"):
        assert result[name] == result_of(plain[0])[name]


def test_calibration(more):
    out, said = more
    result = result_of(out)
    found = result["calibration"]
    assert sum(found["pixels"]) == np.sum(result["confusion"])
    assert sum(found["correct"]) == np.trace(result["confusion"])
    parts = [np.array(found[name]) for name in ("pixels", "correct", "confidence")]
    error = np.abs(parts[1] - parts[2]).sum() / parts[0].sum()
    assert found["expectedCalibrationError"] == pytest.approx(error, rel=1e-12)
    assert f"expected calibration error {error:.4f}" in said
    assert Image.open(out / "reliability.png").size[0] > 400
    assert result["arguments"]["boundary"] and result["arguments"]["calibration"]


def test_a_plot_of_an_earlier_evaluation_is_removed(data, tmp_path):
    (tmp_path / "reliability.png").write_bytes(b"earlier")
    evaluated(data, tmp_path)
    assert not (tmp_path / "reliability.png").exists()


@pytest.mark.slow
def test_processes_change_nothing(data, more, tmp_path):
    given = ["--data-dir", data, *[flag for flag in TINY if flag not in ("--gpu", "cpu")]]
    given += ["--input-size", "33,33", *MORE, "--nproc", 2, "--output-dir", tmp_path]
    done = run_command("tests/small/evaluate.py", *given)
    assert done.returncode == 0, done.stderr
    result, expected = result_of(tmp_path), result_of(more[0])
    found, before = result.pop("calibration"), expected.pop("calibration")
    assert (
        result == expected and found["pixels"] == before["pixels"] and found["correct"] == before["correct"]
    )
    np.testing.assert_allclose(found["confidence"], before["confidence"], rtol=1e-6)
    one, other = (np.load(folder / "pictures.npz", allow_pickle=False) for folder in (tmp_path, more[0]))
    assert one.files == other.files
    for name in one.files:
        assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("name", ["pictures.npz", "reliability.png"])
def test_an_input_of_that_name_is_not_replaced(data, tmp_path, name, monkeypatch, capsys):
    listing = tmp_path / name
    pair = CSDataSet(str(data), split="val", crop_size=None).pairs[0]
    listing.write_text(f"{pair.image}\t{pair.label}\n")
    before = listing.read_bytes()
    given = ["--data-dir", data, "--data-list", listing, *TINY, "--output-dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, given)])
    status = flags.exit_status(command.main)
    line = last_line(capsys.readouterr().err)
    assert status == 2 and "--output-dir" in line and name in line and listing.read_bytes() == before


def page_of(folder: Path) -> str:
    report.main([str(folder), "--gpu", "cpu", "--pictures", "0", "--attention", "0"])
    return (folder / "report.html").read_text()


def test_the_report_shows_them(more, plain):
    text, result = page_of(more[0]), result_of(more[0])
    low, high = result["intervals"]["meanIU"]
    assert f"{100 * low:.2f} to {100 * high:.2f} %" in text
    for words in ("BIoU", "BF", "mean boundary IoU", "mean boundary F score", "Expected calibration error"):
        assert words in text
    assert text.count('alt="reliability plot"') == 1
    text = page_of(plain[0])
    assert "95 % interval" in text and "BIoU" not in text and "reliability plot" not in text


def test_a_result_of_before_has_no_intervals(plain, tmp_path):
    result = result_of(plain[0])
    for name in ("intervals", "classInstScores"):
        result.pop(name)
    for name in ("boundary", "calibration"):
        result["arguments"].pop(name)
    (tmp_path / "result.txt").write_text(json.dumps(result))
    assert run_files.read_result(str(tmp_path))["intervals"] == {}
    text = page_of(tmp_path)
    assert "95 % interval" not in text and f"{100 * result['meanIU']:.2f} %" in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda result: result.update(intervals=[]),
        lambda result: result["intervals"].update(meanIU=[0.1]),
        lambda result: result["intervals"].update(meanIU=[0.1, 2]),
        lambda result: result["intervals"].update(meanIU="low"),
        lambda result: result["intervals"].update(IU_array=[None]),
        lambda result: result["intervals"].update(classInstScores=[1]),
        lambda result: result["intervals"].update(averageScoreInstClasses=3),
        lambda result: result.update(boundaryIU_array=[0.5]),
        lambda result: result.update(meanBoundaryF=-1),
        lambda result: result.update(boundaryF_array=None),
        lambda result: result.update(calibration=[]),
        lambda result: result["calibration"].update(expectedCalibrationError=2),
        lambda result: result["calibration"].update(pixels=[1]),
        lambda result: result["calibration"].update(correct=["x"] * 15),
        lambda result: result["calibration"].update(confidence=[1e9] * 15),
        lambda result: result["calibration"].pop("pixels"),
    ],
)
def test_damaged_entries_are_named(more, tmp_path, damage):
    result = result_of(more[0])
    damage(result)
    (tmp_path / "result.txt").write_text(json.dumps(result))
    with pytest.raises(UsageError, match=r"result.txt: .*(interval|oundary|calibration).*; fix or delete"):
        run_files.read_result(str(tmp_path))
