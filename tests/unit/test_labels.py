"""Class tables: valid and invalid files, and the conversion of label pictures."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from dataset import CSDataSet, DataError, check
from dataset.labels import (
    CITYSCAPES,
    ClassTable,
    Counts,
    Label,
    LabelReader,
    choose_table,
    format_table,
    occurring,
    read_table,
    rows_of_table,
    table_of_rows,
)
from dataset.pictures import load
from utils.args import exit_status

HEADER = "name\tid\ttrain_id\tcolor\n"
TABLE = HEADER + "wood\t7\t0\t10,20,30\nmeadow\t9\t1\t0,200,0\nthicket\t-\t0\t11,20,30\nrest\t0\t255\t0,0,0\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "classes.tsv"
    path.write_text("# mine\n\n" + TABLE)
    return str(path)


def test_first_row_of_a_train_id_is_its_class(table):
    read = read_table(table)
    assert read.names == ("wood", "meadow") and read.colors == ((10, 20, 30), (0, 200, 0))
    assert read.label_ids().tolist() == [7, 9] and len(read.labels) == 4
    ids = read.train_ids()
    assert [ids[value] for value in (7, 9, 0, 255, 1)] == [0, 1, 255, 255, -1]
    assert read.train_ids(3)[0] == 3


def test_columns_in_another_order_and_more_of_them(tmp_path):
    path = tmp_path / "classes.tsv"
    path.write_text("note\tcolor\tname\ttrain_id\tid\r\nx\t1, 2,3\ta b\t0\t5\r\n")
    (label,) = read_table(str(path)).labels
    assert label[:3] == ("a b", 5, 0) and label.color == (1, 2, 3)


@pytest.mark.parametrize(
    "text, words",
    [
        ("name\tid\tcolor\n", "no column train_id"),
        ("", "no column name"),
        (HEADER + "a\t0\t0\n", ":2: has 3 columns"),
        (HEADER + "a\t0\t0\t1,2\n", ":2: color '1,2'"),
        (HEADER + "a\t0\t0\t1,2,256\n", "256"),
        (HEADER + "a\t300\t0\t1,2,3\n", ":2: id '300'"),
        (HEADER + "a\t0\tx\t1,2,3\n", ":2: train_id 'x'"),
        (HEADER + "\t0\t0\t1,2,3\n", "no name"),
        (HEADER + "a" * 300 + "\t0\t0\t1,2,3\n", "a name of 300 characters"),
        (HEADER + "a\0\t0\t0\t1,2,3\n", "not text in UTF-8"),
        (HEADER + "a\t0\t1\t1,2,3\n", "number the classes 0, 1, 2"),
        (HEADER + "a\t0\t255\t1,2,3\n", "number the classes"),
        (HEADER + "a\t4\t0\t1,2,3\nb\t4\t1\t1,2,4\n", "id 4 is in two rows"),
        (HEADER + "a\t0\t0\t1,2,3\nb\t0\t1\t1,2,4\n", "id 0 is in two rows"),
        (HEADER + "".join(f"a\t-\t{k % 255}\t{k // 256},{k % 256},1\n" for k in range(300)), "300 rows"),
    ],
)
def test_wrong_table_is_one_line_that_names_the_file(tmp_path, text, words):
    path = tmp_path / "classes.tsv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_table(str(path))
    assert str(error.value).startswith(str(path)) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_written_table_is_read_again_as_it_is(tmp_path):
    labels = [
        Label("# a  tree", 7, 1, "", False, (1, 2, 3)),
        Label("ä\tb\r\nc", -1, 0, "", False, (255, 0, 0)),
        Label("void", 255, 255, "", False, (0, 0, 0)),
    ]
    path = tmp_path / "classes.tsv"
    path.write_text(format_table(ClassTable(labels)), encoding="utf-8")
    expected = [labels[0]._replace(name="# a tree"), labels[1]._replace(name="ä b c"), labels[2]]
    assert read_table(str(path)).labels == tuple(expected)
    for name in ("", "  ", "a" * 201, "a\0"):
        with pytest.raises(ValueError, match="class name"):
            format_table(ClassTable([labels[0]._replace(name=name, train_id=0)]))


def test_missing_or_binary_table(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary"):
        with pytest.raises(DataError, match=f"{name}: not a readable class table"):
            read_table(str(tmp_path / name))


def test_number_of_classes_follows_the_table(table):
    assert choose_table(None, None) == (None, 19) and choose_table(None, 7) == (None, 7)
    assert choose_table(table, None)[1] == choose_table(table, 2)[1] == 2
    with pytest.raises(DataError, match="--num-classes 3: .* has 2 classes"):
        choose_table(table, 3)


def written(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return load(str(path))


def test_ids_go_through_the_table_and_train_ids_do_not(table, tmp_path):
    reader = LabelReader(read_table(table))
    ids = [[7, 9, 0], [255, 9, 7]]
    assert reader.read(written(tmp_path / "a.png", ids)).tolist() == [[0, 1, 255], [255, 1, 0]]
    assert reader.read(written(tmp_path / "a_labelIds.png", ids)).tolist() == [[0, 1, 255], [255, 1, 0]]
    train_ids = [[0, 1, 255]]
    assert reader.read(written(tmp_path / "a_labelTrainIds.png", train_ids)).tolist() == train_ids
    with pytest.raises(DataError, match="label id 3 is not one of the 2 classes .* --classes"):
        reader.read(written(tmp_path / "b.png", [[3]]))
    assert LabelReader(read_table(table), ignore_label=9).read(load(str(tmp_path / "a.png")))[0, 2] == 9


#: Rows of a table that say what 255 means in labels.
ROWS = {
    "no row": "no\t0\t0\t0,0,0\nyes\t1\t1\t9,9,9\n",
    "a class": "no\t0\t0\t0,0,0\nyes\t255\t1\t9,9,9\n",
    "void": "no\t0\t0\t0,0,0\nyes\t1\t1\t9,9,9\nvoid\t255\t255\t1,1,1\n",
}


@pytest.mark.parametrize("ignore_label", [255, 254, 1])
@pytest.mark.parametrize("rows", ROWS)
def test_255_is_a_class_or_void(rows, ignore_label, tmp_path):
    """255 is a class if a row says so, and otherwise void, which becomes --ignore-label."""
    (tmp_path / "table").write_text(HEADER + ROWS[rows])
    reader = LabelReader(read_table(str(tmp_path / "table")), ignore_label)
    expected = 1 if rows == "a class" else ignore_label
    assert reader.read(written(tmp_path / "a.png", [[0, 255]])).tolist() == [[0, expected]]
    # In train ids 255 is void, if it is the ignored label.
    train_ids = written(tmp_path / "a_labelTrainIds.png", [[0, 255]])
    if ignore_label == 255:
        assert reader.read(train_ids).tolist() == [[0, 255]]
    else:
        with pytest.raises(DataError, match="train id 255 is not one .* --ignore-label"):
            reader.read(train_ids)


def test_255_without_table_is_void_or_refused(tmp_path):
    mask = written(tmp_path / "a.png", [[0, 255]])
    assert LabelReader(num_classes=2).read(mask).tolist() == [[0, 255]]
    with pytest.raises(DataError, match="train id 255 is not one of the 2 classes .* give 255 a row"):
        LabelReader(num_classes=2, ignore_label=9).read(mask)


def counted(reader, *labels) -> Counts:
    counts = Counts()
    for label in labels:
        counts.add(reader.count(label))
    return counts


def test_notes_name_what_occurs_nowhere(tmp_path):
    reader = LabelReader(num_classes=4)
    first, second = written(tmp_path / "a.png", [[0, 3, 255]]), written(tmp_path / "b.png", [[1, 2, 2]])
    assert reader.notes(counted(reader, first, second)) == []
    assert reader.notes(counted(reader, first)) == ["classes 1, 2 occur in no label"]
    assert counted(reader, first, second).train_ids[[0, 1, 2, 3, 255]].tolist() == [1, 1, 2, 1, 1]
    many = LabelReader(num_classes=19)
    assert many.notes(counted(many, first))[0].startswith("classes 1 (sidewalk), 2 (building), 4 (fence),")
    assert "and 9 more occur in no label" in many.notes(counted(many, first))[0]


def test_note_on_black_and_white_masks_alone(tmp_path):
    mask, plain = written(tmp_path / "a.png", [[0, 255]]), written(tmp_path / "b.png", [[0, 0]])
    reader = LabelReader(num_classes=2)
    for labels in ((mask,), (mask, plain)):
        absent, hint = reader.notes(counted(reader, *labels))
        assert absent == "class 1 occurs in no label" and "255 is void" in hint and "row for id 255" in hint
    assert len(reader.notes(counted(reader, plain))) == 1
    assert reader.notes(counted(reader, mask, written(tmp_path / "c.png", [[1]]))) == []
    (tmp_path / "table").write_text(HEADER + ROWS["no row"])
    by_table = LabelReader(read_table(str(tmp_path / "table")))
    assert len(by_table.notes(counted(by_table, mask))) == 2
    (tmp_path / "table").write_text(HEADER + ROWS["a class"])
    by_table = LabelReader(read_table(str(tmp_path / "table")))
    assert by_table.notes(counted(by_table, mask)) == []


def test_note_on_a_class_that_is_void(tmp_path):
    reader = LabelReader(num_classes=3, ignore_label=1)
    notes = reader.notes(counted(reader, written(tmp_path / "a.png", [[0, 1, 2]])))
    assert notes == ["class 1 is void (--ignore-label 1), so it is neither trained nor scored"]


def test_labels_of_void_alone_are_refused(tmp_path):
    Image.new("RGB", (2, 1)).save(tmp_path / "p.png")
    written(tmp_path / "a.png", [[255, 255]])
    (tmp_path / "list").write_text("p.png\ta.png\n")
    with pytest.raises(DataError, match="list: every pixel of its 1 labels is void"):
        CSDataSet(str(tmp_path), str(tmp_path / "list")).check()
    written(tmp_path / "a.png", [[255, 0]])
    said = CSDataSet(str(tmp_path), str(tmp_path / "list"), num_classes=2).check()
    assert "50.0 % of the pixels are void" in said and "\nnote: class 1 occurs in no label" in said


def test_counts_are_exact_beyond_what_float32_counts():
    present, pixels = occurring(np.zeros((4097, 4096 * 2 + 1), np.uint8))
    assert present.tolist() == [0] and pixels.tolist() == [4097 * 8193]


def test_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="--num-classes 1: .* count the background"):
        choose_table(None, 1)
    (tmp_path / "table").write_text(HEADER + "a\t0\t0\t1,2,3\nb\t1\t255\t1,2,4\n")
    for number in (None, 1):
        with pytest.raises(DataError, match="table: has one class.* background"):
            choose_table(str(tmp_path / "table"), number)


@pytest.mark.parametrize("command", [train, evaluate, check], ids=lambda command: command.__name__)
def test_commands_refuse_one_class(command, tmp_path, monkeypatch, capsys):
    arguments = [str(tmp_path)] if command is check else ["--data-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["command", *arguments, "--num-classes", "1"])
    assert exit_status(command.main) == 2
    assert "--num-classes 1: " in capsys.readouterr().err


def test_colors_go_through_the_table(table, tmp_path):
    reader = LabelReader(read_table(table))
    colors = [[(10, 20, 30), (0, 200, 0)], [(11, 20, 30), (0, 0, 0)]]
    assert reader.read(written(tmp_path / "a.png", colors)).tolist() == [[0, 1], [0, 255]]
    with pytest.raises(DataError, match="color 1,2,3 is not one"):
        reader.read(written(tmp_path / "b.png", [[(0, 0, 0), (1, 2, 3)]]))
    with pytest.raises(DataError, match="--classes"):
        LabelReader().read(load(str(tmp_path / "a.png")))
    with pytest.raises(DataError, match="RGBA"):
        reader.read(written(tmp_path / "c.png", [[(0, 0, 0, 255)]]))


def test_colors_equal_those_of_two_classes_are_refused():
    rows = [Label(name, -1, train_id, "", False, (1, 2, 3)) for train_id, name in enumerate("ab")]
    with pytest.raises(ValueError, match="a and b have the same color"):
        ClassTable(rows).row_of_color()
    assert ClassTable([rows[0], rows[0]._replace(name="c")]).row_of_color()[0x010203] == 0


def test_ids_of_predictions_are_never_those_of_another_class():
    rows = [Label("a", -1, 0, "", False, (1, 1, 1)), Label("b", 0, 1, "", False, (2, 2, 2))]
    assert ClassTable(rows).label_ids().tolist() == [0, 1]


def test_labels_of_one_bit(tmp_path):
    Image.fromarray(np.array([[0, 1, 1], [1, 0, 0]], bool)).save(tmp_path / "a.png")
    assert LabelReader().read(load(str(tmp_path / "a.png"))).tolist() == [[0, 1, 1], [1, 0, 0]]
    Image.new("RGB", (3, 2)).save(tmp_path / "b.png")
    (tmp_path / "list").write_text("b.png\ta.png\n")
    assert "1 pictures" in CSDataSet(str(tmp_path), str(tmp_path / "list")).check()


def test_names_and_colors_of_what_no_table_knows():
    assert LabelReader().names() == list(CITYSCAPES.names) and LabelReader().is_cityscapes()
    few = LabelReader(num_classes=3)
    assert few.names() == ["class 0", "class 1", "class 2"] and not few.is_cityscapes()
    assert few.colors() == list(CITYSCAPES.colors[:3]) and few.label_ids().tolist() == [0, 1, 2]


class TestCamVid:
    def test_table(self, root):
        table = read_table(str(root / "dataset/camvid.tsv"))
        assert len(table.labels) == 32 and len(table.classes) == 11
        assert (table.row_of_color() < 255).sum() == 32
        assert table.names[0] == "Sky" and table.label_ids().tolist() == list(range(11))

    def test_labels_of_the_data_set_beside_the_project(self, root):
        """Train ids of the data set beside this project are used unchanged, and the table names them."""
        data = root.parent / "shared/data/camvid"
        if not data.is_dir():
            pytest.skip("no CamVid beside the project")
        table = read_table(str(root / "dataset/camvid.tsv"))
        dataset = CSDataSet(str(data), str(data / "val.lst"), crop_size=None, table=table)
        assert len(dataset) == 101 and dataset.labels.num_classes == 11
        picture = dataset.picture(0, instances=False)
        expected = cv2.imread(dataset.path(dataset.pairs[0].label), cv2.IMREAD_UNCHANGED)
        assert picture.image.shape == (360, 480, 3) and np.array_equal(picture.label, expected)
        names = [line.split("\t")[1] for line in (data / "classes.tsv").read_text().splitlines()[1:12]]
        assert dataset.labels.names() == names


def test_rows_of_a_checkpoint() -> None:
    """Classes with the names of Cityscapes but other ids are a table of their own."""
    assert table_of_rows("a", rows_of_table(None)) is None
    numbered = [
        {"name": name, "id": k, "train_id": k, "color": list(color)}
        for k, (name, color) in enumerate(zip(CITYSCAPES.names, CITYSCAPES.colors, strict=True))
    ]
    assert table_of_rows("a", numbered) is None  # as mmsegmentation numbers them
    table = table_of_rows("a", [{**row, "id": row["id"] + 100} for row in numbered])
    assert table is not None and table.label_ids().tolist() == list(range(100, 119))
    again = table_of_rows("a", rows_of_table(table))
    assert again is not None and again.labels == table.labels
