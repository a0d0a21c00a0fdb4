"""tools.prepare as a user runs it: equal results from every format, broken sources, training afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import annotated
import cv2
import numpy as np
import pytest
from conftest import ROOT, TINY, last_line, mean_of, run
from PIL import Image

from dataset.labels import read_table

pytest.importorskip("pycocotools")
SCENES = annotated.make_scenes(30, ("park", "street", "yard"))
#: Writers of a source by its name. All but the polygons of COCO and CVAT have the same pixels.
SOURCES = {
    "labelme": lambda folder: annotated.write_labelme(folder, SCENES),
    "labelme-masks": lambda folder: annotated.write_labelme(folder, SCENES, masks=True),
    "coco-counts": lambda folder: annotated.write_coco(folder, SCENES, "counts"),
    "coco-text": lambda folder: annotated.write_coco(folder, SCENES, "text"),
    "cvat-masks": lambda folder: annotated.write_cvat(folder, SCENES, masks=True),
    "voc": lambda folder: annotated.write_voc(folder, SCENES),
    "pair": lambda folder: annotated.write_pair(folder, SCENES),
    "coco": lambda folder: annotated.write_coco(folder, SCENES),
    "cvat": lambda folder: annotated.write_cvat(folder, SCENES),
}
POLYGONS = ("coco", "cvat")


def prepare(*arguments: object):
    return run("tools.prepare", *arguments)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a function that prepares a source once; it returns the folder and the output."""
    folder = tmp_path_factory.mktemp("prepared")
    done: dict[str, tuple[Path, str]] = {}

    def get(name: str) -> tuple[Path, str]:
        if name not in done:
            source = SOURCES[name](folder / f"{name}-source")
            result = prepare(source, folder / name)
            assert result.returncode == 0, result.stderr
            done[name] = folder / name, result.stdout
        return done[name]

    return get


def pairs(folder: Path, part: str) -> list[list[str]]:
    return [line.split("\t") for line in (folder / f"{part}.lst").read_text().splitlines()]


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(folder / "labels").with_suffix("").as_posix(): np.asarray(Image.open(path))
        for path in sorted((folder / "labels").rglob("*.png"))
    }


def off_edges(scene: annotated.Scene) -> np.ndarray:
    """Return the pixels, bool [h, w], whose centers are more than 1.5 pixels off the edges of all shapes."""
    contours = [np.array(points, np.float32) for _, points in scene.shapes]
    found = np.ones(scene.picture.shape[:2], bool)
    for row, column in np.ndindex(*found.shape):
        center = column + 0.5, row + 0.5
        found[row, column] = all(
            abs(cv2.pointPolygonTest(contour, center, True)) > 1.5 for contour in contours
        )
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_gives_the_same_labels(prepared, name):
    folder, output = prepared(name)
    labels = labels_of(folder)
    clear = {scene.name: off_edges(scene) for scene in SCENES} if name in POLYGONS else {}
    assert list(labels) == sorted(scene.name for scene in SCENES)  # file stems and folders are kept
    for scene in SCENES:
        label, expected = labels[scene.name], scene.label()
        assert label.dtype == np.uint8 and label.ndim == 2
        if name in POLYGONS:
            sure = clear[scene.name]
            assert sure.mean() > 0.4 and (label == expected)[sure].all(), scene.name
        else:
            np.testing.assert_array_equal(label, expected)
    if name in POLYGONS:
        other = labels_of(prepared("cvat" if name == "coco" else "coco")[0])
        assert all((labels[key] == other[key]).all() for key in labels)
    table = read_table(str(folder / "classes.tsv"))
    assert table.names == ("background", *annotated.LABELS) and len(set(table.colors)) == 4
    train, val = pairs(folder, "train"), pairs(folder, "val")
    assert len(train) == 20 and len(val) == 10 and len({*map(tuple, train + val)}) == 30
    for image, label in train + val:
        assert Path(image).with_suffix("").parts[1:] == Path(label).with_suffix("").parts[1:]
        assert (folder / image).is_symlink() and (folder / image).is_file() and (folder / label).is_file()
    assert "30 pictures, 4 classes: background, cat, dog, tree" in output
    # The split is that of the folders, and the same for every format.
    assert (
        val == pairs(prepared("labelme")[0], "val") and len({Path(image).parts[1] for image, _ in val}) == 1
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_the_printed_commands_work(prepared, tmp_path):
    """Train, evaluate and predict with the printed flags, but with a small network and few steps."""
    folder, output = prepared("labelme")
    printed = re.findall(r"(?:^python .*\n(?:    .*\n)*)", output, re.M)
    commands = [text.replace(" \\\n", " ").split() for text in printed]
    assert [words[1] for words in commands] == ["train.py", "evaluate.py", "-m", "train.py"]
    train, evaluate, predict, _ = (words[2:] for words in commands)
    snapshots, predictions = train[train.index("--snapshot-dir") + 1], predict[predict.index("--out") + 1]

    def here(words: list[str], **changes: str) -> list[str]:
        """Write results below tmp_path, and change values of flags."""
        words = [re.sub(f"^({snapshots}|{predictions})", f"{tmp_path}/\\1", word) for word in words]
        for flag, value in changes.items():
            words[words.index(f"--{flag.replace('_', '-')}") + 1] = value
        return words

    weights = train.index("--restore-from")  # downloads the weights of ImageNet
    del train[weights : weights + 2]
    steps = here(train, num_steps="4", val_every="2", batch_size="2")
    done = run("tests/small/train.py", *steps, *TINY)
    assert done.returncode == 0, done.stderr
    done = run("tests/small/evaluate.py", *here(evaluate), *TINY)
    assert done.returncode == 0, done.stderr
    assert 0 <= mean_of(done.stdout) <= 100 and all(name in done.stdout for name in annotated.LABELS)
    done = run("tools.predict", *here(predict[1:]), "--gpu", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / predictions / "labelIds").rglob("*.png"))) == len(pairs(folder, "val"))


