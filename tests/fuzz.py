"""Fuzz every input of the commands: flags, lists, tables, pictures, checkpoints, files of runs.

    python tests/fuzz.py --minutes 10 [--seed S] [--target NAME]

Whatever the input, a command ends with status 0, 1 or 2 and without a traceback, within LIMIT seconds, and
every file is still there that was there before. Unless the status is 0, the last line says what is wrong. A
function that reads a file raises an InputError or returns what is in the file.

tests/integration/test_fuzz.py runs a few fixed inputs of each target. This command runs new ones for the
given time and prints how many. Its exit status is 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # run as a script, outside pytest

import annotated  # noqa: E402
import cv2  # noqa: E402
import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import state_restored, write_pair  # noqa: E402
from hypothesis import HealthCheck, Phase  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from dataset import CSDataSet, DataError, check, pictures  # noqa: E402
from dataset.labels import LabelReader, read_table  # noqa: E402
from dataset.mini import __main__ as mini  # noqa: E402
from engine.training import checkpoint  # noqa: E402
from networks import Seg_Model  # noqa: E402
from networks.variants import DEPTHS  # noqa: E402
from networks.weights import match_weights, read_state_dict  # noqa: E402
from tools import attention, convert, explore, export, predict, profile, report, seeds  # noqa: E402
from tools.prepare import __main__ as prepare  # noqa: E402
from utils.args import exit_status  # noqa: E402
from utils.errors import InputError, RunError  # noqa: E402

#: Longest time for an input, in seconds.
LIMIT = 60.0
#: Depth of the backbone while a fuzzer runs, so that a run takes a second.
SHALLOW = (1, 1, 1, 1)


class Hang(BaseException):
    """An input took longer than LIMIT. Not an Exception, so that no command can catch it."""


# The files that commands run on


class Ground:
    """A folder with a small data set, a run on it and odd files, which no command may change.

    Attributes:
        folder: all of it.
        pair: the relative paths of a picture and its label.
        data, run: the data set, and a run of one step with its evaluation.
        labeled: pictures with files of labelme.
        masks: folders with label pictures, by their kind.
        checkpoint: the run's weights.
        odd: paths that are given for files and folders of any kind.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.data, self.run, self.odd_files = folder / "data", folder / "run", folder / "odd"
        self.odd_files.mkdir(parents=True)
        for split, count in (("train", 3), ("val", 2)):
            for number in range(count):
                image, label = write_pair(self.data, split, number, (33, 49))
        self.pair = image, label
        scenes = annotated.make_scenes(3)
        self.labeled = annotated.write_labelme(folder / "labeled", scenes)
        self.masks = {
            "voc": annotated.write_voc(folder / "voc", scenes),
            "pair": annotated.write_pair(folder / "two", scenes),
        }
        (folder / "pairs.lst").write_text(f"{image}\t{label}\n")
        (folder / "classes.tsv").write_text(
            "name\tid\ttrain_id\tcolor\nleft\t0\t0\t0,0,0\nright\t1\t1\t255,0,0\nvoid\t2\t255\t9,9,9\n"
        )
        self.checkpoint = self.run / "CS_scenes_1.pth"
        self.picture = self.data / image
        arguments = [*small_train(self), "--snapshot-dir", str(self.run)]
        assert call("train.py", train.main, arguments).status == 0
        arguments = [*small_evaluate(self), "--restore-from", str(self.checkpoint)]
        assert call("evaluate.py", evaluate.main, arguments).status == 0
        odd = self.odd_files
        (odd / "empty").touch()
        (odd / "text").write_text("nothing of use\n")
        (odd / "folder").mkdir()
        (odd / "loop").symlink_to("loop")
        os.mkfifo(odd / "fifo")
        (odd / "bytes").write_bytes(bytes(range(256)) * 40)
        self.odd = [
            *map(str, sorted(odd.iterdir())),
            *map(str, (self.picture, self.checkpoint, self.data, self.run, folder / "classes.tsv")),
            *(
                "",
                "/dev/null",
                "/dev/zero",
                "/dev/null/file",
                "two\nlines",
                os.fsdecode(b"not\xffutf8"),
                "x" * 5000,
            ),
        ]
        self.before = self.contents()

    def contents(self) -> dict[str, list[str]]:
        """Return files by content, without the lock of the run, which each run writes again."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name != checkpoint.LOCK:
                status = path.stat()
                # Any change of a file changes its ctime, which no command can set.
                digest = _digest(path, status.st_ino, status.st_size, status.st_ctime_ns)
                found.setdefault(digest, []).append(str(path))
        return found


@functools.cache
def _digest(path: Path, *_version: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def small_train(ground: Ground) -> list[str]:
    flags = "--backbone resnet50 --input-size 17,17 --batch-size 2 --num-workers 0 --gpu cpu --num-steps 1"
    return ["--data-dir", str(ground.data), *flags.split(), "--print-frequency", "1"]


def small_evaluate(ground: Ground) -> list[str]:
    return [
        "--data-dir",
        str(ground.data),
        *["--backbone", "resnet50", "--whole", "--num-workers", "0", "--gpu", "cpu"],
    ]


def small_report(run: str, out: str) -> list[str]:
    return [run, *["--pictures", "1", "--attention", "0", "--gpu", "cpu"], "--out", f"{out}/a.html"]


@functools.cache
def ground() -> Ground:
    folder = Path(tempfile.mkdtemp(prefix="ccnet-fuzz-"))
    with shallow_network():
        return Ground(folder)


def remove_ground() -> None:
    """Delete what `ground` has made, if it has made anything."""
    if ground.cache_info().currsize:
        shutil.rmtree(ground().folder)
        ground.cache_clear()


@contextlib.contextmanager
def shallow_network() -> Iterator[None]:
    with mock.patch.dict(DEPTHS, resnet50=SHALLOW):
        yield


class Ended:
    """The exit status and the output of a command."""

    def __init__(self, status: int, output: str, errors: str):
        self.status, self.output, self.errors = status, output, errors


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hang(f"no end after {seconds:g} seconds")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def call(name: str, main: Callable[[], int | None], arguments: list[str]) -> Ended:
    """Run a command's main in this process, as its script does. Exceptions propagate."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        state_restored(),
        mock.patch.object(sys, "argv", [name, *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            status = exit_status(main)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
    return Ended(status, output.getvalue(), errors.getvalue())


def check_command(name: str, main: Callable[[], int | None], arguments: list[str]) -> int:
    """Run a command, check that it ends as every command has to, and return its exit status."""
    with shallow_network(), time_limit(LIMIT):
        ended = call(name, main, arguments)
    assert ended.status in (0, 1, 2), f"status {ended.status}"
    assert "Traceback" not in ended.errors, ended.errors
    if ended.status:
        last = ended.errors.rstrip("\n").rsplit("\n", 1)[-1]
        assert ": error: " in last, f"status {ended.status} without a line: {last!r}"
    # Compare by content, because a file may be moved, as the states of an earlier run are.
    now = ground().contents()
    missing = [names for digest, names in ground().before.items() if len(now.get(digest, ())) < len(names)]
    assert not missing, f"changed or deleted: one of each of {missing}"
    return ended.status


# Flags

#: Values that are valid and cheap, or far out of range.
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "17,17",
    "33",
    "0.5",
    "1.0",
    "0.5,1",
    "-1",
    "-0",
    "1e-300",
    "1e39",
    "1e300",
    "nan",
    "inf",
    "-inf",
    "1,2,3",
    "0x10",
    "1_0",
    "99999999999999999999",
    "1000000,1000000",
    "1e1",
    "true",
]
WORDS = (
    "",
    " ",
    " 1",
    "a,b",
    ",",
    "\u0663",
    "\u00e9",
    os.fsdecode(b"\xff"),
    "9" * 5000,
    "one\ntwo",
    "--",
    "-x",
    "%s{}",
)
#: Flags that a fuzzer does not give: they start processes, open cameras or make a run long.
LEFT_OUT = {
    "--help", "--nproc", "--local-rank", "--num-steps", "--rounds", "--seeds", "--fit", "--resume",
    "--compile",
}  # fmt: skip


def values(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    if action.nargs == 0:
        return st.just([])
    pools = [st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8).map(_as_argument)]
    if action.choices:
        pools.append(st.sampled_from([str(choice) for choice in action.choices]))
    if action.type is None:
        pools.append(st.sampled_from(ground().odd))
    return st.one_of(pools).map(lambda value: [value])


def _as_argument(text: str) -> str:
    """Return a text as the system can hand it over: without NUL, its bytes as Python decodes them."""
    return os.fsdecode(text.replace("\0", "").encode("utf-8", "replace"))


def flags(parser: argparse.ArgumentParser) -> st.SearchStrategy[list[str]]:
    """Draw up to three flags of a parser with values of every kind."""
    actions = [
        action
        for action in parser._actions
        if action.option_strings and not LEFT_OUT & set(action.option_strings)
    ]
    one = st.sampled_from(actions).flatmap(
        lambda action: values(action).map(
            lambda value: [f"{action.option_strings[0]}={value[0]}"] if value else [action.option_strings[0]]
        )
    )
    return st.lists(one, min_size=1, max_size=3).map(lambda parts: [word for part in parts for word in part])


class Command:
    """A command to be fuzzed: its parser, its main, and arguments with which it works and is quick.

    An export or a series of seeds takes minutes: the arguments of these two end in a refusal after all flags.
    """

    def __init__(self, name: str, module: Any, arguments: Callable[[Ground, str], list[str]]):
        self.name, self.module, self.arguments = name, module, arguments

    def body(self, drawn: list[str]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            check_command(self.name, self.module.main, [*self.arguments(ground(), scratch), *drawn])


COMMANDS = (
    Command("train.py", train, lambda g, out: [*small_train(g), "--snapshot-dir", out]),
    Command(
        "evaluate.py",
        evaluate,
        lambda g, out: [*small_evaluate(g), "--restore-from", str(g.checkpoint), "--output-dir", out],
    ),
    Command("check.py", check, lambda g, _: [str(g.data), "--num-workers", "1"]),
    Command("mini.py", mini, lambda _, out: [f"{out}/CS", "--train", "1", "--val", "1", "--size", "32x64"]),
    Command(
        "predict.py",
        predict,
        lambda g, out: [str(g.picture), "--restore-from", str(g.checkpoint), "--gpu", "cpu", "--out", out],
    ),
    Command(
        "attention.py",
        attention,
        lambda g, out: [str(g.picture), "--restore-from", str(g.checkpoint), "--gpu", "cpu", "--out", out],
    ),
    Command(
        "explore.py",
        explore,
        lambda g, out: [str(g.checkpoint), str(g.picture), "--gpu", "cpu", "--out", f"{out}/a.html"],
    ),
    Command("convert.py", convert, lambda g, out: [str(g.checkpoint), f"{out}/converted.pth"]),
    Command(
        "export.py",
        export,
        lambda g, out: ["--restore-from", str(g.checkpoint), "--out", f"{out}/exported.zip"],
    ),
    Command(
        "report.py",
        report,
        lambda g, out: small_report(str(g.run), out),
    ),
    Command(
        "profile.py",
        profile,
        lambda _, out: ["--gpu", "cpu", "--input-size", "33,33", "--backbone", "resnet50", "--rounds", "0"],
    ),
    Command("seeds.py", seeds, lambda g, out: [f"{out}/seeds", "--seeds", "0"]),
    Command("prepare.py", prepare, lambda g, out: [str(g.labeled), f"{out}/prepared"]),
)


# Text: lists and tables


def lines(words: list[str]) -> st.SearchStrategy[bytes]:
    """Draw a file of lines that consist of words, tabs and other text, in any encoding."""
    word = st.sampled_from(words) | st.sampled_from(WORDS) | st.text(max_size=6)
    line = st.lists(word, max_size=5).flatmap(
        lambda parts: st.sampled_from(["\t", " ", ","]).map(lambda s: s.join(parts))
    )
    text = st.lists(line, max_size=5).flatmap(
        lambda rows: st.sampled_from(["\n", "\r\n"]).map(lambda end: end.join(rows))
    )
    encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    return st.builds(lambda t, e: t.encode(e, "replace"), text, encodings) | st.binary(max_size=60)


def list_body(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, time_limit(LIMIT):
        path = os.path.join(folder, "list")
        Path(path).write_bytes(content)
        try:
            data = CSDataSet(str(ground().data), path, crop_size=(9, 9), num_classes=19)
            data.check()
        except InputError as error:
            _is_one_line(error)
            return
        for index in range(len(data)):
            data[index]


def table_body(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, time_limit(LIMIT):
        path = os.path.join(folder, "table")
        Path(path).write_bytes(content)
        try:
            table = read_table(path)
        except InputError as error:
            _is_one_line(error)
            return
        assert sorted({label.train_id for label in table.labels} - {255}) == list(range(len(table.classes)))


def _is_one_line(error: Exception) -> None:
    assert str(error).strip() and "Traceback" not in str(error)


# Pictures and labels

LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG", "TGA", "PCX", "ICO", "JPEG2000")
LABEL_MODES = ("1", "L", "P", "I;16", "I", "F", "LA", "RGB", "RGBA", "CMYK")


@st.composite
def encoded_labels(draw: st.DrawFn) -> tuple[np.ndarray, bytes, str]:
    """Draw label ids, and a picture of them in any format and mode that Pillow writes."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    highest = draw(st.sampled_from([1, 2, 3, 15, 18, 255]))
    ids = np.random.default_rng(draw(st.integers(0, 999))).integers(
        0, highest + 1, (height, width), dtype=np.uint8
    )
    kind, mode = draw(st.sampled_from(LABEL_FORMATS)), draw(st.sampled_from(LABEL_MODES))
    image = _in_mode(ids, mode, draw)
    options: dict[str, Any] = {}
    if kind == "PNG" and mode == "P":
        options["bits"] = draw(st.sampled_from([1, 2, 4, 8]))
        if highest >= 2 ** options["bits"]:
            hypothesis.reject()
    if kind == "WEBP":
        options["lossless"] = draw(st.booleans())
    if kind == "TIFF":
        options["compression"] = draw(st.sampled_from([None, "tiff_lzw", "packbits"]))
    file = io.BytesIO()
    try:
        image.save(file, format=kind, **options)
    except (OSError, ValueError, KeyError, TypeError):
        hypothesis.reject()
    return ids, file.getvalue(), mode


def _in_mode(ids: np.ndarray, mode: str, draw: st.DrawFn) -> Image.Image:
    if mode == "1":
        return Image.fromarray(ids > 0)
    if mode == "P":
        image = Image.fromarray(ids)
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
        return image
    if mode == "I;16":
        return Image.fromarray(ids.astype(np.uint16))
    if mode == "I":
        return Image.fromarray(ids.astype(np.int32))
    if mode == "F":
        return Image.fromarray(ids.astype(np.float32))
    return Image.fromarray(ids).convert(mode)


def label_body(drawn: tuple[np.ndarray, bytes, str]) -> None:
    """Check that a label file is read as the ids that were written, or refused."""
    ids, content, mode = drawn
    expected = (ids > 0).astype(np.uint8) if mode == "1" else ids
    with tempfile.TemporaryDirectory() as folder, time_limit(LIMIT):
        path = os.path.join(folder, "label.png")
        Path(path).write_bytes(content)
        try:
            header = pictures.read_header(path)
            encoded = pictures.load(path)
            found = LabelReader(num_classes=255).read(encoded)
        except InputError as error:
            _is_one_line(error)
            return
    assert (header.height, header.width) == (encoded.height, encoded.width) == ids.shape
    np.testing.assert_array_equal(found, expected)


@st.composite
def damaged_pictures(draw: st.DrawFn) -> bytes:
    """Draw a picture file with bytes changed, removed or doubled, or another size in its header."""
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    extension = draw(st.sampled_from([".png", ".jpg", ".bmp", ".tiff", ".webp", ".ppm"]))
    content = bytearray(cv2.imencode(extension, pixels)[1].tobytes())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), 90) - 1) | st.integers(0, len(content) - 1))
        kind = draw(st.sampled_from(["change", "cut", "double", "number"]))
        if kind == "change":
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "double":
            content[at:at] = content[at : at + draw(st.integers(1, 40))]
        else:
            number = struct.pack(
                draw(st.sampled_from(["<I", ">I"])), draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1]))
            )
            content[at : at + 4] = number
        if not content:
            break
    return bytes(content)


def picture_body(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, time_limit(LIMIT):
        path = os.path.join(folder, "picture.png")
        Path(path).write_bytes(content)
        for decode in (pictures.decode_image, pictures.decode_upright, pictures.decode_label):
            try:
                pictures.read_header(path)
                encoded = pictures.load(path)
                found = decode(encoded)
            except InputError as error:
                _is_one_line(error)
                continue
            sizes = {(encoded.height, encoded.width)}
            if decode is pictures.decode_upright:
                sizes.add((encoded.width, encoded.height))
            assert found.shape[:2] in sizes


# Checkpoints


@functools.cache
def _entries() -> dict[str, torch.Tensor]:
    """Return all entries of a shallow network, each expanded from one number, a file of a few kilobytes."""
    with shallow_network(), torch.device("meta"):
        model = Seg_Model(19, backbone="resnet50")
    return {
        name: torch.ones((), dtype=entry.dtype).expand(entry.shape)
        for name, entry in model.state_dict().items()
    }


ODD_ENTRIES: tuple[Callable[[], Any], ...] = (
    lambda: torch.tensor(1.0),
    lambda: torch.zeros(0),
    lambda: torch.zeros(0, 512, 1, 1),
    lambda: torch.full((64, 3, 3, 3), float("nan")),
    lambda: torch.full((19,), float("inf")),
    lambda: torch.zeros(19, 512, 1, 1, dtype=torch.complex64),
    lambda: torch.zeros(19, dtype=torch.int64),
    lambda: torch.zeros(19, dtype=torch.bool),
    lambda: torch.ones(64, 3, 3, 3).to_sparse(),
    lambda: torch.empty(64, 3, 3, 3, device="meta"),
    lambda: torch.ones(1).expand(10**15),
    lambda: "text",
    lambda: None,
    lambda: 3,
    lambda: {"weight": torch.ones(2)},
    lambda: [torch.ones(2)],
)
WRAPPERS: tuple[Callable[[Any], Any], ...] = (
    lambda state: state,
    lambda state: {"state_dict": state},
    lambda state: {"model": state, "epoch": 3},
    lambda state: {"model": {"state_dict": state}},
    lambda state: {f"module.{name}": entry for name, entry in state.items()},
    lambda state: {f"_orig_mod.module.{name}": entry for name, entry in state.items()},
    lambda state: list(state.items()),
    lambda state: None,
    lambda state: {3: torch.ones(1), **state},
)


#: An edit of a checkpoint: name of the entry, kind of the edit, and its number or name.
Edit = tuple[str, str, Any]


def checkpoint_edits() -> st.SearchStrategy[tuple[list[Edit], int]]:
    """Draw edits of the entries of a network, and the number of a wrapper."""
    names = st.sampled_from(["conv1.weight", "head.bottleneck.3.weight", "dsn.3.bias"])
    names |= st.sampled_from(sorted(_entries()))
    odd = st.tuples(names, st.just("odd"), st.integers(0, len(ODD_ENTRIES) - 1))
    removed = st.tuples(names, st.just("removed"), st.none())
    renamed = st.tuples(names, st.just("renamed"), st.text(max_size=9))
    edits = st.lists(st.one_of(odd, removed, renamed), max_size=3)
    return st.tuples(edits, st.integers(0, len(WRAPPERS) - 1))


def checkpoint_body(drawn: tuple[list[Edit], int]) -> None:
    """Check that an edited checkpoint fits a network with only finite numbers, or is refused."""
    edits, wrapper = drawn
    state: dict[Any, Any] = dict(_entries())
    for name, what, how in edits:
        entry = state.pop(name, None)
        if what == "odd":
            state[name] = ODD_ENTRIES[how]()
        elif what == "renamed" and entry is not None:
            state[how + name] = entry
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = os.path.join(folder, "c.pth")
        torch.save(WRAPPERS[wrapper](state), path)
        _read_checkpoint(path)
        with shallow_network(), torch.device("meta"):
            model = Seg_Model(19, backbone="resnet50")
        with time_limit(LIMIT):
            try:
                _, loaded = match_weights(model, path, complete=True)
            except InputError as error:
                _is_one_line(error)
                return
        assert all(entry.isfinite().all() for entry in loaded.values()), "an entry is not finite"


def checkpoint_bytes_body(changes: list[tuple[int, int]]) -> None:
    """Check that a checkpoint with damaged bytes is read or refused."""
    file = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.float16)}, file)
    content = bytearray(file.getvalue())
    for at, value in changes:
        content[at % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "c.pth")
        Path(path).write_bytes(content)
        _read_checkpoint(path)


def _read_checkpoint(path: str) -> None:
    with time_limit(LIMIT), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = read_state_dict(path)
        except InputError as error:
            _is_one_line(error)
            return
    assert all(isinstance(entry, torch.Tensor) for entry in state.values())


# JSON files of a run

ODD_JSON: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**70, -7.5, 1e308, float("nan"), float("inf"), "x", ""),
    *([], [[]], {}, {"a": 1}, [1, 2], ["abc"]),
)


def _places(content: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in a JSON content, at most three of each list."""
    found = [path]
    if isinstance(content, dict):
        for key, value in content.items():
            found += _places(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content[:3]):
            found += _places(value, (*path, index))
    return found


@st.composite
def damaged_json(draw: st.DrawFn, content: Any) -> bytes:
    """Draw a JSON file with values replaced or removed, or bytes that are not JSON."""
    if draw(st.integers(0, 9)) == 0:
        return draw(
            st.binary(max_size=30) | st.sampled_from([b"", b"[" * 100000, b"null", b'{"a": 1', b"\xff{}"])
        )
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_places(content)))
        if not path:
            content = copy.deepcopy(draw(st.sampled_from(ODD_JSON)))
            continue
        at = content
        for key in path[:-1]:
            at = at[key]
        if draw(st.booleans()):
            at[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODD_JSON)))
        else:
            del at[path[-1]]
    return json.dumps(content).encode()


