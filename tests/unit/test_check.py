"""Broken data sets, as reported by the check command and by the loader."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import last_line, status_of, write_pair
from PIL import Image

from dataset import CSDataSet, DataError, check
from dataset.labels import CITYSCAPES, LABELS, choose_table
from engine.evaluation.metrics import CityscapesEvaluation

NAME = "ulm_000000_000002"
IMAGE = f"leftImg8bit/train/ulm/{NAME}_leftImg8bit.png"
LABEL = f"gtFine/train/ulm/{NAME}_gtFine_labelIds.png"
INSTANCES = f"gtFine/train/ulm/{NAME}_gtFine_instanceIds.png"


def checked(folder, capsys, *flags) -> tuple[int, str, str]:
    """Run the check command; return exit status, output and last line on standard error."""
    status = status_of(check.main, folder, "--num-workers", "2", "--partial", *flags)
    captured = capsys.readouterr()
    return status, captured.out, last_line(captured.err or "\n-")


def loaded(folder, list_path=None, classes=None) -> str:
    """Return the first error of the loader for a data set."""
    try:
        table = choose_table(classes, None)[0]
        dataset = CSDataSet(str(folder), list_path, crop_size=None, scale=False, mirror=False, table=table)
        instances = dataset.has_instances()
        dataset.check(instances)
        evaluation = CityscapesEvaluation(LABELS)
        for index in range(len(dataset)):
            dataset[index]
            picture = dataset.picture(index, instances)
            if instances:
                try:
                    evaluation.count(picture.label_ids, picture.instance_ids, np.zeros((48, 64), int))
                except ValueError as error:
                    return f"{dataset.pairs[index].name}: {error}"
    except DataError as error:
        return str(error)
    return "nothing"


# Functions that break a healthy data set. They may return flags of the command.


def cut(name: str, part: float) -> Callable:
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * part)])

    return damage


def flip_a_byte(name: str) -> Callable:
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def write(name: str, pixels) -> Callable:
    return lambda folder: Image.fromarray(np.asarray(pixels)).save(folder / name)


def replace_by(name: str, make: Callable) -> Callable:
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def text(path):
    path.write_text("<html>")


def jpeg(path):
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(path, "JPEG")


def fifo(flag: str) -> Callable:
    def damage(folder):
        os.mkfifo(folder / "fifo")
        return [flag, folder / "fifo"]

    return damage


def utf16(folder):
    (folder / "list").write_text(SOUND, "utf-16")
    return ["--data-list", folder / "list"]


def floats(folder):
    Image.fromarray(np.zeros((48, 64), np.float32)).save(folder / "a.tif")
    return list_of(f"a.tif\t{LABEL}")(folder)


def broken_link(path):
    path.symlink_to("nowhere")


def change_ids(name: str, value: int) -> Callable:
    def damage(folder):
        pixels = cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED)
        pixels[7, 9] = value
        cv2.imwrite(str(folder / name), pixels)

    return damage


def list_of(*lines: str) -> Callable:
    def damage(folder):
        (folder / "list").write_text("".join(line + "\n" for line in lines))
        return ["--data-list", folder / "list"]

    return damage


def table_of(*lines: str) -> Callable:
    def damage(folder):
        (folder / "table").write_text("".join("\t".join(line.split()) + "\n" for line in lines))
        return ["--classes", folder / "table"]

    return damage


def jpeg_cut_short(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert cv2.imwrite(str(folder / "a.jpg"), pixels)
    cut("a.jpg", 0.9)(folder)
    return list_of(f"a.jpg\t{LABEL}")(folder)


def one_folder_too_deep(folder):
    (folder / "inner").mkdir()
    for name in ("leftImg8bit", "gtFine"):
        os.rename(folder / name, folder / "inner" / name)


def sixteen_bits(folder):
    cv2.imwrite(str(folder / "label.png"), np.full((48, 64), 300, np.uint16))
    return list_of(f"{IMAGE}\tlabel.png")(folder)


def emptied(name: str) -> Callable:
    def damage(folder):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return damage


SOUND = f"{IMAGE}\t{LABEL}"
COLUMNS = "name id train_id color"
TWO = ("a 7 0 1,2,3", "b 8 1 1,2,4")
BROKEN: dict[str, tuple[Callable, str, str]] = {
    # what: (how, the file in the line, words of the reason)
    "no such directory": (lambda folder: shutil.rmtree(folder), "CS", "no such directory"),
    "nothing of Cityscapes": (emptied(""), "CS", "has no folder leftImg8bit"),
    "one folder too deep": (one_folder_too_deep, "CS", "but its folder inner has one; name"),
    "split without pictures": (emptied("leftImg8bit/train/ulm"), "CS", "pictur"),
    "no labels at all": (lambda folder: shutil.rmtree(folder / "gtFine"), "_labelIds.png", "gtFine_train"),
    "label missing": (lambda folder: (folder / LABEL).unlink(), LABEL, "gtFine_trainvaltest.zip"),
    "picture missing": (lambda folder: (folder / IMAGE).unlink(), LABEL, "leftImg8bit_trainvaltest.zip"),
    "picture cut short": (cut(IMAGE, 0.7), IMAGE, "truncated"),
    "picture damaged": (flip_a_byte(IMAGE), IMAGE, "damaged"),
    "picture empty": (cut(IMAGE, 0), IMAGE, "not a readable picture"),
    "picture is text": (replace_by(IMAGE, text), IMAGE, "not a readable picture"),
    "picture is a folder": (replace_by(IMAGE, Path.mkdir), "CS", ""),
    "picture is a broken link": (replace_by(IMAGE, broken_link), IMAGE, "no such file"),
    "JPEG cut short": (jpeg_cut_short, "a.jpg", "truncated"),
    "label cut short": (cut(LABEL, 0.6), LABEL, "truncated"),
    "label damaged": (flip_a_byte(LABEL), LABEL, "damaged"),
    "label empty": (cut(LABEL, 0), LABEL, "not a readable picture"),
    "label of colors": (write(LABEL, np.zeros((48, 64, 3), np.uint8)), LABEL, "RGB"),
    "label with transparency": (write(LABEL, np.zeros((48, 64, 4), np.uint8)), LABEL, "RGBA"),
    "label of another size": (write(LABEL, np.full((48, 63), 7, np.uint8)), LABEL, "63x48 pixels, but"),
    "label id that there is not": (change_ids(LABEL, 77), LABEL, "label id 77"),
    "train id of sixteen bits": (sixteen_bits, "label.png", "train id 300"),
    "label by JPEG": (replace_by(LABEL, jpeg), LABEL, "JPEG changes the ids of a label"),
    "label is a gray mask in RGB": (write(LABEL, np.ones((48, 64, 3), np.uint8)), LABEL, "saved as RGB"),
    "picture is a FIFO": (replace_by(IMAGE, os.mkfifo), IMAGE, "is a FIFO"),
    "label is a FIFO": (replace_by(LABEL, os.mkfifo), LABEL, "is a FIFO"),
    "list is a FIFO": (fifo("--data-list"), "fifo", "is a FIFO"),
    "table is a FIFO": (fifo("--classes"), "fifo", "is a FIFO"),
    "list of other characters": (utf16, "list", "not text in UTF-8"),
    "table of one class": (table_of(COLUMNS, "a 7 0 1,2,3"), "table", "has one class"),
    "picture of floating-point numbers": (floats, "a.tif", "32-bit pixel values"),
    "list missing": (lambda folder: ["--data-list", folder / "none"], "none", "not a readable list"),
    "list empty": (list_of(""), "list", "empty"),
    "list line of three": (list_of(SOUND, "a\tb\tc"), "list:2", "image<TAB>label"),
    "list line of one": (list_of(SOUND, "a.png"), "list:2", "has no label"),
    "list names what is missing": (list_of(SOUND, f"x.png\t{LABEL}"), "x.png", "no such file"),
    "list with swapped columns": (list_of(f"{LABEL}\t{IMAGE}"), IMAGE, "one channel"),
    "table without a column": (table_of("name id color", "a 0 1,2,3"), "table", "no column train_id"),
    "table with a gap": (table_of(COLUMNS, "a 0 1 1,2,3"), "table", "number the classes"),
    "table without an id that occurs": (table_of(COLUMNS, *TWO), "labelIds.png", "--classes"),
    "instances of another size": (write(INSTANCES, np.zeros((48, 32), np.uint16)), INSTANCES, "32x48 pix"),
    "instances of colors": (write(INSTANCES, np.zeros((48, 64, 3), np.uint8)), INSTANCES, "channel of ids"),
    "instances cut short": (cut(INSTANCES, 0.6), INSTANCES, "truncated"),
    "instances of no class": (change_ids(INSTANCES, 60001), NAME, "60001"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data_set_is_reported_by_check_and_loader(kind, healthy, capsys):
    damage, file, words = BROKEN[kind]
    flags = damage(healthy) or []
    options = dict(zip(flags[::2], map(str, flags[1::2]), strict=True))
    said = loaded(healthy, options.get("--data-list"), options.get("--classes"))
    status, output, line = checked(healthy, capsys, *flags)
    assert status == 2 and ": error: " in line
    for found in (said, line):
        assert found != "nothing" and "\n" not in found
        if kind != "picture is a folder":  # the layout then lacks the picture, its label has none
            assert file in found and words in found, found


def test_there_are_more_than_twenty_kinds():
    assert len(BROKEN) > 20


def test_healthy_data_set(healthy, capsys):
    status, output, _ = checked(healthy, capsys)
    assert status == 0 and "no problems in 8 pictures" in output and loaded(healthy) == "nothing"
    assert "train: 4 pictures of the official 2975 in 1 folder" in output and "val: 4 pictures in 1" in output
    assert "64x48 (4)" in output


@pytest.mark.parametrize("workers", [1, 3])
def test_every_problem_is_listed_in_order(healthy, capsys, workers):
    for number in (3, 1):
        name = f"val/ulm/ulm_000000_{number:06d}"
        cut(f"leftImg8bit/{name}_leftImg8bit.png", 0.5)(healthy)
        change_ids(f"gtFine/{name}_gtFine_labelIds.png", 99)(healthy)
    cut(INSTANCES, 0.5)(healthy)
    status, output, line = checked(healthy, capsys, "--num-workers", workers)
    assert status == 2 and "5 problems in 8 pictures" in line
    problems = [text for text in output.splitlines() if text.startswith(str(healthy))]
    files = [os.path.basename(text.split(":")[0]) for text in problems]
    assert files == [
        f"{NAME}_gtFine_instanceIds.png",
        "ulm_000000_000001_leftImg8bit.png",
        "ulm_000000_000001_gtFine_labelIds.png",
        "ulm_000000_000003_leftImg8bit.png",
        "ulm_000000_000003_gtFine_labelIds.png",
    ]


def test_instances_that_belong_to_another_label(healthy, capsys):
    change_ids(INSTANCES, 26001)(healthy)
    ids = cv2.imread(str(healthy / LABEL), cv2.IMREAD_GRAYSCALE)
    assert ids[7, 9] != 26
    status, _, line = checked(healthy, capsys)
    assert status == 2 and INSTANCES in line and f"instance 26001 where the label id is {ids[7, 9]}" in line


def test_instances_that_some_labels_lack(healthy, capsys):
    (healthy / INSTANCES).unlink()
    status, _, line = checked(healthy, capsys)
    assert status == 2 and f"{INSTANCES}: no such file, 1 of 4 labels have no instances" in line
    for path in healthy.rglob("*instanceIds.png"):
        path.unlink()
    assert checked(healthy, capsys)[0] == 0


def test_instances_that_would_be_waited_for(healthy, capsys):
    replace_by(INSTANCES, os.mkfifo)(healthy)
    status, _, line = checked(healthy, capsys)
    assert status == 2 and f"{INSTANCES}: is a FIFO, not a file" in line


def test_pictures_named_otherwise(healthy, capsys):
    os.rename(healthy / IMAGE, healthy / IMAGE.replace("_leftImg8bit.png", ".png"))
    (healthy / LABEL).unlink()
    status, _, line = checked(healthy, capsys)
    assert status == 2 and f"{NAME}.png: not named *_leftImg8bit.png" in line


def test_notes_are_no_problems(healthy, capsys):
    cv2.imwrite(str(healthy / LABEL), np.zeros((48, 64), np.uint8))
    flags = list_of(SOUND, SOUND)(healthy)
    for path in healthy.rglob("*instanceIds.png"):
        path.unlink()
    status, output, _ = checked(healthy, capsys, *flags)
    assert status == 0
    assert f"note: {IMAGE}: is listed 2 times" in output and f"note: {LABEL}: has only void pixels" in output


def test_cities_of_cityscapes_have_their_pictures(healthy, capsys):
    """The pictures of the official cities are counted. In val, ulm is not one of them."""
    status, output, line = checked(healthy, capsys)  # --partial
    assert status == 0
    assert status_of(check.main, healthy) == 2
    captured = capsys.readouterr()
    assert "leftImg8bit/train/ulm: 4 of 95 pictures" in captured.out
    assert (
        "leftImg8bit/train/aachen: 0 of 174 pictures" in captured.out
        and "leftImg8bit/val" not in captured.out
    )
    totals = {split: sum(cities.values()) for split, cities in check.OFFICIAL.items()}
    assert totals == {"train": 2975, "val": 500, "test": 1525}
    shutil.move(healthy / "leftImg8bit/train/ulm", healthy / "leftImg8bit/train/neustadt")
    shutil.move(healthy / "gtFine/train/ulm", healthy / "gtFine/train/neustadt")
    assert check.main([str(healthy)]) == 0


def test_test_split_needs_no_labels(healthy, capsys):
    write_pair(healthy, "test", 1, (48, 64))
    shutil.rmtree(healthy / "gtFine/test")
    status, output, _ = checked(healthy, capsys)
    assert status == 0 and "test: 1 pictures" in output
    shutil.rmtree(healthy / "gtFine/val")
    assert checked(healthy, capsys)[0] == 2
    assert checked(healthy, capsys, "--split", "train", "--split", "test")[0] == 0


def test_folder_that_has_no_labels_by_nature(healthy, capsys):
    write_pair(healthy, "demoVideo", 1, (48, 64))
    shutil.rmtree(healthy / "gtFine/demoVideo")
    status, output, _ = checked(healthy, capsys)
    assert status == 0 and "demoVideo: 1 pictures" in output


def test_frequencies_equal_a_count(healthy, tmp_path, capsys):
    status, output, _ = checked(healthy, capsys, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert status == 0
    report = json.loads((tmp_path / "a.json").read_text())
    table = CITYSCAPES.train_ids()
    for split in ("train", "val"):
        labels = [
            table[cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)]
            for path in healthy.glob(f"gtFine/{split}/*/*labelIds.png")
        ]
        for train_id, name in [*enumerate(CITYSCAPES.names), (255, "void")]:
            expected = {
                "pixels": sum(int((label == train_id).sum()) for label in labels),
                "pictures": sum(bool((label == train_id).any()) for label in labels),
            }
            assert report[split]["classes"][name] == expected
        assert report[split]["sizes"] == [{"height": 48, "width": 64, "pictures": 4}]
        assert report[split]["folders"] == {"ulm": 4} and report[split]["problems"] == []
    known = sum(entry["pixels"] for name, entry in report["val"]["classes"].items() if name != "void")
    share = 100 * report["val"]["classes"]["road"]["pixels"] / known
    assert f"road           {share:>8.3f}%" in output.split("val:")[1]
    chart = np.asarray(Image.open(tmp_path / "a.png"))
    colors = {tuple(color) for color in chart.reshape(-1, 3)[::7].tolist()}
    assert {label.color for label in CITYSCAPES.classes} <= colors


def test_wrong_usage(healthy, capsys):
    for flags, word in (
        (["--num-workers", "0"], "--num-workers"),
        (["--num-classes", "999"], "--num-classes"),
        (["--plot", "/nowhere/a.png"], "--plot"),
        (["--classes", "none.tsv"], "none.tsv"),
        (["--unknown"], "--unknown"),
    ):
        status, _, line = checked(healthy, capsys, *flags)
        assert status == 2 and word in line


def test_files_of_systems_are_skipped_and_counted(healthy, capsys):
    for path in [path for path in healthy.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")
    (healthy / "leftImg8bit/train/.DS_Store").touch()
    (healthy / "gtFine/val/Thumbs.db").touch()
    thumbnail = healthy / "leftImg8bit/val/ulm/@eaDir/a_leftImg8bit.png"
    thumbnail.parent.mkdir()
    thumbnail.touch()
    (healthy / "leftImg8bit/__MACOSX").mkdir()
    status, output, _ = checked(healthy, capsys)
    assert status == 0 and "no problems in 8 pictures" in output and loaded(healthy) == "nothing"
    assert "note: 13 hidden or system files skipped, the first is leftImg8bit/train/.DS_Store" in output
    assert "note: 14 hidden or system files skipped" in output
    said = CSDataSet(str(healthy), split="val", crop_size=None).check()
    assert "note: 14 hidden or system files skipped" in said and said.count("skipped") == 1


def test_link_to_a_folder_above_is_not_followed(healthy, capsys):
    (healthy / "leftImg8bit/train/ulm/again").symlink_to(healthy / "leftImg8bit/train")
    assert len(CSDataSet(str(healthy))) == 4


def test_split_that_is_no_folder_below_the_pictures(healthy, capsys):
    for split in ("", ".", "..", "../leftImg8bit/val", "val/..", "/val", "val//ulm"):
        status, _, line = checked(healthy, capsys, "--split", split)
        assert status == 2 and f"--split {split!r}" in line
        with pytest.raises(DataError, match="--split"):
            CSDataSet(str(healthy), split=split)
    status, output, _ = checked(healthy, capsys, "--split", "val/ulm", "--split", "val/ulm")
    assert status == 0 and "no problems in 4 pictures" in output


def test_classes_that_occur_nowhere_are_named(healthy, capsys):
    status, output, _ = checked(healthy, capsys)
    assert status == 0 and "in no label" not in output
    for path in healthy.rglob("*_labelIds.png"):
        ids = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(path), np.where(np.isin(ids, (8, 33)), 7, ids))
    for path in healthy.rglob("*_instanceIds.png"):
        path.unlink()
    status, output, _ = checked(healthy, capsys)
    assert status == 0
    assert output.count("note: classes 1 (sidewalk), 18 (bicycle) occur in no label\n") == 2


def test_masks_of_black_and_white(tmp_path, capsys):
    """Without a table, white is void and its class does not occur. A row with id 255 makes it a class."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "p.png")
    (tmp_path / "list").write_text("p.png\tm.png\n")
    table = ["--classes", tmp_path / "table"]
    status, output, _ = checked(tmp_path, capsys, "--data-list", tmp_path / "list", "--num-classes", 2)
    assert status == 0 and "note: class 1 occurs in no label" in output
    assert "255 is void" in output and "docs/own_data.md" in output
    (tmp_path / "table").write_text("name\tid\ttrain_id\tcolor\nno\t0\t0\t0,0,0\nyes\t255\t1\t9,9,9\n")
    status, output, _ = checked(tmp_path, capsys, "--data-list", tmp_path / "list", *table)
    assert status == 0 and "note:" not in output
    assert "yes     25.000%" in output


