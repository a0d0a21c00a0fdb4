"""tools/elastic.sh and tools/slurm.sbatch: a run that they restart ends as an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, write_pair

FLAGS = [
    "--gpu",
    "cpu",
    "--backbone",
    "resnet50",
    "--num-workers",
    "0",
    "--input-size",
    "33,33",
    "--batch-size",
    "4",
    "--random-mirror",
    "--random-scale",
    "--print-frequency",
    "1",
    "--save-state-every",
    "2",
    "--keep-states",
    "1",
]
STEPS = 6
ENVIRONMENT = {"CCNET_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
#: Longest time of a job in seconds, which only a hanging one reaches.
HANGS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(6):
        write_pair(folder, "train", number, (48, 64))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    """Return the last snapshot of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    flags = [*FLAGS, "--nproc", 2, "--num-steps", STEPS, "--snapshot-dir", folder]
    done = run("train.py", "--data-dir", data, *flags, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder / f"CS_scenes_{STEPS}.pth"


def same_weights(one: Path, other: Path) -> bool:
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@contextlib.contextmanager
def started(command: list[object], **environment: object) -> Iterator[subprocess.Popen]:
    """Start a process, and end it at exit if the test has not."""
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **ENVIRONMENT, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
        process.kill()


def output(process: subprocess.Popen) -> str:
    return process.communicate(timeout=HANGS)[0]


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, output(process)
        time.sleep(0.02)


def child(launcher: subprocess.Popen, rank: int) -> int:
    """Return the id of the process that `launcher` started as `rank`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) != launcher.pid:
                continue
            if b"RANK=%d" % rank in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"rank {rank} is not there")


class TestElastic:
    def test_killed_rank_is_started_again_and_changes_nothing(self, data, uninterrupted, tmp_path):
        command = ["tools/elastic.sh", "--data-dir", data, *FLAGS, "--num-steps", STEPS]
        with started([*command, "--snapshot-dir", tmp_path], NPROC=2, MAX_RESTARTS=1) as process:
            wait_until(lambda: any(tmp_path.glob("state_*.json")), process)
            os.kill(child(process, 1), signal.SIGKILL)
            text = output(process)
        assert process.returncode == 0, text
        assert re.search(r"state_[24]\.pt: continuing after step [24]", text), text
        assert same_weights(tmp_path / f"CS_scenes_{STEPS}.pth", uninterrupted)

    def test_several_machines_without_a_place_to_meet(self):
        with started(["tools/elastic.sh", "--data-dir", "CS"], NNODES=2) as process:
            assert "RDZV_ENDPOINT" in output(process)
        assert process.returncode == 2


#: srun, scancel and scontrol of a single node, as far as slurm.sbatch uses them.
FAKE_SLURM = """#!{python}
import itertools, os, signal, subprocess, sys, time
from pathlib import Path

folder, name = Path(__file__).parent, Path(__file__).name
with open(folder / "calls", "a") as file:
    print(name, *sys.argv[1:], file=file)
if name == "srun":
    command = list(itertools.dropwhile(lambda argument: argument.startswith("-"), sys.argv[1:]))
    tasks = []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        own = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}}
        tasks.append(subprocess.Popen(command, env={{**os.environ, **own}}, start_new_session=True))

    def send(number):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
    (folder / "step").write_text(" ".join(str(task.pid) for task in tasks))
    bad = False
    while any(task.poll() is None for task in tasks):
        if not bad and any(task.returncode for task in tasks):
            bad = True
            send(signal.SIGTERM)
        time.sleep(0.02)
    sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
if name == "scancel":
    assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    for pid in (folder / "step").read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
if name == "scontrol" and sys.argv[1:3] == ["show", "job"]:
    print("   " + (folder / "job").read_text())
"""


class Cluster:
    """Fake commands of Slurm in a folder, and a record of their calls."""

    job = 4711

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir()
        self.tells("JobState=RUNNING Reason=None")
        for name in ("srun", "scancel", "scontrol"):
            (folder / name).write_text(FAKE_SLURM.format(python=sys.executable))
            (folder / name).chmod(0o755)

    def tells(self, line: str) -> None:
        """Set what `scontrol show job` prints."""
        (self.folder / "job").write_text(line)

    def sbatch(
        self, *arguments: object, restarts: int = 0, **environment: str
    ) -> contextlib.AbstractContextManager[subprocess.Popen]:
        """Start the job with two tasks as Slurm does, from a copy of the script."""
        script = shutil.copy(ROOT / "tools/slurm.sbatch", self.folder / "slurm_script")
        slurm = {"SLURM_JOB_ID": self.job, "SLURM_SUBMIT_DIR": ROOT, "SLURM_CPUS_PER_TASK": 1}
        slurm |= {
            "SLURM_NTASKS": 2,
            "SLURM_NTASKS_PER_NODE": 2,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
        }
        if restarts:
            slurm["SLURM_RESTART_COUNT"] = restarts
        return started(["bash", script, *arguments], **{**slurm, **environment})

    def ends_soon(self, process: subprocess.Popen) -> None:
        """Send the signal of the script's --signal option, to the shell only."""
        (name,) = re.findall(
            r"^#SBATCH --signal=B:(\w+)@\d+$", (ROOT / "tools/slurm.sbatch").read_text(), re.M
        )
        process.send_signal(signal.Signals[f"SIG{name}"])

    def requeued(self) -> int:
        calls = (self.folder / "calls").read_text().splitlines()
        return calls.count(f"scontrol requeue {self.job}")


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path / "slurm")


