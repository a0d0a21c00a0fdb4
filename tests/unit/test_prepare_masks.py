"""tools.prepare's readers of label pictures: VOC folders, and folders with images/ and labels/."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from annotated import parts_by_name
from conftest import status_of
from PIL import Image

from dataset import CSDataSet, DataError, check
from dataset.labels import read_table
from tools.prepare.__main__ import main
from tools.prepare.classes import read_classes
from tools.prepare.masks import PASCAL, is_pair, is_voc, read_pair, read_voc
from tools.prepare.source import Found, Problems, Wanted

SIZE = 6, 8
VOC = ("JPEGImages", "SegmentationClass")
HEADER = "name\tid\ttrain_id\tcolor\n"
NAMES = ("a/1", "a/2", "b/1", "b/2")
COLORS = [(0, 0, 0), (200, 10, 10), (10, 200, 10)]
Draw = Callable[[np.ndarray], Image.Image]


def classes_at(number: int) -> np.ndarray:
    """Return 0, 1 and 2, uint8 [6, 8], in a pattern that depends on `number`."""
    return np.random.default_rng(number).integers(0, 3, SIZE, dtype=np.uint8)


def mapped(*values: object, dtype: type = np.uint8) -> Draw:
    return lambda label: Image.fromarray(np.array(values, dtype)[label])


def palette(colors: Sequence[tuple[int, int, int]], *ids: int) -> Draw:
    def draw(label: np.ndarray) -> Image.Image:
        picture = Image.fromarray(np.array(ids, np.uint8)[label])
        picture.putpalette([channel for color in colors for channel in color])
        return picture

    return draw


def write(
    root: Path, draw: Draw, folders: tuple[str, str] = ("images", "labels"), ending: str = ".png"
) -> Path:
    for number, name in enumerate(NAMES):
        for folder in folders:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*SIZE, 3), number, np.uint8)).save(root / folders[0] / f"{name}.png")
        draw(classes_at(number)).save(root / folders[1] / f"{name}{ending}")
    return root


def drawn(found: Found) -> list[list[list[int]]]:
    assert [scene.name for scene in found.scenes] == list(NAMES)
    labels = [scene.draw() for scene in found.scenes]
    assert all(label.dtype == np.uint8 and label.shape == SIZE == scene.size for label, scene in
               zip(labels, found.scenes, strict=True))  # fmt: skip
    return [label.tolist() for label in labels]


def expected(*train_ids: int) -> list[list[list[int]]]:
    """Return the train ids of all labels, if classes 0, 1, 2 of the drawing have `train_ids`."""
    return [np.array(train_ids)[classes_at(number)].tolist() for number in range(len(NAMES))]


def names(found: Found) -> list[str]:
    return [each.name for each in found.classes]


IDS = ["class 0", "class 1", "class 2"]
VALUES: dict[str, tuple[Draw, str, list[str], tuple[int, ...]]] = {
    # name: (drawing, ending, class names, train ids of 0, 1, 2)
    "ids": (mapped(0, 1, 2), ".png", IDS, (0, 1, 2)),
    "gaps and void": (mapped(255, 3, 90), ".png", ["class 3", "class 90"], (255, 0, 1)),
    "black and white": (mapped(0, 255, 255), ".png", ["background", "object"], (0, 1, 1)),
    "colors": (mapped(*COLORS), ".png", ["background", "color 10,200,10", "color 200,10,10"], (0, 2, 1)),
    "opaque colors": (
        mapped(*((*color, 255) for color in COLORS)),
        ".png",
        ["background", "color 10,200,10", "color 200,10,10"],
        (0, 2, 1),
    ),
    "gray in RGB": (mapped((0,) * 3, (1,) * 3, (2,) * 3), ".png", IDS, (0, 1, 2)),
    "gray in RGBA": (
        mapped((0, 0, 0, 255), (5, 5, 5, 255), (255,) * 4),
        ".png",
        ["class 0", "class 5"],
        (0, 1, 255),
    ),
    "black and white in RGB": (
        mapped((0,) * 3, (255,) * 3, (0,) * 3),
        ".bmp",
        ["background", "object"],
        (0, 1, 0),
    ),
    "gray and alpha": (mapped((0, 255), (1, 255), (2, 255)), ".png", IDS, (0, 1, 2)),
    "16 bits": (mapped(0, 1, 2, dtype=np.uint16), ".png", IDS, (0, 1, 2)),
    "32 bits": (mapped(0, 1, 2, dtype=np.int32), ".tif", IDS, (0, 1, 2)),
    "TIFF": (mapped(0, 1, 2), ".tiff", IDS, (0, 1, 2)),
    "BMP": (mapped(0, 1, 2), ".bmp", IDS, (0, 1, 2)),
    "palette": (palette(COLORS, 0, 1, 2), ".png", IDS, (0, 1, 2)),
    "1 bit": (lambda label: Image.fromarray(label > 0), ".png", ["class 0", "class 1"], (0, 1, 1)),
}


class TestPair:
    @pytest.mark.parametrize("name", VALUES)
    def test_values(self, tmp_path: Path, name: str) -> None:
        draw, ending, classes, train_ids = VALUES[name]
        found = read_pair(str(write(tmp_path, draw, ending=ending)), Wanted())
        assert names(found) == classes and drawn(found) == expected(*train_ids)
        assert ("255 is void" in found.notes[1]) == (255 in train_ids)
        assert parts_by_name(found) == {} and is_pair(str(tmp_path)) and not is_voc(str(tmp_path))

    @pytest.mark.parametrize(
        "name", [n for n in VALUES if "gray" not in n and "opaque" not in n and "RGB" not in n]
    )
    def test_training_reads_the_same(self, tmp_path: Path, name: str) -> None:
        """A folder that train.py takes has the same classes and train ids with and without preparation."""
        draw, ending, classes, _ = VALUES[name]
        root = str(write(tmp_path, draw, ending=ending))
        prepared = {scene.name: scene.draw() for scene in read_pair(root, Wanted()).scenes}
        for split in ("train", "val"):
            data = CSDataSet(root, split=split)
            assert data.labels.names() == classes
            for index, pair in enumerate(data.pairs):
                label = data.picture(index, instances=False).label
                assert np.array_equal(label, prepared[pair.image[len("images/") : -len(".png")]])

    def test_palette_gives_the_colors(self, tmp_path: Path) -> None:
        found = read_pair(str(write(tmp_path, palette(COLORS, 0, 1, 2))), Wanted())
        assert [each.color for each in found.classes] == COLORS

    @pytest.mark.parametrize("kind", ["pair", "voc"])
    def test_palettes_that_differ(self, tmp_path: Path, kind: str) -> None:
        folders = ("images", "labels") if kind == "pair" else VOC
        read = read_pair if kind == "pair" else read_voc
        write(tmp_path, palette(COLORS, 0, 1, 2), folders)
        palette([COLORS[0], COLORS[2], COLORS[1]], 0, 2, 1)(classes_at(3)).save(
            tmp_path / folders[1] / "b/2.png"
        )
        with pytest.raises(
            Problems, match=r"b/2.png: the palette has 10,200,10 for the index 1, but that of"
        ):
            read(str(tmp_path), Wanted())
        # A table of the ids reads the indices; a labelmap.txt of VOC reads the colors.
        path = tmp_path / "t.tsv"
        path.write_text(HEADER + "a\t0\t0\t0,0,0\nb\t1\t1\t1,1,1\nc\t2\t2\t2,2,2\n")
        found = read(str(tmp_path), read_classes(str(path), False)[0])
        assert drawn(found)[:3] == expected(0, 1, 2)[:3] and drawn(found)[3] == expected(0, 2, 1)[3]
        if kind == "voc":
            (tmp_path / "labelmap.txt").write_text(LABELMAP)
            assert drawn(read(str(tmp_path), Wanted())) == expected(0, 2, 1)

    def test_class_table_of_the_folder(self, tmp_path: Path) -> None:
        write(tmp_path, mapped(*COLORS))
        (tmp_path / "classes.tsv").write_text(
            HEADER + "b\t-\t1\t10,200,10\na\t-\t0\t200,10,10\nrest\t-\t255\t0,0,0\n"
        )
        found = read_pair(str(tmp_path), Wanted())
        assert names(found) == ["a", "b"] and drawn(found) == expected(255, 0, 1)
        # --classes changes the order by the names.
        found = read_pair(str(tmp_path), Wanted(names=("b", "a")))
        assert names(found) == ["b", "a"] and drawn(found) == expected(255, 1, 0)
        assert [each.color for each in found.classes] == [(10, 200, 10), (200, 10, 10)]
        with pytest.raises(Problems, match="1.png: holds the color 10,200,10, which is not in --classes"):
            read_pair(str(tmp_path), Wanted(names=("a", "c")))

    def test_names_of_the_folder(self, tmp_path: Path) -> None:
        write(tmp_path, mapped(0, 1, 3))
        (tmp_path / "classes.txt").write_text("_background_\ncat\nvoid\ndog\n")
        found = read_pair(str(tmp_path), Wanted())
        assert names(found) == ["background", "cat", "dog"] and drawn(found) == expected(0, 1, 2)
        found = read_pair(str(tmp_path), Wanted(unlabeled_void=True))
        assert names(found) == ["cat", "dog"] and drawn(found) == expected(255, 0, 1)
        found = read_pair(str(tmp_path), Wanted(names=("dog", "cat"), unlabeled_void=True))
        assert names(found) == ["dog", "cat"] and drawn(found) == expected(255, 1, 0)
        found = read_pair(str(tmp_path), Wanted(names=("dog", "background", "cat"), unlabeled_void=True))
        assert names(found) == ["dog", "cat"] and drawn(found) == expected(255, 1, 0)

    @pytest.mark.parametrize("flags", [(), ("--unlabeled", "void")])
    @pytest.mark.parametrize(
        "lines",
        [
            "background\ncat\ndog",
            "cat\n_background_\ndog",
            "sky\nvoid\nsea\nsun",
            "__ignore__\na\nb\nc",
            "a\nb",
        ],
    )
    @pytest.mark.parametrize("draw", [mapped(0, 255, 0), palette(COLORS, 0, 1, 2)])
    @pytest.mark.parametrize("folders", [("images", "labels"), VOC])
    def test_a_list_of_a_flag_is_that_of_the_folder(
        self, tmp_path: Path, lines: str, flags: tuple[str, ...], draw: Draw, folders: tuple[str, str], capsys
    ) -> None:
        """--classes names.txt and classes.txt in the folder name the same ids, or are refused alike."""
        write(tmp_path / "flag", draw, folders)
        write(tmp_path / "folder", draw, folders)
        (tmp_path / "names.txt").write_text(lines)
        (tmp_path / "folder/classes.txt").write_text(lines)
        given = [*flags, "--classes", tmp_path / "names.txt"]
        status = status_of(main, tmp_path / "flag", tmp_path / "flag-out", *given)
        assert status_of(main, tmp_path / "folder", tmp_path / "folder-out", *flags) == status
        if status == 0:
            for file in ("classes.tsv", "train.lst", *(f"labels/{name}.png" for name in NAMES)):
                assert (tmp_path / "flag-out" / file).read_bytes() == (
                    tmp_path / "folder-out" / file
                ).read_bytes()

    def test_names_for_ids_without_names(self, tmp_path: Path) -> None:
        write(tmp_path / "DIR", mapped(0, 1, 2))
        path = tmp_path / "names.txt"

        def read(lines: str, void: bool = False) -> Found:
            path.write_text(lines)
            return read_pair(str(tmp_path / "DIR"), read_classes(str(path), void)[0])

        found = read("road\ncar\ntree")
        assert names(found) == ["road", "car", "tree"] and drawn(found) == expected(0, 1, 2)
        found = read("a\nbackground\nb", void=True)
        assert names(found) == ["a", "b"] and drawn(found) == expected(0, 255, 1)
        with pytest.raises(
            Problems, match="names.txt: has 2 names, of the ids from 0, but .* holds the id 2"
        ):
            read("road\ncar")
        with pytest.raises(Problems, match="--unlabeled void: the labels have no class background, "):
            read("road\ncar\ntree", void=True)

    def test_names_for_colors_are_refused(self, tmp_path: Path) -> None:
        """The order of colors says nothing about the order of names."""
        write(tmp_path, mapped(*COLORS))
        (tmp_path / "names.txt").write_text("background\nx\ny")
        wanted, _ = read_classes(str(tmp_path / "names.txt"), False)
        with pytest.raises(Problems, match="names.txt: names the classes of ids, but .* holds colors; "):
            read_pair(str(tmp_path), wanted)
        found = read_pair(str(tmp_path), Wanted(unlabeled_void=True))
        assert names(found) == ["color 10,200,10", "color 200,10,10"] and drawn(found) == expected(255, 1, 0)

    def test_pictures_for_testing_do_not_tell_the_classes(self, tmp_path: Path) -> None:
        """train.py and tools.prepare have the same train ids; other values of test labels are problems."""
        write(tmp_path, mapped(0, 3, 7))
        mapped(0, 3, 3)(classes_at(0)).save(tmp_path / "labels/a/1.png")
        for folder in ("images", "labels"):
            for part in ("train", "val", "test"):
                (tmp_path / folder / part).mkdir()
            for old, new in (("a/1", "test/1"), ("a/2", "train/2"), ("b/1", "train/1"), ("b/2", "val/1")):
                (tmp_path / folder / f"{old}.png").rename(tmp_path / folder / f"{new}.png")
        found = read_pair(str(tmp_path), Wanted())
        assert names(found) == CSDataSet(str(tmp_path)).labels.names() == ["class 0", "class 3", "class 7"]
        mapped(5, 3, 1)(classes_at(0)).save(tmp_path / "labels/test/1.png")
        assert CSDataSet(str(tmp_path)).labels.names() == ["class 0", "class 3", "class 7"]
        with pytest.raises(Problems) as error:
            read_pair(str(tmp_path), Wanted())
        known = "the labels for training and validation"
        for value, line in zip((1, 5), error.value.lines, strict=True):
            assert f"labels/test/1.png: holds the id {value}, which is not in {known}; correct" in line
        assert status_of(check.main, tmp_path, "--num-workers", 1) == 2
        # Palettes are compared with those of the other labels.
        for part in ("train/1", "train/2", "val/1"):
            palette(COLORS, 0, 1, 2)(classes_at(1)).save(tmp_path / f"labels/{part}.png")
        palette(COLORS[::-1], 0, 1, 2)(classes_at(0)).save(tmp_path / "labels/test/1.png")
        with pytest.raises(Problems, match="test/1.png: the palette has 10,200,10 for the index 0, but that"):
            read_pair(str(tmp_path), Wanted())

    def test_class_table_of_a_flag_reads_the_values(self, tmp_path: Path) -> None:
        """--classes with ids and colors is the class table of train.py, and needs no background."""
        write(tmp_path / "DIR", mapped(4, 11, 9))
        table = tmp_path / "t.tsv"
        table.write_text(HEADER + "sky\t9\t0\t1,1,1\nroad\t4\t1\t2,2,2\nrest\t11\t255\t0,0,0\n")
        assert status_of(main, tmp_path / "DIR", tmp_path / "out", "--classes", table) == 0
        assert read_table(str(tmp_path / "out/classes.tsv")).names == ("sky", "road")
        for number, name in enumerate(NAMES):
            label = cv2.imread(str(tmp_path / f"out/labels/{name}.png"), cv2.IMREAD_UNCHANGED)
            assert label.tolist() == expected(1, 255, 0)[number]

    def test_names_in_a_table_of_a_flag_may_be_equal(self, tmp_path: Path) -> None:
        write(tmp_path / "DIR", mapped(4, 11, 9))
        table = tmp_path / "t.tsv"
        table.write_text(HEADER + "x\t9\t0\t1,1,1\nx\t4\t1\t2,2,2\nx\t11\t255\t0,0,0\n")
        wanted, _ = read_classes(str(table), False)
        assert drawn(read_pair(str(tmp_path / "DIR"), wanted)) == expected(1, 255, 0)

    @pytest.mark.parametrize("picture", ["a/{}", "{}", "s{}/x"])
    def test_the_split_is_that_of_training(self, tmp_path: Path, picture: str) -> None:
        """By default, the same pictures are for validation with and without preparation."""
        for number in range(11):
            for folder, pixels in (
                ("images", np.zeros((*SIZE, 3), np.uint8)),
                ("labels", classes_at(number)),
            ):
                path = tmp_path / "DIR" / folder / f"{picture.format(number)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        assert status_of(main, tmp_path / "DIR", tmp_path / "out") == 0
        for split in ("train", "val"):
            pairs = [CSDataSet(str(tmp_path / name), split=split).pairs for name in ("DIR", "out")]
            assert sorted(pairs[0]) == sorted(pairs[1]) and pairs[0]

    @pytest.mark.parametrize(
        "suffix, train_ids", [("_labelTrainIds", (1, 255, 0)), ("_labelIds", (0, 255, 1))]
    )
    def test_names_of_files_mean_the_same_as_in_training(
        self, tmp_path: Path, suffix: str, train_ids: tuple[int, ...]
    ) -> None:
        """Files *_labelTrainIds.png hold train ids, also if a table has other ids."""
        write(tmp_path, mapped(1, 255, 0), ending=f"{suffix}.png")
        (tmp_path / "classes.tsv").write_text(HEADER + "a\t1\t0\t1,1,1\nb\t0\t1\t2,2,2\n")
        assert drawn(read_pair(str(tmp_path), Wanted())) == expected(*train_ids)
        for split in ("train", "val"):
            data = CSDataSet(str(tmp_path), split=split)
            for index, pair in enumerate(data.pairs):
                number = NAMES.index(pair.image[len("images/") : -len(".png")])
                label = data.picture(index, instances=False).label
                assert label.tolist() == expected(*train_ids)[number]

    def test_files_of_cityscapes(self, tmp_path: Path) -> None:
        write(tmp_path, mapped(7, 0, 8), ending="_labelIds.png")
        found = read_pair(str(tmp_path), Wanted())
        assert len(found.classes) == 19 and drawn(found) == expected(0, 255, 1)
        (tmp_path / "classes.txt").write_text("a\nb\n")  # does not matter, as in training
        assert names(read_pair(str(tmp_path), Wanted())) == names(found)
        assert CSDataSet(str(tmp_path)).labels.names() == names(found)

    def test_own_split(self, tmp_path: Path) -> None:
        write(tmp_path, mapped(0, 1, 2))
        for folder in ("images", "labels"):
            for old, new in (("a", "train"), ("b", "val")):
                (tmp_path / folder / old).rename(tmp_path / folder / new)
        found = read_pair(str(tmp_path), Wanted())
        assert parts_by_name(found) == {
            "train/1": "train",
            "train/2": "train",
            "val/1": "val",
            "val/2": "val",
        }

    def test_pictures_elsewhere(self, tmp_path: Path) -> None:
        write(tmp_path, mapped(0, 1, 2))
        (tmp_path / "images").rename(tmp_path / "photos")
        for source in (tmp_path, tmp_path / "labels"):
            assert drawn(read_pair(str(source), Wanted(pictures=str(tmp_path / "photos")))) == expected(
                0, 1, 2
            )

    def test_labels_of_the_upright_picture(self, tmp_path: Path) -> None:
        """A label that fits a picture as viewers show it belongs to that; train.py refuses the pair."""
        write(tmp_path / "DIR", mapped(0, 1, 2))
        exif = Image.Exif()
        exif[274] = 6  # shown turned by 90 degrees clockwise
        pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "DIR/images/a/1.png", exif=exif)
        found = read_pair(str(tmp_path / "DIR"), Wanted())
        assert [scene.upright for scene in found.scenes] == [True, False, False, False]
        with pytest.raises(DataError, match="a/1.png: 8x6 pixels, but .* has 6x8; .*python -m tools.prepare"):
            [CSDataSet(str(tmp_path / "DIR"), split=split).check() for split in ("train", "val")]
        assert status_of(main, tmp_path / "DIR", tmp_path / "out") == 0
        turned = np.asarray(Image.open(tmp_path / "out/images/a/1.png"))
        assert np.array_equal(turned, np.rot90(pixels, -1))
        assert not any("orientation" in note for note in found.notes)
        # A square picture fits both ways, as the loader reads it.
        Image.fromarray(pixels[:6]).save(tmp_path / "DIR/images/a/1.png", exif=exif)
        Image.fromarray(classes_at(0)[:, :6]).save(tmp_path / "DIR/labels/a/1.png")
        found = read_pair(str(tmp_path / "DIR"), Wanted())
        assert not found.scenes[0].upright
        assert found.notes[-1].startswith("1 picture has an orientation tag") and "a/1.png" in found.notes[-1]


LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:10,200,10::\ndog:200,10,10:ear,tail:\n"


class TestVoc:
    def test_colors_by_labelmap(self, tmp_path: Path) -> None:
        """A labelmap has the colors of label pictures, also of palettes; ids are the numbers of its lines."""
        (tmp_path / "labelmap.txt").write_text(LABELMAP)
        shuffled = [COLORS[2], COLORS[0], COLORS[1]]
        for number, draw in enumerate((mapped(*COLORS), palette(shuffled, 1, 2, 0), mapped(0, 2, 1))):
            write(tmp_path, draw, VOC)
            found = read_voc(str(tmp_path), Wanted())
            assert names(found) == ["background", "cat", "dog"], number
            assert drawn(found) == expected(0, 2, 1)
            assert [each.color for each in found.classes] == [COLORS[0], COLORS[2], COLORS[1]]
        assert is_voc(str(tmp_path)) and not is_pair(str(tmp_path))

    def test_void_of_a_labelmap(self, tmp_path: Path) -> None:
        """The color of Pascal VOC for void, and the index 255 of palettes, are void without a line."""
        (tmp_path / "labelmap.txt").write_text(LABELMAP)
        write(tmp_path, mapped(COLORS[0], (224, 224, 192), COLORS[2]), VOC)
        assert drawn(read_voc(str(tmp_path), Wanted())) == expected(0, 255, 1)
        write(tmp_path, palette([*COLORS, *[(7, 7, 7)] * 253], 0, 255, 2), VOC)
        assert drawn(read_voc(str(tmp_path), Wanted())) == expected(0, 255, 1)
        (tmp_path / "labelmap.txt").write_text("ignore:10,200,10::\n" + LABELMAP.replace("10,200", "9,9"))
        write(tmp_path, mapped(COLORS[0], COLORS[1], COLORS[2]), VOC)
        found = read_voc(str(tmp_path), Wanted())
        assert names(found) == ["background", "cat", "dog"] and drawn(found) == expected(0, 2, 255)

    def test_a_table_of_a_flag_goes_before_labelmap(self, tmp_path: Path) -> None:
        (tmp_path / "labelmap.txt").write_text(LABELMAP)
        write(tmp_path, palette(COLORS, 0, 1, 2), VOC)
        table = tmp_path / "t.tsv"
        table.write_text(HEADER + "x\t2\t0\t9,9,9\ny\t1\t1\t8,8,8\nz\t0\t255\t0,0,0\n")
        wanted, _ = read_classes(str(table), False)
        found = read_voc(str(tmp_path), wanted)
        assert names(found) == ["x", "y"] and drawn(found) == expected(255, 1, 0)

    def test_a_class_table_in_the_folder(self, tmp_path: Path) -> None:
        """It names colors, which a list of names can't, and goes before labelmap.txt."""
        write(tmp_path, mapped(*COLORS), VOC)
        (tmp_path / "class_names.txt").write_text("background\na\nb")
        with pytest.raises(Problems, match="write a table of the colors to classes.tsv"):
            read_voc(str(tmp_path), Wanted())
        rows = "b\t-\t1\t10,200,10\na\t-\t0\t200,10,10\nrest\t-\t255\t0,0,0\n"
        (tmp_path / "classes.tsv").write_text(HEADER + rows)
        (tmp_path / "labelmap.txt").write_text(LABELMAP)
        found = read_voc(str(tmp_path), Wanted())
        assert names(found) == ["a", "b"] and drawn(found) == expected(255, 0, 1)

    def test_export_of_labelme(self, tmp_path: Path) -> None:
        write(tmp_path, palette(COLORS, 0, 1, 2), ("JPEGImages", "SegmentationClassPNG"))
        (tmp_path / "SegmentationClass").mkdir()
        np.save(tmp_path / "SegmentationClass/1.npy", classes_at(0))
        (tmp_path / "class_names.txt").write_text("_background_\nkitten\npuppy")
        found = read_voc(str(tmp_path), Wanted())
        assert names(found) == ["background", "kitten", "puppy"] and drawn(found) == expected(0, 1, 2)
        found = read_voc(str(tmp_path), Wanted(names=("puppy", "kitten"), unlabeled_void=True))
        assert names(found) == ["puppy", "kitten"] and drawn(found) == expected(255, 1, 0)

    def test_pascal_voc_itself(self, tmp_path: Path) -> None:
        write(tmp_path, palette(COLORS * 80, 0, 15, 255), VOC)
        (tmp_path / "Annotations").mkdir()
        lists = tmp_path / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("a/1\nb/2\n")
        (lists / "val.txt").write_text("b/1\r\n")
        found = read_voc(str(tmp_path), Wanted())
        assert names(found) == list(PASCAL) and len(PASCAL) == 21
        assert parts_by_name(found) == {"a/1": "train", "b/1": "val", "b/2": "train"}
        train_ids = [np.array((0, 15, 255))[classes_at(number)].tolist() for number in range(4)]
        assert [scene.draw().tolist() for scene in found.scenes] == train_ids
        (lists / "test.txt").write_text("a/2\nwithout/label\n")
        assert parts_by_name(read_voc(str(tmp_path), Wanted()))["a/2"] == "test"
        (lists / "test.txt").write_text("b/1\n")
        with pytest.raises(Problems, match="test.txt:1: b/1 is in val.txt too"):
            read_voc(str(tmp_path), Wanted())

    def test_without_names_id_0_is_the_background(self, tmp_path: Path) -> None:
        write(tmp_path, palette(COLORS, 0, 1, 2), VOC)
        assert names(read_voc(str(tmp_path), Wanted())) == ["background", "class 1", "class 2"]
        assert names(read_voc(str(tmp_path), Wanted(unlabeled_void=True))) == ["class 1", "class 2"]

    def test_pictures_without_a_label(self, tmp_path: Path) -> None:
        write(tmp_path, palette(COLORS, 0, 1, 2), VOC)
        (tmp_path / "SegmentationClass/a/2.png").unlink()
        found = read_voc(str(tmp_path), Wanted())
        assert len(found.scenes) == 3
        assert found.notes[1] == "1 picture is without a label, and left out; the first is JPEGImages/a/2.png"


