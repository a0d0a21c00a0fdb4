"""tools.prepare.cvat: pixels as CVAT's own export of masks has them, and errors of its XML files."""

from __future__ import annotations

import math
import tracemalloc
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from annotated import (
    LABELS,
    cvat_content,
    make_scenes,
    parts_by_name,
    polygon,
    runs,
    write_cvat,
    write_pictures,
)

from tools.prepare.cvat import read_cvat
from tools.prepare.regions import bounds_of_runs
from tools.prepare.source import Problems, Wanted

coco_mask = pytest.importorskip("pycocotools.mask")
SIZE = (48, 64)


def write(folder, shapes: str, head: str = "", image: str = "") -> None:
    """Write a picture, and a CVAT file with shapes in it."""
    write_pictures(folder, make_scenes(1))
    text = (
        "<annotations><version>1.1</version><meta><task><labels>"
        + "".join(
            f"<label><name>{name}</name><color>#0{k}1020</color></label>" for k, name in enumerate(LABELS)
        )
        + "<label><name>spot</name><type>points</type></label>"
        + f'</labels></task></meta>{head}<image id="0" name="00.png" width="64" height="48" {image}>'
        f"{shapes}</image></annotations>"
    )
    (folder / "annotations.xml").write_text(text)


def drawn(folder) -> np.ndarray:
    return read_cvat(str(folder), Wanted()).scenes[0].draw()


def one_problem(folder, **options) -> str:
    with pytest.raises(Problems) as caught:
        read_cvat(str(folder), Wanted(**options))
    assert len(caught.value.lines) == 1, caught.value.lines
    return str(caught.value)


def by_coco(points) -> np.ndarray:
    rle = coco_mask.frPyObjects([np.ravel(points).tolist()], *SIZE)
    return coco_mask.decode(coco_mask.merge(rle))


def as_points(points) -> str:
    return ";".join(f"{x},{y}" for x, y in points)


def test_polygons_and_boxes_are_those_of_pycocotools(tmp_path):
    """A rotated box is the polygon of its corners, rotated clockwise around its center."""
    rng = np.random.default_rng(1)
    for _ in range(25):
        points = polygon(rng, SIZE)
        write(tmp_path, f'<polygon label="dog" points="{as_points(points)}"/>')
        np.testing.assert_array_equal(drawn(tmp_path), 2 * by_coco(points))
        x, y = rng.uniform(10, 30, 2)
        width, height = rng.uniform(5, 30, 2)
        angle = float(rng.choice([0, 90, 33.3, 270, 359]))
        write(
            tmp_path,
            f'<box label="cat" xtl="{x}" ytl="{y}" xbr="{x + width}" ybr="{y + height}" rotation="{angle}"/>',
        )
        center = complex(x + width / 2, y + height / 2)
        turn = complex(math.cos(math.radians(angle)), math.sin(math.radians(angle)))
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
        turned = [center + (complex(*corner) - center) * turn for corner in corners]
        expected = by_coco([(point.real, point.imag) for point in turned])
        assert (drawn(tmp_path) != expected).sum() <= (0 if angle == 0 else 2)  # rounding of sine and cosine


def test_ellipses_are_those_of_opencv(tmp_path):
    rng = np.random.default_rng(2)
    for _ in range(20):
        x, y = rng.uniform(-3, 50, 2)
        a, b = rng.uniform(4, 30, 2)
        angle = float(rng.choice([0, 20, 200.5]))
        write(tmp_path, f'<ellipse label="cat" cx="{x}" cy="{y}" rx="{a}" ry="{b}" rotation="{angle}"/>')
        expected = np.zeros(SIZE, np.uint8)
        cv2.ellipse(expected, (round(x), round(y)), (round(a), round(b)), angle, 0, 360, 1, -1)
        np.testing.assert_array_equal(drawn(tmp_path), expected)


@pytest.mark.parametrize("left, top", [(5, 7), (-4, -3), (56, 41), (0, 0)])
def test_masks(tmp_path, left, top):
    """Runs go row by row and begin with pixels outside of the mask. A mask is clipped at the border."""
    pixels = np.random.default_rng(5).random((11, 13)) < 0.6
    text = ", ".join(map(str, runs(pixels.ravel())))
    write(tmp_path, f'<mask label="tree" rle="{text}" left="{left}" top="{top}" width="13" height="11"/>')
    expected = np.zeros(SIZE, np.uint8)
    for row, column in np.argwhere(pixels):
        if 0 <= row + top < SIZE[0] and 0 <= column + left < SIZE[1]:
            expected[row + top, column + left] = 3
    np.testing.assert_array_equal(drawn(tmp_path), expected)


