"""tools.prepare.labelme: shapes pixel for pixel as labelme draws them, its files, and their errors."""

from __future__ import annotations

import base64
import json
import math
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from annotated import labelme_page, labelme_shape, make_scenes, png, polygon, write_labelme, write_pictures
from PIL import Image

from tools.prepare.labelme import read_labelme
from tools.prepare.labelme_shapes import draw_shape, parse_shape, reach
from tools.prepare.source import Problems, Wanted

SIZE = (40, 56)
#: Number of corners by kind of shape.
CORNERS = {"rectangle": 2, "oriented_rectangle": 4, "circle": 2, "line": 2, "linestrip": 5, "point": 1}


def drawn(shape, size=SIZE, value=1):
    image = Image.new("L", size[::-1])
    draw_shape(image, shape, value)
    return np.array(image)


def parsed(kind, points, **others):
    return parse_shape({"label": "a", "shape_type": kind, "points": np.asarray(points).tolist(), **others})


@pytest.mark.parametrize("kind", ["polygon", *CORNERS])
def test_shapes_are_those_of_labelme(kind):
    """Coordinates may be fractions, and beyond the picture."""
    rng = np.random.default_rng(7)
    outside = 0
    for number in range(150):
        points = rng.uniform(-25, 80, (CORNERS.get(kind) or rng.integers(3, 9), 2))
        points = points.round(number % 3 * 2)
        expected = labelme_shape().shape_to_mask(SIZE, points.tolist(), kind)
        shape = parsed(kind, points)
        np.testing.assert_array_equal(drawn(shape, value=9), np.where(expected, 9, 0))
        assert (reach(shape, SIZE) == "outside") == (not expected.any())
        outside += not expected.any()
    assert outside < 130


def test_later_shapes_cover_earlier_ones(tmp_path):
    scenes = make_scenes(3)
    found = read_labelme(str(write_labelme(tmp_path, scenes)), Wanted())
    names = {"cat": 1, "dog": 2, "tree": 3}
    for scene, read in zip(scenes, found.scenes, strict=True):
        shapes = [{"label": label, "points": points} for label, points in scene.shapes]
        expected, _ = labelme_shape().shapes_to_label(scene.picture.shape[:2], shapes, names)
        np.testing.assert_array_equal(read.draw(), expected)
        assert read.draw().dtype == np.uint8 and read.name == scene.name and read.upright


@pytest.mark.parametrize("left, top", [(3.9, 2.2), (-4, -3), (50, 35), (0, 0)])
def test_masks_lie_at_the_whole_part_of_their_corner(left, top):
    """A mask is placed at int(x), int(y), and clipped at the border."""
    pixels = np.random.default_rng(0).random((9, 11)) < 0.5
    mask = parsed("mask", [(left, top), (int(left) + 10, int(top) + 8)], mask=png(pixels))
    expected = np.zeros(SIZE, np.uint8)
    for row, column in np.argwhere(pixels):
        y, x = row + int(top), column + int(left)
        if 0 <= y < SIZE[0] and 0 <= x < SIZE[1]:
            expected[y, x] = 5
    np.testing.assert_array_equal(drawn(mask, value=5), expected)
    gray = parsed("mask", [(0, 0), (10, 8)], mask=png(np.where(pixels, 7, 0).astype(np.uint8)))
    assert (drawn(gray) > 0).sum() == pixels.sum()


def test_how_shapes_lie_in_the_picture():
    assert reach(parsed("polygon", [(0, 0), (56, 0), (56, 40)]), SIZE) is None
    assert reach(parsed("polygon", [(0, 0), (70, 0), (56, 30)]), SIZE) == "clipped"
    assert reach(parsed("polygon", [(-5, 0), (20, 0), (20, 30)]), SIZE) == "clipped"
    assert reach(parsed("circle", [(20, 20), (20, 30)]), SIZE) is None
    assert reach(parsed("circle", [(20, 20), (20, 45)]), SIZE) == "clipped"
    assert reach(parsed("point", [(58, 20)]), SIZE) == "clipped"
    # The bounding box of this line reaches into the picture, but no pixel of it does.
    assert reach(parsed("line", [(-60, 20), (20, -60)]), SIZE) == "outside"
    empty = parsed("mask", [(0, 0), (1, 1)], mask=png(np.zeros((2, 2), bool)))
    assert reach(empty, SIZE) == "tiny"


