"""tools.prepare.classes: train ids of labels, and files of --classes."""

from __future__ import annotations

import pytest

from tools.prepare.classes import number_classes, problems_of, read_classes, similar_names
from tools.prepare.source import Class, Wanted
from utils.errors import InputError


def numbered(*names: str, **options):
    return number_classes(map(Class, names), Wanted(**options))


def test_the_background_is_class_0():
    found = numbered("b", "Background", "a", " a ", "VOID", "ignore")
    assert [each.name for each in found.classes] == ["background", "b", "a"] and found.fill == 0
    ids = [
        found.train_id(name) for name in ("b", "a", "a\t", "_background_", "BACKGROUND", "__ignore__", "Void")
    ]
    assert ids == [1, 2, 2, 0, 0, 255, 255]
    assert found.train_id("c") is None and found.train_id("A") is None and found.drawn("c") == 255


def test_unlabeled_void():
    """There is no background then, unless a label has this name."""
    found = numbered("b", "a", unlabeled_void=True)
    assert [each.name for each in found.classes] == ["b", "a"] and found.fill == 255
    assert found.train_id("background") is None
    found = numbered("b", "_background_", unlabeled_void=True)
    assert [each.name for each in found.classes] == ["background", "b"] and found.fill == 255


def test_a_text_file_gives_names_in_order(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("__ignore__\n_background_\nb\r\na  c\n")
    wanted, classes = read_classes(str(path), False)
    assert wanted.names == ("background", "b", "a c") == tuple(each.name for each in classes)
    found = number_classes([], wanted)
    assert [found.train_id(name) for name in ("b", "a c", "background", "__ignore__", "d")] == [
        1,
        2,
        0,
        255,
        None,
    ]
    path.write_text("b\nBackground\na")
    wanted, _ = read_classes(str(path), False)
    assert wanted.names == ("b", "background", "a") and number_classes([], wanted).fill == 1
    path.write_text("b\na")
    assert read_classes(str(path), False)[0].names == ("background", "b", "a")
    wanted, _ = read_classes(str(path), True)
    assert wanted.names == ("b", "a") and number_classes([], wanted).fill == 255


def test_a_table_unites_labels(tmp_path):
    path = tmp_path / "classes.tsv"
    rows = ["name\tid\ttrain_id\tcolor", "road\t7\t1\t9,9,9", "lane\t8\t1\t8,8,8", "rest\t3\t255\t0,0,0"]
    path.write_text("\n".join([*rows, "Background\t0\t0\t1,2,3"]))
    wanted, classes = read_classes(str(path), False)
    assert classes == [Class("Background", (1, 2, 3)), Class("road", (9, 9, 9))]
    found = number_classes([], wanted)
    labels = ("road", "lane", "rest", "background", "_background_")
    assert [found.train_id(name) for name in labels] == [1, 1, 255, 0, 0] and found.fill == 0
    path.write_text("\n".join([*rows, "sky\t0\t0\t1,2,3"]))
    with pytest.raises(InputError, match="has no class named background"):
        number_classes([], read_classes(str(path), False)[0])
    assert number_classes([], read_classes(str(path), True)[0]).fill == 255


@pytest.mark.parametrize(
    "text, words",
    [
        (b"a\nb\na", "names 'a' twice"),
        (b"background\n_background_\n", "names 'background' twice"),
        (b"a\n\nb", "the name of id 1 has 0 characters"),
        (b"\xff\xfe", "not a readable list of class names"),
        (b"void\n", "fewer than two classes"),
        (b"a\n" + b"b" * 201, "has 201 characters"),
        (b"name\tid\n", "has no column train_id, color"),
        ("\n".join(map(str, range(254))).encode(), "has 255 classes, but 254 are the most"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, words):
    path = tmp_path / "names"
    path.write_bytes(text)
    with pytest.raises(InputError, match=words) as caught:
        read_classes(str(path), False)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        read_classes(str(tmp_path / "other"), False)


def test_an_unknown_label_is_one_line():
    found = numbered("a", names=("background", "a"), origin="--classes f")
    lines = found.problems([("a", "1"), ("b", "2"), ("b", "3"), ("b", "3"), ("c", "4")])
    assert lines == [
        "2: label 'b' is unknown, it is not in --classes f (in 2 files); correct the label or add it there",
        "4: label 'c' is unknown, it is not in --classes f; correct the label or add it there",
    ]


def test_names_that_differ_in_case():
    assert similar_names([Class("cat"), Class("dog"), Class("Cat")]) == [
        "labels 'cat' and 'Cat' are two classes; give them one name if they are the same"
    ]
    assert not similar_names([Class("cat"), Class("dog")])


def test_numbers_of_classes():
    assert problems_of("s", [Class("a"), Class("b")]) == []
    assert "fewer than two classes (a)" in problems_of("s", [Class("a")])[0]
    assert problems_of("s", [Class(str(k)) for k in range(254)]) == []
