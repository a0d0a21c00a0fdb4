"""Kill training runs at random times and check that they end as uninterrupted ones.

    python tests/kill_runs.py [--kills N] [--seed S] [--processes 1 2] [--out JSON] [--train FLAGS ...]

A run is train.py with the real network on a few random pictures, with a state after each step. It is killed
(SIGKILL) and resumed again and again. At its end its weights must be those of an uninterrupted run, bit for
bit, and its log the same but for times and memory. --train adds flags of train.py. Of a run of one process
the main process alone is killed and at once resumed: the process that reads pictures for it must not be in
the way, and must go by itself. Of a run of several, in turns, the launching process, one rank, or all are
killed.

A kill counts as survived when the run that it hit ended the same. Exit status 1 if one is not survived. 50
kills take about a quarter of an hour on two cores, and up to 7 GB in TMPDIR. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from filecmp import cmp
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # run as a script, outside pytest

from conftest import ROOT, write_pair  # noqa: E402

from engine.training import checkpoint  # noqa: E402
from utils.environment import machine  # noqa: E402
from utils.errors import UsageError  # noqa: E402

STEPS, VALIDATE = 4, 2
FLAGS = (
    f"--backbone resnet50 --input-size 33,33 --batch-size 2 --num-steps {STEPS} --learning-rate 3e-3 "
    f"--ema 0.9 --random-mirror --random-scale --print-frequency 1 --save-state-every 1 "
    f"--val-every {VALIDATE}"
).split()
WEIGHTS = [f"CS_scenes_{name}.pth" for name in (STEPS, f"{STEPS}_ema", "best")]
#: Measured values in the log, which differ between equal runs.
MEASURED = ("images_per_second", "data_seconds", "memory_mb")
#: A variable of all processes of a run, by which orphaned ones are found.
MARK = "CCNET_KILL_RUN"
#: Longest time in seconds, which only a hanging run reaches.
LIMIT = 300.0


class Failure(Exception):
    """A run did not end as it should. The message is one line."""


@dataclass
class Kill:
    """A kill and its consequences.

    Attributes:
        after: seconds since the start of the process.
        state: step of the newest state, 0 if there is none.
    """

    run: int
    processes: int
    workers: int
    after: float
    killed: str
    phase: str = "unknown"
    state: int = 0
    half_written: list[str] = field(default_factory=list)
    survived: bool = False


@dataclass
class Run:
    """A run in its own directory, over all its starts and kills.

    Args:
        turns: what to kill of several processes: "launcher", "rank" or "all".
        flags: flags of train.py.
    """

    number: int
    directory: Path
    data: Path
    processes: int
    workers: int
    turns: Iterator[str]
    flags: list[str]
    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0  # of its last start

    def go(self, kills: int, longest: float, rng: random.Random) -> None:
        """Run until the end, with at most `kills` kills.

        Args:
            longest: each start is killed after a random time up to this, in seconds, if it still runs.
        """
        while True:
            before = self.half_written()
            begin = time.monotonic()
            process = self.start()
            after, rank = rng.uniform(0, longest), rng.randrange(self.processes)
            kill = None
            if len(self.kills) < kills:
                try:
                    process.wait(after)
                except subprocess.TimeoutExpired:
                    killed = self.kill(process, rank)
                    kill = Kill(self.number, self.processes, self.workers, round(after, 3), killed)
                    self.kills.append(kill)
            self.wait(process)
            if process.returncode == 0:
                if kill:
                    self.kills.pop()  # it came too late
                self.seconds = time.monotonic() - begin
                self.wait_for_all()
                return
            if kill is None or process.returncode != (1 if "rank" in kill.killed else -signal.SIGKILL):
                lines = self.output.read_text().strip().splitlines()
                raise Failure(f"exit status {process.returncode}: {lines[-1] if lines else 'no output'}")
            if self.processes > 1:
                self.wait_for_all()  # ranks that live end after the step under way
            earlier = max((each.state for each in self.kills), default=0)
            self.look_at(kill, before)
            print(f"run {self.number}: {describe(kill)}", flush=True)
            if kill.state < earlier:
                raise Failure(f"state {earlier} is lost")
            self.see_the_lock()

    def start(self) -> subprocess.Popen:
        """Start the run; resume it if it was started before."""
        place = ["--nproc", str(self.processes)] if self.processes > 1 else ["--gpu", "cpu"]
        resume = ["--resume"] if self.directory.exists() else []
        self.directory.mkdir(exist_ok=True)
        own = ["--data-dir", str(self.data), "--snapshot-dir", str(self.directory)]
        own += ["--num-workers", str(self.workers)]
        with open(self.output, "w") as output:
            return subprocess.Popen(
                [sys.executable, "train.py", *self.flags, *place, *own, *resume],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                # One thread: results depend on the number, and threads wait for each other on a busy machine.
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: str(self.directory)},
            )

    @property
    def output(self) -> Path:
        return self.directory.with_suffix(".txt")

    def kill(self, process: subprocess.Popen, rank: int) -> str:
        """Kill what is next in turn; return its name."""
        what = next(self.turns) if self.processes > 1 else "main"
        ranks = [pid for pid in self.pids() if parent(pid) == process.pid] if what == "rank" else []
        if rank < len(ranks):
            os.kill(ranks[rank], signal.SIGKILL)
            return f"rank {rank}"
        process.kill()
        if what == "all":
            self.kill_all()
        return "launcher" if what == "rank" else what

    def wait(self, process: subprocess.Popen) -> None:
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failure(f"not at its end after {LIMIT:.0f} seconds") from None

    def pids(self) -> list[int]:
        """Return the living processes of this run by id, which is mostly the order of the ranks."""
        mark, found = f"{MARK}={self.directory}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # gone, or another user's
                pass
        return sorted(found)

    def kill_all(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for_all(self) -> None:
        end = time.monotonic() + LIMIT
        while pids := self.pids():
            if time.monotonic() > end:
                raise Failure(f"processes {pids} live on")
            time.sleep(0.1)

    def see_the_lock(self) -> None:
        """Check that the next run can lock the directory, after killed ranks have ended."""
        end = time.monotonic() + (10.0 if self.processes > 1 else 0.0)
        while True:
            try:
                with checkpoint.locked(str(self.directory)):
                    return
            except UsageError as error:
                if time.monotonic() > end:
                    raise Failure(str(error)) from None
            time.sleep(0.1)

    def half_written(self) -> set[str]:
        """Return temporary files, and states without a description."""
        states = {path.stem for path in self.directory.glob("state_*.pt")}
        described = {path.stem for path in self.directory.glob("state_*.json")}
        return (states - described) | {path.name for path in self.directory.glob(".writing-*")}

    def look_at(self, kill: Kill, before: set[str]) -> None:
        """Record what a kill left, and the phase of the run that it hit, as far as files and output tell.

        Args:
            before: what was half written before.
        """
        new = self.half_written() - before
        kill.half_written = sorted(re.sub(r"^\.writing-[\d.]+-", "part of ", name) for name in new)
        found = [json.loads(path.read_text()) for path in self.directory.glob("state_*.json")]
        newest: dict[str, Any] = max(found, key=lambda each: each["step"], default={"step": 0})
        kill.state = step = newest["step"]
        if new:
            kill.phase = "save"
        elif not re.search(r"^step |continuing after", self.output.read_text(), re.MULTILINE):
            kill.phase = "start"
        elif step and step % VALIDATE == 0 and newest["validation"]["step"] < step:
            kill.phase = "validation"
        else:
            kill.phase = "step" if step < STEPS else "end"


def parent(pid: int) -> int:
    """Return the parent of a process, or 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def describe(kill: Kill) -> str:
    processes = f"{kill.processes} process{'es' if kill.processes > 1 else ''}"
    files = f" ({', '.join(kill.half_written)})" if kill.half_written else ""
    return (
        f"{processes}, {kill.workers} workers: {kill.killed} killed after {kill.after:.2f} s, state "
        f"{kill.state}, in {kill.phase}{files}"
    )


