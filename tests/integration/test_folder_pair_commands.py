"""Commands on a folder with images/ and labels/, without a list or a class table."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, last_line, run
from PIL import Image

from dataset import CSDataSet
from dataset.labels import read_table
from networks.of_run import table_path
from tools import seeds

TRAIN_PY, EVALUATE_PY = "tests/small/train.py", "tests/small/evaluate.py"
FLAGS = [*TINY, "--input-size", "33,33", "--batch-size", "2", "--num-steps", "2"]
SIZE = 48, 64

pytestmark = pytest.mark.usefixtures("small_network")


def make(folder: Path, values: list[object], count: int = 10) -> Path:
    """Write pictures and labels with `values` as the classes."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        blocks = np.kron(rng.integers(0, len(values), (6, 8)), np.ones((8, 8), int))
        picture = np.clip(blocks[..., None] * 90 + rng.integers(0, 40, (*SIZE, 3)), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"images/{number}.png")
        Image.fromarray(np.array(values, np.uint8)[blocks]).save(folder / f"labels/{number}_mask.png")
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return make(tmp_path / "DIR", [0, 3, 255])


def done(script: str, *arguments: object) -> str:
    """Run a command and return its output."""
    result = run(script, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def trained(pair: Path, *more: object) -> tuple[Path, str]:
    """Train for two steps; return the snapshot and the output."""
    out = pair.parent / "snapshots"
    said = done(TRAIN_PY, "--data-dir", pair, *FLAGS, "--snapshot-dir", out, *more)
    return out / "CS_scenes_2.pth", said


def names_of(checkpoint: Path) -> list[str]:
    """Return the class names that the args.json next to a checkpoint gives."""
    found = table_path(str(checkpoint), json.loads((checkpoint.parent / "args.json").read_text())["classes"])
    return list(read_table(found).names)


def test_train_evaluate_and_predict(pair: Path, tmp_path: Path) -> None:
    """The run keeps its classes, and the validation pictures are those that it was not trained on."""
    snapshot, said = trained(pair, "--val-every", 2)
    assert (
        f"{pair}: 10 pictures of images/ with their labels of labels/ (STEM_mask.png); 8 for training, "
        in said
    )
    assert f"{pair}: the labels hold ids 0, 3 and 255: classes 0 and 3; 255 is void (give --classes" in said
    assert said.count("STEM_mask") == 1 and "mean IoU" in said
    arguments = json.loads((snapshot.parent / "args.json").read_text())
    assert arguments["classes"] == "classes.tsv" and arguments["num_classes"] == 2
    rows = [label[:3] for label in read_table(str(snapshot.parent / "classes.tsv")).labels]
    assert rows == [("class 0", 0, 0), ("class 3", 3, 1), ("void", 255, 255)]

    said = done(
        EVALUATE_PY, "--data-dir", pair, *TINY[:2], "--restore-from", snapshot, "--input-size", "33,33"
    )
    assert "2 for validation (seed 0; each picture is a group)" in said and "class 3 " in said
    used = {sample.split()[0] for line in (snapshot.parent / "log.jsonl").read_text().splitlines()
            for sample in json.loads(line)["samples"]}  # fmt: skip
    scored = {path.stem for path in (snapshot.parent / "outputs").iterdir()}
    assert scored == {each.name for each in CSDataSet(str(pair), split="val").pairs} and not scored & used

    picture = pair / "images" / f"{min(scored)}.png"
    out = tmp_path / "predicted"
    done("tools.predict", picture, "--restore-from", snapshot, "--gpu", "cpu", "--out", out)
    assert list(out.iterdir())


def test_black_and_white_masks_have_two_classes(tmp_path: Path) -> None:
    pair = make(tmp_path / "DIR", [0, 255])
    snapshot, said = trained(pair)
    assert "classes background and object" in said and "0.0 % of the pixels are void" in said
    said = done(EVALUATE_PY, "--data-dir", pair, "--gpu", "cpu", "--restore-from", snapshot, "--whole")
    assert "background" in said and "object" in said


def test_a_checkpoint_alone_takes_the_classes_of_the_labels(tmp_path: Path) -> None:
    """Without args.json, 255 of a black-and-white mask would be void, and every pixel of class 0."""
    pair = make(tmp_path / "DIR", [0, 255])
    snapshot, _ = trained(pair)
    alone = tmp_path / "alone.pth"
    shutil.copy(snapshot, alone)
    flags = ["--data-dir", pair, *TINY, "--restore-from", alone, "--whole"]
    assert "object" in done(EVALUATE_PY, *flags)
    other = make(tmp_path / "OTHER", [0, 1, 2])
    result = run(EVALUATE_PY, *flags, "--data-dir", other)
    assert result.returncode == 2
    assert f"{other}: has labels of 3 classes, but the network has 2" in last_line(result.stderr)


def test_resume_has_the_same_recipe_unless_the_classes_change(pair: Path) -> None:
    snapshot, _ = trained(pair)
    before = (snapshot.parent / "classes.tsv").read_bytes()
    _, said = trained(pair, "--resume", "--num-steps", 3, "--change-recipe")
    assert "continuing after step 2" in said and (snapshot.parent / "classes.tsv").read_bytes() == before
    _, said = trained(pair, "--resume", "--num-steps", 3)
    assert "the run is finished" in said
    (pair / "classes.txt").write_text("a\nb\nc\nd\n")
    result = run(TRAIN_PY, "--data-dir", pair, *FLAGS, "--snapshot-dir", snapshot.parent, "--resume")
    assert result.returncode == 2 and "num-classes" in last_line(result.stderr).replace("_", "-")
    assert (snapshot.parent / "classes.tsv").read_bytes() == before


def test_a_new_run_sets_the_table_of_an_earlier_one_aside(pair: Path) -> None:
    snapshot, _ = trained(pair)
    before = (snapshot.parent / "classes.tsv").read_bytes()
    (pair / "classes.txt").write_text("a\nb\nc\nd\n")
    trained(pair)
    assert (snapshot.parent / "earlier_1/classes.tsv").read_bytes() == before
    assert read_table(str(snapshot.parent / "classes.tsv")).names == ("a", "b", "c", "d")
    # The earlier run still has its own table, also after a run whose table is elsewhere.
    shutil.copy(snapshot, snapshot.parent / "earlier_1")
    assert names_of(snapshot.parent / "earlier_1/CS_scenes_2.pth") == ["class 0", "class 3"]
    shutil.copy(snapshot.parent / "earlier_1/classes.tsv", pair / "own.tsv")
    trained(pair, "--classes", pair / "own.tsv")
    assert not (snapshot.parent / "classes.tsv").exists()
    assert names_of(snapshot) == ["class 0", "class 3"]
    assert read_table(str(snapshot.parent / "earlier_2/classes.tsv")).names == ("a", "b", "c", "d")
    # The table that a run would move can't be its input.
    trained(pair)
    refused = run(TRAIN_PY, "--data-dir", pair, *FLAGS, "--snapshot-dir", snapshot.parent, "--classes",
                  snapshot.parent / "classes.tsv")  # fmt: skip
    assert refused.returncode == 2 and "would replace its own input" in last_line(refused.stderr)


def test_a_table_that_a_flag_gives_is_left_where_it_is(pair: Path) -> None:
    """Only a table that the run writes itself is replaced or moved."""
    out = pair.parent / "snapshots"
    out.mkdir()
    table = out / "classes.tsv"
    table.write_text("name\tid\ttrain_id\tcolor\nx\t0\t0\t1,1,1\ny\t3\t1\t2,2,2\n")
    before = table.read_bytes()
    for _ in range(2):
        trained(pair, "--classes", table)
        assert table.read_bytes() == before
    assert json.loads((out / "args.json").read_text())["classes"] == str(table)


def test_the_folder_itself_takes_no_snapshots(pair: Path) -> None:
    result = run(TRAIN_PY, "--data-dir", pair, *FLAGS, "--snapshot-dir", pair)
    assert result.returncode == 2 and "is also --data-dir" in last_line(result.stderr)
    assert not (pair / "classes.tsv").exists()


@pytest.mark.slow
def test_processes_have_the_same_pairs_and_classes(pair: Path, tmp_path: Path) -> None:
    """Two processes log the samples of one, in the same order."""
    logs = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ["--data-dir", pair, *TINY[2:], *FLAGS[len(TINY) :], "--nproc", processes]
        done(TRAIN_PY, *flags, "--snapshot-dir", out, "--print-frequency", 1)
        lines = (out / "log.jsonl").read_text().splitlines()
        logs.append([sorted(json.loads(line)["samples"]) for line in lines])
    assert logs[0] == logs[1]


def test_pictures_to_predict(pair: Path) -> None:
    snapshot, _ = trained(pair)
    shutil.copytree(pair / "images", pair / "images/test")
    flags = ["--data-dir", pair, "--gpu", "cpu", "--restore-from", snapshot, "--whole", "--split", "test"]
    said = done(EVALUATE_PY, *flags)
    assert "10 pictures for testing, without labels" in said
    ids = {
        value for path in (snapshot.parent / "submission").iterdir() for value in np.unique(Image.open(path))
    }
    assert ids <= {0, 3}
    shutil.rmtree(pair / "images/test")
    result = run(EVALUATE_PY, *flags)
    assert result.returncode == 2 and "--split test: " in last_line(result.stderr)


@pytest.mark.slow
def test_dataset_check(pair: Path) -> None:
    said = done("dataset.check", pair, "--num-workers", 1)
    assert "train: 8 pictures" in said and "val: 2 pictures" in said and "no problems in 10 pictures" in said
    labels = np.stack([Image.open(path) for path in sorted((pair / "labels").iterdir())])
    file = pair.parent / "counts.json"
    done("dataset.check", pair, "--num-workers", 1, "--json", file)
    counts = json.loads(file.read_text())
    total = sum(counts[side]["classes"]["class 3"]["pixels"] for side in ("train", "val"))
    assert total == (labels == 3).sum()


def test_seeds(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tools.seeds trains and scores without lists, and skips what is done."""
    commands: list[str] = []

    def small(script: str, *arguments: object) -> None:
        commands.append(script)
        done(f"tests/small/{script}", *arguments)

    monkeypatch.setattr(seeds, "run", small)
    given = [str(tmp_path / "seeds"), "--seeds", "2", "--train", "--data-dir", str(pair), *FLAGS]
    seeds.main(given)
    assert commands == ["train.py", "evaluate.py"] * 2
    assert os.path.isfile(tmp_path / "seeds/seeds.md")
    seeds.main(given)
    assert commands[4:] == ["train.py"] * 2


def test_camvid_as_a_folder_pair(tmp_path: Path, root: Path) -> None:
    """Real pictures, linked into two folders: the classes and their shares are those of the labels."""
    data = root.parent / "shared/data/camvid"
    if not data.is_dir():
        pytest.skip("no CamVid beside the project")
    shares = np.zeros(256, np.int64)
    for line in (data / "val.lst").read_text().splitlines():
        for folder, path in zip(("images", "labels"), line.split("\t"), strict=True):
            target = tmp_path / "DIR" / folder / Path(path).parent.name / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            name = target.name.replace("_leftImg8bit", "").replace("_gtFine_labelTrainIds", "_L")
            os.symlink(data / path, target.with_name(name))
            if folder == "labels":
                shares += np.bincount(np.asarray(Image.open(data / path)).ravel(), minlength=256)
    file = tmp_path / "counts.json"
    said = done("dataset.check", tmp_path / "DIR", "--num-workers", 2, "--json", file)
    assert "classes 0, 1, 2, 3, 4, 5, 6, ... and 10 (11 in all); 255 is void" in said
    counts = json.loads(file.read_text())
    for value in range(11):
        pixels = sum(side["classes"][f"class {value}"]["pixels"] for side in counts.values())
        assert pixels == shares[value]
    assert sum(side["classes"]["void"]["pixels"] for side in counts.values()) == shares[255]


def test_a_run_with_a_list_is_not_scored_without_one(pair: Path) -> None:
    """The random division of the folder would put pictures that were trained on into the validation."""
    (pair.parent / "mine.lst").write_text(
        "".join(f"images/{number}.png\tlabels/{number}_mask.png\n" for number in range(8))
    )
    table = pair.parent / "table.tsv"
    table.write_text("name\tid\ttrain_id\tcolor\nx\t0\t0\t1,1,1\ny\t3\t1\t2,2,2\n")
    snapshot, _ = trained(pair, "--data-list", pair.parent / "mine.lst", "--classes", table)
    flags = ["--data-dir", pair, "--gpu", "cpu", "--restore-from", snapshot, "--input-size", "33,33"]
    refused = run(EVALUATE_PY, *flags)
    assert refused.returncode == 2 and last_line(refused.stderr).startswith(
        "evaluate.py: error: --data-list: required"
    )
    done(EVALUATE_PY, *flags, "--data-list", pair.parent / "mine.lst")


def test_the_table_of_the_folder_counts_with_a_list_too(pair: Path) -> None:
    (pair / "classes.tsv").write_text("name\tid\ttrain_id\tcolor\nx\t0\t0\t1,1,1\ny\t3\t1\t2,2,2\n")
    (pair / "some.lst").write_text("images/0.png\tlabels/0_mask.png\nimages/1.png\tlabels/1_mask.png\n")
    snapshot, said = trained(pair, "--data-list", pair / "some.lst")
    assert "2 classes by classes.tsv" in said and names_of(snapshot) == ["x", "y"]
    refused = run(
        TRAIN_PY, "--data-dir", pair, *FLAGS, "--snapshot-dir", pair.parent / "b", "--num-classes", 4
    )
    assert refused.returncode == 2 and "has 2 classes; omit --num-classes" in last_line(refused.stderr)


def test_files_that_describe_a_folder_pair_are_inputs(pair: Path) -> None:
    (pair / "classes.txt").write_text("a\nb\nc\nd\n")
    assert {str(pair / name) for name in ("classes.txt", "classes.tsv", "train.lst", "val.lst")} <= set(
        CSDataSet(str(pair)).files()
    )


def test_a_renamed_class_keeps_its_name_when_the_run_is_resumed(pair: Path) -> None:
    snapshot, _ = trained(pair)
    table = snapshot.parent / "classes.tsv"
    table.write_text(table.read_text().replace("class 3", "pothole"))
    trained(pair, "--resume")
    assert names_of(snapshot) == ["class 0", "pothole"]