def test_z_order_then_the_order_of_the_file(tmp_path):
    box = '<box label="{}" xtl="0" ytl="0" xbr="{}" ybr="9" z_order="{}"/>'
    boxes = [("cat", 9, 2), ("dog", 5, 2), ("tree", 20, -1), ("cat", 30, -5)]
    write(tmp_path, "".join(box.format(*each) for each in boxes))
    assert drawn(tmp_path)[3, [2, 7, 15, 25, 40]].tolist() == [2, 1, 3, 1, 0]


def test_labels_colors_and_notes(tmp_path):
    """Labels are in the order of <labels>, with their colors. Those of points are no classes."""
    write(
        tmp_path,
        '<box label="cat" xtl="0" ytl="0" xbr="9" ybr="9"/><points label="spot" points="3,4"/>'
        '<polyline label="cat" points="3,4;5,6"/><tag label="dog"/>'
        '<box label="cat" xtl="-5" ytl="0" xbr="9" ybr="9"/>'
        '<polygon label="cat" points="5.1,5.1;5.2,5.1;5.2,5.2"/>',
    )
    found = read_cvat(str(tmp_path), Wanted())
    assert [each.name for each in found.classes] == ["background", *LABELS]
    assert [each.color for each in found.classes] == [None, (0, 16, 32), (1, 16, 32), (2, 16, 32)]
    assert any("2 polylines, points, cuboids or skeletons" in note for note in found.notes)
    assert any("1 shape is partly outside" in note for note in found.notes)
    assert any("1 shape is smaller than a pixel" in note for note in found.notes)
    assert (found.scenes[0].draw() > 0).sum() == 81


def test_scenes_of_a_task_and_a_split(tmp_path):
    scenes = make_scenes(4, ("a", "b"))
    write_cvat(tmp_path, scenes)
    found = read_cvat(str(tmp_path / "annotations.xml"), Wanted())
    assert [scene.name for scene in found.scenes] == [scene.name for scene in scenes] and parts_by_name(
        found
    ) == {}
    root = cvat_content(scenes)
    for image, subset in zip(root.iterfind("image"), ("Train", "Train", "Validation", "Test"), strict=True):
        image.set("subset", subset)
    ElementTree.ElementTree(root).write(tmp_path / "annotations.xml")
    found = read_cvat(str(tmp_path), Wanted())
    assert [scene.part for scene in found.scenes] == ["train", "train", "val", "test"]
    # Pictures of one name with different endings keep their own parts.
    for image, name in zip(root.iterfind("image"), ("a/x.png", "a/x.jpg", "a/x.bmp", "a/x.tif"), strict=True):
        (tmp_path / f"images/{image.get('name')}").rename(tmp_path / f"images/{name}")
        image.set("name", name)
    ElementTree.ElementTree(root).write(tmp_path / "annotations.xml")
    assert [scene.part for scene in read_cvat(str(tmp_path), Wanted()).scenes] == [
        "train",
        "train",
        "val",
        "test",
    ]


def test_a_frame_of_a_video_has_no_ending(tmp_path):
    write(tmp_path, '<box label="cat" xtl="0" ytl="0" xbr="9" ybr="9"/>')
    text = (tmp_path / "annotations.xml").read_text()
    (tmp_path / "annotations.xml").write_text(text.replace('"00.png"', '"frame_000000"'))
    (tmp_path / "images").mkdir()
    (tmp_path / "00.png").rename(tmp_path / "images/frame_000000.PNG")
    (scene,) = read_cvat(str(tmp_path), Wanted()).scenes
    assert scene.name == "frame_000000"


MASK = '<mask label="cat" left="{}" top="0" width="{}" height="2" rle="{}"/>'


