"""Training and evaluation of each published data set, in miniature, by the commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, last_line, run
from PIL import Image

from dataset import mini
from dataset.catalog import DATA_SETS

TRAIN_PY, EVALUATE_PY = "tests/small/train.py", "tests/small/evaluate.py"
SAMPLES = ["--input-size", "33,41", "--batch-size", "2", "--random-mirror"]
SCALED = ["--short-sides", "40,48", "--long-side", "90"]


def done(script: str, *arguments: object) -> str:
    result = run(script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("layout", DATA_SETS)
def test_two_steps_and_an_evaluation(layout: str, tmp_path: Path) -> None:
    root, run_folder = tmp_path / "data", tmp_path / "run"
    mini.write(root, 3, 2, (48, 96), 0, layout)
    data = DATA_SETS[layout]
    scaling = SCALED if layout in ("ade20k", "lip") else ["--random-scale", "--scale-range", "0.5,2.0"]
    said = done(
        TRAIN_PY,
        "--data-dir",
        root,
        *TINY,
        *SAMPLES,
        *scaling,
        "--num-steps",
        2,
        "--snapshot-dir",
        run_folder,
    )
    assert f"3 of the official {data.splits['train'].number} pictures for train (--dataset {layout})" in said
    samples = json.loads((run_folder / "log.jsonl").read_text().splitlines()[-1])["samples"]
    assert len(samples) == 2 and all("scale=" in sample for sample in samples)

    split = ["--split", "test"] if "test" in data.splits else []
    flags = ["--short-sides", "32,48", "--long-side", "80"] if layout == "ade20k" else ["--scales", "0.5,1"]
    snapshot = run_folder / "CS_scenes_2.pth"
    evaluation = ["--data-dir", root, "--gpu", "cpu", "--restore-from", snapshot, "--whole", "--flip"]
    said = done(EVALUATE_PY, *evaluation, *flags, *split)
    result = json.loads((run_folder / "result.txt").read_text())
    table = data.classes()
    number = 19 if table is None else len(table.classes)
    assert len(result["IU_array"]) == number and f"mean IoU {result['meanIU']:.4f}" in said
    where = data.splits["test" if split else "val"]
    names = [os.path.splitext(name)[0] for name in os.listdir(run_folder / "outputs")]
    assert len(names) == 2
    for name in names:
        found = Image.open(run_folder / "outputs" / f"{name}.png")
        assert found.mode == "P" and np.asarray(found).max() < number
        stem = f"{name.split('_')[0]}/{name}" if layout == "coarse" else name
        picture = os.path.join(root, data.folders[-1], where.pictures[0].replace("{}", stem))
        assert Image.open(picture).size == found.size


@pytest.mark.slow
def test_the_flipped_prediction_of_persons_has_left_and_right_exchanged(tmp_path: Path) -> None:
    """Scores with --flip are those of the classes that the checkpoint's own table calls left and right."""
    root, folder = tmp_path / "lip", tmp_path / "run"
    mini.write(root, 3, 2, (64, 64), 0, "lip")
    done(TRAIN_PY, "--data-dir", root, *TINY, *SAMPLES, "--num-steps", 1, "--snapshot-dir", folder)
    table = folder / "classes.tsv"
    assert table.read_text().splitlines()[0].split("\t")[-2:] == ["mirror", "name"]
    confusions = []
    for name, text in (("own", None), ("none", table.read_text())):
        flags = ["--restore-from", folder / "CS_scenes_1.pth", "--output-dir", tmp_path / name]
        if text is not None:
            lines = [line.split("\t") for line in text.splitlines()]
            plain = tmp_path / "plain.tsv"
            plain.write_text("".join("\t".join([*line[:3], line[4]]) + "\n" for line in lines))
            flags += ["--classes", plain]
        done(EVALUATE_PY, "--data-dir", root, "--gpu", "cpu", "--whole", "--flip", *flags)
        pictures = sorted((tmp_path / name / "outputs").iterdir())
        confusions.append([np.asarray(Image.open(picture)) for picture in pictures])
    assert any((a != b).any() for a, b in zip(*confusions, strict=True))


@pytest.mark.parametrize(
    "command, flags, message",
    [
        (TRAIN_PY, ["--short-sides", "40", "--random-scale"], "--short-sides: replaces --random-scale"),
        (TRAIN_PY, ["--scale-range", "0.5,2.0"], "--scale-range: requires --random-scale; add it"),
        (TRAIN_PY, ["--long-side", "90"], "--long-side: requires --short-sides; add it"),
        (TRAIN_PY, ["--random-scale", "--scale-range", "0.55,2"], "'0.55,2' is not a range of factors"),
        (TRAIN_PY, ["--dataset", "lip"], "--dataset lip: "),
        (TRAIN_PY, ["--num-classes", "19"], "voc2012.tsv has 21 classes; omit --num-classes"),
        (EVALUATE_PY, ["--short-sides", "40", "--scales", "0.5,1"], "--short-sides: replaces --scales"),
        (EVALUATE_PY, ["--long-side", "40"], "--long-side: requires --short-sides; add it"),
        (EVALUATE_PY, ["--split", "test"], "--split test: PASCAL VOC 2012 has labels for train and val"),
    ],
)
def test_wrong_flags_give_one_line(command: str, flags: list[str], message: str, tmp_path: Path) -> None:
    mini.write(tmp_path / "voc", 1, 1, (32, 64), 0, "voc2012")
    folder = ["--snapshot-dir" if command == TRAIN_PY else "--output-dir", tmp_path / "run"]
    result = run(command, "--data-dir", tmp_path / "voc", "--gpu", "cpu", "--model", "small", *folder, *flags)
    assert result.returncode == 2 and message in last_line(result.stderr)
    assert "Traceback" not in result.stderr
