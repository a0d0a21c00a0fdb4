"""tools.prepare.writing and advice: names, colors, files, and the numbers that are suggested."""

from __future__ import annotations

import io
import math
import os
import shlex
from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.labels import LabelReader, format_table, read_table
from dataset.pictures import decode_image, load
from engine.options import TrainOptions
from tools.prepare import advice
from tools.prepare.source import Class, Scene
from tools.prepare.writing import Counts, Writer, check_out, class_table, colors_of, new_folder, output_names
from utils.errors import DataError, RunError, UsageError


def scene(name, picture="", size=(2, 3), **options):
    return Scene(name, str(picture), size, lambda: np.ones(size, np.uint8), **options)


def test_names_are_kept_and_distinct():
    names = ["a/x", "b", "b", "b", "../../e", "c\td\n", "/f", ".", "b_2"]
    expected = ["a/x", "b", "b_2", "b_3", "e", "c_d_", "f", "_", "b_2_2"]
    assert output_names([scene(name) for name in names]) == expected


def test_colors_are_distinct():
    black, red = (0, 0, 0), (255, 0, 0)
    assert colors_of([Class("a"), Class("b", red), Class("c", red)])[:2] == [black, red]
    classes = [Class("a"), *(Class(str(k), red if k % 2 else None) for k in range(253))]
    assert len(set(colors_of(classes))) == 254
    assert colors_of([Class("a", red), Class("b", black)]) == [red, black]


@pytest.mark.parametrize("names", [("background", "#1", "a b"), ("x", "void"), tuple(map(str, range(254)))])
def test_the_class_table_is_read_again(tmp_path, names):
    path = tmp_path / "classes.tsv"
    path.write_text(format_table(class_table([Class(name) for name in names])))
    table = read_table(str(path))
    assert table.names == names and table.label_ids().tolist() == list(range(len(names)))
    assert table.train_ids()[255] == 255 and len(set(table.colors)) == len(names)
    table.row_of_color()


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "deep/out"
    for error in (KeyboardInterrupt, DataError("x")):
        with (
            pytest.raises(type(error) if isinstance(error, Exception) else error),
            new_folder(str(out)) as place,
        ):
            (tmp_path / place / "file").touch()
            raise error
        assert not out.exists() and os.listdir(out.parent) == []
    out.mkdir()
    with new_folder(str(out)) as place:
        (tmp_path / place / "file").touch()
        assert os.listdir(out) == []
    assert os.listdir(out) == ["file"] and os.listdir(out.parent) == ["out"]


def test_out_is_new_or_empty(tmp_path):
    source = str(tmp_path / "source")
    check_out(str(tmp_path / "new"), source)
    check_out(f"{source}-2", source)
    (tmp_path / "empty").mkdir()
    check_out(str(tmp_path / "empty"), source, str(tmp_path / "new"))
    (tmp_path / "link").symlink_to(tmp_path)
    for out in ("empty", "empty/x/y", "link/empty/out"):
        with pytest.raises(UsageError, match="is in .*empty, where the next run would read the results"):
            check_out(str(tmp_path / out), str(tmp_path / "x/../empty"))
        with pytest.raises(UsageError, match="is in .*empty, where the next run would read the results"):
            check_out(str(tmp_path / out), source, str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        check_out(str(tmp_path / "file"), source)
    with pytest.raises(UsageError, match="is not empty"):
        check_out(str(tmp_path), source)
    with pytest.raises(UsageError, match="can't be created in .*file"):
        check_out(str(tmp_path / "file/x/y"), source)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match="can't be read"):
        check_out(str(tmp_path / "dangling"), source)


