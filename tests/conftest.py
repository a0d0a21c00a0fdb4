"""Helpers and fixtures of several tests: small data sets, weights, and commands run as a user runs them."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

# Before PyTorch is loaded: by default its threads wait in a busy loop, which slows down all other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import cv2
import numpy as np
import pytest
import torch

import fused
from fused import _library as fused_library
from utils.args import exit_status

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # these processes share the cores: more threads would only wait
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

ROOT = Path(__file__).resolve().parent.parent
#: Flags of the smallest run of the real network.
SMALL = ["--gpu", "cpu", "--backbone", "resnet50", "--num-workers", "0"]
#: Flags of a run of the small network, which tests/small/*.py and the fixture `small_network` make known.
TINY = ["--gpu", "cpu", "--model", "small", "--backbone", "small", "--num-workers", "0"]


def status_of(main: Callable[[list[str]], int | None], *arguments: object) -> int:
    """Return the exit status of a command's main, run in this process."""
    try:
        return exit_status(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as ended:  # argparse's
        return int(ended.code or 0)


@contextlib.contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Let the system refuse to make a file longer than `size` bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def small_network() -> Iterator[None]:
    """Let commands that run in this process know the small network."""
    from small_network import registered

    with registered():
        yield


@pytest.fixture(autouse=True)
def no_interpreter_in_fast_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts Python or a shell without the marker `slow` or `build`."""
    if any(request.node.get_closest_marker(name) for name in ("slow", "build")):
        return
    start = subprocess.Popen.__init__

    def checked(self: subprocess.Popen, command: Any, *others: Any, **options: Any) -> None:
        program = os.path.basename(os.fsdecode(command if isinstance(command, (str, bytes)) else command[0]))
        assert not program.startswith(("python", "bash", "sh")), f"mark the test slow: it starts {program}"
        start(self, command, *others, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", checked)


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    """Restore the number of threads, on which results depend by rounding, for the tests that follow."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start the installed Chromium. Skip the tests without it or without Playwright."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    if not (path := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def write_pair(
    folder: Path, split: str, number: int, size: tuple[int, int], classes: int = 19
) -> tuple[str, str]:
    """Write a random picture and its labelIds in the Cityscapes layout; return their relative paths."""
    rng = np.random.default_rng(number)
    base = f"{split}/ulm/ulm_000000_{number:06d}"
    image, label = f"leftImg8bit/{base}_leftImg8bit.png", f"gtFine/{base}_gtFine_labelIds.png"
    ids = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0], np.uint8)
    blocks = rng.integers(0, len(ids) if classes == 19 else classes, (size[0] // 8 + 1, size[1] // 8 + 1))
    pixels = np.kron(ids[blocks], np.ones((8, 8), np.uint8))[: size[0], : size[1]]
    for relative, content in ((image, rng.integers(0, 256, (*size, 3), dtype=np.uint8)), (label, pixels)):
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / relative), content)
    return image, label


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Write six training and five validation pictures of 48 x 64 random pixels, in the Cityscapes layout."""
    folder = tmp_path / "scenes"
    for split, count in (("train", 6), ("val", 5)):
        for number in range(count):
            write_pair(folder, split, number, (48, 64))
    return folder


@pytest.fixture
def healthy(tmp_path) -> Path:
    """Write four pictures of each split with labels and instances."""
    folder = tmp_path / "CS"
    for split in ("train", "val"):
        for number in range(4):
            _, label = write_pair(folder, split, number, (48, 64))
            ids = np.asarray(cv2.imread(str(folder / label), cv2.IMREAD_GRAYSCALE), np.uint16)
            instances = np.where(ids >= 24, ids * 1000 + 1, ids).astype(np.uint16)
            cv2.imwrite(str(folder / label.replace("labelIds", "instanceIds")), instances)
    return folder


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill a network with random weights of a sensible size, some batch-norm weights negative."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            value.copy_(random.abs() * 0.3 + 0.5)
        elif value.dim() > 1:
            value.copy_(random * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(random * 0.5)
    model.state_dict()["head.cca.gamma"].fill_(0.7)


def fill_library(model: torch.nn.Module) -> torch.nn.Module:
    """Fill a network of a library with random weights, some of them tiny, zero or negative; return it."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        random = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(random.abs() * 0.3 + 0.5)
        elif value.dim() > 1:
            value.copy_(random * (2 / value[0].numel()) ** 0.5)
        elif value.dim() == 1:
            value.copy_(random * 0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight[:4] = torch.tensor([0, 1e-7, -3e-6, -1.0])
    return model.eval()


@contextlib.contextmanager
def state_restored() -> Iterator[None]:
    """Undo what a command changes in its process: environment, directory, signals, settings of PyTorch."""
    environment, directory, arguments, path = dict(os.environ), os.getcwd(), sys.argv, list(sys.path)
    streams = sys.stdin, sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    hooks = sys.unraisablehook, sys.excepthook
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    dtype, threads, opencv_threads = torch.get_default_dtype(), torch.get_num_threads(), cv2.getNumThreads()
    random_state = torch.get_rng_state()
    try:
        with fused.using(fused_library._mode):
            yield
    finally:
        torch.set_rng_state(random_state)
        cv2.setNumThreads(opencv_threads)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
        torch.use_deterministic_algorithms(deterministic)
        sys.unraisablehook, sys.excepthook = hooks
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.stdin, sys.stdout, sys.stderr = streams
        sys.argv, sys.path[:] = arguments, path
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)


