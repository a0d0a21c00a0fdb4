"""tools.prepare.coco: pixels as pycocotools has them, split, pictures, and errors of COCO files."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from annotated import (
    LABELS,
    coco_content,
    make_scenes,
    parts_by_name,
    polygon,
    runs,
    write_coco,
    write_pictures,
)
from PIL import Image

from dataset.split import sides_in
from tools.prepare import regions
from tools.prepare.coco import read_coco
from tools.prepare.coco_file import told_by
from tools.prepare.source import Problems, Wanted

coco_mask = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO
SIZE = (48, 64)


def write(folder, content) -> None:
    (folder / "annotations.json").write_text(json.dumps(content))


def one_problem(folder, **options) -> str:
    with pytest.raises(Problems) as caught:
        read_coco(str(folder), Wanted(**options))
    assert len(caught.value.lines) == 1, caught.value.lines
    return str(caught.value)


def oracle(folder, ids):
    """Draw the annotations of each picture in order, with the masks of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "annotations.json"))
    labels = []
    for key, image in coco.imgs.items():
        label = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in coco.imgToAnns[key]:
            label[coco.annToMask(annotation) > 0] = ids[annotation["category_id"]]
        labels.append(label)
    return labels


def segmentation(rng, kind):
    """Draw an annotation: one or several polygons, or the RLE of a mask with holes."""
    polygons = [polygon(rng, SIZE) for _ in range(rng.integers(1, 4))]
    if kind == "polygons":
        return [np.ravel(each).tolist() for each in polygons]
    pixels = rng.random(SIZE) < 0.3
    if kind == "counts":
        return {"size": list(SIZE), "counts": runs(pixels.ravel(order="F"))}
    rle = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def test_pixels_are_those_of_pycocotools(tmp_path):
    """Later annotations cover earlier ones: polygons with several parts, and both kinds of RLE with holes."""
    rng = np.random.default_rng(3)
    scenes = make_scenes(12)
    content = coco_content(scenes)
    for annotation in content["annotations"]:
        kind = str(rng.choice(["polygons", "counts", "text"]))
        annotation |= {"segmentation": segmentation(rng, kind), "iscrowd": int(kind != "polygons")}
    write_pictures(tmp_path, scenes)
    write(tmp_path, content)
    found = read_coco(str(tmp_path), Wanted())
    assert [each.name for each in found.classes] == ["background", *LABELS]  # by id, not as in the file
    for scene, expected in zip(found.scenes, oracle(tmp_path, {10: 1, 20: 2, 30: 3}), strict=True):
        np.testing.assert_array_equal(scene.draw(), expected)
        assert scene.draw().dtype == np.uint8


def test_compressed_runs_are_decoded_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 0.99, 1.0):
        for size in ((1, 1), (7, 300), (200, 3), (90, 90)):
            pixels = rng.random(size) < density
            text = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
            decoded = regions.decode_runs(regions.parse_counts(text), pixels.size)
            np.testing.assert_array_equal(decoded.reshape(size[::-1]).T, pixels)


@pytest.mark.parametrize("text", ["\x00", "d01c01\u20ac", "o", "ooooooooooooooooo", " "])
def test_damaged_runs_are_refused(text):
    with pytest.raises(ValueError):
        regions.check_runs(regions.parse_counts(text), 48 * 64)