def test_pictures_are_linked_copied_or_turned(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    smooth = cv2.resize(pixels, (300, 200), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(smooth).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    content = (tmp_path / "plain.png").read_bytes()
    scenes = [
        scene("x/plain", tmp_path / "plain.png", upright=True),
        scene("turned", tmp_path / "turned.png", (3, 2), upright=True),
        scene("stored", tmp_path / "turned.png"),
        scene("photo", tmp_path / "turned.jpg", (300, 200), upright=True),
        scene("embedded", tmp_path / "a.json", content=lambda: content),
    ]
    classes = [Class("a"), Class("b")]
    for copy in (False, True):
        folder = tmp_path / f"out{copy}"
        folder.mkdir()
        counts = Writer(str(folder), copy).write(scenes, ["val", "train", "train", "train", "test"], classes)
        assert (folder / "train.lst").read_text() == (
            "images/photo.jpg\tlabels/photo.png\nimages/stored.png\tlabels/stored.png\n"
            "images/turned.png\tlabels/turned.png\n"
        )
        assert (folder / "val.lst").read_text() == "images/x/plain.png\tlabels/x/plain.png\n"
        assert (folder / "test.lst").read_text() == "images/embedded.png\tlabels/embedded.png\n"
        link = folder / "images/x/plain.png"
        assert link.is_symlink() != copy and link.read_bytes() == content
        assert (folder / "images/embedded.png").read_bytes() == content
        turned = decode_image(load(str(folder / "images/turned.png")))[..., ::-1]
        np.testing.assert_array_equal(turned, np.rot90(pixels, -1))
        np.testing.assert_array_equal(
            decode_image(load(str(folder / "images/stored.png")))[..., ::-1], pixels
        )
        photo = decode_image(load(str(folder / "images/photo.jpg")))[..., ::-1]
        assert photo.shape == (300, 200, 3)
        assert np.abs(photo.astype(int) - np.rot90(smooth, -1)).mean() < 4
        reader = LabelReader(read_table(str(folder / "classes.tsv")))
        assert (reader.read(load(str(folder / "labels/turned.png"))) == np.ones((3, 2))).all()
        assert counts["train"].pictures == 3 and counts["train"].pixels[1] == 6 + 6 + 60000
        assert counts["val"].sizes == Counter({(2, 3): 1}) and counts["val"].containing[1] == 1
    with pytest.raises(RunError, match="its label is uint8"):
        Writer(str(tmp_path), True).write([scenes[0]._replace(size=(9, 9))], ["train"], classes)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
def test_embedded_pictures_have_the_ending_of_their_format(tmp_path, kind):
    """Formats other than JPEG and PNG are written as PNG."""
    content = io.BytesIO()
    gray = np.random.default_rng(0).integers(0, 256, (2, 3), np.uint8)
    picture = Image.fromarray(gray).convert("RGB")
    picture.save(content, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    embedded = scene("0", tmp_path / "a.json", content=content.getvalue)
    Writer(str(tmp_path), False).write([embedded], ["train"], [Class("a"), Class("b")])
    (path,) = (tmp_path / "images").iterdir()
    with Image.open(path) as written, Image.open(content) as original:
        assert written.format == ("JPEG" if kind == "JPEG" else "PNG")
        assert path.suffix == (".jpg" if kind == "JPEG" else ".png")
        np.testing.assert_array_equal(np.array(written.convert("RGB")), np.array(original.convert("RGB")))


# Advice


def test_class_weights():
    """The weights are 1 / ln(1.02 + share), relative to the smallest, if the shares differ by 20 times."""
    assert advice.class_weights(np.array([0.6, 0.35, 0.05])) is None
    found = advice.class_weights(np.array([0.9, 0.08, 0.02, 0]))
    expected = [math.log(1.92) / math.log(1.02 + share) for share in (0.9, 0.08, 0.02)]
    assert found == [*(float(f"{weight:.3g}") for weight in expected), 1] and found[0] == 1
    assert advice.class_weights(np.array([1.0, 0])) is None
    assert max(advice.class_weights(np.array([1 - 1e-9, 1e-9])) or ()) < 36


@pytest.mark.parametrize(
    "sizes, crop",
    [
        ({(1024, 2048): 5}, (769, 769)),
        ({(360, 480): 5}, (353, 473)),
        ({(48, 64): 3, (1000, 1000): 2}, (41, 57)),
        ({(769, 9): 1}, (769, 9)),
        ({(8, 4): 1}, (9, 9)),
    ],
)
def test_crop(sizes, crop):
    assert advice.crop_of(Counts(sizes=Counter(sizes))) == crop
    assert all((side - 1) % 8 == 0 for side in crop)


def test_steps():
    assert advice.steps_of(2975) == 59500  # near the 60000 of Cityscapes
    assert advice.steps_of(24) == 2000 and advice.steps_of(10**6) == 60000


def counts(*pixels):
    label = np.repeat(np.arange(len(pixels)), pixels).astype(np.uint8)
    found = Counts()
    found.add(label.reshape(1, -1))
    return found


def test_table_and_remarks():
    classes = [Class("background"), Class("cat"), Class("dog")]
    both = {"train": counts(996, 4), "val": counts(50, 30, 20)}
    both["val"].pixels[255], both["val"].containing[255] = 25, 1
    lines = [line.split() for line in advice.describe(both, classes)]
    assert lines[0] == ["class", "train", "%", "pictures", "val", "%", "pictures"]
    assert lines[1:4] == [
        ["background", "99.600", "1", "50.000", "1"],
        ["cat", "0.400", "1", "30.000", "1"],
        ["dog", "0.000", "0", "20.000", "1"],
    ]
    assert lines[4][:5] == ["(void)", "0.000", "0", "20.000", "1"]
    remarks = advice.remarks(both, classes)
    assert len(remarks) == 2 and "class dog has no pixel in train, so it can't be learned" in remarks[0]
    assert "class background covers 99.60 %" in remarks[1]
    assert any("--class-weights 1,29.6,1 to" in line for line in advice.suggestions("o", both, classes))


def test_commands_can_be_copied():
    """Every flag is one of the command, and the shell splits the lines into the same words."""
    import evaluate
    import train
    from tools import predict

    both = {"train": counts(60, 40), "val": counts(50, 50)}
    out = "my data/it's $HOME"
    parsers = {"train.py": train, "evaluate.py": evaluate, "-m": predict}
    found = advice.commands(out, both, os.path.basename(out))
    assert [words[1] for _, words in found] == ["train.py", "evaluate.py", "-m", "train.py"]
    for _, words in found:
        text = advice.as_command(words)
        assert shlex.split(text.replace(" \\\n", " ")) == words
        assert all(len(line) <= 110 for line in text.splitlines())
        arguments = words[3:] if words[1] == "-m" else words[2:]
        args = parsers[words[1]].get_parser().parse_args(arguments)
        if words[1] == "train.py":
            options = TrainOptions.of(args)
            options.check(1, "cpu")
            assert options.data_dir == out and options.val_every