def save(name: str, pixels: object, dtype: type = np.uint8, **options: object) -> Callable[[Path], object]:
    return lambda root: Image.fromarray(np.asarray(pixels, dtype)).save(root / name, **options)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(content)


def listed(train: str, val: str) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        (root / "ImageSets/Segmentation/train.txt").write_text(train)
        (root / "ImageSets/Segmentation/val.txt").write_text(val)

    return damage


def half_transparent(root: Path) -> None:
    pixels = np.full((*SIZE, 4), 255)
    pixels[0, 0, 3] = 10
    save("labels/a/1.png", pixels)(root)


def jpeg(root: Path) -> None:
    (root / "labels/a/1.png").unlink()
    save("labels/a/1.jpg", np.zeros(SIZE))(root)


def color_of_two_classes(root: Path) -> None:
    write(root, mapped(*COLORS))
    rows = "a\t-\t0\t0,0,0\nb\t-\t1\t200,10,10\nc\t-\t2\t0,0,0\n"
    (root / "classes.tsv").write_text(HEADER + rows)


def gone(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


FINE = mapped(0, 1, 2)
NOISE = np.random.default_rng(0).integers(0, 256, (*SIZE[:1], 60, 3))
PAIRS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    # what: (damage, patterns of the lines)
    "size": (
        save("labels/a/1.png", np.zeros((3, 4))),
        [r"a/1.png: 4x3 pixels, but .*a/1.png has 8x6"],
    ),
    "picture missing": (gone("images/a/2.png"), [r"labels/a/2.png: has no picture in images; add"]),
    "JPEG": (jpeg, [r"labels/a/1.jpg: JPEG changes the ids of a label"]),
    "transparent": (half_transparent, [r"a/1.png: has transparent pixels, whose class is"]),
    "cut short": (
        lambda root: (root / "labels/b/1.png").write_bytes((root / "labels/b/1.png").read_bytes()[:50]),
        [r"labels/b/1.png: truncated picture; copy it again"],
    ),
    "picture is text": (text("images/b/1.png", "hello"), [r"images/b/1.png: not a readable picture"]),
    "id of 16 bits": (
        save("labels/a/1.png", np.full(SIZE, 999), np.uint16),
        [r"a/1.png: holds the id 999"],
    ),
    "a photo": (
        lambda root: [save(f"{folder}/a/1.png", NOISE)(root) for folder in ("images", "labels")],
        [r"labels/a/1.png: holds 360 colors"],
    ),
    "ids and colors": (
        save("labels/a/1.png", np.full((*SIZE, 3), (1, 2, 3))),
        [r"labels/a/2.png: holds ids, but .*labels/a/1.png holds colors"],
    ),
    "id without a name": (
        text("classes.txt", "sky\nsea\n"),
        [r"has 2 names, .* holds the id 2"],
    ),
    "id without a row": (
        text("classes.tsv", HEADER + "a\t0\t0\t1,1,1\nb\t1\t1\t2,2,2\n"),
        [r"labels/a/1.png: holds the id 2, which is not in .*classes.tsv; correct"],
    ),
    "color of two classes": (
        lambda root: (
            write(root, mapped(*COLORS)),
            (root / "classes.tsv").write_text(
                HEADER + "a\t-\t0\t0,0,0\nb\t-\t1\t200,10,10\nc\t-\t2\t0,0,0\n"
            ),
        ),
        [
            r"holds the color 0,0,0, which two classes have in .*classes.tsv",
            "color 10,200,10, which is not in",
        ],
    ),
    "names are no text": (
        lambda root: (root / "classes.txt").write_bytes(b"\xff"),
        [r"classes.txt: not a readable"],
    ),
    "all of one class": (
        lambda root: write(root, mapped(0, 0, 0)),
        [r"the labels hold only 0, so there are no two classes"],
    ),
}