RLE = {"size": [48, 64], "counts": [48 * 64 - 1, 1]}
SQUARE = [1, 1, 9, 1, 9, 9]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"segmentation": [SQUARE[:4]]}, "a polygon of 2 points, which should be 3 or more"),
        ({"segmentation": [SQUARE, [1, 1]]}, "a polygon of 1 points"),
        ({"segmentation": [SQUARE[:5]]}, "a polygon that is not a list of finite numbers"),
        ({"segmentation": SQUARE}, "a polygon that is not a list of finite numbers"),
        ({"segmentation": [[*SQUARE, "1", 2]]}, "a polygon that is not a list of finite numbers"),
        ({"segmentation": [[*SQUARE, 1e9, 2]]}, "a polygon that is not a list of finite numbers"),
        ({"segmentation": [[0, 0, *([4e6, 0, 0, 1] * 3)]]}, "longer than 4 million pixels"),
        ({"segmentation": [[1, 1] * 100_001]}, "has 100001 points, more than 100000"),
        ({"segmentation": [[100, 1, 109, 1, 109, 9]]}, "is outside of 00.png (64x48 pixels)"),
        ({"segmentation": [[-100, 1, -1, 1, -0.5, 9]]}, "is outside of 00.png"),
        ({"segmentation": "SQUARE"}, "neither polygons nor RLE"),
        ({"segmentation": {**RLE, "size": [64, 48]}}, "an RLE of 48x64, but its picture has 64x48"),
        ({"segmentation": {**RLE, "size": None}}, "an RLE of no valid size"),
        ({"segmentation": {**RLE, "counts": [1, 2]}}, "its runs have 3 pixels in total instead of 3072"),
        ({"segmentation": {**RLE, "counts": [3073, -1]}}, "neither text nor whole numbers from 0"),
        ({"segmentation": {**RLE, "counts": [3071.0, 1]}}, "neither text nor whole numbers from 0"),
        ({"segmentation": {**RLE, "counts": "~~"}}, "does not occur in compressed RLE"),
        ({"segmentation": {**RLE, "counts": "o"}}, "it is cut off"),
        ({"segmentation": []}, "1 annotations have no segmentation, the first has id 1"),
        ({"category_id": 7}, "the unknown category_id 7"),
        ({"category_id": [10]}, "the unknown category_id [10]"),
        ({"image_id": 9}, "the image_id 9, which no image has"),
        ({"image_id": None}, "the image_id None, which no image has"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, changes, words):
    scenes = make_scenes(2)
    write_coco(tmp_path, scenes)
    content = coco_content(scenes)
    content["annotations"][0] |= changes
    write(tmp_path, content)
    problem = one_problem(tmp_path)
    assert words in problem and "annotations.json: " in problem


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("images", None, "images is not a list of objects"),
        ("annotations", [1], "annotations is not a list of objects"),
        ("categories", {}, "categories is not a list of objects"),
        (
            "categories",
            [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}],
            "category id 1 is that of a and of b",
        ),
        ("categories", [{"id": "1", "name": "a"}], "category 1 has no whole number as id"),
        ("images", [{"id": 1, "file_name": "00.png", "height": 0, "width": 64}], "image 1 has no valid id"),
        (
            "images",
            [{"id": 1, "file_name": "00.png", "height": 2**20, "width": 2**20}],
            "image 1 has no valid id",
        ),
        (
            "images",
            [{"id": 1, "file_name": "00.png", "height": True, "width": 64}],
            "image 1 has no valid id",
        ),
        ("images", [{"id": [], "file_name": "00.png", "height": 48, "width": 64}], "image 1 has no valid id"),
    ],
)
def test_wrong_entries_are_named(tmp_path, key, value, words):
    write_coco(tmp_path, make_scenes(1))
    content = {**coco_content(make_scenes(1)), key: value}
    if (key == "images" and value) or (key == "categories" and value):
        content["annotations"] = []
    write(tmp_path, content)
    assert words in one_problem(tmp_path)


def test_problems_with_pictures(tmp_path):
    scenes = make_scenes(3)
    content = coco_content(scenes)
    write_coco(tmp_path, scenes)
    content["images"][1]["id"] = 1
    write(tmp_path, {**content, "annotations": []})
    assert "image id 1 is that of 00.png and of 01.png" in one_problem(tmp_path)
    content["images"][1] |= {"id": 2, "file_name": "./images/../images/00.png"}
    write(tmp_path, content)
    assert "a second time" in one_problem(tmp_path)
    content["images"][1] |= {"file_name": "01.png", "height": 47}
    write(tmp_path, {**content, "annotations": content["annotations"][:3]})
    assert "says that 01.png has 64x47 pixels, but" in one_problem(tmp_path)
    (tmp_path / "images/01.png").write_bytes(b"nothing")
    assert "not a readable picture" in one_problem(tmp_path)
    (tmp_path / "images/01.png").unlink()
    assert "its picture 01.png is missing" in one_problem(tmp_path)
    write_coco(tmp_path, [scene._replace(shapes=[]) for scene in scenes])
    assert "no annotations in 3 pictures" in one_problem(tmp_path)


def test_pictures_without_annotations_are_background(tmp_path):
    scenes = make_scenes(2)
    write_coco(tmp_path, [scenes[0], scenes[1]._replace(shapes=[])])
    found = read_coco(str(tmp_path), Wanted())
    assert not found.scenes[1].draw().any()
    assert any("1 picture is without annotations" in note and "01.png" in note for note in found.notes)
    assert (read_coco(str(tmp_path), Wanted(unlabeled_void=True)).scenes[1].draw() == 255).all()


def test_shapes_of_less_than_a_pixel_are_left_out(tmp_path):
    """Real files have a few of them, which must not be problems."""
    scenes = make_scenes(1)
    write_coco(tmp_path, scenes)
    content = coco_content(scenes)
    content["annotations"].append(
        {**content["annotations"][0], "segmentation": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]}
    )
    empty = {"size": [48, 64], "counts": [48 * 64]}
    content["annotations"].append({**content["annotations"][0], "segmentation": empty})
    write(tmp_path, content)
    found = read_coco(str(tmp_path), Wanted())
    assert any("2 shapes are smaller than a pixel" in note for note in found.notes)


