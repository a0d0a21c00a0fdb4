"""Messages of decoders on standard error, and the progress of long work."""

from __future__ import annotations

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from dataset.pictures import decode_image, load
from utils.progress import Progress
from utils.silence import Silence, silence


@pytest.fixture
def odd(tmp_path) -> str:
    """Write a gray picture with a color profile, which makes libpng warn."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png", icc_profile=profile)
    return str(tmp_path / "a.png")


def test_decoders_write_nothing_to_the_terminal(odd, capfd):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: decode_image(load(odd)), range(40)))
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_lines_are_kept_where_they_are_asked_for(capfd):
    kept = Silence()
    with kept:
        os.write(2, b"dropped\n")
    assert kept.take() == []
    kept.collect()
    with kept:
        os.write(2, b"a line\nanother\na line\n")
    assert kept.take() == ["a line", "another"] and kept.take() == []
    with kept:
        os.write(2, b"short")
    assert kept.take() == ["short"]
    assert capfd.readouterr().err == ""


def test_the_last_thread_out_puts_it_back(capfd):
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with silence:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait()
    with silence:
        pass
    os.write(2, b"still silent\n")
    # A process that is forked now does not have this thread.
    if (child := os.fork()) == 0:
        with silence:
            pass
        os.write(2, b"child\n")
        os._exit(0)
    os.waitpid(child, 0)
    leave.set()
    thread.join()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "child\nheard\n"


def test_closed_standard_error(odd):
    kept = os.dup(2)
    os.close(2)
    try:
        assert decode_image(load(odd)).shape == (8, 8, 3)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_few_elsewhere():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(3, stream=stream, interval=1e6)
        progress.last -= 0.5
        for done in (1, 2, 3):
            progress.show(done)
    assert file.getvalue().startswith("picture 3/3") and file.getvalue().count("\n") == 1
    assert terminal.getvalue().startswith("\rpicture 1/3") and terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\x1b[K\n") and "\rpicture 3/3" in terminal.getvalue()
