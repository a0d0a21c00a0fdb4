"""What several tests need: small data sets, and the commands run as a user runs them."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.args import exit_status

ROOT = Path(__file__).resolve().parent.parent
#: Flags of the smallest run of the real network.
SMALL = "--gpu cpu --backbone resnet50 --num-workers 0".split()


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


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


def write_pair(
    folder: Path, split: str, number: int, size: tuple[int, int], classes: int = 19
) -> tuple[str, str]:
    """One random picture and its labelIds in the Cityscapes layout; their relative paths."""
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
    """Six training and five validation pictures of 48 x 64 random pixels, in the Cityscapes layout."""
    folder = tmp_path / "scenes"
    for split, count in (("train", 6), ("val", 5)):
        for number in range(count):
            write_pair(folder, split, number, (48, 64))
    return folder


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a sensible size, negative batch-norm weights among them."""
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


def run(
    script: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """A script of the project, or a module by its name, in a process of its own, with its output as text."""
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
    """The mean IoU that evaluate.py printed."""
    found = re.search(r"mean IoU ([0-9.]+)", output)
    assert found, output
    return float(found.group(1))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CCNet of ResNet-50 and 19 classes with random weights."""
    from networks import Seg_Model

    model = Seg_Model(19, backbone="resnet50")
    fill(model)
    path = tmp_path_factory.mktemp("network") / "CS_scenes_7.pth"
    torch.save(model.state_dict(), path)
    return path