def test_several_files_are_the_source_s_own_split(tmp_path):
    """Roboflow writes files in folders train, valid and test, with an unused first category."""
    scenes = make_scenes(6)
    for part, own in (("train", scenes[:3]), ("valid", scenes[3:5]), ("test", scenes[5:])):
        (tmp_path / part).mkdir()
        write_pictures(tmp_path / part, own)
        content = coco_content(own)
        content["categories"] = [
            {"id": 0, "name": "pets", "supercategory": "none"},
            *({**each, "supercategory": "pets"} for each in content["categories"]),
        ]
        (tmp_path / part / "_annotations.coco.json").write_text(json.dumps(content))
    found = read_coco(str(tmp_path), Wanted())
    assert [each.name for each in found.classes] == ["background", *LABELS]
    assert parts_by_name(found) == {
        **{f"train/{scene.name}": "train" for scene in scenes[:3]},
        **{f"valid/{scene.name}": "val" for scene in scenes[3:5]},
        "test/05": "test",
    }
    assert parts_by_name(read_coco(str(tmp_path / "train"), Wanted())) == {}


def test_the_folders_of_coco_itself(tmp_path):
    """annotations/ has captions and keypoints of the same pictures too, which are in folders like val2017.

    Folders above the source do not matter.
    """
    tmp_path = tmp_path / "test"
    tmp_path.mkdir()
    scenes = make_scenes(4)
    (tmp_path / "annotations").mkdir()
    for part, own in (("train", scenes[:3]), ("val", scenes[3:])):
        write_pictures(tmp_path / f"{part}2017", own)
        for kind in ("instances", "captions", "person_keypoints"):
            path = tmp_path / "annotations" / f"{kind}_{part}2017.json"
            path.write_text(json.dumps(coco_content(own)))
    found = read_coco(str(tmp_path), Wanted())
    assert set(parts_by_name(found).values()) == {"train", "val"} and len(found.scenes) == 4
    assert [scene.name for scene in found.scenes] == [
        "train2017/00",
        "train2017/01",
        "train2017/02",
        "val2017/03",
    ]
    assert any("4 JSON files are not named instances_*" in note for note in found.notes)


@pytest.mark.parametrize(
    "path, sides",
    [
        ("d/instances_train2017.json", {"train"}),
        ("d/valid/_annotations.coco.json", {"val"}),
        ("d/test/a.json", {"test"}),
        ("Train/x/a.json", {"train"}),
        ("d/trainval.json", set()),
        ("d/train_val.json", {"train", "val"}),
    ],
)
def test_sides_of_a_file(path, sides):
    assert sides_in(told_by(path)) == sides


def test_folders_of_the_pictures_in_one_file(tmp_path):
    scenes = make_scenes(6, ("train", "val", "test"))
    write_coco(tmp_path, scenes)
    found = read_coco(str(tmp_path), Wanted())
    assert parts_by_name(found) == {scene.name: scene.name.split("/")[0] for scene in scenes}


def test_a_picture_is_found_by_the_end_of_its_path(tmp_path):
    scenes = make_scenes(2)
    write_pictures(tmp_path / "deep/er/x", scenes[:1])
    write_pictures(tmp_path / "deep/y", scenes[1:])
    content = coco_content(scenes)
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "x\\00.png", "/home/me/01.png"
    write(tmp_path, content)
    found = read_coco(str(tmp_path / "annotations.json"), Wanted())
    assert [scene.name for scene in found.scenes] == ["deep/er/x/00", "deep/y/01"]
    write_pictures(tmp_path / "other/x", scenes[:1])
    assert "x/00.png may be" in one_problem(tmp_path)
    found = read_coco(str(tmp_path), Wanted(pictures=str(tmp_path / "deep")))
    assert [scene.name for scene in found.scenes] == ["er/x/00", "y/01"]
    content["images"][0]["file_name"] = "z/00.png"
    write(tmp_path, content)
    assert "its picture z/00.png is missing" in one_problem(tmp_path)


@pytest.mark.parametrize(
    "folder", ["masks", "Labels", "annotations", "SegmentationClass", "train_masks", "gtFine"]
)
def test_label_pictures_are_not_taken_for_missing_pictures(tmp_path, folder):
    scenes = make_scenes(1)
    write_pictures(tmp_path / folder / "a", scenes)
    write(tmp_path, coco_content(scenes))
    assert "its picture 00.png is missing" in one_problem(tmp_path)
    found = read_coco(str(tmp_path), Wanted(pictures=str(tmp_path / folder)))
    assert found.scenes[0].name == "a/00"
    write_pictures(tmp_path / "photos", scenes)
    found = read_coco(str(tmp_path), Wanted())
    assert found.scenes[0].picture == str(tmp_path / "photos/00.png")
    assert f"taken by name from {tmp_path / 'photos'}" in found.notes[0]