def difference(run: Path, uninterrupted: Path) -> str | None:
    """Return the first difference between two runs, or None."""
    for name in WEIGHTS:
        if not (run / name).exists():
            return f"{name} is missing"
        if not cmp(run / name, uninterrupted / name, shallow=False):
            return f"{name} is another"
    return None if entries(run) == entries(uninterrupted) else "log.jsonl is another"


def entries(run: Path) -> list[dict[str, Any]]:
    """Return the log without the measured values."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def give(
    folder: Path, kills: int, seed: int, processes: list[int], flags: list[str]
) -> tuple[list[Kill], dict[str, float]]:
    """Do runs until there were `kills` kills; return these and the seconds of the uninterrupted runs."""
    rng = random.Random(seed)
    data = folder / "data"
    for split, pictures in (("train", 3), ("val", 1)):
        for number in range(pictures):
            write_pair(data, split, number, (33, 33))
    whole: dict[int, tuple[Path, float]] = {}  # uninterrupted runs and their seconds
    turns = itertools.cycle(["launcher", "rank", "all"])
    # The number of workers changes more slowly than that of processes, so all combinations occur.
    settings = itertools.cycle([(count, workers) for workers in (1, 0) for count in processes])
    given: list[Kill] = []
    for number in itertools.count(1):
        if len(given) == kills:
            break
        count, workers = next(settings)
        if count not in whole:
            first = Run(0, folder / f"uninterrupted_{count}", data, count, workers, turns, flags)
            first.go(0, 0.0, rng)
            whole[count] = (first.directory, first.seconds)
            print(f"uninterrupted with --nproc {count}: {first.seconds:.1f} s", flush=True)
            for path in first.directory.glob("state_*"):
                path.unlink()
        uninterrupted, seconds = whole[count]
        run = Run(number, folder / f"run_{number}", data, count, workers, turns, flags)
        try:
            run.go(kills - len(given), 1.1 * seconds, rng)
            failure = difference(run.directory, uninterrupted)
        except Failure as error:
            failure = str(error)
        finally:
            run.kill_all()
        print(f"run {number}: {failure or 'ended the same'}, {len(run.kills)} kills", flush=True)
        for kill in run.kills:
            kill.survived = failure is None
        given += run.kills
        if not run.kills:
            whole[count] = (uninterrupted, min(seconds, run.seconds))  # the first one may meet a busy machine
        if failure and not run.kills:
            raise Failure(f"run {number} failed, and nobody had killed it")
        shutil.rmtree(run.directory)
    return given, {str(count): round(seconds, 2) for count, (_, seconds) in whole.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kill_runs.py",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, help="to give in all")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the runs, in turns")
    parser.add_argument("--out", help="JSON file to write too")
    parser.add_argument(
        "--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py to add; last"
    )
    args = parser.parse_args(argv)
    flags = [*FLAGS, *args.train]
    print(f"seed {args.seed}, {' '.join(args.train) or 'no further flags'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            kills, seconds = give(Path(folder), args.kills, args.seed, args.processes, flags)
        except Failure as error:
            print(f"kill_runs.py: {error}", file=sys.stderr)
            return 1
    phases = Counter(kill.phase for kill in kills)
    survived = sum(kill.survived for kill in kills)
    if args.out:
        report = {
            "machine": machine("cpu") | {"threads": 1},
            "command": f"python tests/kill_runs.py --kills {args.kills} --seed {args.seed} --processes "
            + " ".join([*map(str, args.processes), *(["--train", *args.train] if args.train else [])]),
            "train.py": " ".join(flags),
            "uninterrupted_seconds": seconds,
            "survived": survived,
            "phases": phases,
            "kills": [asdict(kill) for kill in kills],
        }
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{len(kills)} kills ({', '.join(f'{phases[name]} in {name}' for name in sorted(phases))}): "
        f"{survived} of {len(kills)} in runs that ended with the same weights, bit for bit, and the same log"
    )
    return 0 if survived == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