def lines_of(read: Callable[[str, Wanted], Found], root: Path) -> list[str]:
    with pytest.raises(Problems) as error:
        read(str(root), Wanted())
    assert all("\n" not in line and str(root) in line for line in error.value.lines), error.value.lines
    return error.value.lines


@pytest.mark.parametrize("name", PAIRS)
def test_broken_pairs(tmp_path: Path, name: str) -> None:
    damage, patterns = PAIRS[name]
    damage(write(tmp_path, FINE))
    lines = lines_of(read_pair, tmp_path)
    assert all(any(re.search(pattern, line) for line in lines) for pattern in patterns), lines
    assert len(lines) == len(patterns)


def test_all_problems_are_collected(tmp_path: Path) -> None:
    write(tmp_path, FINE)
    save("labels/a/1.png", np.zeros((3, 4)))(tmp_path)
    save("labels/b/1.png", np.full(SIZE, 999), np.uint16)(tmp_path)
    save("labels/c.png", np.zeros(SIZE))(tmp_path)
    lines = lines_of(read_pair, tmp_path)
    files = [re.search(r"labels/(.*?)\.png", line)[1] for line in lines]
    assert sorted(files) == ["a/1", "b/1", "c"]


VOCS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown color": (
        text("labelmap.txt", "background:0,0,0::\ncat:200,10,10::\n"),
        r"SegmentationClass/a/1.png: holds the color 10,200,10, which is not in .*labelmap.txt; correct",
    ),
    "labelmap without a color": (
        text("labelmap.txt", "background:0,0,0::\ncat:::\n"),
        r"labelmap.txt:2: 'cat:::' is not",
    ),
    "labelmap with 256": (
        text("labelmap.txt", "a:0,0,256::\nb:1,1,1::\n"),
        r"labelmap.txt:1: 'a:0,0,256::' is not",
    ),
    "labelmap with a color twice": (
        text("labelmap.txt", "background:0,0,0::\ncat:0,0,0::\n"),
        r"labelmap.txt:2: cat has the name or color of background",
    ),
    "labelmap of one class": (
        text("labelmap.txt", "a:0,0,0::\n"),
        r"labelmap.txt: has fewer than two classes",
    ),
    "labelmap that is no text": (
        lambda root: (root / "labelmap.txt").write_bytes(b"\xff\xfe"),
        r"labelmap.txt: not a readable list of classes",
    ),
    "list names a picture without a label": (
        listed("a/1\nz\n", "b/1\n"),
        r"train.txt:2: z has no label picture",
    ),
    "picture in both lists": (listed("a/1\n", "b/1\na/1\n"), r"val.txt:2: a/1 is in train.txt too"),
}


