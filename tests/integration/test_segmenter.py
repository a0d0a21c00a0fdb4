"""The class Segmenter: the same predictions for every kind of picture, and those of the tools."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, fill
from PIL import Image

import hubconf
from dataset import IMG_MEAN, DataError
from dataset.labels import CITYSCAPES
from networks import Seg_Model
from networks.attention import picture_attention
from networks.weights import ABOUT, mark, metadata_of, read_state_dict
from segmenter import Segmenter, as_rgb
from tools import predict
from utils.errors import CheckpointError, InputError, RunError, UsageError

SIZE = (40, 56)


@pytest.fixture(scope="module")
def segmenter(checkpoint: Path) -> Segmenter:
    return Segmenter.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(small, SIZE[::-1], interpolation=cv2.INTER_CUBIC)


def logits_of(model: Seg_Model, rgb: np.ndarray) -> torch.Tensor:
    """Compute logits [K, h, w] step by step: BGR minus mean, network, resizing with aligned corners."""
    image = torch.from_numpy(rgb[..., ::-1].astype(np.float32) - IMG_MEAN).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model(image)[0]
    return torch.nn.functional.interpolate(logits, rgb.shape[:2], mode="bilinear", align_corners=True)[0]


def test_a_prediction_is_that_of_the_network(segmenter: Segmenter, checkpoint: Path, rgb: np.ndarray) -> None:
    model = Seg_Model(19, backbone="resnet50")
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    logits = logits_of(model.eval(), rgb)
    found = segmenter.predict(rgb)
    assert found.classes.dtype == np.uint8 and (found.classes == logits.argmax(0).numpy()).all()
    assert found.probabilities.dtype == np.float32
    assert np.abs(found.probabilities - logits.softmax(0).numpy()).max() < 1e-4
    colors = np.array(CITYSCAPES.colors, np.uint8)
    assert found.colors.dtype == np.uint8 and (found.colors == colors[found.classes]).all()
    assert len(np.unique(found.classes)) > 1
    assert segmenter.names == list(CITYSCAPES.names) and segmenter.num_classes == 19


def test_every_kind_of_picture_gives_the_same(segmenter: Segmenter, rgb: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    planes = torch.from_numpy(rgb).permute(2, 0, 1)
    kinds = [
        rgb,
        rgb[:, ::-1][:, ::-1],  # a view with negative strides
        np.asarray(Image.fromarray(rgb)),  # read-only
        np.asfortranarray(rgb),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(rgb),
        Image.open(tmp_path / "a.png"),
        Image.fromarray(rgb).convert("RGBA"),
        planes,
        planes.float() / 255,
        planes.double() / 255,
        (planes.float() / 255).requires_grad_(),
        [rgb],
    ]
    right = segmenter.predict(rgb)
    for kind in kinds:
        found = segmenter.predict(kind)
        found = found[0] if isinstance(found, list) else found
        assert (found.classes == right.classes).all()
        assert np.array_equal(found.probabilities, right.probabilities)
    assert segmenter.predict([]) == []


def test_pictures_are_turned_as_their_tag_says(rgb: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(rgb, -1)
    assert (as_rgb(tmp_path / "a.png").numpy() == upright).all()
    assert (as_rgb(Image.open(tmp_path / "a.png")).numpy() == upright).all()


def test_without_probabilities_the_classes_are_the_same(segmenter: Segmenter, rgb: np.ndarray) -> None:
    for options in ({}, {"tile_size": (33, 33)}, {"tile_size": None, "scales": (0.75, 1.25), "flip": True}):
        whole, few = segmenter.predict(rgb, **options), segmenter.predict(rgb, probabilities=False, **options)
        assert few.probabilities is None and (few.classes == whole.classes).all()
    assert not np.array_equal(
        segmenter.predict(rgb, tile_size=(33, 33)).probabilities, segmenter.predict(rgb).probabilities
    )


@pytest.mark.parametrize(
    "options", [[], ["--input-size", "33,33"], ["--whole", "--scales", "1,1.5", "--flip"]]
)
def test_tools_predict_writes_the_same_bits(
    segmenter: Segmenter, checkpoint: Path, rgb: np.ndarray, tmp_path: Path, options: list[str]
) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    arguments = [tmp_path / "a.png", "--restore-from", checkpoint, "--gpu", "cpu", "--out", tmp_path / "out"]
    arguments += ["--save", "color,probabilities", *options]
    assert predict.main([*map(str, arguments)]) == 0
    given = {
        "": {},
        "--input-size 33,33": {"tile_size": (33, 33)},
        "--whole --scales 1,1.5 --flip": {"tile_size": None, "scales": (1, 1.5), "flip": True},
    }[" ".join(options)]
    found = segmenter.predict(tmp_path / "a.png", **given)
    assert (np.array(Image.open(tmp_path / "out/color/a.png")) == found.classes).all()
    written = np.load(tmp_path / "out/probabilities/a.npy")
    assert (written == found.probabilities.astype(np.float16)).all()


def test_attention(segmenter: Segmenter, rgb: np.ndarray) -> None:
    maps = segmenter.attention(rgb, [(3, 4), (30, 50)])
    assert maps.shape == (2, 2, 6, 8) and maps.dtype == np.float32
    assert np.abs(maps.sum((2, 3)) - 1).max() < 1e-5
    image = torch.from_numpy(rgb[..., ::-1].astype(np.float32) - IMG_MEAN).permute(2, 0, 1)[None]
    right = picture_attention(segmenter.model, image, [(30, 50)])
    assert np.abs(maps[1] - right[:, 0].numpy()).max() < 1e-6
    with pytest.raises(UsageError, match=r"pixels: pixel \(40, 0\) is outside of 40 rows"):
        segmenter.attention(rgb, [(40, 0)])


def test_bf16_is_close(segmenter: Segmenter, checkpoint: Path, rgb: np.ndarray) -> None:
    low = Segmenter.load(checkpoint, device="cpu", amp="bf16")
    exact, rounded = segmenter.predict(rgb), low.predict(rgb)
    difference = np.abs(exact.probabilities - rounded.probabilities).max()
    assert 0 < difference < 0.2 and rounded.probabilities.dtype == np.float32
    for amp, message in (("fp8", "--amp fp8: is not one of auto, bf16, fp16"), ("fp16", "requires a GPU")):
        with pytest.raises(UsageError, match=message):
            Segmenter.load(checkpoint, device="cpu", amp=amp)


BAD = {
    "gray": (np.zeros((4, 5), np.uint8), "an array uint8 [4, 5]"),
    "channels first": (np.zeros((3, 4, 5), np.uint8), "an array uint8 [3, 4, 5]"),
    "float array": (np.zeros((4, 5, 3)), "an array float64 [4, 5, 3]"),
    "empty": (np.zeros((0, 5, 3), np.uint8), "an array uint8 [0, 5, 3]"),
    "batch": (torch.zeros(2, 3, 4, 5), "a batch; give a list"),
    "channels last": (torch.zeros(4, 5, 3), "a tensor float32 [4, 5, 3]; give [3, h, w]"),
    "normalized": (torch.full((3, 4, 5), -2.0), "with values from -2 to -2"),
    "0 to 255": (torch.full((3, 4, 5), 200.0), "from 200 to 200"),
    "nan": (torch.full((3, 4, 5), torch.nan), "from nan to nan"),
    "int": (torch.zeros(3, 4, 5, dtype=torch.int64), "give uint8, or float"),
    "16 bits": (Image.fromarray(np.zeros((4, 5), np.uint16)), "convert it to 8 bits"),
    "bytes": (b"a.png", "of type bytes"),
    "none": (None, "of type NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused(segmenter: Segmenter, name: str) -> None:
    picture, words = BAD[name]
    with pytest.raises(UsageError) as error:
        segmenter.predict(picture)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_errors(segmenter: Segmenter, checkpoint: Path, rgb: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.png: no such file"):
        segmenter.predict(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match=r"no.pth: no such file"):
        Segmenter.load(tmp_path / "no.pth")
    with pytest.raises(TypeError, match="unknown option passes; known are"):
        Segmenter.load(checkpoint, passes=2)
    for device, words in (("gpu", "not a device"), ("cuda:99", "no such GPU")):
        with pytest.raises(UsageError, match=words):
            Segmenter.load(checkpoint, device=device)
    with pytest.raises(InputError, match="backbone resnet101"):
        Segmenter.load(checkpoint, backbone="resnet101")
    broken = Segmenter.load(checkpoint, device="cpu")
    with torch.no_grad():
        broken.model.head.bottleneck[3].bias.fill_(torch.nan)
    for probabilities in (True, False):
        with pytest.raises(RunError, match="gives NaN"):
            broken.predict(rgb, probabilities=probabilities)


ARGUMENTS = {
    "tile_size 769": {"tile_size": 769},
    "tile_size (0, 0)": {"tile_size": (0, 0)},
    "tile_size (9,)": {"tile_size": (9,)},
    "scales []": {"scales": []},
    "scales [0]": {"scales": [0]},
    "scales 1": {"scales": 1},
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_impossible_arguments_of_a_prediction(segmenter: Segmenter, rgb: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError) as error:
        segmenter.predict(rgb, **ARGUMENTS[words])
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "flags",
    [{"model": "zz"}, {"backbone": "zz"}, {"recurrence": -1}, {"num_classes": "x"}, {"num_classes": 300}],
)
def test_impossible_arguments_of_load(flags: dict, checkpoint: Path) -> None:
    for path in (None, checkpoint):
        with pytest.raises(UsageError, match=f"Segmenter.load: {next(iter(flags))} is "):
            Segmenter.load(path, device="cpu", **flags)


def test_a_flag_that_differs_from_the_run_is_said(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pth").symlink_to(checkpoint)
    (tmp_path / "args.json").write_text(json.dumps({"recurrence": 1}))
    assert Segmenter.load(tmp_path / "a.pth", device="cpu").description.recurrence == 1
    with pytest.warns(UserWarning, match="--recurrence 3: used instead of 1"):
        assert Segmenter.load(tmp_path / "a.pth", device="cpu", recurrence=3).description.recurrence == 3


# torch.hub

PROGRAM = """
import sys
import numpy as np
sys.path.insert(0, {own!r})
import utils, dataset
from PIL import Image
import torch
torch.set_num_threads({threads})  # results depend on the number by rounding
segmenter = torch.hub.load({folder!r}, "ccnet", weights={weights!r}, source="local", device="cpu")
again = torch.hub.load({folder!r}, "ccnet", weights={weights!r}, source="local", device="cpu")
found = segmenter.predict({picture!r})
np.savez({out!r}, classes=found.classes, probabilities=found.probabilities, colors=found.colors,
         attention=again.attention({picture!r}, [(3, 4)]))