def test_a_mask_larger_than_its_picture_is_not_decoded(tmp_path):
    """A PNG of 20 KB may hold 13000 x 13000 pixels."""
    content = base64.b64encode(cv2.imencode(".png", np.zeros((13000, 13000), np.uint8))[1].tobytes()).decode()
    mask = {"label": "cat", "points": [[0, 0], [12999, 12999]], "shape_type": "mask", "mask": content}
    page(tmp_path, shapes=[mask])
    tracemalloc.start()
    assert "shape 1 (cat): is a mask of 13000x13000 pixels in a picture of 64x48" in one_problem(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_a_damaged_mask_is_one_line(tmp_path):
    """The header and the checksums of this PNG are right, but its data are not compressed pixels."""
    content = base64.b64decode(png(np.ones((2, 2), bool)))
    start = content.index(b"IDAT")
    chunk = b"IDAT" + b"nothing"
    damaged = content[: start - 4] + struct.pack(">I", 7) + chunk + struct.pack(">I", zlib.crc32(chunk))
    damaged += content[content.index(b"IEND") - 4 :]
    mask = {"label": "cat", "points": [[0, 0], [1, 1]], "shape_type": "mask"}
    page(tmp_path, shapes=[{**mask, "mask": base64.b64encode(damaged).decode()}])
    assert "shape 1 (cat): is a mask without a readable PNG" in one_problem(tmp_path)


def test_how_masks_lie_in_the_picture():
    for left, top, expected in ((0, 0, None), (53, 37, None), (54, 37, "clipped"), (-2, 0, "clipped")):
        mask = parsed("mask", [(left, top), (left + 2, top + 2)], mask=png(np.ones((3, 3), bool)))
        assert reach(mask, SIZE) == expected
    for left, top in ((56, 0), (0, 40), (-3, 0), (0, -3), (500, 500)):
        mask = parsed("mask", [(left, top), (left + 2, top + 2)], mask=png(np.ones((3, 3), bool)))
        assert reach(mask, SIZE) == "outside"


SQUARE = [[1, 1], [9, 1], [9, 9]]


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"points": SQUARE}, "has no label"),
        ({"label": " \t", "points": SQUARE}, "has no label"),
        ({"label": 3, "points": SQUARE}, "has no label"),
        ({"label": "a", "points": SQUARE[:2]}, "a polygon of 2 points, which should be 3 or more"),
        ({"label": "a", "points": SQUARE, "shape_type": "circle"}, "a circle of 3 points, which should be 2"),
        (
            {"label": "a", "points": [[0, 0], [1e6, 0]], "shape_type": "circle"},
            "a radius above 131072 pixels",
        ),
        ({"label": "a", "points": SQUARE, "shape_type": "points"}, "the shape_type 'points'"),
        ({"label": "a", "points": SQUARE, "shape_type": ["polygon"]}, "the shape_type"),
        ({"label": "a", "points": [[0, 0], [4e6, 0], [0, 4e6]]}, "longer than 4 million pixels"),
        ({"label": "a", "points": SQUARE * 40_000}, "has 120000 points, more than 100000"),
        ({"label": "a", "points": None}, "not pairs of finite numbers"),
        ({"label": "a", "points": [[1, 2, 3]]}, "not pairs of finite numbers"),
        ({"label": "a", "points": [[1, True], *SQUARE]}, "not pairs of finite numbers"),
        ({"label": "a", "points": [[1, math.inf], *SQUARE]}, "not pairs of finite numbers"),
        ({"label": "a", "points": [[1, 10**30], *SQUARE]}, "not pairs of finite numbers"),
        ({"label": "a", "points": SQUARE[1:], "shape_type": "mask"}, "a mask without a readable PNG"),
        (
            {"label": "a", "points": SQUARE[1:], "shape_type": "mask", "mask": "AAAA"},
            "without a readable PNG",
        ),
        (
            {"label": "a", "points": SQUARE[1:], "shape_type": "mask", "mask": png(np.ones((9, 2), bool))},
            "a mask of 2x9 pixels, but its points enclose 1x9",
        ),
        (
            {
                "label": "a",
                "points": SQUARE[1:],
                "shape_type": "mask",
                "mask": png(np.ones((9, 1, 3), np.uint8)),
            },
            "several channels",
        ),
    ],
)
def test_wrong_shapes_are_named(shape, words):
    with pytest.raises(ValueError, match=words):
        parse_shape(shape)