class TestSlurm:
    def test_run_over_its_time_limit_is_requeued_and_ends_as_without(
        self, cluster, data, uninterrupted, tmp_path
    ):
        snapshots = tmp_path / "snapshots"
        flags = ["--data-dir", data, *FLAGS, "--num-steps", STEPS, "--snapshot-dir", snapshots]
        flags += ["--num-workers", 1]  # it gets the signal too
        with cluster.sbatch(*flags) as process:
            wait_until(lambda: (snapshots / "log.jsonl").exists(), process)
            wait_until(lambda: (snapshots / "log.jsonl").read_text(), process)
            cluster.ends_soon(process)
            text = output(process)
        assert process.returncode not in (0, 2) and cluster.requeued() == 1, text
        (step,) = map(int, re.findall(r"ended by SIGTERM after step (\d+)", text))
        assert 1 <= step < STEPS and (snapshots / f"state_{step}.json").exists()
        for expected in (f"continuing after step {step}", "the run is finished"):
            with cluster.sbatch(*flags, restarts=1) as process:
                text = output(process)
            assert process.returncode == 0 and expected in text
        assert cluster.requeued() == 1
        assert same_weights(snapshots / f"CS_scenes_{STEPS}.pth", uninterrupted)

    def test_wrong_input_is_not_requeued(self, cluster, data, tmp_path):
        flags = ["--data-dir", data, *FLAGS, "--batch-size", 3, "--snapshot-dir", tmp_path / "snapshots"]
        with cluster.sbatch(*flags) as process:
            text = output(process)
        assert process.returncode != 0 and "--batch-size 3" in text and cluster.requeued() == 0

    @pytest.mark.parametrize(
        "signalled, status, job, requeued",
        [
            (True, 1, "JobState=RUNNING", 1),
            (True, 0, "JobState=RUNNING", 0),  # it was the last step
            (True, 2, "JobState=RUNNING", 0),
            (True, 1, "JobState=COMPLETING", 0),  # by scancel, whose SIGTERM reaches the script too
            (False, 1, "JobState=RUNNING PreemptTime=None", 0),
            (False, 1, "JobState=RUNNING PreemptTime=2026-11-22T16:41:34", 1),
        ],
    )
    def test_what_is_requeued(self, cluster, signalled, status, job, requeued):
        stub = cluster.folder / "python"
        wait = f"touch {cluster.folder}/started; sleep 60 & wait" if signalled else f"exit {status}"
        stub.write_text(f"#!/usr/bin/env bash\ntrap 'exit {status}' TERM\n{wait}\n")
        stub.chmod(0o755)
        cluster.tells(job)
        with cluster.sbatch(CCNET_PYTHON=str(stub), SLURM_NTASKS="1") as process:
            if signalled:
                wait_until((cluster.folder / "started").exists, process)
                cluster.ends_soon(process)
            text = output(process)
        assert (process.returncode, cluster.requeued()) == (status, requeued), text


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Make two connected network namespaces, 10.77.0.1 and 10.77.0.2; return their names."""
    names = [f"ccnet-{os.getpid()}-{number}" for number in (1, 2)]

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: ip is not installed")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "net1",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "net2",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", f"net{number}")
            for device in ("lo", f"net{number}"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class TestTwoMachines:
    def test_same_samples_and_loss_and_one_failure_ends_both(self, machines, data, tmp_path):
        flags = ["--data-dir", data, *FLAGS, "--save-state-every", 1000]
        one, two = tmp_path / "one", tmp_path / "two"
        done = run("train.py", *flags, "--num-steps", 2, "--snapshot-dir", one, environment=ENVIRONMENT)
        assert done.returncode == 0, done.stderr

        def entries(folder: Path) -> list[dict]:
            path = folder / "log.jsonl"
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

        with contextlib.ExitStack() as held:
            jobs = []
            for number, name in enumerate(machines, 1):
                command = ["ip", "netns", "exec", name, ROOT / "tools/elastic.sh", *flags]
                environment = {
                    "NNODES": 2,
                    "NPROC": 1,
                    "MAX_RESTARTS": 0,
                    "RDZV_ENDPOINT": "10.77.0.1:29400",
                    # torchrun would find both by the name of the machine, which has another address.
                    "PET_LOCAL_ADDR": f"10.77.0.{number}",
                    "PET_RDZV_CONF": f"is_host={int(number == 1)}",
                    "GLOO_SOCKET_IFNAME": f"net{number}",
                }
                command += ["--num-steps", 1000, "--snapshot-dir", two]
                jobs.append(held.enter_context(started(command, **environment)))
            wait_until(lambda: len(entries(two)) > 1, jobs[0])
            os.kill(child(jobs[1], 1), signal.SIGKILL)
            texts = [job.communicate(timeout=60)[0] for job in jobs]
        assert all(job.returncode for job in jobs)
        assert "process 0 of 2: lost the connection to another process" in texts[0]
        logs = entries(one), entries(two)
        assert [entry["samples"] for entry in logs[0]] == [entry["samples"] for entry in logs[1][:2]]
        assert logs[1][0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-4)