assert isinstance(again, type(segmenter))
# Neither the modules nor the path of the process changed.
import loss, fused
assert [utils.mine, dataset.mine, loss.mine, fused.mine] == [1, 2, 3, 4]
assert not any(name.partition(".")[0] in ("networks", "segmenter", "engine") for name in sys.modules)
assert {folder!r} not in sys.path
"""


@pytest.mark.slow
def test_hub_in_a_process_with_packages_of_the_same_names(
    segmenter: Segmenter, checkpoint: Path, rgb: np.ndarray, tmp_path: Path
) -> None:
    for number, name in enumerate(("utils", "dataset", "loss", "fused"), 1):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "__init__.py").write_text(f"mine = {number}\n")
    picture, out = str(tmp_path / "a.png"), str(tmp_path / "out.npz")
    Image.fromarray(rgb).save(picture)
    places = {"own": tmp_path / "own", "folder": ROOT, "weights": checkpoint, "picture": picture, "out": out}
    threads = torch.get_num_threads()
    program = PROGRAM.format(threads=threads, **{name: str(place) for name, place in places.items()})
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, right = np.load(out), segmenter.predict(picture)
    assert (found["classes"] == right.classes).all() and (found["colors"] == right.colors).all()
    assert np.array_equal(found["probabilities"], right.probabilities)
    assert np.array_equal(found["attention"], segmenter.attention(picture, [(3, 4)]))


def test_the_hub_s_own_modules() -> None:
    """The modules below the prefix are those of the repository, and not the ones of this process."""
    module = hubconf._module("utils.errors")
    assert module.__name__.startswith("ccnet_") and module.InputError is not InputError
    assert module.__file__ == str(ROOT / "utils/errors.py")
    assert hubconf._module("utils.errors") is module
    # A cache written from rewritten code would break the modules under their usual names.
    assert "hubconf" not in Path(module.__file__).read_text()


def test_every_import_can_be_rewritten() -> None:
    for name in hubconf._OWN:
        folder = ROOT / name
        for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
            tree = hubconf._Rewriter().visit(ast.parse(path.read_text()))
            nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
            imported = [getattr(node, "module", None) or node.names[0].name for node in nodes]
            assert not {module.split(".")[0] for module in imported} & set(hubconf._OWN), path
    with pytest.raises(ImportError, match="import utils.errors: write it as from"):
        hubconf._Rewriter().visit(ast.parse("import utils.errors"))


def test_random_weights() -> None:
    loaded = Segmenter.load(None, device="cpu", backbone="resnet50", num_classes=4)
    assert loaded.num_classes == 4 and loaded.path is None and loaded.files == []
    assert loaded.predict(np.zeros((9, 9, 3), np.uint8)).probabilities.shape == (4, 9, 9)


# One file is enough


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run: weights of five classes, args.json, and a class table with other ids than train ids."""
    folder = tmp_path_factory.mktemp("run")
    model = Seg_Model(5, backbone="resnet50", recurrence=1)
    fill(model)
    torch.save(model.state_dict(), folder / "CS_scenes_20.pth")
    rows = ["name\tid\ttrain_id\tcolor", *(f"thing {k}\t{10 * k}\t{k}\t{k},9,{50 * k}" for k in range(5))]
    (folder / "table.tsv").write_text("\n".join([*rows, "nothing\t7\t255\t1,1,1"]) + "\n")
    arguments = {"recurrence": 1, "num_classes": 5, "classes": str(folder / "table.tsv"), "num_steps": 20}
    arguments |= {"learning_rate": 0.02, "data_dir": "/somewhere", "model": "ccnet", "backbone": "resnet50"}
    (folder / "args.json").write_text(json.dumps(arguments))
    return folder