@contextlib.contextmanager
def _descriptors_replaced(files: dict[int, int]) -> Iterator[None]:
    """Let file descriptors refer to other open files: a map from the one to the other."""
    kept = {number: os.dup(number) for number in files}
    try:
        for number, other in files.items():
            os.dup2(other, number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _exit_status(command: Callable[[], object]) -> int:
    """Return the status with which the interpreter would exit after `command`."""
    try:
        command()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(
    script: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, or a module by its name, as the main program of this process.

    This saves starting an interpreter and importing PyTorch. The code is executed as `__main__`, with its
    own standard streams, and what it changes in the process is undone (`state_restored`). Processes that
    it starts are real. Use `run_process` where the interpreter itself matters.

    Args:
        environment: variables that are set for the command. PyTorch is already loaded, so those that it reads
            at its start affect only the processes that the command starts.
    """
    text = [str(argument) for argument in arguments]
    with contextlib.ExitStack() as held:
        held.enter_context(state_restored())
        files = {number: held.enter_context(tempfile.TemporaryFile()) for number in (1, 2)}
        nothing = held.enter_context(open(os.devnull, "rb"))
        sys.stdout.flush()
        sys.stderr.flush()
        replaced = {0: nothing.fileno(), **{number: file.fileno() for number, file in files.items()}}
        with (
            _descriptors_replaced(replaced),
            warnings.catch_warnings(),
            mock.patch.object(os, "execve", _refuse),
        ):
            sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
            sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
            sys.stderr = io.TextIOWrapper(
                io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
                errors="backslashreplace",
                line_buffering=True,
            )
            os.environ.update(environment or {})
            os.chdir(ROOT)
            # Warnings are printed as outside of pytest, and not collected.
            warnings.showwarning = _show_warning
            warnings.resetwarnings()
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", message=r".* found in sys.modules", module="runpy")
            if script.endswith(".py"):
                sys.argv = [str(ROOT / script), *text]
                command = functools.partial(runpy.run_path, sys.argv[0], run_name="__main__")
            else:
                sys.argv = [script, *text]
                command = functools.partial(runpy.run_module, script, run_name="__main__", alter_sys=True)
            status = _exit_status(command)
            sys.stdout.flush()
            sys.stderr.flush()
        output = []
        for file in files.values():
            file.seek(0)
            output.append(file.read().decode())
    return subprocess.CompletedProcess([script, *text], status, *output)


def _refuse(*command: object) -> None:
    raise AssertionError(f"replaces the process of the tests: use run_process: {command}")


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


def run_process(
    script: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, or a module by its name, in a process of its own."""
    what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    return subprocess.run(
        [sys.executable, *what, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


def last_line(text: str) -> str:
    return [line for line in text.splitlines() if line.strip()][-1]


def mean_of(output: str) -> float:
    """Return the mean IoU that evaluate.py printed."""
    found = re.search(r"mean IoU ([0-9.]+)", output)
    assert found, output
    return float(found.group(1))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of CCNet with ResNet-50, 19 classes and random weights; return its path."""
    from networks import Seg_Model

    model = Seg_Model(19, backbone="resnet50")
    fill(model)
    path = tmp_path_factory.mktemp("network") / "CS_scenes_7.pth"
    torch.save(model.state_dict(), path)
    return path