@pytest.mark.parametrize("name", ["{out}/00.png", "../secret/00.png", "x/../../secret/00.png", "C:00.png"])
def test_paths_out_of_the_source_are_not_followed(tmp_path, name):
    scenes = make_scenes(1)
    source, out = tmp_path / "source", tmp_path / "secret"
    source.mkdir()
    write_pictures(out, scenes)
    content = coco_content(scenes)
    content["images"][0]["file_name"] = name.format(out=out)
    write(source, content)
    assert "is missing" in one_problem(source)
    write_pictures(source / "pictures", scenes)
    found = read_coco(str(source), Wanted())
    assert found.scenes[0].picture == str(source / "pictures/00.png")
    found = read_coco(str(source), Wanted(pictures=str(out)))
    assert found.scenes[0].picture == str(out / "00.png")


def test_absolute_paths_into_the_source_are_followed(tmp_path):
    scenes = make_scenes(1)
    for folder in ("a", "b"):
        write_pictures(tmp_path / folder, scenes)
    content = coco_content(scenes)
    content["images"][0]["file_name"] = str(tmp_path / "b/00.png")
    write(tmp_path, content)
    assert read_coco(str(tmp_path), Wanted()).scenes[0].name == "b/00"


@pytest.mark.parametrize("orientation, upright", [(1, True), (3, True), (6, False)])
def test_labels_of_the_stored_size_belong_to_the_upright_picture_if_both_have_it(
    tmp_path, orientation, upright
):
    (scene,) = make_scenes(1)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(scene.picture).save(tmp_path / "00.png", exif=exif)
    write(tmp_path, coco_content([scene]))
    assert read_coco(str(tmp_path), Wanted()).scenes[0].upright == upright


def test_equal_names_in_the_folders_of_a_split(tmp_path):
    """The file of a part takes the picture in the folder of this part."""
    scenes = make_scenes(2)
    for part, own in (("train", scenes[0]), ("val", scenes[1]._replace(name=scenes[0].name))):
        write_pictures(tmp_path / part, [own])
        (tmp_path / f"instances_{part}.json").write_text(json.dumps(coco_content([own])))
    found = read_coco(str(tmp_path), Wanted())
    assert parts_by_name(found) == {"train/00": "train", "val/00": "val"}
    assert [scene.picture for scene in found.scenes] == [
        str(tmp_path / f"{k}/00.png") for k in ("train", "val")
    ]
    write_pictures(tmp_path / "more/val", scenes[:1])
    assert "00.png may be" in one_problem(tmp_path)


def categories(content, *supercategories):
    """Give a new category 0 and the other ones supercategories."""
    content["categories"] = [{"id": 0, "name": "pets"}, *content["categories"]]
    for category, name in zip(content["categories"], supercategories, strict=True):
        category["supercategory"] = name
    return content


@pytest.mark.parametrize(
    "supercategories, kept",
    [
        (("none", "pets", "pets", "pets"), False),
        (("pets", "pets", "pets", "pets"), False),
        (("none", "pets", "pets", "animals"), True),
        (("none", "pets", None, "pets"), True),
        (("none", "", "", ""), True),
    ],
)
def test_only_roboflow_s_heading_is_left_out(tmp_path, supercategories, kept):
    """A category without annotations is a class, unless it is the supercategory of all others."""
    scenes = make_scenes(2)
    write_coco(tmp_path, scenes)
    write(tmp_path, categories(coco_content(scenes), *supercategories))
    found = read_coco(str(tmp_path), Wanted())
    assert [each.name for each in found.classes] == ["background", *["pets"] * kept, *LABELS]
    assert any("category pets is left out" in note for note in found.notes) != kept


def test_an_annotated_heading_is_a_class(tmp_path):
    scenes = make_scenes(2)
    write_coco(tmp_path, scenes)
    content = categories(coco_content(scenes), "none", "pets", "pets", "pets")
    content["annotations"][0]["category_id"] = 0
    write(tmp_path, content)
    assert "pets" in [each.name for each in read_coco(str(tmp_path), Wanted()).classes]


def test_without_pycocotools(tmp_path, monkeypatch):
    write_coco(tmp_path, make_scenes(1))
    regions._pycocotools.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    try:
        with pytest.raises(ValueError, match="pip install pycocotools"):
            read_coco(str(tmp_path), Wanted())
    finally:
        regions._pycocotools.cache_clear()