RUN_FILES = ("args.json", "environment.json", "log.jsonl", "result.txt")


@st.composite
def damaged_runs(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(RUN_FILES))
    text = (ground().run / name).read_text()
    return name, draw(damaged_json(json.loads(text)))


def report_body(drawn: tuple[str, bytes]) -> None:
    """Check that the report of a run with a damaged file is a page, or names the damaged file."""
    name, content = drawn
    with tempfile.TemporaryDirectory() as folder:
        for each in (*RUN_FILES, "confusion.png"):
            shutil.copy(ground().run / each, folder)
        Path(folder, name).write_bytes(content)
        check_command("report.py", report.main, small_report(folder, folder))
        assert Path(folder, name).read_bytes() == content


# Annotation files


@st.composite
def damaged_annotations(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a file of labelme, COCO or CVAT with values replaced or removed, and its name."""
    scenes = annotated.make_scenes(3)
    kind = draw(st.sampled_from(["labelme", "masks", "polygons", "counts", "text", "cvat", "cvat masks"]))
    if kind in ("labelme", "masks"):
        return "00.json", draw(damaged_json(annotated.labelme_page(scenes[0], kind == "masks")))
    if not kind.startswith("cvat"):
        return "coco.json", draw(damaged_json(annotated.coco_content(scenes, kind)))
    root = annotated.cvat_content(scenes, kind == "cvat masks")
    for _ in range(draw(st.integers(1, 3))):
        element = draw(st.sampled_from(list(root.iter())))
        odd: st.SearchStrategy[str] = st.sampled_from(NUMBERS) | st.text(
            st.characters(categories=["L", "N", "P"]), max_size=8
        )
        if draw(st.booleans()) and element.attrib:
            element.set(draw(st.sampled_from(sorted(element.attrib))), draw(odd))
        elif draw(st.booleans()):
            element.text = draw(odd)
        else:
            element.clear()
    content = ElementTree.tostring(root)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 20)) :]
    return "cvat.xml", content


def annotation_body(drawn: tuple[str, bytes]) -> None:
    """Check that a damaged file is refused without a result, or gives a whole one."""
    name, content = drawn
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        shutil.copytree(ground().labeled, source)
        if not name.startswith("00"):
            for path in source.glob("*.json"):
                path.unlink()
        (source / name).write_bytes(content)
        status = check_command("prepare.py", prepare.main, [str(source), str(out)])
        assert sorted(os.listdir(folder)) == (["source"] if status else ["out", "source"])
        if status == 0:
            table = read_table(str(out / "classes.tsv"))
            data = [CSDataSet(str(out), str(out / f"{part}.lst"), table=table) for part in ("train", "val")]
            assert sum(map(len, data)) >= 2


# Folders with label pictures

#: Files of a folder that may be damaged, by its kind.
OF_FOLDERS = {
    "voc": ("labelmap.txt", "class_names.txt", "SegmentationClass/00.png", "JPEGImages/00.png"),
    "pair": ("classes.txt", "classes.tsv", "train.lst", "val.lst", "labels/00.png", "images/00.png"),
}


@st.composite
def damaged_folders(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """Draw the kind of a folder with label pictures, a file in it, and the damaged content of the file."""
    kind = draw(st.sampled_from(sorted(OF_FOLDERS)))
    name = draw(st.sampled_from(OF_FOLDERS[kind]))
    path = ground().masks[kind] / name
    content = path.read_bytes() if path.exists() else b""
    if name.endswith((".lst", ".tsv")):
        rows = [f"images/{stem}.png\tlabels/{stem}.png" for stem in ("00", "01")]
        if name == "classes.tsv":
            rows = ["name\tid\ttrain_id\tcolor", *(f"{k}\t{k}\t{k}\t{k},9,9" for k in range(4))]
        content = "\n".join(rows).encode()
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + draw(st.integers(0, 20)) :]
    return kind, name, content


def folder_body(drawn: tuple[str, str, bytes]) -> None:
    """Check that a damaged folder is refused without a result, or has the same labels in each way of use."""
    kind, name, content = drawn
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        shutil.copytree(ground().masks[kind], source)
        if name.endswith(".lst"):
            for each in ("train.lst", "val.lst"):
                (source / each).write_text("images/02.png\tlabels/02.png\n")
        (source / name).write_bytes(content)
        status = check_command("prepare.py", prepare.main, [str(source), str(out)])
        assert sorted(os.listdir(folder)) == (["source"] if status else ["out", "source"])
        if kind == "voc":
            return
        try:
            data = [CSDataSet(str(source), split=split) for split in ("train", "val")]
            labels = [each.picture(k, False).label for each in data for k in range(len(each))]
        except DataError as error:
            assert "\n" not in str(error)
            return
        assert status == 0 and sum(map(len, data)) == len(labels)
        prepared = [CSDataSet(str(out), split=split) for split in ("train", "val")]
        assert [each.labels.names() for each in prepared] == [each.labels.names() for each in data]


# The states of a run

STATES = (1, 2)


@functools.cache
def _states() -> dict[str, bytes]:
    """Return the files of two states of a small run, whose weights are the number of their step."""
    with tempfile.TemporaryDirectory() as folder:
        for step in STATES:
            recipe, path = {"batch_size": 4, "input_size": [33, 33]}, checkpoint.state_path(folder, step)
            parts = {name: part.state_dict() for name, part in _parts(step).items()}
            checkpoint.save(checkpoint.State(step, path, recipe, checkpoint.Validation()), parts, len(STATES))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _parts(value: float) -> dict[str, Any]:
    """Return a network whose weights are `value`, and its optimizer with momentum."""
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return {"model": model, "optimizer": optimizer}


@st.composite
def damaged_states(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Draw files of states whose content differs from what was written."""
    found = []
    for name in draw(st.lists(st.sampled_from(sorted(_states())), min_size=1, max_size=2, unique=True)):
        content = _states()[name]
        if name.endswith(".json"):
            found.append((name, draw(damaged_json(json.loads(content)))))
        else:
            at, value = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 255))
            found.append(
                (name, content[:at] + bytes([value]) + content[at + 1 :][: draw(st.integers(0, 9999))])
            )
    return found


