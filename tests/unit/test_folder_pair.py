"""Folder pairs: which label belongs to which picture, the division into sides, and the classes by content."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import status_of
from PIL import Image

from dataset import CSDataSet, DataError, check, folder_pair
from dataset.classes import choose_classes, read_names
from dataset.label_values import Values
from dataset.labels import CITYSCAPES, format_table
from dataset.layout import Pair
from dataset.pairing import pair_up, pictures_below
from utils.args import exit_status

SIZE = 6, 8
Damage = Callable[[Path], object]
RGB = {0: (0, 0, 0), 1: (200, 10, 10), 2: (10, 200, 10)}


def save(path: Path, pixels: object, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


def classes_at(number: int) -> np.ndarray:
    """Return 0, 1 and 2 in stripes whose widths depend on `number`."""
    return (np.arange(SIZE[0])[:, None] + np.arange(SIZE[1]) * (1 + number % 3)) % 3


def make(root: Path, names: Sequence[str], suffix: str = "", values: Callable = lambda label: label) -> Path:
    """Write a picture and a label for each name, such as a/1; `values` maps classes 0, 1, 2 to a label."""
    for number, name in enumerate(names):
        save(root / "images" / f"{name}.jpg", np.full((*SIZE, 3), 20 * number % 255))
        save(root / "labels" / f"{name}{suffix}.png", values(classes_at(number)))
    return root


def mapped(colors: Mapping[int, object]) -> Callable:
    return lambda label: np.array([colors[value] for value in range(3)])[label]


NAMES = [f"p{number}" for number in range(10)]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return make(tmp_path / "DIR", NAMES, "_L")


class TestPairing:
    def of(self, root: Path) -> list[tuple[str, str]]:
        listings = [pictures_below(str(root), folder) for folder in ("images", "labels")]
        found = pair_up(str(root), *listings, ("images", "labels"))
        assert found.problems == []
        return found.pairs

    @pytest.mark.parametrize("suffix", ["", "_mask", "Mask", "-seg.v2", "_1"])
    def test_each_label_belongs_to_the_picture_of_its_name(self, tmp_path: Path, suffix: str) -> None:
        names = ["a/1", "a/10", "a/1_x", "b/1", "1", "10", "x y"]
        make(tmp_path, names, suffix)
        expected = {(f"images/{name}.jpg", f"labels/{name}{suffix}.png") for name in names}
        assert set(self.of(tmp_path)) == expected

    def test_random_names(self, tmp_path: Path) -> None:
        """Pairs are found whatever the names are, also if one is the start of another."""
        draw = random.Random(0)
        for number in range(20):
            names = {"".join(draw.choices("ab_1", k=draw.randint(1, 5))) for _ in range(6)}
            suffix = draw.choice(["", "_seg", "-m"])
            root = make(tmp_path / str(number), sorted(names), suffix)
            assert {(Path(a).stem, Path(b).stem) for a, b in self.of(root)} == {
                (name, name + suffix) for name in names
            }

    def test_the_longest_name_wins(self, tmp_path: Path) -> None:
        make(tmp_path, ["x", "x_a"])
        shutil.rmtree(tmp_path / "labels")
        save(tmp_path / "labels/x_a_m.png", classes_at(0))
        assert self.of(tmp_path) == [("images/x_a.jpg", "labels/x_a_m.png")]

    def test_a_number_is_no_suffix(self, tmp_path: Path) -> None:
        make(tmp_path, ["1", "2"])
        shutil.rmtree(tmp_path / "labels")
        for name in ("10", "20"):
            save(tmp_path / f"labels/{name}.png", classes_at(0))
        with pytest.raises(DataError, match="no label fits a picture by its name, for example .*1.jpg"):
            self.of(tmp_path)

    def test_what_is_left_out_is_said(self, pair: Path) -> None:
        for name in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden/x.png"):
            (pair / "labels" / name).parent.mkdir(exist_ok=True)
            (pair / "labels" / name).write_text("")
        os.unlink(pair / "labels/p3_L.png")
        data = CSDataSet(str(pair))
        first, *others = data.taken
        assert first.startswith(
            f"{pair}: 9 pictures of images/ with their labels of labels/ (STEM_L.png); 7 "
        )
        assert f"{pair}: 1 pictures have no label and are left out, the first is images/p3.jpg" in others
        assert (
            f"{pair}: 1 other files are no pictures and are left out, the first is labels/notes.txt" in others
        )
        assert "note: 3 hidden or system files skipped" in data.check()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_orientation_tags_that_the_labels_do_not_tell(tmp_path: Path, ending: str, capsys) -> None:
    """The picture and the label are used as stored, and a note says so; other tags are not ambiguous."""
    numbers = {1: SIZE, 3: SIZE, 2: SIZE, 4: SIZE, 8: (6, 6), 5: (6, 6), 6: SIZE}
    for orientation, size in numbers.items():
        exif = Image.Exif()
        exif[274] = orientation
        name = f"train/{orientation}"
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3))
        save(tmp_path / f"images/{name}.{ending}", pixels, exif=exif)
        save(tmp_path / f"labels/{name}.png", classes_at(0)[:, : size[1]])
    save(tmp_path / "images/val/x.png", np.zeros((*SIZE, 3)))
    save(tmp_path / "labels/val/x.png", classes_at(1))
    words = "note: 5 pictures have an orientation tag, and a label that fits both"
    first = f"the first is images/train/2.{ending}"
    data = CSDataSet(str(tmp_path))
    assert words in data.check() and first in data.check()
    assert "orientation tag" not in CSDataSet(str(tmp_path), split="val").check()
    assert status_of(check.main, tmp_path, "--num-workers", 1) == 0
    out = capsys.readouterr().out
    assert out.count(words) == 1 and first in out
    index = [pair.name for pair in data.pairs].index("3")
    with Image.open(tmp_path / f"images/train/3.{ending}") as picture:
        stored = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(data.picture(index, instances=False).image[..., ::-1] - stored).max() <= 3


class TestSides:
    def test_random_division(self, pair: Path) -> None:
        train, val = (CSDataSet(str(pair), split=split) for split in ("train", "val"))
        images = [[pair.image for pair in data.pairs] for data in (train, val)]
        assert len(images[0]) == 8 and len(images[1]) == 2
        assert sorted(images[0] + images[1]) == [f"images/{name}.jpg" for name in NAMES]
        assert "8 for training, 2 for validation (seed 0; each picture is a group)" in train.taken[0]
        assert CSDataSet(str(pair), split="val").digest() == val.digest() != train.digest()

    def test_folders_are_groups(self, tmp_path: Path) -> None:
        make(tmp_path, [f"scene{number // 4}/{number}" for number in range(20)])
        train, val = (CSDataSet(str(tmp_path), split=split) for split in ("train", "val"))
        folders = [{os.path.dirname(pair.image) for pair in data.pairs} for data in (train, val)]
        assert len(folders[0]) == 4 and len(folders[1]) == 1 and not folders[0] & folders[1]
        assert "16 for training, 4 for validation (seed 0; one group per folder)" in train.taken[0]

    @pytest.mark.parametrize(
        "train, val, test",
        [
            ("train", "val", "test"),
            ("Train", "valid", "Test"),
            ("training", "VALIDATION", "testing"),
            ("cam1/train", "cam2/dev", "x/y/test"),
            ("train2017", "val2017", "test2019"),
        ],
    )
    def test_folders_train_and_val(self, tmp_path: Path, train: str, val: str, test: str) -> None:
        make(tmp_path, [f"{train}/a", f"{train}/s/b", f"{val}/c", f"{test}/d", "trainer/e"])
        found = folder_pair.find(str(tmp_path))
        names = {side: [pair.name for pair in pairs] for side, pairs in found.sides.items()}
        assert names == {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
        assert "2 for training, 1 for validation (by their folders)" in found.notes[0]
        assert "1 pictures are in none of the folders for training, validation and testing" in found.notes[1]
        assert [pair.name for pair in folder_pair.pictures_to_predict(str(tmp_path))] == ["d"]

    @pytest.mark.parametrize(
        "names, line",
        [
            (
                ["train/a", "train/b", "other/c", "other/d"],
                "train/a.jpg is for train, but none is for val",
            ),
            (
                ["train/val/a", "train/b", "val/c", "val/d"],
                "train/val/a.jpg is for both train and val",
            ),
        ],
    )
    def test_folders_that_cannot_divide_are_said(
        self, tmp_path: Path, names: Sequence[str], line: str
    ) -> None:
        found = folder_pair.find(str(make(tmp_path, names)))
        assert not found.is_given
        assert f"{tmp_path}: the names of folders do not divide the pictures: {line}" in found.notes

    def test_a_division_of_few_folders_is_said(self, tmp_path: Path) -> None:
        make(tmp_path, [f"{folder}/{number}" for folder in ("north", "south") for number in range(4)])
        found = folder_pair.find(str(tmp_path))
        (val,) = {pair.image.split("/")[1] for pair in found.sides["val"]}
        assert found.notes[1] == (
            f"{tmp_path}: the division is coarse: of only 2 groups of pictures, {val} (4 of 8 pictures) "
            "is for validation"
        )
        make(tmp_path, [f"{folder}/{number}" for folder in ("a", "b", "c") for number in range(4)])
        assert len(folder_pair.find(str(tmp_path)).notes) == 1

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        make(tmp_path, ["train/a", "train/b", "car/c", "bus/d"])
        sides = folder_pair.find(str(tmp_path)).sides
        assert len(sides["train"]) + len(sides["val"]) == 4

    def test_test_pictures_are_never_trained(self, tmp_path: Path) -> None:
        make(tmp_path, ["a", "b", "c", "test/d"])
        sides = folder_pair.find(str(tmp_path)).sides
        assert {pair.image for pair in sides["train"] + sides["val"]} == {f"images/{n}.jpg" for n in "abc"}

    def test_lists(self, pair: Path) -> None:
        (pair / "train.lst").write_text("images/p1.jpg\tlabels/p1_L.png\nimages/p2.jpg\tlabels/p2_L.png\n")
        (pair / "val.lst").write_text("images/p0.jpg\tlabels/p0_L.png\n")
        assert CSDataSet(str(pair), split="val").pairs == [Pair("images/p0.jpg", "labels/p0_L.png", "p0")]
        assert [each.name for each in CSDataSet(str(pair)).pairs] == ["p1", "p2"]
        for image in ("images/p1.jpg", "./images//p1.jpg"):
            (pair / "val.lst").write_text(f"{image}\tlabels/p1_L.png\n")
            with pytest.raises(DataError, match=rf"val.lst: {image} is in train.lst too; remove"):
                CSDataSet(str(pair))
        (pair / "val.lst").unlink()
        with pytest.raises(DataError, match=r"train.lst: train.lst and val.lst divide .* write both"):
            CSDataSet(str(pair))

    def test_pictures_to_predict_need_no_labels(self, tmp_path: Path) -> None:
        save(tmp_path / "images/test/b/x.jpg", np.zeros((*SIZE, 3)))
        data = CSDataSet(str(tmp_path), split="test", labeled=False)
        assert data.pairs == [Pair("images/test/b/x.jpg", "", "x")]
        assert data.taken == [f"{tmp_path}: 1 pictures for testing, without labels"]

    def test_the_cityscapes_layout_is_no_folder_pair(self, scenes: Path) -> None:
        make(scenes, NAMES)
        assert not folder_pair.is_pair(str(scenes))
        assert len(CSDataSet(str(scenes))) == 6


def test_a_clash_of_palettes_is_kept() -> None:
    files = [Values({1: name}, used={1: ((number, 0, 0), name)}) for number, name in enumerate("ab")]
    found, together = Values(), Values()
    for each in files:
        found.add(each)
    together.add(found)
    assert together.clash and together.clash.startswith(
        "b: the palette has 1,0,0 for the index 1, but that of a "
    )


def table(root: Path):
    return CSDataSet(str(root)).labels.table


CONTENTS = {
    # name: (values of 0, 1, 2; expected (name, id, train id, color) of the rows)
    "ids": ({0: 0, 1: 1, 2: 2}, [("class 0", 0, 0, (0, 0, 0)), ("class 1", 1, 1), ("class 2", 2, 2)]),
    "ids with gaps": ({0: 3, 1: 7, 2: 200}, [("class 3", 3, 0), ("class 7", 7, 1), ("class 200", 200, 2)]),
    "void": ({0: 0, 1: 4, 2: 255}, [("class 0", 0, 0), ("class 4", 4, 1), ("void", 255, 255)]),
    "black and white": (
        {0: 0, 1: 255, 2: 0},
        [("background", 0, 0, (0, 0, 0)), ("object", 255, 1, (255, 255, 255))],
    ),
    "colors": (
        RGB,
        [
            ("background", -1, 0, (0, 0, 0)),
            ("color 10,200,10", -1, 1, (10, 200, 10)),
            ("color 200,10,10", -1, 2, (200, 10, 10)),
        ],
    ),
}


class TestClasses:
    @pytest.mark.parametrize("name", CONTENTS)
    def test_by_content(self, tmp_path: Path, name: str) -> None:
        values, rows = CONTENTS[name]
        make(tmp_path, NAMES, values=mapped(values))
        found = table(tmp_path)
        for label, row in zip(found.labels, rows, strict=True):
            assert label[:3] == row[:3] and (len(row) == 3 or label.color == row[3])
        # An independent count of the train ids of a picture.
        data = CSDataSet(str(tmp_path), crop_size=None)
        number = int(data.pairs[0].name[1:])
        key = {row[3] if len(row) > 3 and row[1] < 0 else row[1]: row[2] for row in rows}
        expected = [[key[values[value]] for value in line] for line in classes_at(number).tolist()]
        assert data.picture(0, instances=False).label.tolist() == expected

    def test_classes_that_only_one_side_has(self, pair: Path) -> None:
        """All labels count, so that both sides have the same classes."""
        save(pair / CSDataSet(str(pair), split="val").pairs[0].label, np.full(SIZE, 77))
        for split in ("train", "val"):
            names = CSDataSet(str(pair), split=split).labels.names()
            assert names == ["class 0", "class 1", "class 2", "class 77"]

    def test_palette(self, tmp_path: Path) -> None:
        colors = [(0, 0, 0), (9, 8, 7), (1, 2, 3)]
        make(tmp_path, NAMES)
        for path in (tmp_path / "labels").iterdir():
            picture = Image.open(path).copy()
            picture.putpalette([channel for color in colors for channel in color])
            picture.save(path)
        assert table(tmp_path).colors == tuple(colors) and table(tmp_path).label_ids().tolist() == [0, 1, 2]

    def test_palettes_that_differ(self, tmp_path: Path, capsys) -> None:
        """Programs that reduce colors number them anew in each file; then an index is no class."""
        make(tmp_path, NAMES)
        colors = [[0, 0, 0, 255, 0, 0, 0, 255, 0], [0, 0, 0, 0, 255, 0, 255, 0, 0]]

        def paint(palettes: Sequence[Sequence[int]]) -> None:
            for number, path in enumerate(sorted((tmp_path / "labels").iterdir())):
                picture = Image.open(path).copy()
                picture.putpalette(palettes[number % 2])
                picture.save(path)

        paint(colors)
        words = (
            r"labels/p\d.png: the palette has (255,0,0|0,255,0) for the index 1, but that of .*labels/p\d.png"
            r" has (255,0,0|0,255,0); save the labels as RGB, or give a table"
        )
        for names in (None, "a\nb\nc\n"):
            if names:
                (tmp_path / "classes.txt").write_text(names)
            with pytest.raises(DataError, match=words):
                table(tmp_path)
        (tmp_path / "classes.txt").unlink()
        # Indices that only one of the files has may have any color.
        for path in (tmp_path / "labels").iterdir():
            number = int(path.stem[1:])
            save(path, np.where(classes_at(number) == 2 - number % 2, 0, classes_at(number)))
        paint([[0, 0, 0, 255, 0, 0, 9, 9, 9], [0, 0, 0, 7, 7, 7, 0, 255, 0]])
        assert table(tmp_path).colors == ((0, 0, 0), (255, 0, 0), (0, 255, 0))
        # 255 is void in any color.
        make(tmp_path, NAMES, values=mapped({0: 0, 1: 1, 2: 255}))
        paint([[*colors[0][:6], *[0] * 759, number, 0, 0] for number in (1, 2)])
        assert table(tmp_path).names == ("class 0", "class 1")
        # Grays depend on the number of indices.
        make(tmp_path, NAMES)
        for path in (tmp_path / "labels").iterdir():
            number = int(path.stem[1:])
            save(path, np.minimum(classes_at(number), 1 + number % 2))
        paint([[0, 0, 0, 255, 255, 255], [0, 0, 0, 127, 127, 127, 255, 255, 255]])
        assert table(tmp_path).names == ("class 0", "class 1", "class 2")
        # A table of the ids says that the palettes mean nothing.
        make(tmp_path, NAMES)
        paint(colors)
        (tmp_path / "classes.tsv").write_text("name\tid\ttrain_id\tcolor\na\t0\t0\t1,1,1\nb\t1\t1\t2,2,2\n"
                                              "c\t2\t1\t3,3,3\n")  # fmt: skip
        assert table(tmp_path).names == ("a", "b")

    def test_palette_of_grays(self, tmp_path: Path) -> None:
        """Grays that are the ids would be hard to see."""
        make(tmp_path, NAMES)
        for path in (tmp_path / "labels").iterdir():
            picture = Image.open(path).copy()
            picture.putpalette([value for value in range(256) for _ in range(3)])
            picture.save(path)
        assert table(tmp_path).colors == ((0, 0, 0), (128, 0, 0), (0, 128, 0))

    def test_255_classes(self, tmp_path: Path) -> None:
        """The table of as many classes as possible can be read again."""
        make(tmp_path, NAMES, "_L", mapped({0: 0, 1: 253, 2: 255}))
        (tmp_path / "classes.txt").write_text("\n".join(f"n{number}" for number in range(255)))
        found = table(tmp_path)
        (tmp_path / "classes.tsv").write_text(format_table(found))
        assert len(found.classes) == 255 and table(tmp_path).names == found.names

    def test_void_by_name(self, tmp_path: Path) -> None:
        make(tmp_path, NAMES, "_L", mapped({0: 0, 1: 1, 2: 2}))
        (tmp_path / "classes.txt").write_text("class room\nVoid\nb")
        data = CSDataSet(str(tmp_path))
        assert [label[:3] for label in data.labels.table.labels] == [
            ("class room", 0, 0), ("Void", 1, 255), ("b", 2, 1),
        ]  # fmt: skip
        assert data.taken[-1].endswith("classes class room and b; 1 is void (named by classes.txt)")

    def test_names_of_ids(self, pair: Path) -> None:
        (pair / "labels.txt").write_text("__ignore__\n_background_\r\n cat \ndog\nbird\n\n")
        data = CSDataSet(str(pair))
        assert data.labels.names() == ["background", "cat", "dog", "bird"]
        assert data.taken[-1].endswith("classes background, cat, dog and bird (named by labels.txt)")

    def test_names_of_black_and_white(self, tmp_path: Path) -> None:
        make(tmp_path, NAMES, values=mapped(CONTENTS["black and white"][0]))
        (tmp_path / "classes.txt").write_text("road\nhole")
        assert [label[:3] for label in table(tmp_path).labels] == [("road", 0, 0), ("hole", 255, 1)]

    def test_table_of_the_folder(self, pair: Path) -> None:
        (pair / "classes.tsv").write_text(
            "name\tid\ttrain_id\tcolor\na\t0\t0\t1,1,1\nb\t1\t1\t2,2,2\nc\t2\t255\t0,0,0\n"
        )
        assert table(pair).names == ("a", "b")
        assert CSDataSet(str(pair)).taken[-1] == f"{pair}: 2 classes by classes.tsv: a and b"

    def test_flags_go_first(self, pair: Path) -> None:
        assert choose_classes(str(pair), None, None, 7) == (None, 7, [], None)
        assert choose_classes(str(pair), "list", None, None) == (None, 19, [], None)
        assert CSDataSet(str(pair), num_classes=3).labels.table is None

    def test_names_of_cityscapes_files(self, tmp_path: Path) -> None:
        make(tmp_path, NAMES, "_labelIds", values=mapped({0: 7, 1: 8, 2: 0}))
        found = choose_classes(str(tmp_path), None, None, None)
        assert found.table is None and found.number == len(CITYSCAPES.classes)
        root = make(tmp_path / "b", NAMES, "_labelTrainIds", values=mapped({0: 0, 1: 4, 2: 255}))
        data = CSDataSet(str(root), crop_size=None)
        assert data.num_classes == 5 and set(np.unique(data.picture(0, False).label)) == {0, 4, 255}

    def test_255_in_train_ids_is_void(self, tmp_path: Path) -> None:
        make(tmp_path, NAMES, "_labelTrainIds", values=mapped({0: 0, 1: 255, 2: 255}))
        with pytest.raises(DataError, match="hold only 0 and 255, so there are no two classes"):
            CSDataSet(str(tmp_path))

    def test_digest_has_the_table(self, pair: Path) -> None:
        before = CSDataSet(str(pair)).digest()
        (pair / "classes.txt").write_text("a\nb\nc\n")
        named = CSDataSet(str(pair))
        assert named.digest() == before and named.labels.names() == ["a", "b", "c"]  # names do not matter
        (pair / "classes.txt").write_text("a\nb\nc\nd\n")
        assert CSDataSet(str(pair)).digest() != before


def rewrite(name: str, pixels: object, **options: object) -> Damage:
    return lambda root: save(root / name, pixels, **options)


def text(name: str, content: str) -> Damage:
    return lambda root: (root / name).write_text(content)


def renamed(old: str, new: str) -> Damage:
    return lambda root: os.rename(root / old, root / new)


def only(values: Mapping[int, object], names: str | None = None) -> Damage:
    def damage(root: Path) -> None:
        make(root, NAMES, "_L", mapped(values))
        if names:
            (root / names).write_text("a\n")

    return damage


def jpeg_labels(root: Path) -> None:
    for path in (root / "labels").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def emptied(root: Path) -> None:
    for path in (root / "labels").iterdir():
        path.rename(path.with_suffix(".txt"))


def other_names(root: Path) -> None:
    for path in (root / "labels").iterdir():
        path.rename(path.with_name(f"mask_{path.name}"))


def without(pattern: str) -> Damage:
    def damage(root: Path) -> None:
        for path in root.glob(pattern):
            path.unlink()

    return damage


def fifo(root: Path) -> None:
    os.unlink(root / "labels/p5_L.png")
    os.mkfifo(root / "labels/p5_L.png")


def unlabeled_val(root: Path) -> None:
    make(root, ["train/a"], "_L")
    save(root / "images/val/b.jpg", np.zeros((*SIZE, 3)))


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 40, channels)).squeeze()


BROKEN: dict[str, tuple[Damage, str]] = {
    # what: (damage, the whole line or its pattern)
    "no folder of labels": (
        lambda root: shutil.rmtree(root / "labels"),
        r"DIR/labels: has no label pictures; put",
    ),
    "labels of YOLO": (
        emptied,
        r"DIR/labels: has no label pictures \(labels/p0_L.txt is none\); .*tools.prepare",
    ),
    "no pictures": (without("images/*"), "DIR/images: has no pictures; put"),
    "other names": (
        other_names,
        r"no label fits a picture by its name, for example images/p0.jpg and labels/mask_p0_L.png; give",
    ),
    "label without picture": (
        renamed("images/p4.jpg", "images/q.jpg"),
        r"p4_L.png: has no picture in images; add",
    ),
    "two labels, other suffix": (
        rewrite("labels/p4_color.png", np.zeros(SIZE)),
        r"p4_color.png: has no picture, unless it belongs to images/p4.jpg, as does labels/p4_L.png; ",
    ),
    "two labels, other ending": (
        rewrite("labels/p4_L.bmp", np.zeros(SIZE)),
        r"labels/p4_L.png: belongs to images/p4.jpg, as does labels/p4_L.bmp; keep one",
    ),
    "two pictures": (
        rewrite("images/p4.png", np.zeros(SIZE)),
        r"fits both images/p4.jpg and images/p4.png; rename",
    ),
    "one pair": (
        without("labels/*[1-9]_L.png"),
        "only 1 picture for training and validation has a label; label at least 2",
    ),
    "JPEG": (jpeg_labels, r"labels/p0_L.jpg: JPEG changes the ids of a label; save the original as PNG"),
    "gray in RGB": (
        only({0: (0, 0, 0), 1: (9, 9, 9), 2: (255, 255, 255)}),
        r"p0_L.png: .* a gray mask saved as RGB; .*python -m tools.prepare DIR OUT",
    ),
    "gray in RGBA": (
        only({k: (k, k, k, 255) for k in range(3)}),
        r"saved as RGBA; .*python -m tools.prepare DIR",
    ),
    "a photo": (
        rewrite("labels/p4_L.png", noise(3)),
        r"p4_L.png: holds \d+ colors; probably it was saved as JPEG",
    ),
    "soft edges": (
        rewrite("labels/p4_L.png", noise(1)),
        r"p4_L.png: holds 255 ids together with the others; .*soft edges",
    ),
    "ids and colors": (
        rewrite("labels/p4_L.png", np.full((*SIZE, 3), (1, 2, 3))),
        r"p0_L.png: holds ids, but .*p4_L.png holds colors; save all labels alike",
    ),
    "one class": (only({0: 1, 1: 1, 2: 255}), r"the labels hold only 1 and 255, so there are no two classes"),
    "all black": (only({0: 0, 1: 0, 2: 0}), r"hold only 0, so there are no two classes"),
    "16 bits": (
        lambda root: Image.fromarray(np.full(SIZE, 300, np.uint16)).save(root / "labels/p4_L.png"),
        r"p4_L.png: holds the id 300; number the classes 0 to 254",
    ),
    "too few names": (
        text("classes.txt", "a\nb\n"),
        r"classes.txt: has 2 names, .*p0_L.png holds the id 2; name ev",
    ),
    "one name": (only({0: 0, 1: 0, 2: 255}, "classes.txt"), r"classes.txt: names fewer than two classes, "),
    "a name twice": (text("classes.txt", "a\nb\na\n"), r"classes.txt: names 'a' twice"),
    "an empty name": (text("classes.txt", "a\n\nb\n"), r"classes.txt: the name of id 1 has 0 characters"),
    "names that are no text": (
        lambda root: (root / "labels.txt").write_bytes(b"\xff\0"),
        "labels.txt: not a readable list of class names",
    ),
    "a table that is none": (text("classes.tsv", "a\n"), r"classes.tsv: the first line has no column"),
    "cut short": (
        lambda root: os.truncate(root / "labels/p5_L.png", 40),
        r"p5_L.png: damaged or truncated picture; copy it again",
    ),
    "a FIFO": (fifo, r"p5_L.png: is a FIFO, not a file"),
    "no label for val": (unlabeled_val, "no picture for val has a label; add labels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_one_line(name: str, pair: Path) -> None:
    damage, words = BROKEN[name]
    damage(pair)
    with pytest.raises(DataError) as error:
        CSDataSet(str(pair))
    assert re.search(words, str(error.value)), str(error.value)
    assert str(pair) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "split, words", [("foo", "divided into train, val and test"), ("test", "no pictures for testing; put")]
)
def test_other_splits(pair: Path, split: str, words: str) -> None:
    with pytest.raises(DataError, match=f"--split {split}: .*{words}"):
        CSDataSet(str(pair), split=split, labeled=False)


def test_read_names(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("\ufeffa b\n#c\n", encoding="utf-8")
    assert read_names(str(tmp_path / "n")) == ["a b", "#c"]
    (tmp_path / "n").write_text("\n".join(map(str, range(256))))
    with pytest.raises(DataError, match="has 256 names"):
        read_names(str(tmp_path / "n"))


def test_check_lists_all_problems(pair: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """dataset.check goes on where training refuses, and lists every file."""
    save(pair / "labels/x.png", np.zeros(SIZE))
    save(pair / "labels/y.png", np.zeros(SIZE))
    os.truncate(pair / "labels/p5_L.png", 40)
    monkeypatch.setattr("sys.argv", ["dataset.check", str(pair), "--num-workers", "1"])
    assert exit_status(check.main) == 2
    out = capsys.readouterr().out
    assert "STEM_L.png" in out and "classes 0, 1 and 2" in out
    for name in ("x.png: has no picture", "y.png: has no picture", "p5_L.png: damaged"):
        assert name in out
    assert "train: 8 pictures" in out and "val: 2 pictures" in out


def test_a_list_of_test_pictures(pair: Path) -> None:
    """As tools.prepare writes it: with labels, which dataset.check checks and --split test does not need."""
    pairs = [each for side in folder_pair.find(str(pair)).sides.values() for each in side]
    lines = [f"{each.image}\t{each.label}\n" for each in pairs]
    for name, some in (("train", lines[:-2]), ("val", lines[-2:-1]), ("test", lines[-1:])):
        (pair / f"{name}.lst").write_text("".join(some))
    last = pairs[-1].image
    assert [each.image for each in folder_pair.find(str(pair)).sides["test"]] == [last]
    assert [each.image for each in CSDataSet(str(pair), split="test", labeled=False).pairs] == [last]
    (pair / "test.lst").write_text("".join(lines[:1]))
    assert "is in train.lst too" in folder_pair.find(str(pair)).problems[0]


def test_lists_and_test_pictures(pair: Path) -> None:
    """A picture of test.lst is nowhere trained on; it needs no label; no picture is in two lists."""
    pairs = [each for side in folder_pair.find(str(pair)).sides.values() for each in side]
    lines = [f"{each.image}\t{each.label}\n" for each in pairs]
    (pair / "test.lst").write_text(lines[0])
    with pytest.raises(DataError, match=r"test.lst: train.lst and val.lst divide .* write both"):
        folder_pair.find(str(pair))
    (pair / "train.lst").write_text("".join(lines[3:]))
    (pair / "val.lst").write_text("".join(lines[1:3]))
    (pair / "test.lst").write_text(f"{pairs[0].image}\n")  # without its label
    found = folder_pair.find(str(pair))
    assert found.problems == [] and found.sides["test"] == [] and len(found.sides["train"]) == len(pairs) - 3
    assert [each.image for each in CSDataSet(str(pair), split="test", labeled=False).pairs] == [
        pairs[0].image
    ]
    (pair / "test.lst").write_text("\n")
    assert folder_pair.find(str(pair)).problems == [] and len(CSDataSet(str(pair), split="val")) == 2
    (pair / "test.lst").write_text(f"./{pairs[1].image}\n")
    (problem,) = folder_pair.find(str(pair)).problems
    assert problem.endswith("is in val.lst too; remove it from one list")
