"""tools.export: other runtimes give the network's answers, with standard operators only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fill, longest_file
from PIL import Image

from cc_attention import RecurrentCrissCrossAttention, reference
from dataset import IMG_MEAN
from engine.inference import predict_whole
from networks import ABN, CheckpointError, Seg_Model
from networks.variants import DEPTHS, VARIANTS
from tools import export
from utils.errors import RunError, UsageError

pytestmark = pytest.mark.slow

CLASSES = 5
#: Batch, height, width: neither the tool's example nor one of the sizes that it compares itself.
SIZES = [(1, 65, 65), (3, 40, 72), (1, 57, 90)]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Register a backbone with few blocks."""
    DEPTHS["tiny"] = (2, 1, 1, 1)
    yield
    del DEPTHS["tiny"]


def make_model(**options) -> Seg_Model:
    """Return a network with random weights and a gamma of 0.7, so that the attention matters."""
    model = Seg_Model(CLASSES, backbone="tiny", **options).eval()
    fill(model)
    return model


@pytest.fixture(scope="module")
def model(tiny) -> Seg_Model:
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """Return a folder with the checkpoint, where the exported files are made too."""
    path = tmp_path_factory.mktemp("export")
    torch.save(model.state_dict(), path / "checkpoint.pth")
    return path


def run_main(folder: Path, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "COMPARED", ((1, 49, 34),))  # the tests compare for themselves
        patch.setattr(
            sys, "argv", ["export", "--restore-from", f"{folder}/checkpoint.pth", *map(str, arguments)]
        )
        export.main()


def made(folder: Path, name: str, *arguments: object) -> Path:
    if not (folder / name).exists():
        run_main(folder, "--out", folder / name, *arguments)
    return folder / name


def pictures_of(size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(size[1]).integers(0, 256, (*size, 3), dtype=np.uint8)


def expected(model: Seg_Model, size: tuple[int, int, int]) -> torch.Tensor:
    """Return the logits of `pictures_of` in float64, at 1/8 size."""
    other = Seg_Model(CLASSES, recurrence=model.head.cca.recurrence, backbone="tiny").eval()
    other.load_state_dict(model.state_dict())
    images = torch.from_numpy(pictures_of(size)[..., ::-1].astype(np.float64) - IMG_MEAN.astype(np.float64))
    with torch.no_grad():
        return other.double()(images.permute(0, 3, 1, 2))[0]


@pytest.fixture(scope="module")
def answers(model) -> dict[tuple[int, int, int], torch.Tensor]:
    return {size: expected(model, size) for size in SIZES}


def assert_near(answer: np.ndarray | torch.Tensor, logits: torch.Tensor) -> None:
    assert answer.shape == logits.shape
    difference = (torch.as_tensor(answer).double() - logits).abs().max() / logits.abs().max()
    assert difference < 1e-4


@pytest.fixture(scope="module")
def session(folder):
    """Return a function that runs an ONNX file."""
    for name in export.PACKAGES:
        pytest.importorskip(name, reason=f"the package {name} is not installed")
    import onnxruntime

    def run(name: str, pictures: np.ndarray, *arguments: object) -> np.ndarray:
        path = made(folder, name, *arguments)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, {"pictures": pictures})[0]

    return run


@pytest.mark.parametrize("size", SIZES)
def test_onnx_gives_the_logits_of_the_network(session, answers, size):
    assert_near(session("logits.onnx", pictures_of(size), "--output", "logits"), answers[size])


def test_the_attention_counts(model, answers, monkeypatch):
    """Without the attention the answers differ, so the comparisons test it."""
    monkeypatch.setattr(model.head.cca, "recurrence", 1)
    difference = (expected(model, SIZES[0]) - answers[SIZES[0]]).abs().max() / answers[SIZES[0]].abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_onnx_gives_the_classes_at_the_pictures_size(session, answers, size):
    answer = session("classes.onnx", pictures_of(size))
    assert (answer.dtype, answer.shape) == (np.int32, size)
    logits = predict_whole(lambda _: answers[size], torch.zeros(size[0], 3, *size[1:]))
    chosen = logits.gather(1, torch.from_numpy(answer).long().unsqueeze(1)).squeeze(1)
    assert (logits.amax(1) - chosen).max() < 1e-4 * logits.abs().max()
    assert len(np.unique(answer)) > 1


