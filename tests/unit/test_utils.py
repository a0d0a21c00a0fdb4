"""The package utils: numbers, files and shortages."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine.runtime import distributed
from engine.training.log import RunLog
from utils import args as flags
from utils import run_files
from utils.drawing.chart import draw_curves
from utils.errors import InputError, RunError, UsageError
from utils.files import (
    check_output_file,
    check_outputs,
    open_input,
    read_input,
    replacing,
    unwritable,
    write_file,
)
from utils.resources import LEAST_BYTES, check_fits, physical_memory, shortage


@pytest.fixture
def never_waits() -> Iterator[None]:
    """Fail a test that waits for a FIFO, instead of hanging."""

    def waited(_number: int, _frame: object) -> None:
        raise TimeoutError("waits for a FIFO")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(kind: str, path: Path) -> Path:
    """Make a file that is not a regular one."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        path.parent.mkdir(exist_ok=True)
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


KINDS = ("FIFO", "socket", "folder", "device")

# Numbers


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (flags.positive_int, "1", 1),
        (flags.positive_int, "+007", 7),
        (flags.seed, str(2**63 - 1), 2**63 - 1),
        (flags.batch, "65536", 65536),
        (flags.positive_float, "1e-37", 1e-37),
        (flags.positive_float, ".5", 0.5),
        (flags.positive_float, "3.E+2", 300.0),
        (flags.fraction, "1", 1.0),
        (flags.size, "769", (769, 769)),
        (flags.size, "32768,1", (32768, 1)),
        (flags.scales, "0.5,1,16", [0.5, 1.0, 16.0]),
    ],
)
def test_numbers_are_exact(kind, text: str, value: object) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (flags.positive_int, ["0", "-1", str(2**31), "9" * 6000, "1.0", "1e3"]),
        (flags.seed, [str(2**63), "-1"]),
        (flags.batch, ["65537", "99999999999999999998"]),
        (flags.workers, ["1025", str(10**9)]),
        (flags.recurrence, ["101", str(10**9)]),
        (flags.positive_float, ["0", "1e-50", "1e39", "1e999", "-1", "1e-99999"]),
        (flags.fraction, ["1.01", "-0.1"]),
        (flags.size, ["32769,1", "1000000,1000000", "0", "1,2,3", "1,", ",", "-5,5"]),
        (flags.scales, ["1e300", "0", "1,,1", "17"]),
    ],
)
def test_other_numbers_are_refused(kind, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert len(str(error.value)) < 200 and "give" in str(error.value)


@pytest.mark.parametrize("kind", [flags.positive_int, flags.positive_float, flags.size, flags.scales])
@pytest.mark.parametrize(
    "text", ["1_000", " 5 ", "", "\u0663", "\uff15", "nan", "inf", "-inf", "0x10", "1\n", "\udcff", "a" * 999]
)
def test_what_python_alone_takes_for_numbers_is_refused(kind, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)


# Files


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_no_files_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    with pytest.raises(OSError, match=rf"is a {kind}, not a file|No such device"):
        read_input(make(kind, tmp_path / "x"))


def test_open_input_reads_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("ä\n", encoding="utf-8")
    with open_input(tmp_path / "x", "r", encoding="utf-8") as file:
        assert file.read() == "ä\n"
    with pytest.raises(FileNotFoundError):
        open_input(tmp_path / "none")


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").write_text("old")
    (tmp_path / "link").symlink_to("there/x")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there/x").read_text() == "new"
    (tmp_path / "dangling").symlink_to("there/y")
    write_file(tmp_path / "dangling", b"made")
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "there/y").read_text() == "made"


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_no_files_stay_what_they_are(tmp_path: Path, kind: str) -> None:
    path = make(kind, tmp_path / "x")
    before = path.lstat()
    with pytest.raises(OSError, match=f"is a {kind}, not a file") as error:
        write_file(path, "text")
    assert error.value.filename == str(path) and str(path) in str(unwritable(error.value))
    with pytest.raises(UsageError, match=rf"--out: .*x is a {kind}, not a file"):
        check_outputs("--out", [str(path)])
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("encoder error -2"), ValueError("other")],
)
def test_a_failure_names_the_final_file_and_leaves_the_old_one(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, replacing(path) as temporary:
        Path(temporary).write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["x"] and path.read_text() == "old"
    if isinstance(raised.value, OSError):
        line = str(unwritable(raised.value))
        assert (
            line.startswith(f"{path}: can't be written (") and ".writing" not in line and "None" not in line
        )
        assert ("make room" in line) == (error.errno == errno.ENOSPC)


def test_text_with_names_that_are_no_utf8_is_written(tmp_path: Path) -> None:
    write_file(tmp_path / "x", "道 a\udcff \ud800")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "道 a\\udcff \\ud800"


def test_no_output_is_an_input_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    path = tmp_path / "in/p.png"
    path.write_text("picture")
    os.link(path, tmp_path / "hard.png")
    (tmp_path / "link.png").symlink_to("in/p.png")
    (tmp_path / "folder").symlink_to("in")
    (tmp_path / "in/other.png").write_text("picture")
    same = ["in/p.png", "in/deep/../p.png", "folder/p.png", "link.png", "hard.png", "./in//p.png"]
    for name in same:
        with pytest.raises(UsageError, match=r"--out: would replace its own input"):
            check_outputs("--out", [str(tmp_path / "in/other.png"), str(tmp_path / name)], [None, str(path)])
    check_outputs("--out", [str(tmp_path / "in/other.png"), str(tmp_path / "none/x")], [str(path), "gone"])
    with pytest.raises(UsageError, match="would replace its own input"):
        check_output_file("--json", str(tmp_path / "link.png"), [str(path)])
    check_output_file("--json", str(tmp_path / "in/other.png"), [str(path)])


def test_no_output_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    outputs = [str(tmp_path / name) for name in ("a/x.png", "a/y.png", "b/x.png")]
    for _ in range(2):
        check_outputs("--out", outputs[:2])
        with pytest.raises(UsageError, match="a/x.png and .*b/x.png are the same file"):
            check_outputs("--out", outputs)
        (tmp_path / "a/x.png").touch()


def test_outputs_that_can_have_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("file/x", "Not a directory"),
        ("n" * 300, "too long"),
        ("none/" + "n" * 256, "too long"),
        ("loop", "symbolic links"),
    ):
        with pytest.raises(UsageError, match=rf"--out: .*{words}.*name another"):
            check_outputs("--out", [str(tmp_path / name)])
    with pytest.raises(UsageError, match="is not a file name"):
        check_outputs("--out", [f"{tmp_path}/"])
    with pytest.raises(UsageError, match="no file can be written in"):
        check_output_file("--out", str(tmp_path / "none/x"))