@pytest.fixture(scope="module")
def one_file(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the run to one file in a folder of its own; return it."""
    pytest.importorskip("safetensors")
    from tools import convert

    path = tmp_path_factory.mktemp("alone") / "ccnet.safetensors"
    convert.main([str(run_folder / "CS_scenes_20.pth"), str(path), "--to", "safetensors"])
    return path


@pytest.mark.slow
def test_one_file_describes_its_network(run_folder: Path, one_file: Path, rgb: np.ndarray) -> None:
    before, after = (
        Segmenter.load(path, device="cpu") for path in (run_folder / "CS_scenes_20.pth", one_file)
    )
    assert after.description._replace(classes=before.description.classes) == before.description
    assert after.names == before.names == [f"thing {k}" for k in range(5)]
    assert after.labels.colors() == before.labels.colors()
    assert after.labels.table.labels == before.labels.table.labels
    assert after.run["learning_rate"] == 0.02 and "data_dir" not in after.run
    one, other = before.predict(rgb), after.predict(rgb)
    assert np.array_equal(one.probabilities, other.probabilities) and np.array_equal(one.colors, other.colors)


@pytest.mark.slow
def test_round_trip_bit_for_bit(run_folder: Path, one_file: Path, tmp_path: Path) -> None:
    from tools import convert

    convert.main([str(one_file), str(tmp_path / "back.pth")])
    convert.main([str(tmp_path / "back.pth"), str(tmp_path / "again.safetensors"), "--to", "safetensors"])
    first = read_state_dict(run_folder / "CS_scenes_20.pth")
    for path in (one_file, tmp_path / "back.pth", tmp_path / "again.safetensors"):
        state = read_state_dict(path)
        assert state.keys() == first.keys()
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert Segmenter.load(path, device="cpu").names == [f"thing {k}" for k in range(5)]
    assert metadata_of(read_state_dict(tmp_path / "again.safetensors")) == metadata_of(
        read_state_dict(one_file)
    )


@pytest.mark.slow
def test_every_command_reads_it(one_file: Path, rgb: np.ndarray, tmp_path: Path) -> None:
    from conftest import run

    (tmp_path / "own").mkdir()
    Image.fromarray(rgb).save(tmp_path / "own/a.png")
    ids = np.repeat(np.array([0, 10, 20, 40, 7], np.uint8), 8)[:40, None].repeat(56, 1)
    Image.fromarray(ids).save(tmp_path / "own/a_label.png")
    (tmp_path / "own/all.lst").write_text("a.png\ta_label.png\n")
    data = ["--data-dir", tmp_path / "own", "--data-list", tmp_path / "own/all.lst", "--whole"]
    done = run(
        "evaluate.py", *data, "--restore-from", one_file, "--output-dir", tmp_path / "out", "--gpu", "cpu"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/result.txt").read_text())
    assert len(result["IU_array"]) == 5
    classes = Segmenter.load(one_file, device="cpu").predict(rgb).classes
    assert (np.array(Image.open(tmp_path / "out/outputs/a.png")) == classes).all()
    done = run(
        "tools.predict", tmp_path / "own/a.png", "--restore-from", one_file, "--gpu", "cpu", "--out",
        tmp_path / "predicted",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = np.array(Image.open(tmp_path / "predicted/labelIds/a.png"))
    assert (written == 10 * classes).all()
    done = run("tools.report", tmp_path / "out", "--gpu", "cpu", "--attention", "1")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/report.html").read_text()
    assert "no pictures" not in page and "thing 3" in page and "sidewalk" not in page
    done = run(
        "tools.attention", tmp_path / "own/a.png", "--restore-from", one_file, "--gpu", "cpu", "--out",
        tmp_path / "attention",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.load(next((tmp_path / "attention").glob("*.npy"))).shape == (1, 6, 8)  # recurrence 1
    done = run("tools.profile", "--restore-from", one_file, "--input-size", "33,33", "--rounds", "0")
    assert done.returncode == 0 and "R=1" in done.stdout, done.stdout + done.stderr


DAMAGED = {
    "not JSON": ("{", "is damaged"),
    "a list": ("[1]", "is damaged"),
    "labels": ('{"model": "ccnet", "labels": 3}', "class table is not a list"),
    "a row": ('{"model": "ccnet", "labels": [3, 4]}', "class table is invalid (row 0"),
    "a color": (
        '{"labels": [{"name": "a", "id": 0, "train_id": 0, "color": [1, 2, "x"]}]}',
        "class table is invalid (color",
    ),
    "other number": (
        '{"labels": [{"name": "a", "id": 0, "train_id": 0, "color": null}]}',
        "its class table has 1 classes",
    ),
    "recurrence": ('{"model": "ccnet", "recurrence": -1}', "recurrence is -1"),
    "model": ('{"model": 7}', "model is 7"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_description_is_refused(name: str, run_folder: Path, tmp_path: Path) -> None:
    text, words = DAMAGED[name]
    state = read_state_dict(run_folder / "CS_scenes_20.pth")
    torch.save(mark(state, {ABOUT: text}), tmp_path / "a.pth")
    with pytest.raises(InputError) as error:
        Segmenter.load(tmp_path / "a.pth", device="cpu")
    assert str(error.value).startswith(f"{tmp_path}/a.pth: ") and words in str(error.value)
