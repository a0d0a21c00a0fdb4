"""tools.prepare.pictures and formats: orientation tags, the search for pictures, recognized formats."""

from __future__ import annotations

import io
import json

import cv2
import numpy as np
import pytest
from annotated import make_scenes, write_coco, write_cvat, write_labelme
from PIL import Image, ImageOps, features

from dataset.pictures import decode_image, decode_upright, load, read_orientation
from tools.prepare import formats
from tools.prepare.coco import read_coco
from tools.prepare.cvat import read_cvat
from tools.prepare.pictures import Finder, examine
from tools.prepare.source import Wanted
from tools.prepare.writing import Writer
from utils.errors import DataError


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_is_that_of_pillow(tmp_path, orientation, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a"
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(path, format=kind, exif=exif, **options)
    found = examine(str(path))
    assert found.orientation == orientation and found.stored == (3, 5)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert found.upright == expected.shape[:2]
    turned = decode_upright(load(str(path)))[..., ::-1]
    np.testing.assert_allclose(turned.astype(int), expected, atol=0 if kind in ("PNG", "WEBP") else 2)


def test_tags_in_any_place_of_a_png(tmp_path):
    """The chunk eXIf is before or after the pixels; a damaged one and similar bytes do not count."""
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((3, 5), np.uint8)).save(path, exif=exif)
    content = path.read_bytes()
    begin = content.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(content[begin : begin + 4], "big")
    chunk, rest = content[begin:end], content[:begin] + content[end:]
    last = len(rest) - 12  # IEND
    for changed, orientation in (
        (content, 6),
        (rest[:last] + chunk + rest[last:], 6),
        (rest, 1),
        (content.replace(chunk, chunk[:-1] + b"?"), 1),
        (content[:begin] + b"eXIf" + content[begin:], 6),
    ):
        path.write_bytes(changed)
        assert read_orientation(str(path)) == orientation
    assert read_orientation(str(tmp_path / "missing.png")) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("write, read", [(write_coco, read_coco), (write_cvat, read_cvat)])
def test_labels_of_coco_and_cvat_belong_to_the_upright_picture(tmp_path, write, read, orientation):
    """Also if the sizes fit both ways; then a note says so."""
    scene = make_scenes(1, size=(40, 40))[0]
    write(tmp_path / "source", [scene])
    exif = Image.Exif()
    exif[274] = orientation
    path = next((tmp_path / "source").rglob("*.png"))
    pixels = np.asarray(Image.open(path))
    Image.fromarray(pixels).save(path, exif=exif)
    found = read(str(tmp_path / "source"), Wanted())
    assert found.scenes[0].upright
    notes = [note for note in found.notes if "orientation" in note]
    if orientation == 1:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith("1 picture is turned or mirrored by an orientation tag") and str(path) in note
        assert "remove the tag" in note
    (tmp_path / "out").mkdir()
    Writer(str(tmp_path / "out"), False).write(found.scenes, ["train"], found.classes)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    written = decode_image(load(str(next((tmp_path / "out/images").rglob("*.png")))))
    np.testing.assert_array_equal(written[..., ::-1], expected)


@pytest.mark.parametrize("write, read", [(write_coco, read_coco), (write_cvat, read_cvat)])
def test_labels_that_fit_only_the_stored_picture(tmp_path, write, read):
    write(tmp_path, make_scenes(1))
    exif = Image.Exif()
    exif[274] = 6
    path = next(tmp_path.rglob("*.png"))
    Image.fromarray(np.asarray(Image.open(path))).save(path, exif=exif)
    found = read(str(tmp_path), Wanted())
    assert not found.scenes[0].upright and not any("orientation" in note for note in found.notes)


def test_pictures_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.tif"
    picture = Image.fromarray(np.zeros((30, 50, 3), np.uint8))
    picture.save(path, tiffinfo={274: 6})
    with pytest.raises(DataError, match="stored turned or mirrored"):
        examine(str(path))
    picture.save(path, format="ICO")
    with pytest.raises(DataError, match="ICO is not supported"):
        examine(str(path))
    content = io.BytesIO()
    picture.save(content, format="JPEG")
    path.write_bytes(content.getvalue()[:-9])
    with pytest.raises(DataError, match="truncated"):
        examine(str(path))
    exif = Image.Exif()
    exif[274] = 99
    picture.save(path, format="PNG", exif=exif)
    assert examine(str(path)).orientation == 1


def test_names_of_scenes(tmp_path):
    """A name is the path below the folder of the pictures, or else of the source, without images/."""
    finder = Finder(str(tmp_path / "source"), str(tmp_path / "pictures"))
    for picture, name in (
        ("pictures/x/1.png", "x/1"),
        ("source/y/2.b.jpg", "y/2.b"),
        ("source/images/z/3.png", "z/3"),
        ("elsewhere/4.png", "inner/4"),
    ):
        assert finder.name_of(str(tmp_path / picture), "inner") == name


def test_formats_are_recognized_by_content(tmp_path):
    scenes = make_scenes(2)
    for write, name, words in (
        (write_labelme, "labelme", "2 labelme JSON files"),
        (write_coco, "coco", "1 COCO JSON file"),
        (write_cvat, "cvat", "1 XML file of CVAT"),
    ):
        found, what = formats.recognize(str(write(tmp_path / name, scenes)))
        assert found == name and what.startswith(words)
    assert formats.recognize(str(tmp_path / "labelme/00.json"))[0] == "labelme"
    assert formats.recognize(str(tmp_path / "coco/annotations.json"))[0] == "coco"
    with pytest.raises(
        DataError, match="2 labelme JSON files and 1 COCO JSON file and .*choose with --from labelme"
    ):
        formats.recognize(str(tmp_path))
    # A labelme file that is cut off, or whose picture comes first, is still recognized.
    path = tmp_path / "labelme/00.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"imageData": "A" * 300_000, **content}))
    assert formats.recognize(str(path))[0] == "labelme"
    path.write_text(json.dumps(content)[:400] + '"shapes": [], "imagePath": "')
    assert formats.recognize(str(path))[0] == "labelme"


@pytest.mark.parametrize("text", ["", "{}", "nothing", '{"shapes": 1}', '{"a": "images annotations"}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "a.xml").write_text("<annotation><object/></annotation>")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((2, 2, 3), np.uint8))
    for source in (tmp_path, tmp_path / "a.json", tmp_path / "a.xml", tmp_path / "a.png"):
        with pytest.raises(DataError, match=r"no labels of a known format; accepted are labelme JSON files"):
            formats.recognize(str(source))