def test_a_shape_without_a_type_is_a_polygon():
    assert parse_shape({"label": "a", "points": SQUARE, "shape_type": None}).kind == "polygon"
    assert parse_shape({"label": "a", "points": SQUARE}).kind == "polygon"


def page(tmp_path, **changes):
    """Write a picture of 48 x 64 pixels and its JSON file with other entries."""
    (scene,) = make_scenes(1)
    write_pictures(tmp_path, [scene])
    (tmp_path / "00.json").write_text(json.dumps({**labelme_page(scene), **changes}))
    return scene


def one_problem(tmp_path, **options) -> str:
    with pytest.raises(Problems) as caught:
        read_labelme(str(tmp_path), Wanted(**options))
    assert len(caught.value.lines) == 1, caught.value.lines
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"imagePath": "other.png"}, None),  # the picture with the name of the JSON is taken
        ({"imagePath": "C:\\data\\00.png"}, None),
        ({"imagePath": "..\\00.png"}, None),
        ({"imagePath": ""}, None),
        ({"imageHeight": None, "imageWidth": None}, None),
        ({"imageHeight": 48.0, "imageWidth": 64.0}, None),
        ({"imageHeight": 49}, "is for a picture of 64x49 pixels, but"),
        ({"imageHeight": "48"}, "imageHeight and imageWidth are not whole numbers"),
        ({"imagePath": None}, "imagePath or imageData is not text"),
        ({"shapes": {}}, "shapes is not a list of objects"),
        ({"shapes": [3]}, "shapes is not a list of objects"),
        ({"shapes": []}, "no shape in 1 labelme files"),
    ],
)
def test_entries_of_the_file(tmp_path, changes, words):
    scene = page(tmp_path, **changes)
    if words:
        assert words in one_problem(tmp_path)
    else:
        (read,) = read_labelme(str(tmp_path), Wanted()).scenes
        np.testing.assert_array_equal(read.draw(), scene.label())
        assert read.picture == str(tmp_path / "00.png") and read.size == (48, 64)


def test_pictures_are_found_in_other_folders(tmp_path):
    """ImagePath is relative to the JSON; --images is searched first for the path and then for the name."""
    scene = page(tmp_path, imagePath="..\\pictures\\00.png")
    (tmp_path / "json").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "00.json").rename(tmp_path / "json/00.json")
    (tmp_path / "00.png").rename(tmp_path / "pictures/00.png")
    (read,) = read_labelme(str(tmp_path), Wanted()).scenes
    assert read.picture == str(tmp_path / "pictures/00.png") and read.name == "pictures/00"
    (read,) = read_labelme(str(tmp_path / "json"), Wanted()).scenes
    assert read.name == "00"
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    assert "its picture ..\\pictures\\00.png is missing" in one_problem(tmp_path)
    (read,) = read_labelme(str(tmp_path / "json"), Wanted(pictures=str(tmp_path / "elsewhere"))).scenes
    assert read.picture == str(tmp_path / "elsewhere/00.png") and read.name == "00"
    np.testing.assert_array_equal(read.draw(), scene.label())


@pytest.mark.parametrize("path", ["{root}/secret/1.png", "../../secret/1.png", "../b/../../secret/1.png"])
def test_paths_far_out_of_the_source_are_not_followed(tmp_path, path):
    """ImagePath may lead to a folder next to the source, which a note tells, but no farther."""
    source, secret = tmp_path / "a/source", tmp_path / "secret"
    source.mkdir(parents=True)
    secret.mkdir()
    page(source, imagePath=path.format(root=tmp_path))
    (source / "00.png").rename(secret / "1.png")
    assert "is missing" in one_problem(source)
    found = read_labelme(str(source), Wanted(pictures=str(secret)))
    assert found.scenes[0].picture == str(secret / "1.png")
    (tmp_path / "a/next").mkdir()
    page(source, imagePath="../next/1.png")
    (source / "00.png").rename(tmp_path / "a/next/1.png")
    found = read_labelme(str(source), Wanted())
    assert found.scenes[0].picture == str(tmp_path / "a/next/1.png")
    assert any(f"1 picture is outside of {source}" in note for note in found.notes)