def test_pictures_that_are_nearly_black(tmp_path, capsys):
    """Only the upper 8 of 16 stored bits are read, so a picture of 12 bits is nearly black."""
    pixels = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels * (16 if number == 2 else 1))
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 19).save(tmp_path / "l.png")
    (tmp_path / "list").write_text("".join(f"{number}.png\tl.png\n" for number in (2, 0, 1)))
    status, output, _ = checked(tmp_path, capsys, "--data-list", tmp_path / "list")
    assert status == 0 and output.count("nearly black") == 1
    assert "0.png: nearly black, its brightest value is 15 of 255" in output
    assert "(and 1 more such files)" in output and "of its 16 bits" in output
    (tmp_path / "list").write_text("1.png\tl.png\n")
    assert "1.png: nearly black" in CSDataSet(str(tmp_path), str(tmp_path / "list")).check()
    (tmp_path / "list").write_text("2.png\tl.png\n")
    assert "nearly black" not in CSDataSet(str(tmp_path), str(tmp_path / "list")).check()


def test_no_input_is_overwritten(healthy, tmp_path, capsys):
    (tmp_path / "list").write_text(SOUND + "\n")
    table = tmp_path / "table.tsv"
    table.write_text("name\tid\ttrain_id\tcolor\nroad\t7\t0\t1,2,3\nrest\t8\t1\t3,2,1\n")
    (healthy / "link").symlink_to(healthy / LABEL)
    os.link(healthy / INSTANCES, tmp_path / "hard")
    content = {path: path.read_bytes() for path in healthy.rglob("*.png")}
    for flag, file in (
        ("--json", tmp_path / "list"),
        ("--plot", healthy / IMAGE),
        ("--plot", healthy / "link"),
        ("--json", tmp_path / "hard"),
        ("--json", table),
    ):
        flags = ["--data-list", tmp_path / "list", "--classes", table, flag, file]
        status, output, line = checked(healthy, capsys, *flags)
        assert status == 2 and f"{flag}: would replace its own input {file}" in line and output == ""
    status, _, line = checked(healthy, capsys, "--json", tmp_path / "a", "--plot", tmp_path / "." / "a")
    assert status == 2 and "is also the file of --json" in line
    assert {path: path.read_bytes() for path in content} == content
    assert (tmp_path / "list").read_text() == SOUND + "\n" and table.read_text().startswith("name")


def test_full_disk_leaves_nothing_and_names_the_result(healthy, tmp_path, capsys, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.json").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    status, _, line = checked(healthy, capsys, "--json", tmp_path / "out/a.json")
    assert status == 1 and f"{tmp_path / 'out/a.json'}: can't be written (No space left on device)" in line
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("a.json", "before")]