def test_onnx_has_standard_operators_and_free_axes(session, folder):
    session("classes.onnx", pictures_of(SIZES[0]))
    import onnx

    file = onnx.load(folder / "classes.onnx")
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", 18)]
    assert {node.domain for node in file.graph.node} == {""} and not file.functions
    for values, axes in (
        (file.graph.input, ["batch", "height", "width", ""]),
        (file.graph.output, export.AXES),
    ):
        (value,) = values
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == list(axes)
    # No size of the example, of its features or of its stages may be fixed in the file.
    sizes = {
        n for side in export.EXAMPLE[1:] for n in (side, (side + 1) // 2, (side + 3) // 4, (side + 7) // 8)
    }
    constants = [onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer]
    assert not sizes & {int(n) for c in constants if c.dtype == np.int64 for n in c.flatten()}
    # Batch norms are merged into the convolutions, and the auxiliary head is omitted.
    operators = [node.op_type for node in file.graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("Conv") == 3 + 3 * 5 + 4 + 3 + 2 * 3 + 1
    known = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(known["classes"]) == [f"class {number}" for number in range(CLASSES)]
    assert known["channel_order"] == "RGB" and "122.67" in known["mean"].split(",")[0]


def test_examples_of_the_documentation_run(session, folder, tmp_path):
    session("classes.onnx", pictures_of(SIZES[0]))
    (tmp_path / "ccnet.onnx").symlink_to(folder / "classes.onnx")
    (tmp_path / "ccnet.pt2").symlink_to(made(folder, "logits.pt2", "--output", "logits"))
    Image.fromarray(pictures_of(SIZES[0])[0]).save(tmp_path / "street.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert block != blocks[0] or re.search(r"^class \d +\d+\.\d %$", result.stdout, re.MULTILINE)


def test_program_needs_nothing_of_the_project(folder, answers, tmp_path):
    made(folder, "logits.pt2", "--output", "logits")
    np.savez(tmp_path / "pictures.npz", *map(pictures_of, SIZES))
    script = """
import sys, numpy, torch
known = {"classes": ""}
module = torch.export.load(sys.argv[1], extra_files=known).module()
for index, pictures in enumerate(numpy.load("pictures.npz").values()):
    numpy.save(f"{index}.npy", module(torch.from_numpy(pictures)).detach().numpy())
assert "cc_attention" not in sys.modules
print(known["classes"])
"""
    arguments = [sys.executable, "-c", script, str(folder / "logits.pt2")]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[4] == "class 4"
    for index, size in enumerate(SIZES):
        assert_near(np.load(tmp_path / f"{index}.npy"), answers[size])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_exported_form_of_every_variant_is_its_network(variant):
    size = (1, 64, 50)  # of which the stem leaves 32 rows, where the ways to pool differ, and 25 columns
    model = make_model(variant=variant)
    images = torch.from_numpy(pictures_of(size)[..., ::-1] - IMG_MEAN).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(images)[0]
        exported = export.Exported(model, "logits")
        assert not any(isinstance(module, ABN) for module in exported.modules())
        assert_near(exported(torch.from_numpy(pictures_of(size))), logits.double())


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 8, 1, 6), (1, 8, 4, 1), (1, 8, 1, 1)])
def test_plain_attention_is_the_reference(shape):
    attention = RecurrentCrissCrossAttention(shape[1], recurrence=2).double()
    torch.nn.init.constant_(attention.gamma, 0.7)
    x = torch.randn(shape, dtype=torch.float64)
    y = x
    for _ in range(2):
        operands = attention.query_conv(y), attention.key_conv(y), attention.value_conv(y)
        y = y + attention.gamma * reference.criss_cross_attention(*operands)
    torch.testing.assert_close(export.PlainAttention(attention)(x), y)


def test_nothing_is_left_where_the_answers_differ(folder, monkeypatch, tmp_path):
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    monkeypatch.setattr(export, "trace", lambda model: program)
    monkeypatch.setattr(export, "compare", lambda run, model, output: 2e-4)
    (tmp_path / "old.pt2").write_text("kept")
    with pytest.raises(RunError, match="old.pt2.*not written.*2.0e-04 of the largest"):
        run_main(folder, "--out", tmp_path / "old.pt2", "--output", "logits")
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt2"]
    assert (tmp_path / "old.pt2").read_text() == "kept"


def test_classes_are_compared_by_their_logits(model):
    assert export.compare(lambda p: np.zeros(p.shape[:3], np.int32), model, "classes") > 0.1


