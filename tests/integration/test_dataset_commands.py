"""dataset.check as a process, and the cache of pictures on a real file system."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, last_line
from PIL import Image, ImageCms

from dataset import cache
from dataset.cache import PictureCache, Plan

IMAGE = "leftImg8bit/train/ulm/ulm_000000_000002_leftImg8bit.png"

pytestmark = pytest.mark.slow


def test_file_names_that_are_no_text(healthy, tmp_path, root):
    """Names of pictures, folders, list and results need not be UTF-8, even for a UTF-8 terminal."""
    folder = os.fsencode(tmp_path) + b"/d\xe4"
    os.rename(healthy, folder)
    name = folder + b"/leftImg8bit/val/ulm/stra\xdfe_leftImg8bit.png"
    with open(name, "w") as file:
        file.write("broken")
    listing = os.fsencode(tmp_path) + b"/l\xff.lst"
    with open(listing, "wb") as file:
        file.write(IMAGE.encode() + b"\tgtFine/train/ulm/\xdf.png\n")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for flags, words in (
        ([b"--split", b"val"], (b"stra", b"not a readable picture")),
        ([b"--data-list", listing], (b"l\\udcff.lst", b"\\udcdf.png: no such file")),
    ):
        done = subprocess.run(
            [sys.executable, b"-m", b"dataset.check", folder, b"--json", folder + b"/\xff", *flags],
            capture_output=True,
            cwd=root,
            env=strict,
        )
        assert done.returncode == 2 and b"Traceback" not in done.stderr
        assert all(word in done.stdout for word in words), done.stdout
        assert os.path.exists(folder + b"/\xff")


def test_one_error_line_and_notes(healthy, root):
    """The command prints its progress and one error line; warnings of a decoder become notes."""
    content = (healthy / IMAGE).read_bytes()
    (healthy / IMAGE).write_bytes(content[: len(content) // 2])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = "gtFine/val/ulm/ulm_000000_000000_gtFine_labelIds.png"
    Image.open(healthy / name).save(healthy / name, icc_profile=profile)  # of colors, in a gray picture
    command = [sys.executable, "-m", "dataset.check", str(healthy), "--partial"]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=plain)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last_line(done.stderr).startswith("dataset.check: error: ") and IMAGE in last_line(done.stderr)
    assert "8/8" not in done.stderr and "4/4" in done.stderr
    assert "arning" not in done.stderr and f"note: {name}: libpng warning: iCCP" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which root alone may")
def test_full_disk_only_ends_the_filling(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        sizes = [(64, 64)] * 20
        full = PictureCache(str(tmp_path / "pictures.cache"), Plan(sizes, 10**9))
        rng = np.random.default_rng(0)
        for number in range(20):
            full.put(number, *(rng.integers(0, 256, (64, 64, *more), np.uint8) for more in ((3,), ())))
        there = [full.get(number) is not None for number in range(20)]
        assert 1 <= sum(there) < 20 and there == sorted(there, reverse=True)
        del full
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_file_in_memory_is_gone_with_its_processes():
    """Other processes can open the file while this one runs. It has no name in any folder."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from dataset import cache; print(cache.in_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("/proc/") and not os.path.exists(done.stdout.strip())
    path = cache.in_memory()
    assert path.startswith(f"/proc/{os.getpid()}/fd/") and "memfd" in os.readlink(path)