def test_an_embedded_picture_is_used_if_the_file_is_missing(tmp_path):
    scene = page(tmp_path)
    content = (tmp_path / "00.png").read_bytes()
    page(tmp_path, imageData=base64.b64encode(content).decode())
    (tmp_path / "00.png").unlink()
    (read,) = read_labelme(str(tmp_path), Wanted()).scenes
    assert read.content is not None and read.content() == content and not read.upright
    np.testing.assert_array_equal(read.draw(), scene.label())
    page(tmp_path, imageData="AAAA")
    (tmp_path / "00.png").unlink()
    assert "picture" in one_problem(tmp_path)


@pytest.mark.parametrize("orientation", [3, 6])
def test_labels_belong_to_the_upright_picture(tmp_path, orientation):
    """Labelme shows and measures pictures turned by their orientation tag."""
    scene = page(tmp_path, imagePath="00.jpg")
    stored = scene.picture if orientation == 3 else scene.picture.transpose(1, 0, 2)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "00.jpg", exif=exif)
    (tmp_path / "00.png").unlink()
    (read,) = read_labelme(str(tmp_path), Wanted()).scenes
    assert read.upright and read.size == (48, 64)


def test_order_of_the_classes(tmp_path):
    """Classes are in alphabetical order, in that of labels.txt, or in that of --classes."""
    write_labelme(tmp_path, make_scenes(2))
    names = [each.name for each in read_labelme(str(tmp_path), Wanted()).classes]
    assert names == ["background", "cat", "dog", "tree"]
    names = [each.name for each in read_labelme(str(tmp_path), Wanted(unlabeled_void=True)).classes]
    assert names == ["cat", "dog", "tree"]
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ntree\ncat\ndog\n")
    found = read_labelme(str(tmp_path), Wanted())
    assert [each.name for each in found.classes] == ["background", "tree", "cat", "dog"]
    expected = np.array([0, 2, 3, 1], np.uint8)[make_scenes(2)[1].label()]
    np.testing.assert_array_equal(found.scenes[1].draw(), expected)
    (tmp_path / "labels.txt").write_text("_background_\ntree\ncat\n")
    problem = one_problem(tmp_path)
    assert "label 'dog' is unknown" in problem and "labels.txt" in problem and "in 2 files" in problem
    found = read_labelme(str(tmp_path), Wanted(names=("background", "dog", "cat", "tree")))
    assert [each.name for each in found.classes] == ["background", "dog", "cat", "tree"]


def test_background_and_void_are_recognized_by_name(tmp_path):
    (scene,) = make_scenes(1)
    scene = scene._replace(shapes=[("cat", polygon(np.random.default_rng(k), (48, 64))) for k in range(3)])
    content = labelme_page(scene)
    content["shapes"][1]["label"], content["shapes"][2]["label"] = "__ignore__", "Background"
    write_pictures(tmp_path, [scene])
    (tmp_path / "00.json").write_text(json.dumps(content))
    expected = np.zeros((48, 64), np.uint8)
    for value, (_, mask) in zip((1, 255, 0), scene.masks(), strict=True):
        expected[mask] = value
    found = read_labelme(str(tmp_path), Wanted())
    np.testing.assert_array_equal(found.scenes[0].draw(), expected)
    assert [each.name for each in found.classes] == ["background", "cat"]
    # Then uncovered pixels are void, and the pixels that are labeled as background still are.
    found = read_labelme(str(tmp_path), Wanted(unlabeled_void=True))
    covered = np.logical_or.reduce([mask for _, mask in scene.masks()])
    np.testing.assert_array_equal(found.scenes[0].draw(), np.where(covered, expected, 255))


def test_other_files_are_left_out_with_notes(tmp_path):
    scenes = make_scenes(3)
    write_labelme(tmp_path, scenes[:2])
    write_pictures(tmp_path, scenes[2:])
    (tmp_path / "settings.json").write_text("{}")
    empty = labelme_page(scenes[1])
    (tmp_path / "01.json").write_text(json.dumps({**empty, "shapes": []}))
    notes = read_labelme(str(tmp_path), Wanted()).notes
    assert any("1 JSON file is not of labelme" in note and "settings.json" in note for note in notes)
    assert any("1 picture is without a JSON file" in note and "02.png" in note for note in notes)
    assert any("1 picture is without shapes" in note and "01.json" in note for note in notes)
    cv2.imwrite(str(tmp_path / "copy.png"), scenes[0].picture)
    (tmp_path / "copy.json").write_text(json.dumps(labelme_page(scenes[0])))
    assert "has the same picture as" in one_problem(tmp_path)