def state_body(drawn: list[tuple[str, bytes]]) -> None:
    """Check that a run resumes from a damaged state at the step of its weights, or refuses and keeps it."""
    with tempfile.TemporaryDirectory() as folder, time_limit(LIMIT):
        for name, content in (_states() | dict(drawn)).items():
            Path(folder, name).write_bytes(content)
        before = sorted(path.read_bytes() for path in Path(folder).iterdir())
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                state = checkpoint.newest_state(folder)
                if state is not None:
                    parts = _parts(0)
                    checkpoint.load(state, parts)
            except (InputError, RunError) as error:
                _is_one_line(error)
                state = None
        if state is not None:
            assert all((weight == state.step).all() for weight in parts["model"].parameters())
        assert sorted(path.read_bytes() for path in Path(folder).iterdir()) == before


# The targets

Target = Callable[[], tuple[st.SearchStrategy[Any], Callable[[Any], None]]]


def targets() -> dict[str, Target]:
    """Return, by name, functions that give a strategy and the function that takes its inputs."""

    def of_command(command: Command) -> Target:
        return lambda: (flags(command.module.get_parser()), command.body)

    columns = ["name", "id", "train_id", "color", "0", "1", "255", "-", "1,2,3", "#"]
    byte = st.tuples(st.integers(0, 4000), st.integers(0, 255))
    return {f"flags of {command.name}": of_command(command) for command in COMMANDS} | {
        "list": lambda: (lines([*ground().pair, *ground().odd]), list_body),
        "class table": lambda: (lines(columns), table_body),
        "label formats": lambda: (encoded_labels(), label_body),
        "damaged pictures": lambda: (damaged_pictures(), picture_body),
        "checkpoint entries": lambda: (checkpoint_edits(), checkpoint_body),
        "checkpoint bytes": lambda: (st.lists(byte, min_size=1, max_size=8), checkpoint_bytes_body),
        "states": lambda: (damaged_states(), state_body),
        "run files": lambda: (damaged_runs(), report_body),
        "annotations": lambda: (damaged_annotations(), annotation_body),
        "folders": lambda: (damaged_folders(), folder_body),
    }


