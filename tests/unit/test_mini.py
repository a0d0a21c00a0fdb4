"""The generated data set: repeatable, in the layout of Cityscapes, not predictable from place or color."""

import errno
import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import status_of

from benchmarks.baselines import Baselines, whole_pictures
from dataset import CSDataSet, mini
from dataset.labels import CITYSCAPES, IGNORE, LABELS
from dataset.mini.__main__ import main
from dataset.pictures import decode_label, load

TRAIN, VAL = 32, 16  # the first pictures of the default set
BY_ID = {label.id: label for label in LABELS}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "set"
    assert main([str(out), "--train", str(TRAIN), "--val", str(VAL)]) == 0
    return out


def run_wrong(capsys, *argv: str) -> str:
    """Return the only line on standard error of a command, and check its exit status 2."""
    assert status_of(main, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_same_seed_same_files_whatever_the_counts(generated, tmp_path):
    assert main([str(tmp_path / "few"), "--train", "3", "--val", "2"]) == 0
    few, many = files_of(tmp_path / "few"), files_of(generated)
    assert len(few) == 15
    assert all(many[name] == content for name, content in few.items())


def test_another_seed_gives_other_pictures():
    first, second = (mini.picture("train", 0, (64, 128), seed)[2] for seed in (0, 1))
    assert all((a != b).any() for a, b in zip(first, second, strict=True))


def test_splits_and_pictures_differ():
    images = [mini.picture(s, i, (64, 128), 0)[2][0] for s, i in (("train", 0), ("train", 8), ("val", 0))]
    assert all((images[a] != images[b]).mean() > 0.5 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_layout_and_names(generated):
    names = list(files_of(generated))
    assert len(names) == 3 * (TRAIN + VAL)
    kinds = "leftImg8bit|gtFine_labelIds|gtFine_instanceIds"
    pattern = rf"(leftImg8bit|gtFine)/(train|val)/([a-z]+)/\3_\d{{6}}_\d{{6}}_({kinds})\.png"
    matches = [re.fullmatch(pattern, name) for name in names]
    assert all(matches)
    cities = {split: {match[3] for match in matches if match[2] == split} for split in ("train", "val")}
    assert len(cities["train"]) > 1
    assert len(cities["val"]) > 1
    assert not cities["train"] & cities["val"]
    for split, count in (("train", TRAIN), ("val", VAL)):
        data = CSDataSet(str(generated), split=split)
        assert len(data) == count
        data.check()
    assert not list(generated.rglob("*.tmp"))


def test_labels_and_instances_agree(generated):
    for path in generated.rglob("*_labelIds.png"):
        labels = decode_label(load(str(path)))
        instances = cv2.imread(str(path).replace("labelIds", "instanceIds"), cv2.IMREAD_UNCHANGED)
        assert (labels.dtype, instances.dtype) == (np.uint8, np.uint16)
        assert set(np.unique(labels)) <= set(BY_ID)
        single = instances >= 1000
        assert (np.where(single, instances // 1000, instances) == labels).all()
        assert all(BY_ID[int(label)].has_instances for label in np.unique(labels[single]))


def test_every_class_and_void_occur_in_both_splits(generated):
    for split in ("train", "val"):
        labels = [
            decode_label(load(str(path))) for path in (generated / "gtFine" / split).rglob("*_labelIds.png")
        ]
        shares = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256) / sum(
            label.size for label in labels
        )
        for name, label in zip(CITYSCAPES.names, CITYSCAPES.label_ids(), strict=True):
            assert shares[label] > 0.005, (split, name)
            assert sum((ids == label).any() for ids in labels) >= len(labels) / 4, (split, name)
        void = sum(shares[label.id] for label in LABELS if label.train_id == IGNORE)
        assert 0.02 < void < 0.2
        assert all(shares[BY_ID[i].id] > 0 for i in (1, 2, 3, 4, 9, 10))


@pytest.mark.parametrize("size", [(64, 128), (75, 133), (1024, 2048)])
def test_the_same_scene_at_every_size(size):
    image, labels, instances = mini.picture("val", 2, size, 0)[2]
    assert (image.shape, labels.shape, instances.shape) == ((*size, 3), size, size)
    assert (image.dtype, labels.dtype, instances.dtype) == (np.uint8, np.uint8, np.uint16)
    usual = mini.picture("val", 2, (128, 256), 0)[2][1]
    rows, columns = (np.arange(n) * m // n for n, m in zip((128, 256), size, strict=True))
    assert (labels[rows][:, columns] == usual).mean() > 0.85


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--train", "0"),
        ("--train", "many"),
        ("--val", "-3"),
        ("--size", "128"),
        ("--size", "8x8"),
        ("--size", "2048x4096"),
        ("--seed", "1.5"),
    ],
)
def test_bad_values_are_refused(flag, value, tmp_path, capsys):
    error = run_wrong(capsys, str(tmp_path / "set"), f"{flag}={value}")
    assert flag in error
    assert value in error
    assert not (tmp_path / "set").exists()


def test_a_second_run_reuses_and_other_parameters_are_refused(generated, capsys):
    before = {path: path.stat().st_mtime_ns for path in generated.rglob("*")}
    argv = [str(generated), "--train", str(TRAIN), "--val", str(VAL)]
    assert main(argv) == 0
    assert "already" in capsys.readouterr().out
    assert str(generated) in run_wrong(capsys, *argv, "--seed", "5")
    assert {path: path.stat().st_mtime_ns for path in generated.rglob("*")} == before


def test_an_interrupted_run_is_taken_up(tmp_path):
    out, argv = tmp_path / "set", ["--train", "1", "--val", "1", "--size", "64x128"]
    assert main([str(out), *argv]) == 0
    whole = files_of(out)
    (out / "mini.json").rename(out / "mini.started.json")
    next(out.rglob("*_labelIds.png")).unlink()
    assert main([str(out), *argv]) == 0
    assert files_of(out) == whole
    assert json.loads((out / "mini.json").read_text())["size"] == [64, 128]


@pytest.mark.parametrize("written", [0, 1, 2, 5])
def test_generation_can_be_repeated_after_a_full_disk(written, tmp_path, monkeypatch, capsys):
    """After a disk was full at any file, the first being the marker, generation can be repeated."""
    out, argv = tmp_path / "set", ["--train", "1", "--val", "1", "--size", "64x128"]
    left, sync = [written], os.fsync

    def filling(file):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", filling)
    assert status_of(main, out, *argv) == 1
    line = capsys.readouterr().err
    assert f"error: {out}" in line and "can't be written (No space left on device); make room" in line
    assert line.count("\n") == 1 and ".writing" not in line
    assert len([path for path in out.rglob("*") if path.is_file()]) == written
    monkeypatch.setattr(os, "fsync", sync)
    assert status_of(main, out, *argv) == 0
    assert len(files_of(out)) == 6 and not list(out.rglob(".*"))
    assert [path.name for path in out.glob("*.json")] == ["mini.json"]


@pytest.mark.parametrize("content", ["", '{"format"', "[" * 100_000, "\0"])
def test_marker_that_was_not_written_whole(content, tmp_path, capsys):
    """An incomplete marker is ignored in an empty folder, and refused beside pictures."""
    out, argv = tmp_path / "set", ["--train", "1", "--val", "1", "--size", "64x128"]
    out.mkdir()
    (out / "mini.started.json").write_text(content)
    assert status_of(main, out, *argv) == 0 and len(files_of(out)) == 6
    whole = files_of(out)
    for name in ("mini.json", "mini.started.json"):
        next(out.glob("mini*.json")).unlink()
        (out / name).write_text(content)
        assert f"{out / name}: is damaged" in run_wrong(capsys, str(out), *argv)
    assert files_of(out) == whole


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert str(tmp_path) in run_wrong(capsys, str(tmp_path))
    assert "thesis.txt" in run_wrong(capsys, str(tmp_path / "thesis.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_place_or_color_alone_say_little(generated):
    train, val = (whole_pictures(str(generated), None, split) for split in ("train", "val"))
    scores = Baselines(train).scores(val)
    assert max(scores.values()) < 0.15, scores


def test_baselines_find_what_there_is_to_find():
    label = np.repeat([[0], [1], [2], [IGNORE]], 40, axis=0) + np.zeros((1, 40), int)
    image = np.stack([label * 20] * 3, -1).astype(np.uint8)
    assert Baselines([(image, label)], 3).scores([(image, label)]) == dict.fromkeys(
        ("row_prior", "position_prior", "mean_color"), 1.0
    )
