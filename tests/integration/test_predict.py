"""tools.predict: its results are those of the network, with the names and folders of the inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import IMG_MEAN, DataError
from dataset.labels import CITYSCAPES
from networks import Seg_Model
from tools import predict, sources
from tools.sources import PictureFile
from utils.drawing.palette import make_palette
from utils.drawing.sheet import Sheet, overlay
from utils.errors import UsageError

SIZE = (40, 56)


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return a random picture, uint8 [h, w, 3] BGR, smooth so that its parts differ for the network."""
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def write(path: Path, content: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), content)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Seg_Model:
    model = Seg_Model(19, backbone="resnet50")
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


@torch.no_grad()
def logits_of(model: Seg_Model, content: np.ndarray) -> torch.Tensor:
    """Compute logits [K, h, w] step by step: BGR minus mean, network, resizing with aligned corners."""
    image = torch.from_numpy(content.astype(np.float32) - IMG_MEAN).permute(2, 0, 1)[None]
    logits = model(image)[0]
    return torch.nn.functional.interpolate(logits, content.shape[:2], mode="bilinear", align_corners=True)[0]


def run(checkpoint: Path, *arguments: object) -> int:
    return predict.main([*map(str, arguments), "--restore-from", str(checkpoint), "--gpu", "cpu"])


def test_a_folder_keeps_its_structure_and_every_result_is_the_network_s(
    tmp_path: Path, checkpoint: Path, model: Seg_Model
) -> None:
    contents = {"a/one": picture(1), "a/b/two": picture(2, (33, 48)), "three": picture(3, (64, 24))}
    for name, content in contents.items():
        write(tmp_path / "in" / f"{name}.png", content)
    out = tmp_path / "out"
    assert run(checkpoint, tmp_path / "in", "--out", out, "--save", ",".join(predict.KINDS)) == 0
    palette = make_palette(CITYSCAPES.colors)
    for name, content in contents.items():
        logits = logits_of(model, content)
        classes = logits.argmax(0).numpy()
        color = Image.open(out / "color" / f"{name}.png")
        assert color.mode == "P" and (np.array(color) == classes).all()
        assert np.array(color.getpalette()[: 3 * 19]).tolist() == palette[: 3 * 19]
        ids = np.array(Image.open(out / "labelIds" / f"{name}.png"))
        assert (ids == CITYSCAPES.label_ids()[classes]).all()
        probabilities = np.load(out / "probabilities" / f"{name}.npy")
        assert probabilities.dtype == np.float16
        assert np.abs(probabilities - logits.softmax(0).numpy()).max() < 1e-3
        shown = np.array(Image.open(out / "overlay" / f"{name}.jpg"), np.float64)
        expected = (content[..., ::-1].astype(np.float64) + np.array(palette).reshape(256, 3)[classes]) / 2
        assert np.abs(shown - expected).mean() < 8  # JPEG
    assert Image.open(out / "sheet.jpg").width > 600
    # The second time, the results of the first are not taken for pictures of the folder.
    inner = tmp_path / "in" / "predictions"
    for _ in range(2):
        assert run(checkpoint, tmp_path / "in", "--out", inner, "--save", "color") == 0
    assert sorted(path.name for path in (inner / "color").rglob("*.png")) == [
        "one.png",
        "three.png",
        "two.png",
    ]


def test_larger_pictures_go_by_tiles_unless_whole(tmp_path: Path, checkpoint: Path) -> None:
    path = write(tmp_path / "p.png", picture(1, (40, 80)))
    results = {}
    for name, flags in {
        "tiles": ["--input-size", "33,33"],
        "whole": ["--input-size", "33,33", "--whole"],
        "fits": [],
        "flip": ["--flip", "--scales", "1,1.5"],
    }.items():
        assert run(checkpoint, path, "--out", tmp_path / name, "--save", "labelIds", *flags) == 0
        results[name] = np.array(Image.open(tmp_path / name / "labelIds/p.png"))
    assert (results["whole"] == results["fits"]).all()
    assert (results["tiles"] != results["whole"]).any() and (results["flip"] != results["whole"]).any()