# JSON of runs


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[" * 100_000,
        b"[" * 30 + b"]" * 30,
        b"1e999",
        b"[NaN]",
        b'{"a": Infinity}',
        b"9" * 5000,
    ],
    ids=range(9),
)
def test_json_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "args.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"args.json: can't be read .*; fix or delete the file"):
        run_files.read_arguments(str(tmp_path))


def test_json_is_read_as_it_is(tmp_path: Path) -> None:
    assert run_files.read_arguments(str(tmp_path)) == {} and run_files.read_environment(str(tmp_path)) == []
    assert run_files.read_log(str(tmp_path)) == ([], 0) and run_files.read_result(str(tmp_path)) is None
    (tmp_path / "args.json").write_text('\ufeff{"a": [1, {"b": null}]}', encoding="utf-8")
    assert run_files.read_arguments(str(tmp_path)) == {"a": [1, {"b": None}]}


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("kind", KINDS)
def test_run_files_that_are_no_files(tmp_path: Path, kind: str) -> None:
    for name, read in (
        ("args.json", run_files.read_arguments),
        ("environment.json", run_files.read_environment),
        ("log.jsonl", run_files.read_log),
        ("result.txt", run_files.read_result),
    ):
        make(kind, tmp_path / name)
        with pytest.raises(UsageError, match=rf"{name}: can't be read \(.*(is a {kind}|No such device)"):
            read(str(tmp_path))


def test_a_log_takes_entries_alone(tmp_path: Path) -> None:
    entry = '{"step": 1, "loss": 2.5, "lr": 0.1, "gradient_norm": null}'
    odd = ["12", '{"step": true, "loss": 1, "lr": 1}', '{"step": 1e400, "loss": 1, "lr": 1}', "[" * 9999]
    odd += [
        '{"step": 2, "loss": null, "lr": 1}',
        '{"step": 2, "loss": 1e300, "lr": 1}',
        '{"loss": 1, "lr": 1}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join([entry, "", *odd, entry, '{"step": 9, "lo']))
    entries, left_out = run_files.read_log(str(tmp_path))
    assert [each["step"] for each in entries] == [1, 1] and left_out == len(odd)


def test_a_log_goes_on_after_what_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2, "lr": 1}\n{"step": 1e999}\n'
        + "[" * 9999
        + '\n{"step": 2, "loss": 2, "lr": 1}\n{'
    )
    log = RunLog(str(tmp_path), 1, 3, 1)
    log.write(2, 1.5, 0.1)
    log.close()
    assert [each["step"] for each in run_files.read_log(str(tmp_path))[0]] == [1, 2]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.usefixtures("never_waits")