#: Wrong answers to pictures [n, h, w, 3], which no tolerance allows.
WRONG_ANSWERS = {
    "nan": ("logits", lambda n, h, w: np.full((n, CLASSES, (h + 7) // 8 + 1, (w + 7) // 8 + 1), np.nan)),
    "no class": ("classes", lambda n, h, w: np.full((n, h, w), CLASSES)),
    "negative class": ("classes", lambda n, h, w: np.full((n, h, w), -1)),
    "one class": ("classes", lambda n, h, w: np.zeros((n, 1, 1), int)),
    "one logit": ("logits", lambda n, h, w: np.zeros((1, 1, 1, 1))),
}


@pytest.mark.parametrize("what", WRONG_ANSWERS)
def test_wrong_answers_are_infinitely_far(what, model, monkeypatch):
    monkeypatch.setattr(export, "COMPARED", ((1, 49, 34), (1, 40, 40)))
    output, answer = WRONG_ANSWERS[what]
    assert export.compare(lambda p: answer(*p.shape[:3]), model, output) == np.inf


def test_nan_in_one_answer_of_several_counts(model, monkeypatch):
    sizes = ((1, 49, 34), (1, 40, 40))
    monkeypatch.setattr(export, "COMPARED", sizes)

    def answer(pictures: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pictures[..., ::-1].astype(np.float32) - IMG_MEAN).permute(0, 3, 1, 2)
        logits = model(images)[0].detach().numpy()
        if pictures.shape[:3] == wrong:
            logits[0, 0, 0, 0] = np.nan
        return logits

    for wrong in (None, *sizes):
        assert (export.compare(answer, model, "logits") < 1e-5) == (wrong is None)


def test_a_network_whose_logits_are_not_finite_is_refused(folder, model, monkeypatch, tmp_path):
    large = {f"layer{n}.0.bn3.weight": torch.full((256 * 2 ** (n - 1),), 3e38) for n in range(1, 5)}
    torch.save({**model.state_dict(), **large}, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(
        export, "trace", lambda model: torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    )
    with pytest.raises(CheckpointError, match="checkpoint.pth: the network gives nan or inf"):
        run_main(tmp_path, "--out", tmp_path / "out.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_network_of_zeros_is_compared_too(monkeypatch):
    monkeypatch.setattr(export, "COMPARED", ((1, 49, 34),))
    model = make_model()
    torch.nn.init.zeros_(model.head.bottleneck[3].weight)
    torch.nn.init.zeros_(model.head.bottleneck[3].bias)
    logits = export.Exported(model, "logits")
    assert export.compare(lambda p: logits(torch.from_numpy(p)).detach().numpy(), model, "logits") == 0
    assert export.compare(lambda p: np.ones((1, CLASSES, 7, 5)), model, "logits") == np.inf


@pytest.mark.parametrize("name", ["out.pt2", "out.onnx"])
def test_full_disk_names_the_file_and_leaves_nothing(name, folder, model, monkeypatch, tmp_path):
    if name.endswith(".onnx"):
        for package in export.PACKAGES:
            pytest.importorskip(package)
    program = torch.export.export(torch.nn.Linear(1000, 1000), (torch.zeros(1, 1000),))
    monkeypatch.setattr(export, "trace", lambda model: program)
    monkeypatch.setattr(export, "name_axes", lambda graph: None)
    with longest_file(10**6), pytest.raises(OSError, match="File too large") as error:
        run_main(folder, "--out", tmp_path / name)
    assert error.value.filename == str(tmp_path / name) and not list(tmp_path.iterdir())


def test_out_that_is_an_input_or_no_file(folder, monkeypatch, tmp_path):
    """An input, folder or FIFO as --out is refused before the network is read. A link is followed."""
    checkpoint = tmp_path / "weights.pt2"
    checkpoint.write_bytes((folder / "checkpoint.pth").read_bytes())
    (tmp_path / "link.pt2").symlink_to(checkpoint)
    os.mkfifo(tmp_path / "fifo.pt2")
    (tmp_path / "folder.pt2").mkdir()
    for name, words in (
        ("weights.pt2", "would replace"),
        ("link.pt2", "would replace"),
        ("fifo.pt2", "is a FIFO"),
        ("folder.pt2", "is a folder"),
    ):
        with pytest.raises(UsageError, match=f"--out: (?=.*{name}).*{words}"):
            run_main(folder, "--out", tmp_path / name, "--restore-from", checkpoint)
    monkeypatch.setattr(
        export, "trace", lambda model: torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    )
    monkeypatch.setattr(export, "compare", lambda run, model, output: 0.0)
    (tmp_path / "other.pt2").symlink_to(tmp_path / "target.pt2")
    run_main(folder, "--out", tmp_path / "other.pt2", "--restore-from", checkpoint)
    assert (tmp_path / "other.pt2").is_symlink() and (tmp_path / "target.pt2").stat().st_size
    assert checkpoint.read_bytes() == (folder / "checkpoint.pth").read_bytes()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (["--out", "ccnet.trt"], UsageError, "--out ccnet.trt"),
        (["--out", "a.onnx", "--restore-from", "nowhere.pth"], CheckpointError, "nowhere.pth"),
    ],
)
def test_wrong_usage_is_one_line(folder, monkeypatch, arguments, error, message):
    monkeypatch.setattr(export, "require_packages", lambda out: None)
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=message):
        run_main(folder, *arguments)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, sys)
    with pytest.raises(UsageError, match="onnxscript; run pip install onnx onnxruntime onnxscript"):
        run_main(folder, "--out", folder / "none.onnx")