def test_what_can_t_be_read_is_left_out_and_named(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in/good.png", picture(1))
    (tmp_path / "in/bad.png").write_bytes((tmp_path / "in/good.png").read_bytes()[:-40])
    (tmp_path / "in/worse.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"worse.jpg: not a readable picture.*2 inputs were skipped"):
        run(checkpoint, tmp_path / "in", "--out", tmp_path / "out")
    assert "bad.png: damaged" in capsys.readouterr().err
    assert (tmp_path / "out/color/good.png").exists() and (tmp_path / "out/sheet.jpg").exists()
    assert not list((tmp_path / "out").rglob(".writing*"))


def test_further_pages_are_named_and_the_sheet_says_what_it_shows(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [Image.fromarray(picture(number)) for number in range(3)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "moving.gif", save_all=True, append_images=pages[1:2])
    pages[0].save(tmp_path / "one.tif")
    files = [tmp_path / name for name in ("scan.tif", "moving.gif", "one.tif")]
    assert run(checkpoint, *files, "--out", tmp_path / "out", "--save", "color") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("3 pictures (color); sheet.jpg shows all 3")
    named = f"{tmp_path / 'moving.gif'} (1 of 2 predicted), {tmp_path / 'scan.tif'} (1 of 3 predicted)"
    assert lines[-1] == f"skipped further pages of 2 files: {named}"


def test_the_camera_s_orientation_is_followed(tmp_path: Path, checkpoint: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(1, (40, 56))).save(tmp_path / "in/p.jpg", exif=turned)
    assert run(checkpoint, tmp_path / "in/p.jpg", "--out", tmp_path / "out") == 0
    assert Image.open(tmp_path / "out/color/p.png").size == (40, 56)


def make_video(path: Path, number: int) -> list[np.ndarray]:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12.0, (64, 48))
    pictures = [picture(index, (48, 64)) for index in range(number)]
    for each in pictures:
        writer.write(each)
    writer.release()
    return pictures


def test_a_video_becomes_a_video(tmp_path: Path, checkpoint: Path, model: Seg_Model) -> None:
    make_video(tmp_path / "street.mp4", 4)
    out = tmp_path / "out"
    assert run(checkpoint, tmp_path / "street.mp4", "--out", out, "--frames", "3") == 0
    read = cv2.VideoCapture(str(tmp_path / "street.mp4"))
    for kind in ("overlay", "color"):
        capture = cv2.VideoCapture(str(out / kind / "street.mp4"))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
        assert capture.get(cv2.CAP_PROP_FPS) == 12 and capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 64
    for number in range(1, 4):
        classes = logits_of(model, read.read()[1]).argmax(0).numpy()
        ids = np.array(Image.open(out / f"labelIds/street/{number:06d}.png"))
        assert (ids == CITYSCAPES.label_ids()[classes]).all()
    assert not (out / "labelIds/street/000004.png").exists()


def test_a_camera_runs_until_it_is_interrupted(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Camera:
        """A camera that gives two frames, then Ctrl-C."""

        def __init__(self, number: int):
            assert number == 1
            self.frames = 0

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def get(self, _: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, np.ndarray]:
            self.frames += 1
            if self.frames == 3:
                raise KeyboardInterrupt
            return True, picture(self.frames)

        def release(self) -> None:
            pass

    real = cv2.VideoCapture
    monkeypatch.setattr(
        cv2, "VideoCapture", lambda what: Camera(what) if isinstance(what, int) else real(what)
    )
    assert run(checkpoint, "camera:1", "--out", tmp_path) == 0
    assert real(str(tmp_path / "overlay/camera1.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert len(list((tmp_path / "labelIds/camera1").iterdir())) == 2


def test_an_interrupted_video_leaves_no_half_one(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "v.mp4", 3)
    real = predict.Work.predict
    calls: list[int] = []

    def interrupted(work: predict.Work, content: np.ndarray) -> predict.Prediction:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(work, content)

    monkeypatch.setattr(predict.Work, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "v.mp4", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_frames_of_another_size_stay_in_the_video(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [picture(0, (48, 64)), picture(1, (40, 56)), picture(2, (48, 64))]
    monkeypatch.setattr(predict, "frames", lambda video, most: (10.0, 3, (each for each in pictures)))
    (tmp_path / "v.mp4").write_text("anything")
    assert run(checkpoint, tmp_path / "v.mp4", "--out", tmp_path / "out") == 0
    capture = cv2.VideoCapture(str(tmp_path / "out/overlay/v.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert Image.open(tmp_path / "out/labelIds/v/000002.png").size == (56, 40)


def test_a_video_that_ends_early_is_named(tmp_path: Path, checkpoint: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    for number in range(30):
        writer.write(picture(number, (48, 64)))
    writer.release()
    content = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "v.avi").write_bytes(content[: len(content) // 3])
    with pytest.raises(DataError, match=r"v.avi: ends after \d+ of 30 frames"):
        run(checkpoint, tmp_path / "v.avi", "--out", tmp_path / "out", "--save", "color")


@pytest.mark.slow
def test_a_full_disk_leaves_no_broken_video(tmp_path: Path) -> None:
    """A video that exceeds the largest file of 20 kB is removed, although OpenCV reports no error."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from tools.predict import Film\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "with Film(sys.argv[1], 10.0) as film:\n"
        "    for number in range(60):\n"
        "        film.add(np.random.default_rng(number).integers(0, 256, (240, 320, 3), dtype=np.uint8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "v.mp4")],
        capture_output=True,
        text=True,
        cwd=Path(predict.__file__).parent.parent,
    )
    assert done.returncode == 1 and "RunError" in done.stderr and "can't be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


# Inputs


def test_the_results_have_a_folder_of_their_own(tmp_path: Path, checkpoint: Path) -> None:
    write(tmp_path / "in/p.png", picture(0))
    with pytest.raises(UsageError, match="is also --out"):
        run(checkpoint, tmp_path / "in", "--out", tmp_path / "in")


def test_links_of_windows_lists_and_loops(tmp_path: Path) -> None:
    write(tmp_path / "in/p.png", picture(0))
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    assert [each.name for each in sources.find([str(tmp_path / "in")], "")[0]] == ["p"]
    (tmp_path / "windows.txt").write_bytes("\ufeffin/p.png\r\n".encode())
    assert [each.name for each in sources.find([str(tmp_path / "windows.txt")], "")[0]] == ["in/p"]


def test_what_systems_leave_in_a_folder_is_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    litter = ("._p.png", ".DS_Store", "@eaDir/p.jpg", "__MACOSX/p.png", "a/._q.png")
    for name in ("p.png", *litter, "a/q.png", "moving.mp4", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [each.name for each in sources.find([str(tmp_path)], "")[0]] == ["p", "a/q"]
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: skipped 7 files: 5 hidden or system (.DS_Store, ._p.png, ")
    assert "and 2 more), 2 not pictures (moving.mp4, a/notes.txt)\n" in said
    assert said.count("\n") == 1


def test_a_long_name(tmp_path: Path, checkpoint: Path) -> None:
    path = write(tmp_path / f"{'n' * 240}.png", picture(0))
    assert run(checkpoint, path, "--out", tmp_path / "out", "--save", "color") == 0
    assert (tmp_path / "out/color" / path.name).exists()


def test_frames_beside_their_video(tmp_path: Path) -> None:
    write(tmp_path / "v/000001.png", picture(0))
    make_video(tmp_path / "v.mp4", 1)
    pictures, videos = sources.find([str(tmp_path), str(tmp_path / "v.mp4")], "")
    assert [each.name for each in pictures] == ["v/000001"] and [each.name for each in videos] == ["v.mp4"]


def test_lists_name_pictures_beside_them(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/y.jpg", "z.png"):
        write(tmp_path / name, picture(0))
    (tmp_path / "some.lst").write_text("a/x.png\ta/label.png\n\na/y.jpg\n")
    (tmp_path / "a/up.txt").write_text(f"../z.png\n{tmp_path / 'a/x.png'}\n")
    pictures, _ = sources.find([str(tmp_path / "some.lst"), str(tmp_path / "a/up.txt")], "")
    assert [each.name for each in pictures] == ["a/x", "a/y", "z", "x"]
    assert all(Path(each.path).is_file() for each in pictures)


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    for name in ("p.png", "p.jpg", "sub/p.png"):
        write(tmp_path / name, picture(0))
    arguments = [str(tmp_path / name) for name in ("p.png", "p.jpg", "sub/p.png")]
    assert [each.name for each in sources.find(arguments, "")[0]] == ["p.png", "p.jpg", "p.png_2"]
    odd = write(tmp_path / "odd/p.png_2.png", picture(0))
    assert len({each.name for each in sources.find([*arguments, str(odd)], "")[0]}) == 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing.png", "no such file or folder"),
        ("empty", "no pictures in it"),
        ("blank.txt", "names no picture"),
        ("wrong.lst", "line 2: .*gone.png is not a file"),
        ("binary.lst", "can't be read as a list"),
        ("camera:x", "not the number of a camera"),
    ],
)
def test_inputs_that_are_none(tmp_path: Path, argument: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "p.png", picture(0))
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "wrong.lst").write_text("p.png\ngone.png\n")
    (tmp_path / "binary.lst").write_bytes(b"\xff\xfe\x00")
    path = argument if argument.startswith("camera") else str(tmp_path / argument)
    with pytest.raises(UsageError, match=message):
        sources.find([path], "")


def test_a_video_that_is_none_is_named(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "v.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"v.mp4: can't be opened"):
        run(checkpoint, tmp_path / "v.mp4", "--out", tmp_path / "out")


def test_find_gives_a_file_of_any_name_to_the_decoder(tmp_path: Path) -> None:
    path = tmp_path / "picture.data"
    path.write_bytes(write(tmp_path / "p.png", picture(0)).read_bytes())
    assert sources.find([str(path)], "")[0] == [PictureFile(str(path), "picture")]


@pytest.mark.parametrize("kind", ["FIFO", "device"])
@pytest.mark.parametrize("name", ["p.png", "p.mp4", "p.lst", "folder/p.png", "list of it"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / ("p.png" if name == "list of it" else name)
    path.parent.mkdir(exist_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    given = path.parent if "/" in name else path
    if name == "list of it":
        given = tmp_path / "some.lst"
        given.write_text("p.png\n")
    with pytest.raises(UsageError, match=f"is a {kind}, not a file|is not a file"):
        sources.find([str(given)], "")


def test_a_video_whose_name_would_crash_opencv_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v\udcff.mp4"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="videos need a path in UTF-8"):
        sources.find([str(path)], "")


def test_names_that_are_no_utf8(tmp_path: Path, checkpoint: Path) -> None:
    path = write(tmp_path / "p.png", picture(0)).rename(tmp_path / "p\udcff.png")
    out = tmp_path / "out\udcfe"
    assert run(checkpoint, path, "--out", out) == 0
    assert (out / "labelIds/p\udcff.png").exists() and (out / "overlay/p\udcff.jpg").exists()


# Existing files


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("files", "arguments"),
    [
        (["in/color/p.png"], ["in/color", "--out", "in"]),
        (["in/color/p.png"], ["in/color/p.png", "--out", "in/color/.."]),
        (["in/color/p.png"], ["in/color/some.lst", "--out", "in"]),
        (["in/labelIds/p.png"], ["in/labelIds", "--save", "labelIds", "--out", "in"]),
        (["in/overlay/p.jpg"], ["in/overlay", "--save", "overlay", "--out", "in"]),
        (["in/sheet.jpg"], ["in/sheet.jpg", "--out", "in"]),
        (["a/p.png", "in/color/q.png"], ["a/p.png", "in/color/q.png", "--out", "in"]),
        (["link to in: in/p.png"], ["in", "--out", "out"]),
        (["hard: in/p.png"], ["in", "--out", "out"]),
        (["video: in/color/v.mp4"], ["in/color/v.mp4", "--save", "color", "--out", "in"]),
        (["video: in/v.mp4", "in/labelIds/v/000001.png"], ["in/v.mp4", "in/labelIds/v", "--out", "in"]),
        (["in/p.png", "table: in/color/p.png"], ["in/p.png", "--classes", "in/color/p.png", "--out", "in"]),
    ],
)
def test_no_result_replaces_what_is_read(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = "name\tid\ttrain_id\tcolor\n" + "".join(f"c{k}\t{k}\t{k}\t{k},1,2\n" for k in range(19))
    for name in files:
        kind, _, path = name.rpartition(": ")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if kind == "video":
            make_video(tmp_path / path, 1)
        elif kind == "table":
            (tmp_path / path).write_text(table)
        else:
            write(tmp_path / path, picture(0))
        if kind == "link to in":
            (tmp_path / "out").mkdir()
            (tmp_path / "out/color").symlink_to("../in")
        elif kind == "hard":
            (tmp_path / "out/color").mkdir(parents=True)
            os.link(tmp_path / path, tmp_path / "out/color/p.png")
    if arguments[0].endswith(".lst"):
        (tmp_path / arguments[0]).write_text("p.png\n")
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="--out: would replace its own input"):
        run(checkpoint, *arguments)
    assert files_of(tmp_path) == before


def test_nothing_of_the_network_is_replaced(tmp_path: Path, checkpoint: Path) -> None:
    write(tmp_path / "p.png", picture(0))
    (tmp_path / "out").mkdir()
    own = tmp_path / "out/sheet.jpg"
    own.write_bytes(checkpoint.read_bytes())
    with pytest.raises(UsageError, match="--out: would replace its own input"):
        predict.main(
            [str(tmp_path / "p.png"), "--restore-from", str(own), "--gpu", "cpu", "--out", str(own.parent)]
        )
    assert own.read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize("name", ["sheet.jpg", "color/p.png", "color/v.mp4", "color"])
def test_a_result_s_place_is_a_file_s(tmp_path: Path, checkpoint: Path, name: str) -> None:
    path = write(tmp_path / "p.png", picture(0))
    make_video(tmp_path / "v.mp4", 1)
    (tmp_path / "out/color").mkdir(parents=True)
    if name == "color":
        (tmp_path / "out/color").rmdir()
        (tmp_path / "out/color").write_text("kept")
    else:
        os.mkfifo(tmp_path / "out" / name)
    with pytest.raises(UsageError, match=r"--out: .*(is a FIFO, not a file|Not a directory)"):
        run(checkpoint, path, tmp_path / "v.mp4", "--out", tmp_path / "out", "--save", "color")
    assert (tmp_path / "out" / name).is_fifo() or (tmp_path / "out/color").read_text() == "kept"


# The sheet


def test_a_sheet_shows_pictures_evenly() -> None:
    palette = make_palette(CITYSCAPES.colors)
    sheet = Sheet(CITYSCAPES.names, palette, most=4)
    for number in range(19):
        content = np.full((20, 30, 3), number, np.uint8)
        sheet.add(str(number), content, content, np.full((20, 30), number, np.uint8))
    assert [name for name, _, _ in sheet._kept] == ["0", "8", "16"]
    assert sheet.shown == "3 of 19"
    drawn = np.array(sheet.draw())
    for index in range(19):  # the legend has every class that occurred
        assert (drawn == np.array(palette[3 * index : 3 * index + 3])).all(-1).any()


def test_overlay_mixes_by_opacity() -> None:
    palette = make_palette([(255, 0, 100)])
    shown = np.full((2, 2, 3), 100, np.uint8)
    classes = np.zeros((2, 2), np.uint8)
    for opacity, expected in ((0.0, (100, 100, 100)), (1.0, (255, 0, 100)), (0.25, (139, 75, 100))):
        assert np.abs(overlay(shown, classes, palette, opacity) - np.array(expected)).max() <= 1
    # A black class, such as a background, leaves the picture as it is.
    classes[0] = 1
    mixed = overlay(shown, classes, make_palette([(255, 0, 100), (0, 0, 0)]), 0.25)
    assert (mixed[0] == 100).all() and (mixed[1] != 100).any()