@pytest.mark.parametrize("kind", KINDS)
def test_a_log_is_a_file(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "log.jsonl")
    with pytest.raises(UsageError, match=rf"--snapshot-dir: .*log.jsonl is a {kind}, not a file"):
        RunLog(str(tmp_path), 0, 3, 1)


def test_events_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UsageError, match="tensorboard is not a folder"):
        RunLog(str(tmp_path), 0, 3, 1)


def test_curves_of_any_numbers() -> None:
    rng = np.random.default_rng(0)
    tiny, huge = 5e-324, run_files.LARGEST
    for _ in range(200):
        exponents = rng.uniform(-323, 39, 3)
        values = [tiny, -tiny, 0.0, huge, -huge, *(10.0**exponents * rng.choice([-1, 1], 3))]
        chosen = rng.choice(values, 4)
        steps = sorted(int(step) for step in rng.integers(1, 2**63 - 1, 4))
        assert "nan" not in draw_curves({"a": list(zip(steps, chosen.tolist(), strict=True))})
    assert draw_curves({"a": [(1, 1.0), (2**63 - 1, np.nextafter(1.0, 2))]})


# Shortages


def error_of(action) -> BaseException:
    with pytest.raises(BaseException) as raised:
        action()
    return raised.value


def test_shortages_are_recognized() -> None:
    too_much = 2**48
    for error in (
        error_of(lambda: np.empty(too_much, np.uint8)),
        error_of(lambda: torch.empty(too_much, dtype=torch.uint8)),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        cv2.error("OpenCV(4.10) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 12 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        assert (shortage(error) or "").startswith("out of memory"), error
    assert shortage(error_of(lambda: np.empty(too_much, np.uint8))) == "out of memory (for another 256. TiB)"
    assert shortage(error_of(lambda: torch.empty(too_much, dtype=torch.uint8))) == (
        "out of memory (for another 262144.00 GiB)"
    )
    assert "processes" in (shortage(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")) or "")
    assert "processes" in (shortage(RuntimeError("can't start new thread")) or "")
    assert shortage(OSError(errno.EMFILE, "Too many open files")) == "too many open files"
    for error in (
        OSError(errno.ENOSPC, "No space left"),
        RuntimeError("mat1 and mat2"),
        ValueError("memory"),
    ):
        assert shortage(error) is None


def test_what_can_t_fit_is_refused() -> None:
    there = physical_memory() // LEAST_BYTES
    check_fits("--batch-size", there)
    with pytest.raises(UsageError, match=r"--batch-size: needs more than \d+ GiB"):
        check_fits("--batch-size", there + 1)


def test_a_shortage_ends_a_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        parser = flags.Parser()
        parser.add_argument("--batch-size")
        parser.add_argument("--input-size")
        parser.parse_args([])
        torch.empty(2**48, dtype=torch.uint8)

    hook = sys.unraisablehook
    try:
        assert flags.exit_status(main) == 1
    finally:
        sys.unraisablehook = hook
    line = capsys.readouterr().err
    assert "error: out of memory (for another" in line and line.count("\n") == 1
    assert line.endswith("; give a smaller --batch-size or --input-size\n")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1_0", "9" * 30])
def test_a_launcher_s_variables_are_numbers(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(each, "0")
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"environment variable {name}: "):
        distributed.run([torch.device("cpu")], lambda: None, lambda world: None)


def test_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException):
        def main() -> None:
            raise error

        return main

    assert flags.exit_status(lambda: None) == 0 and flags.exit_status(lambda: 3) == 3
    assert flags.exit_status(raising(InputError("a\nb"))) == 2
    assert capsys.readouterr().err.endswith("error: a b\n")
    assert flags.exit_status(raising(RunError("c"))) == 1
    assert flags.exit_status(raising(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        flags.exit_status(raising(ZeroDivisionError()))


@pytest.mark.parametrize("arguments", [["--name", ""], ["--name="], ["--other", "a", "--name", ""]])
def test_an_empty_value_is_refused(arguments, capsys):
    parser = flags.Parser()
    parser.add_argument("--name")
    parser.add_argument("--other", default=None)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2 and "--name: is empty" in capsys.readouterr().err
    assert parser.parse_args(["--name", "a"]).name == "a" and parser.parse_args([]).name is None


def test_a_value_that_argparse_drops_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = flags.Parser()
    parser.add_argument("--size")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--size=--"])
    assert end.value.code == 2 and "--size: is empty; give a value" in capsys.readouterr().err