def test_the_split(tmp_path):
    """It depends on the seed, keeps groups together, and has the wanted share."""
    source = annotated.write_labelme(tmp_path / "source", SCENES)
    found = {}
    for name, flags in {
        "a": ["--seed", 3, "--val", 0.34, "--group", "[0-9]$|([0-9])\\.png"],
        "b": ["--seed", 3, "--val", 0.34, "--group", "[0-9]$|([0-9])\\.png"],
        "c": ["--seed", 4, "--val", 0.34, "--group", "[0-9]$|([0-9])\\.png"],
    }.items():
        done = prepare(source, tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        found[name] = [{image for image, _ in pairs(tmp_path / name, part)} for part in ("train", "val")]
    assert found["a"] == found["b"] != found["c"]
    for train, val in found.values():
        assert 8 <= len(val) <= 12 and not train & val and len(train | val) == 30
        digits = [{Path(image).stem[-1] for image in part} for part in (train, val)]
        assert not digits[0] & digits[1]


def write_split(name: str, folder: Path, parts: dict[str, list[annotated.Scene]]) -> None:
    """Write a source whose folders, subsets or lists name the parts."""
    named = [scene._replace(name=f"{part}/{scene.name}") for part, own in parts.items() for scene in own]
    if name == "coco":  # as Roboflow writes it
        for part, own in parts.items():
            annotated.write_pictures(folder / part, own)
            content = json.dumps(annotated.coco_content(own))
            (folder / part / "_annotations.coco.json").write_text(content)
    elif name == "cvat subsets":
        scenes = [scene for own in parts.values() for scene in own]
        annotated.write_pictures(folder / "images", scenes)
        root = annotated.cvat_content(scenes)
        subsets = [part for part, own in parts.items() for _ in own]
        for image, part in zip(root.iterfind("image"), subsets, strict=True):
            image.set("subset", part)
        ElementTree.ElementTree(root).write(folder / "annotations.xml")
    elif name == "voc lists":
        annotated.write_voc(folder, [scene for own in parts.values() for scene in own])
        lists = folder / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        for part, own in zip(("train", "val", "test"), parts.values(), strict=True):
            (lists / f"{part}.txt").write_text("\n".join(scene.name for scene in own))
    else:
        writers = {
            "labelme": annotated.write_labelme,
            "pair": annotated.write_pair,
            "cvat": annotated.write_cvat,
            "voc": annotated.write_voc,
        }
        writers[name](folder, named)


@pytest.mark.parametrize("name", ["labelme", "pair", "coco", "cvat", "cvat subsets", "voc", "voc lists"])
@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Validation", "Training", "Testing")])
def test_a_source_with_its_own_split(tmp_path, name, names):
    """The second names have more pictures for validation, and the parts in another order."""
    parts = dict(zip(names, (SCENES[:4], SCENES[4:6], SCENES[6:7]), strict=True))
    (tmp_path / "source").mkdir()
    swapped = names[0] == "Validation" and name != "voc lists"
    write_split(name, tmp_path / "source", parts)
    done = prepare(tmp_path / "source", tmp_path / "own", "--copy")
    numbers = [2, 4, 1] if swapped else [4, 2, 1]
    assert done.returncode == 0, done.stderr
    assert f"its own split ({numbers[0]} train, {numbers[1]} val, 1 test)" in done.stdout
    for part, number in zip(("train", "val", "test"), numbers, strict=True):
        own = {scene.name for scene in next(scenes for scenes in parts.values() if len(scenes) == number)}
        found = {
            "/".join(Path(image).with_suffix("").parts[-2:]) for image, _ in pairs(tmp_path / "own", part)
        }
        assert found == own
    assert not any(path.is_symlink() for path in (tmp_path / "own").rglob("*"))
    # Flags divide the pictures anew, but not those for testing.
    done = prepare(tmp_path / "source", tmp_path / "drawn", "--val", "0.4")
    assert done.returncode == 0 and "split by seed 0" in done.stdout
    assert sum(len(pairs(tmp_path / "drawn", part)) for part in ("train", "val")) == 6
    assert pairs(tmp_path / "drawn", "test") == pairs(tmp_path / "own", "test")


def test_pictures_for_testing_alone_are_not_divided(tmp_path):
    scenes = [*SCENES[:6], SCENES[6]._replace(name="test/x")]
    for name in ("labelme", "pair"):
        getattr(annotated, f"write_{name}")(tmp_path / name, scenes)
        done = prepare(tmp_path / name, tmp_path / f"{name}-out")
        assert done.returncode == 0, done.stderr
        assert "with 1 for testing" in done.stdout and "the division is coarse" in done.stdout
        assert "of only 3 groups of pictures" in done.stdout and "(2 of 6 pictures)" in done.stdout
        assert [image for image, _ in pairs(tmp_path / f"{name}-out", "test")] == ["images/test/x.png"]
        assert sum(len(pairs(tmp_path / f"{name}-out", part)) for part in ("train", "val")) == 6


def test_pictures_outside_of_the_own_split_are_said(tmp_path):
    scenes = [
        scene._replace(name=f"{part}/a")
        for part, scene in zip(("train", "val", "more"), SCENES, strict=False)
    ]
    source = annotated.write_labelme(tmp_path / "source", scenes)
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 picture is in no part of the source's own split, and left out; the first is " in done.stdout
    assert done.stdout.count("more/a.png") == 1 and not (tmp_path / "out/images/more").exists()


def test_classes_and_void(tmp_path):
    source = annotated.write_labelme(tmp_path / "source", SCENES[:6])
    (tmp_path / "classes.tsv").write_text(
        "name\tid\ttrain_id\tcolor\npet\t1\t0\t1,2,3\ncat\t2\t0\t0,0,0\ndog\t3\t0\t0,0,0\ntree\t4\t1\t9,9,9\n"
    )
    flags = ["--classes", tmp_path / "classes.tsv", "--unlabeled", "void"]
    done = prepare(source, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    table = read_table(str(tmp_path / "out/classes.tsv"))
    assert table.names == ("pet", "tree") and table.colors == ((1, 2, 3), (9, 9, 9))
    look_up = np.array([255, 0, 0, 1], np.uint8)
    for scene in SCENES[:6]:
        np.testing.assert_array_equal(labels_of(tmp_path / "out")[scene.name], look_up[scene.label()])
    assert "(void)" in done.stdout


# Broken sources


def edited(name: str, change, ending: str = ".json"):
    """Return a function that writes a source and changes the content of its first annotation file."""

    def write(folder: Path) -> list[object]:
        SOURCES[name](folder)
        path = min(folder.rglob(f"*{ending}"))
        text = path.read_text()
        if ending == ".json":
            content = json.loads(text)
            change(content)
            path.write_text(json.dumps(content))
        else:
            path.write_text(change(text))
        return []

    return write


def with_file(name: str, change, pattern: str = "*.png", *flags: object):
    """Return a function that writes a source, and changes the first file that fits a pattern."""

    def write(folder: Path) -> list[object]:
        SOURCES[name](folder)
        change(min(folder.rglob(pattern)))
        return list(flags)

    return write


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shape(**changes):
    return lambda content: content["shapes"][0].update(changes)


def annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


def image(**changes):
    return lambda content: content["images"][1].update(changes)


OUTSIDE = [[100, 1], [120, 1], [110, 9]]
BROKEN = {
    "missing picture": (with_file("labelme", os.unlink), "00.png is missing"),
    "polygon outside": (edited("labelme", shape(points=OUTSIDE)), "outside of its picture (64x48 pixels)"),
    "two points": (edited("labelme", shape(points=OUTSIDE[:2])), "a polygon of 2 points"),
    "no number": (edited("labelme", shape(points=[*OUTSIDE, [float("nan"), 1]])), "the number NaN"),
    "unknown shape": (edited("labelme", shape(shape_type="star")), "the shape_type 'star'"),
    "size differs": (edited("labelme", lambda page: page.update(imageWidth=65)), "a picture of 65x48 pixels"),
    "cut off": (with_file("labelme", cut, "*.json"), "not valid JSON"),
    "no JSON": (with_file("labelme", lambda path: path.write_text("hello"), "*.json"), "not valid JSON"),
    "unreadable picture": (
        with_file("labelme", lambda path: path.write_text("hello")),
        "not a readable picture",
    ),
    "truncated picture": (with_file("labelme", cut), "truncated picture"),
    "wrong --from": (
        with_file("labelme", lambda _: None, "*", "--from", "cvat"),
        "lists no picture",
    ),
    "no group": (with_file("labelme", lambda _: None, "*", "--group", "x[0-9]"), "not found in park/00.png"),
    "bad group": (with_file("labelme", lambda _: None, "*", "--group", "("), "not a regular expression"),
    "one group": (with_file("labelme", lambda _: None, "*", "--group", "/"), "one group"),
    "no images": (with_file("labelme", lambda _: None, "*", "--images", "/nowhere"), "no such folder"),
    "unknown category": (edited("coco", annotation(category_id=77)), "the unknown category_id 77"),
    "unknown image": (edited("coco", annotation(image_id=77)), "the image_id 77, which no image has"),
    "no segmentation": (edited("coco", annotation(segmentation=[])), "have no segmentation"),
    "twice the id": (edited("coco", image(id=1)), "image id 1 is that of park/00.png and of street/01.png"),
    "twice the picture": (edited("coco", image(file_name="park/00.png")), "a second time"),
    "other size": (edited("coco", image(height=50)), "64x50"),
    "bad RLE": (
        edited("coco-text", annotation(segmentation={"size": [48, 64], "counts": "1"})),
        "a damaged mask: its runs have 1 pixels in total instead of 3072",
    ),
    "XML cut off": (edited("cvat", lambda text: text[:900], ".xml"), "not valid XML"),
    "entities": (edited("cvat", lambda text: "<!DOCTYPE a>" + text, ".xml"), "a document type declaration"),
    "video": (
        edited("cvat", lambda t: t.replace("<image", "<track/><image", 1), ".xml"),
        "tracks of a video",
    ),
    "no points": (
        edited("cvat", lambda t: t.replace("points=", "p=", 1), ".xml"),
        "not pairs of finite numbers",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_one_line(name, tmp_path):
    write, words = BROKEN[name]
    flags = write(tmp_path / "source")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = prepare(tmp_path / "source", tmp_path / "out", *flags)
    line = last_line(done.stderr)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert line.startswith("tools.prepare: error: ") and words in done.stdout + line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_many_problems_are_listed(tmp_path):
    source = annotated.write_labelme(tmp_path / "source", SCENES)
    for path in source.rglob("*.png"):
        path.unlink()
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout.count(" is missing; copy it") == 20 and "... and 10 more" in done.stdout
    assert last_line(done.stderr).startswith(f"tools.prepare: error: {source}: 30 problems, the first is ")


@pytest.mark.parametrize("content", [None, "nothing", "{}", "<a/>"])
def test_a_source_of_no_known_format(tmp_path, content):
    source = tmp_path / "source"
    if content is not None:
        source.mkdir()
        for ending in ("json", "xml", "txt"):
            (source / f"a.{ending}").write_text(content)
    done = prepare(source, tmp_path / "out")
    words = "no such file or folder" if content is None else "no labels of a known format; accepted are"
    assert done.returncode == 2 and words in last_line(done.stderr)
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_not_empty(tmp_path):
    source = annotated.write_labelme(tmp_path / "source", SCENES[:4])
    done = prepare(source, source)
    assert done.returncode == 2 and "is not empty" in last_line(done.stderr)
    (tmp_path / "out").mkdir()
    assert prepare(source, tmp_path / "out").returncode == 0
    before = sorted((tmp_path / "out").rglob("*"))
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 2 and "is not empty; name a new folder" in last_line(done.stderr)
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_two_classes_are_needed(tmp_path):
    scenes = [scene._replace(shapes=[("cat", scene.shapes[0][1])]) for scene in SCENES[:3]]
    source = annotated.write_labelme(tmp_path / "source", scenes)
    done = prepare(source, tmp_path / "out", "--unlabeled", "void")
    assert done.returncode == 2 and "fewer than two classes (cat)" in last_line(done.stderr)
    assert prepare(source, tmp_path / "out").returncode == 0


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path):
    """A signal in the midst of writing: OUT is not there, nor a part of it."""
    scenes = [
        scene._replace(name=f"{k}-{scene.name}") for k in range(20) for scene in annotated.make_scenes(20)
    ]
    source = annotated.write_labelme(tmp_path / "source", scenes)
    # Labels are written slowly, so that the signal does not come too late. A shell ignores the signal for
    # processes in the background, which they inherit.
    program = (
        "import signal, sys, time\nfrom tools import common\nfrom tools.prepare import __main__, writing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "save = writing.save_gray_png\n"
        "writing.save_gray_png = lambda *label: (time.sleep(0.1), save(*label))\n"
        "common.end(lambda: __main__.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".writing-*/labels/*5.png")) and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pictures_that_share_a_name_and_turned_ones(tmp_path):
    """a.png and a.jpg get different names; a turned picture is written upright, as its labels are."""
    source = annotated.write_labelme(tmp_path / "source", SCENES[:3])
    first = source / "park/00.png"
    pixels = cv2.cvtColor(SCENES[0].picture, cv2.COLOR_BGR2RGB)
    exif = Image.Exif()
    exif[274] = 8
    Image.fromarray(np.rot90(pixels, -1)).save(source / "park/00.jpg", exif=exif, quality=100, subsampling=0)
    page = annotated.labelme_page(SCENES[0])
    (source / "park/other.json").write_text(json.dumps({**page, "imagePath": "00.jpg"}))
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    labels = labels_of(tmp_path / "out")
    names = {
        Path(image).stem: image for part in ("train", "val") for image, _ in pairs(tmp_path / "out", part)
    }
    assert {"00", "00_2"} <= names.keys() and first.exists()
    for name in ("park/00", "park/00_2"):
        np.testing.assert_array_equal(labels[name], SCENES[0].label())
    turned = next(image for image in names.values() if image.endswith(".jpg"))
    found = cv2.imread(str(tmp_path / "out" / turned), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert found.shape[:2] == (48, 64) and np.abs(found.astype(int) - SCENES[0].picture).mean() < 10


def test_the_source_is_not_changed(tmp_path):
    source = annotated.write_coco(tmp_path / "source", SCENES[:4])
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert prepare(source, tmp_path / "prepared").returncode == 0
    done = prepare(source, source / "prepared")
    assert done.returncode == 2 and "where the next run would read the results" in done.stderr
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
