"""Loading of checkpoints: what is read from which file, and the errors for others."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evaluate
from dataset import IMG_MEAN
from networks import CheckpointError, Seg_Model, load_weights
from networks.of_run import describe
from networks.pretrained import read_weights
from networks.weights import (
    ACTIVATED,
    BATCH_NORM,
    CLASSIFIER,
    PLAIN,
    batch_norm_of,
    classes_of,
    mark,
    read_state_dict,
)
from segmenter import Segmenter
from tools import common
from utils.errors import UsageError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Seg_Model(5, backbone="resnet50")


@pytest.fixture(scope="module")
def state(model) -> dict[str, Tensor]:
    """Return a state dict filled with one number, which takes little space on the disk."""
    number = torch.full([1], 0.01)
    return {
        name: number.reshape([1] * value.dim()).expand(value.shape)
        for name, value in model.state_dict().items()
    }


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "weights.pth"


def refused(path: Path, read: Callable[[Path], object] = read_state_dict) -> str:
    """Return the line that refuses a checkpoint."""
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


SMALL = {"a.weight": torch.ones(2), "a.bias": torch.zeros(3)}


class TestNames:
    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
    )
    def test_wrapping_modules_are_left_out(self, prefix, path):
        torch.save({prefix + name: value for name, value in SMALL.items()}, path)
        assert list(read_state_dict(path)) == list(SMALL)

    def test_of_parts_too(self, path):
        torch.save({"layer1._orig_mod.0.weight": torch.ones(1), "modules.module.w": torch.ones(1)}, path)
        assert list(read_state_dict(path)) == ["layer1.0.weight", "modules.w"]

    @pytest.mark.parametrize(
        "keys", [["model"], ["state_dict"], ["model", "state_dict"], ["state_dict", "model"]]
    )
    def test_state_dict_in_a_wrapper(self, keys, path):
        content: dict = SMALL
        for key in keys:
            content = {key: content, "epoch": 3}
        torch.save(content, path)
        assert list(read_state_dict(path)) == list(SMALL)

    def test_two_entries_of_one_name(self, path):
        torch.save({**SMALL, "module.a.bias": torch.ones(3)}, path)
        assert "holds a.bias twice" in refused(path)

    def test_two_state_dicts(self, path):
        torch.save({"model": SMALL, "state_dict": SMALL}, path)
        assert "holds both model and state_dict" in refused(path)

    def test_a_file_that_holds_itself(self, path):
        content: dict = {}
        content["model"] = content
        torch.save(content, path)
        assert "'model'" in refused(path)


EYE = torch.eye(64)
QUANTIZED = "ignore:.*quantize.*"
#: An entry of CCNet, its new value, and words of the error.
WRONG: dict[str, tuple[str, Callable[[], object], str]] = {
    "classifier without dimensions": (CLASSIFIER, lambda: torch.tensor(1.0), "has shape []"),
    "bias without dimensions": ("head.bottleneck.3.bias", lambda: torch.tensor(1.0), "has shape []"),
    "no classes": (CLASSIFIER, lambda: torch.zeros(0, 512, 1, 1), "has shape [0, 512, 1, 1]"),
    "no numbers": ("conv1.weight", lambda: torch.zeros(0), "has shape [0]"),
    "meta": ("conv1.weight", lambda: torch.empty(64, 3, 3, 3, device="meta"), "meta device"),
    "sparse": ("conv1.weight", lambda: EYE.to_sparse(), "is sparse"),
    "compressed rows": ("conv1.weight", lambda: EYE.to_sparse_csr(), "is sparse"),
    "quantized": ("bn1.bias", lambda: torch.quantize_per_tensor(EYE[0], 0.1, 0, torch.qint8), "is quantized"),
    "complex": ("bn1.weight", lambda: torch.ones(64, dtype=torch.complex64), "complex64"),
    "integers": ("bn1.weight", lambda: torch.ones(64, dtype=torch.int64), "int64"),
    "booleans": ("bn1.weight", lambda: torch.ones(64, dtype=torch.bool), "bool"),
    "8 bits": ("bn1.weight", lambda: torch.ones(64).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "large view": ("bn1.weight", lambda: torch.ones(1).expand(10**12), "[1000000000000]"),
    "overlapping view": (
        "bn1.weight",
        lambda: torch.ones(99999).as_strided((50000, 50000), (1, 1)),
        "larger",
    ),
    "dictionary": ("bn1.weight", lambda: {"a": torch.ones(64)}, "of type dict"),
    "number": ("bn1.weight", lambda: 1.0, "of type float"),
    "nan": ("bn1.bias", lambda: torch.full((64,), torch.nan), "in 1 of its 307 entries, the first is"),
    "inf": ("bn1.bias", lambda: torch.tensor([*[0.0] * 63, -torch.inf]), "in 1 of its 307 entries"),
    "beyond float32": ("bn1.bias", lambda: torch.full((64,), 1e39, dtype=torch.float64), "beyond float32"),
    "negative variance": ("bn1.running_var", lambda: torch.full((64,), -1e-3), "negative variances"),
    "nan variance": ("bn1.running_var", lambda: torch.full((1,), torch.nan).expand(64), "has nan"),
}


class TestEntries:
    @pytest.mark.filterwarnings("ignore")  # quantized and sparse tensors are on their way out, says torch
    @pytest.mark.parametrize("what", WRONG)
    def test_what_is_no_weight_is_named_and_changes_nothing(self, what, model, state, path):
        name, make, words = WRONG[what]
        torch.save({**state, name: make()}, path)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        message = refused(path, lambda path: load_weights(model, path, complete=True))
        assert name in message and words in message
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_all_that_are_not_finite_are_counted(self, path):
        nan = torch.tensor([0, torch.nan])
        torch.save({"a": torch.ones(2), "b": nan, "c": torch.ones(2), "d": nan.half(), "e": -1 / nan}, path)
        assert "in 3 of its 5 entries, the first is b;" in refused(path)

    def test_a_left_over_one_that_is_not_finite_is_refused_too(self, model, state, path):
        torch.save({**state, "fc.weight": torch.full((2,), torch.nan)}, path)
        assert "the first is fc.weight" in refused(path, lambda path: load_weights(model, path))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_every_type_of_floating_point_is_loaded(self, dtype, model, state, path):
        value = torch.randn(64, 3, 3, 3).to(dtype)
        torch.save({**state, "conv1.weight": value}, path)
        load_weights(model, path, complete=True)
        assert torch.equal(model.conv1.weight, value.float())
        assert (model.layer4[2].conv1.weight == 0.01).all()

    def test_other_classes_are_told_from_no_classifier(self, state, path):
        assert classes_of(path, state) == 5
        for shape in ((), (5,), (0, 512, 1, 1)):
            with pytest.raises(CheckpointError, match=re.escape(f"{CLASSIFIER} has shape {list(shape)}")):
                classes_of(path, {CLASSIFIER: torch.zeros(shape)})

    def test_commands_refuse_them(self, state, path, monkeypatch):
        torch.save({**state, "dsn.3.bias": torch.full((5,), torch.nan)}, path)
        monkeypatch.setattr(
            sys, "argv", ["evaluate.py", "--data-dir", "nowhere", "--restore-from", str(path)]
        )
        opening = argparse.Namespace(restore_from=str(path), gpu="cpu", classes=None, recurrence=None)
        for read in (
            lambda _: evaluate.main(),
            lambda _: common.open_network(opening),
            lambda _: read_weights(str(path), IMG_MEAN.tolist()),
            lambda _: Seg_Model(5, backbone="resnet50", pretrained_model=path),
        ):
            assert "the first is dsn.3.bias" in refused(path, read)

    def test_weights_of_a_library_are_checked_too(self, monkeypatch):
        timm = pytest.importorskip("timm")
        library = timm.create_model("resnet50")
        nn.init.constant_(library.layer4[0].bn1.bias, torch.nan)
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: library)
        with pytest.raises(CheckpointError, match="^timm:resnet50: has nan.*layer4.0.bn1.bias"):
            read_weights("timm:resnet50", IMG_MEAN.tolist())


class TestMark:
    """The kind of batch norm that a state dict is marked for."""

    @pytest.mark.parametrize("zip_file", [True, False])
    def test_torch_saves_it_and_every_module_takes_it(self, zip_file, path):
        module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        torch.save(
            {"state_dict": mark(module.state_dict(), {BATCH_NORM: PLAIN})},
            path,
            _use_new_zipfile_serialization=zip_file,
        )
        read = read_state_dict(path)
        assert batch_norm_of(read) == PLAIN and list(read) == list(module.state_dict())
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        torch.save(read, path)
        assert batch_norm_of(read_state_dict(path)) == PLAIN

    def test_plain_ones_are_not_loaded(self, model, state, path):
        torch.save(mark(state, {BATCH_NORM: PLAIN}), path)
        message = refused(path, lambda path: load_weights(model, path))
        assert "plain batch norm" in message and "convert it back with python -m tools.convert" in message
        torch.save(mark(state, {BATCH_NORM: ACTIVATED}), path)
        load_weights(model, path, complete=True)

    @pytest.mark.parametrize("metadata", [None, 3, {"": None}, {"": {"batch_norm": [1]}}, {"a": {}}])
    def test_metadata_of_another_kind_is_no_mark(self, metadata, path):
        content = mark(SMALL, {})
        content._metadata = metadata  # type: ignore[attr-defined]
        torch.save(content, path)
        assert batch_norm_of(read_state_dict(path)) is None


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class TestFiles:
    @pytest.mark.parametrize("zip_file", [True, False])
    def test_what_would_run_a_command_runs_none_and_gets_no_advice(self, zip_file, path, tmp_path):
        torch.save({"a": Touch(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zip_file)
        message = refused(path)
        assert "would call posix.system" in message and "python -c" not in message
        assert not (tmp_path / "ran").exists()

    def test_other_formats_are_named(self, path, tmp_path):
        path.touch()
        assert "is empty" in refused(path)
        program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, tmp_path / "program.pt2")
        assert "saved by torch.export" in refused(tmp_path / "program.pt2")
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "storages")
        assert "is a tar file; unpack it" in refused(path)
        with tarfile.open(path, "a") as archive:
            archive.add(__file__, "pickle")
        message = refused(path)
        assert "is a tar file of an early version of torch.save; if you trust" in message
        # The advised command overwrites no existing file.
        assert message.endswith(f" and use {tmp_path}/weights_weights.pth")
        (tmp_path / "weights_weights.pth").touch()
        assert refused(path).endswith(f" and use {tmp_path}/weights_weights2.pth")
        torch.save({"a": torch.zeros(100000)}, tmp_path / "plain.pth")
        with (
            zipfile.ZipFile(tmp_path / "plain.pth") as plain,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
        assert "compressed zip file" in refused(path)

    def test_what_is_no_file_is_refused_and_never_waited_for(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        os.mkfifo("fifo")
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind("socket")
            for name, words in (
                ("fifo", "is a FIFO"),
                ("socket", ""),
                ("/dev/zero", "is a device"),
                (str(tmp_path), "is a folder"),
                ("gone", "no such file"),
            ):
                assert words in refused(Path(name))

    def test_safetensors(self, path):
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file({f"module.{name}": value for name, value in SMALL.items()}, path)
        assert list(read_state_dict(path)) == sorted(SMALL)
        path.write_bytes(path.read_bytes()[:-4])
        assert "damaged" in refused(path)
        safetensors.save_file({"a": torch.full((2,), torch.nan)}, path)
        assert "the first is a;" in refused(path)


class TestRecipe:
    """The file args.json beside a checkpoint."""

    def open(self, folder: Path, content: bytes, **flags: object) -> Segmenter:
        (folder / "args.json").write_bytes(content)
        flags = {
            "restore_from": f"{folder}/weights.pth",
            "gpu": "cpu",
            "classes": None,
            "recurrence": None,
            **flags,
        }
        return common.open_network(argparse.Namespace(**flags))

    @pytest.mark.parametrize(
        "content, words",
        [
            (b"{", "can't be read"),
            (b"\xff\xfe\x00", "can't be read"),
            (b"[" * 100000, "can't be read"),
            (b"9" * 10000, "can't be read"),
            (b"[1]", "holds a list, not a dict"),
            (b'{"recurrence": true}', "recurrence is True"),
            (b'{"recurrence": 1e300}', "recurrence is 1e"),
            (b'{"recurrence": 9999999999}', "recurrence is 9999999999"),
            (b'{"recurrence": -1}', "recurrence is -1"),
            (b'{"recurrence": null}', "recurrence is None"),
            (b'{"classes": ["a.tsv"]}', "classes is ['a.tsv']"),
        ],
    )
    def test_what_is_no_recipe_is_refused(self, content, words, state, path, tmp_path):
        torch.save(state, path)
        with pytest.raises(UsageError) as error:
            self.open(tmp_path, content)
        message = str(error.value)
        assert message.startswith(f"{tmp_path}/args.json: {words}") and "\n" not in message

    def test_what_is_no_file_is_refused(self, state, path, tmp_path):
        torch.save(state, path)
        os.mkfifo(tmp_path / "args.json")
        with pytest.raises(UsageError, match=r"args.json: can't be read \(is a FIFO"):
            describe(str(path), state, {})

    def test_flags_go_before_it(self, state, path, tmp_path):
        torch.save(state, path)
        content = json.dumps({"recurrence": "two"}).encode()
        assert self.open(tmp_path, content, recurrence=3).description.recurrence == 3
        assert self.open(tmp_path, b'{"recurrence": 1}').description.recurrence == 1