@pytest.mark.parametrize("name", VOCS)
def test_broken_voc_folders(tmp_path: Path, name: str) -> None:
    damage, pattern = VOCS[name]
    damage(write(tmp_path, mapped(*COLORS), VOC))
    (line,) = lines_of(read_voc, tmp_path)
    assert re.search(pattern, line), line


def test_a_label_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    """A PNG of 40 KB may hold 2^28 pixels."""
    write(tmp_path, mapped(0, 1, 2))
    path = tmp_path / "labels/a/1.png"
    assert cv2.imwrite(str(path), np.zeros((2**14, 2**14), np.uint8))
    tracemalloc.start()
    (line,) = lines_of(read_pair, tmp_path)
    assert "16384x16384 pixels, but" in line
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_color_of_a_palette_that_labelmap_lacks(tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text(LABELMAP)
    write(tmp_path, palette([*COLORS[:2], (1, 2, 3)], 0, 1, 2), VOC)
    lines = lines_of(read_voc, tmp_path)
    assert len(lines) == len(NAMES)
    assert re.search(r"a/1.png: its palette has the color 1,2,3 for the index 2, which is not in", lines[0])


def test_the_command_refuses_without_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpeg(write(tmp_path / "DIR", FINE))
    assert status_of(main, tmp_path / "DIR", tmp_path / "out") == 2
    assert "labels/a/1.jpg: JPEG changes" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_picture_that_is_listed_twice(tmp_path: Path) -> None:
    """It is prepared twice, as train.py reads it twice."""
    write(tmp_path, mapped(0, 1, 2))
    (tmp_path / "train.lst").write_text("images/a/1.png\tlabels/a/1.png\n" * 2)
    (tmp_path / "val.lst").write_text("images/b/1.png\tlabels/b/1.png\n")
    found = read_pair(str(tmp_path), Wanted())
    assert [scene.part for scene in found.scenes] == ["train", "train", "val"]
    assert status_of(main, tmp_path, tmp_path.parent / "twice") == 0
