"""Faults during a run: each ends it within a minute, with one clear cause and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, last_line, longest_file, run, write_pair

import fused
from engine.training.run import Run
from utils.errors import RunError

#: Flags of a run that would take many minutes.
ENDLESS = [
    "--num-steps",
    "1000",
    "--save-state-every",
    "1",
    "--print-frequency",
    "1",
    "--input-size",
    "33,33",
]
CPU = ["--batch-size", "2", *TINY]

#: train.py with the small network.
SCRIPT = "tests/small/train.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for number in range(4):
            write_pair(folder, split, number, (48, 64))
    return folder


class Training:
    """A running train.py, in its own process, with the small network."""

    def __init__(self, data: Path, snapshots: Path, *flags: object):
        self.snapshots = snapshots
        command = [sys.executable, SCRIPT, "--data-dir", data, "--snapshot-dir", snapshots, *flags]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_) -> None:
        """End all processes of the run, whatever the test did."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def wait_for(self, step: int) -> None:
        """Wait until `step` is done and its state is saved."""
        for _ in range(2400):
            if (self.snapshots / f"state_{step}.json").exists():
                return
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)
        raise TimeoutError

    def children(self, pid: int | None = None) -> list[int]:
        pid = pid or self.process.pid
        found = []
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def end(self) -> tuple[int, str]:
        """Return the exit status and standard error; the run has to end within a minute."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def logged(snapshots: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (snapshots / "log.jsonl").read_text().splitlines()]


def newest(snapshots: Path) -> int:
    return max(int(path.stem.split("_")[1]) for path in snapshots.glob("state_*.json"))


def assert_nothing_lost(snapshots: Path, done: int = 0) -> None:
    """Check that the newest state is complete and of the last logged step (or `done`), without leftovers."""
    step = newest(snapshots)
    assert step == (done or logged(snapshots)[-1])
    content = torch.load(snapshots / f"state_{step}.pt", weights_only=True)
    assert all(value.isfinite().all() for value in content["model"].values())
    assert not list(snapshots.glob(".writing*"))


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("processes", [1, 2])
    def test_the_step_is_finished_and_saved(self, data, tmp_path, number, processes):
        flags = [
            *ENDLESS,
            *CPU[:2],
            *TINY[2:],
            "--nproc",
            processes,
            "--save-state-every",
            1000,
            "--num-workers",
            1,
        ]
        with Training(data, tmp_path, *flags) as training:
            while not (tmp_path / "log.jsonl").exists() or not logged(tmp_path):
                assert training.process.poll() is None, training.end()
                time.sleep(0.05)
            # A terminal sends a signal to every process of the group, a scheduler to the first one only.
            if number == signal.SIGINT:
                os.killpg(training.process.pid, number)
            else:
                training.process.send_signal(number)
            status, errors = training.end()
        assert status == 1 and "Traceback" not in errors
        ended = f"train.py: error: ended by {number.name} after step {newest(tmp_path)}; --resume continues"
        assert last_line(errors).startswith(ended)
        assert_nothing_lost(tmp_path)

    def test_validation_is_given_up_and_done_again(self, data, tmp_path):
        flags = [*CPU, "--input-size", "33,33", "--num-steps", 1, "--val-every", 1]
        many = tmp_path / "many"
        for number in range(10):
            write_pair(many, "val", number, (48, 64))
        (many / "leftImg8bit/train").symlink_to(data / "leftImg8bit/train")
        (many / "gtFine/train").symlink_to(data / "gtFine/train")
        with Training(many, tmp_path / "run", *flags) as training:
            training.wait_for(1)
            training.process.send_signal(signal.SIGTERM)
            status, errors = training.end()
        assert status == 1 and "ended by SIGTERM after step 1" in last_line(errors)
        state = json.loads((tmp_path / "run/state_1.json").read_text())
        assert state["validation"]["step"] == 0 and not (tmp_path / "run/CS_scenes_best.pth").exists()
        done = run(SCRIPT, "--data-dir", many, "--snapshot-dir", tmp_path / "run", *flags, "--resume")
        assert done.returncode == 0 and "mean IoU" in done.stdout, done.stderr
        state = json.loads((tmp_path / "run/state_1.json").read_text())
        assert state["validation"]["step"] == 1 and (tmp_path / "run/CS_scenes_best.pth").exists()


class TestProcesses:
    def test_killed_rank(self, data, tmp_path):
        flags = [*ENDLESS, *CPU[:2], *TINY[2:], "--nproc", 2]
        with Training(data, tmp_path, *flags) as training:
            training.wait_for(1)
            os.kill(training.children()[1], signal.SIGKILL)
            status, errors = training.end()
        assert status == 1 and "Traceback" not in errors
        assert "process 1 of 2 was killed by SIGKILL" in last_line(errors)
        assert newest(tmp_path) >= logged(tmp_path)[-1] - 1

    def test_killed_launcher_takes_its_processes_along(self, data, tmp_path):
        flags = [*ENDLESS, *CPU[:2], *TINY[2:], "--nproc", 2]
        with Training(data, tmp_path, *flags) as training:
            training.wait_for(1)
            ranks = training.children()
            training.process.kill()
            training.end()
            for _ in range(600):
                if not any(Path(f"/proc/{rank}/cmdline").exists() for rank in ranks):
                    break
                time.sleep(0.1)
            else:
                raise TimeoutError
        assert_nothing_lost(tmp_path)  # they had SIGTERM

    def test_killed_worker(self, data, tmp_path):
        with Training(data, tmp_path, *ENDLESS, *CPU, "--num-workers", 1) as training:
            training.wait_for(1)
            for child in training.children():
                os.kill(child, signal.SIGKILL)
            status, errors = training.end()
        assert status == 1 and "a data worker was killed" in last_line(errors)
        assert "Traceback" not in errors
        assert_nothing_lost(tmp_path)

    def test_second_run_into_the_directory_is_refused_and_the_first_goes_on(self, data, tmp_path):
        with Training(data, tmp_path, *ENDLESS, *CPU) as training:
            training.wait_for(1)
            with Training(data, tmp_path, *ENDLESS, *CPU, "--resume") as other:
                status, errors = other.end()
            assert status == 2 and "another run writes there" in last_line(errors)
            assert f"process {training.process.pid} on" in errors and "--snapshot-dir" in errors
            training.wait_for(newest(tmp_path) + 1)
            training.process.terminate()
            assert training.end()[0] == 1
        assert_nothing_lost(tmp_path)


class TestDisk:
    def test_file_too_large(self, data, tmp_path):
        with longest_file(3 << 20):
            done = run(SCRIPT, "--data-dir", data, "--snapshot-dir", tmp_path, *ENDLESS, *CPU)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "state_1.pt" in last_line(done.stderr) and "File too large" in last_line(done.stderr)
        assert not list(tmp_path.glob(".writing*")) and not list(tmp_path.glob("state*"))

    @pytest.mark.parametrize("processes", [1, 2])
    def test_full_disk(self, data, tmp_path, processes):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        flags = [*ENDLESS, *CPU[:2], *TINY[2:], "--nproc", processes]
        try:
            with Training(data, disk, *flags) as training:
                status, errors = training.end()
            assert status == 1 and "Traceback" not in errors
            assert "No space left on device" in last_line(errors) and "state_3.pt" in last_line(errors)
            # Two states of 6 MB are there, and no room for a third.
            assert_nothing_lost(disk, done=2)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


class TestInput:
    def test_picture_deleted_mid_run(self, data, tmp_path):
        own = tmp_path / "data"
        for number in range(4):
            write_pair(own, "train", number, (48, 64))
        with Training(own, tmp_path / "run", *ENDLESS, *CPU) as training:
            training.wait_for(1)
            for path in own.rglob("*leftImg8bit.png"):
                path.unlink()
            status, errors = training.end()
        assert status == 2 and "leftImg8bit.png" in last_line(errors) and "Traceback" not in errors
        assert_nothing_lost(tmp_path / "run")

    def test_loss_that_explodes(self, data, tmp_path):
        flags = [*ENDLESS, *CPU, "--learning-rate", 1e30]
        done = run(SCRIPT, "--data-dir", data, "--snapshot-dir", tmp_path, *flags)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        last = last_line(done.stderr)
        step = newest(tmp_path) + 1
        assert f"step {step}: the loss is" in last and "on process 0" in last and "ulm_000000_" in last
        assert_nothing_lost(tmp_path)

    @pytest.mark.skipif(not fused.active(torch.device("cpu")), reason="the fused operators are not built")
    @pytest.mark.parametrize("log_every", [1, 100])
    def test_loss_that_explodes_where_steps_wait_late(self, data, tmp_path, monkeypatch, log_every):
        """No state is saved after the step, whether its numbers are wanted at once or one step later."""
        monkeypatch.setattr("engine.options.waits_late", lambda *_: True)
        flags = [*ENDLESS, *CPU, "--learning-rate", 1e30, "--print-frequency", log_every]
        done = run(SCRIPT, "--data-dir", data, "--snapshot-dir", tmp_path, *flags, "--save-state-every", 50)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        last = last_line(done.stderr)
        assert re.search(r"step \d+: the loss is .*on process 0.*ulm_000000_", last)
        assert not list(tmp_path.glob("state_*")) and not list(tmp_path.glob(".writing*"))

    @pytest.mark.skipif(not fused.active(torch.device("cpu")), reason="the fused operators are not built")
    def test_a_run_that_ends_before_it_knows_the_numbers_of_its_last_step(self, data, tmp_path, monkeypatch):
        """The state of a step whose loss is not finite is not saved, whatever else ends the run."""
        monkeypatch.setattr("engine.options.waits_late", lambda *_: True)
        ends = Run._stopped

        def stopped(self: Run, step: int) -> RunError | None:
            bad = self._latest is not None and not all(
                output.isfinite().all() for output in self._latest.outputs
            )
            return RunError("ended by the test") if bad else ends(self, step)

        monkeypatch.setattr(Run, "_stopped", stopped)
        flags = [*ENDLESS, *CPU, "--learning-rate", 1e30, "--print-frequency", 100, "--save-state-every", 50]
        done = run(SCRIPT, "--data-dir", data, "--snapshot-dir", tmp_path, *flags)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "the loss is" in last_line(done.stderr) and not list(tmp_path.glob("state_*"))

    def test_weights_that_overflow_in_the_last_step_are_not_saved(self, data, tmp_path):
        """The weights of the last step are checked too, although no later step uses them."""
        flags = [*ENDLESS, *CPU, "--num-steps", 1, "--learning-rate", 1e30, "--weight-decay", 1e30]
        done = run(SCRIPT, "--data-dir", data, "--snapshot-dir", tmp_path, *flags)
        assert done.returncode == 1 and "weights that are not finite" in last_line(done.stderr), done.stderr
        assert not list(tmp_path.glob("CS_scenes_*")) and not list(tmp_path.glob("state_*"))

    def test_truncated_newest_state(self, data, tmp_path):
        flags = ["--data-dir", data, *CPU, "--input-size", "33,33", "--num-steps", 3]
        flags += ["--save-state-every", 1, "--print-frequency", 1]
        for name in ("whole", "cut"):
            assert run(SCRIPT, *flags, "--snapshot-dir", tmp_path / name).returncode == 0
        newest_state = tmp_path / "cut/state_3.pt"
        os.truncate(newest_state, newest_state.stat().st_size // 2)
        (tmp_path / "cut/CS_scenes_3.pth").unlink()
        done = run(SCRIPT, *flags, "--snapshot-dir", tmp_path / "cut", "--resume")
        assert done.returncode == 0, done.stderr
        assert "state_3.pt: damaged, skipped" in done.stdout and "continuing after step 2" in done.stdout
        ends = [(tmp_path / name / "CS_scenes_3.pth").read_bytes() for name in ("whole", "cut")]
        assert ends[0] == ends[1]