def run_target(name: str, examples: int, seed: int | None) -> int:
    """Run inputs of a target; return their number.

    Args:
        seed: of the inputs; None for those that the suite has each time.

    Raises:
        AssertionError or what a command raised: the smallest input found that fails is in its notes.
    """
    strategy, body = targets()[name]()
    number = 0

    def counted(drawn: Any) -> None:
        nonlocal number
        number += 1
        body(drawn)

    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    test = settings(hypothesis.given(strategy)(counted))
    test = test if seed is None else hypothesis.seed(seed)(test)
    test()
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the first inputs; a new one without it")
    parser.add_argument("--target", action="append", help="one of the targets, by name; may be given again")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.randrange(2**31)
    print(f"seed {seed}", flush=True)
    end = time.monotonic() + 60 * args.minutes
    tried: Counter[str] = Counter()
    failed: dict[str, str] = {}
    # A full disk, or a change of the files that this process reads, would end the fuzzer too.
    os.chdir(tempfile.mkdtemp(prefix="ccnet-fuzz-here-"))
    names = args.target or list(targets())
    try:
        while time.monotonic() < end and len(failed) < len(names):
            for name in names:
                if name in failed or time.monotonic() > end:
                    continue
                try:
                    tried[name] += run_target(name, 10 if name.startswith("flags") else 100, seed)
                except (Exception, Hang):
                    failed[name] = traceback.format_exc()
                    print(f"FAILS: {name}\n{failed[name]}", flush=True)
            seed += 1
    finally:
        remove_ground()
    for name in names:
        print(f"{name}: {tried[name]} inputs{', FAILED' if name in failed else ''}")
    print(f"{sum(tried.values())} inputs in {args.minutes:g} minutes; {len(failed)} targets failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