@pytest.mark.parametrize(
    "shapes, words",
    [
        ('<polygon label="cat" points="1,1;9,9"/>', "polygon 1 (cat) is a polygon of 2 points"),
        ('<polygon label="cat" points="1,1;9,9;1,nan"/>', "points that are not pairs of finite numbers"),
        ('<polygon label="cat" points="1,1;9,9;1"/>', "points that are not pairs of finite numbers"),
        ('<polygon label="cat" points="1,1;9,9;1,2,3"/>', "points that are not pairs of finite numbers"),
        ('<polygon label="cat"/>', "points that are not pairs of finite numbers"),
        ('<polygon points="1,1;9,9;1,9"/>', "has no label"),
        ('<polygon label="cow" points="1,1;9,9;1,9"/>', "a label that is not in <labels>"),
        ('<polygon label="cat" points="-9,1;-1,9;-1,19"/>', "is outside of 00.png (64x48 pixels)"),
        ('<polygon label="cat" points="1,1;9,9;1,9" z_order="top"/>', "the z_order 'top'"),
        ('<box label="cat" xtl="1" ytl="1" xbr="9"/>', "no finite numbers xtl, ytl, xbr, ybr"),
        ('<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9" rotation="x"/>', "a rotation that is not"),
        ('<ellipse label="cat" cx="1" cy="1" rx="-4" ry="9"/>', "a negative radius"),
        ('<ellipse label="cat" cx="-50" cy="1" rx="4" ry="9"/>', "is outside of 00.png"),
        (MASK.format(0, 2, "1,2"), "its runs have 3 pixels in total instead of 4"),
        (MASK.format(0, 2, "1,x"), "whose rle is not a list of whole numbers"),
        (MASK.format(0.5, 2, "1,3"), "is not a whole number"),
        (MASK.format(0, 4000000, "1,3"), "a mask of 4000000x2 pixels in a picture of 64x48"),
        (MASK.format(64, 2, "1,3"), "is outside of 00.png"),
        ('<points label="spot" points="1,1"/>', "no shapes with an area in 1 picture"),
    ],
)
def test_wrong_shapes_are_named(tmp_path, shapes, words):
    write(tmp_path, shapes)
    assert words in one_problem(tmp_path)


def test_masks_of_a_wrong_picture_size_are_not_decoded(tmp_path):
    """A short file may declare a picture and a mask of 2^30 pixels."""
    side = 2**15
    write(
        tmp_path, f'<mask label="cat" left="0" top="0" width="{side}" height="{side}" rle="0,{side * side}"/>'
    )
    path = tmp_path / "annotations.xml"
    path.write_text(path.read_text().replace('width="64" height="48"', f'width="{side}" height="{side}"', 1))
    tracemalloc.start()
    assert "says that 00.png has 32768x32768 pixels" in one_problem(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_bounds_of_runs():
    rng = np.random.default_rng(0)
    for density in (0, 0.02, 0.2, 1):
        for _ in range(20):
            pixels = rng.random((rng.integers(1, 9), rng.integers(1, 9))) < density
            bounds = bounds_of_runs(np.array(runs(pixels.ravel())), pixels.shape[1])
            y, x = np.nonzero(pixels)
            expected = [[x.min(), y.min()], [x.max() + 1, y.max() + 1]] if len(x) else None
            assert (None if bounds is None else bounds.tolist()) == expected


def test_wrong_files_are_named(tmp_path):
    box = '<box label="cat" xtl="0" ytl="0" xbr="9" ybr="9"/>'
    path = tmp_path / "annotations.xml"
    write(tmp_path, box, head="<track/>")
    assert "has tracks of a video; export the task as 'CVAT for images 1.1'" in one_problem(tmp_path)
    write(tmp_path, box)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert "not valid XML" in one_problem(tmp_path)
    path.write_text('<!DOCTYPE a [<!ENTITY e "cat">]>' + text.replace('"cat"', '"&e;"'))
    assert "has a document type declaration" in one_problem(tmp_path)
    path.write_text(text.replace('width="64"', 'width="6e1"'))
    assert "image 1 has no name, width or height" in one_problem(tmp_path)
    path.write_text(text.replace('width="64"', 'width="65"'))
    assert "says that 00.png has 65x48 pixels" in one_problem(tmp_path)
    path.write_text(text.replace("annotations>", "annotation>"))
    assert "is not a file of CVAT, its root is <annotation>" in one_problem(tmp_path)
    path.write_text(text)
    (tmp_path / "00.png").unlink()
    assert "its picture 00.png is missing" in one_problem(tmp_path)
