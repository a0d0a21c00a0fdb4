"""Measure how much longer a resumed run takes to reach its first step than a new one.

    python -m benchmarks.resume [--rounds N] [--out JSON]

Measures the time from the start of `python train.py` to the end of its first step, alternately: step 1 of a
new run, and step 50 001 of a run resumed from its state on disk. Setting: 60 000 steps, 2975 training images
in a list (a few small ones under many names), CCNet with ResNet-101, batch 2 of 33x33, on the CPU. Only the
resumed run computes the checksum of the state and loads it; the file is in the page cache. The exit status is
1 if that takes more than 2 seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from dataset import CSDataSet, mini
from tools.common import end
from utils import args as flags
from utils import timing
from utils.environment import machine
from utils.files import check_output_file, write_file

ROOT = Path(__file__).resolve().parent.parent
STEPS, DONE, IMAGES = 60_000, 50_000, 2975
#: Maximum number of seconds that a resumed run may take longer.
BAR = 2.0
#: Seconds after which a run is taken to hang.
LIMIT = 300.0
FLAGS = f"--gpu cpu --num-workers 1 --batch-size 2 --input-size 33,33 --num-steps {STEPS} --print-frequency 1"


def write_images(folder: Path) -> list[str]:
    """Write a data set of IMAGES pairs. Return the flags of train.py that name it."""
    mini.write(folder, 8, 1, (64, 128), seed=0)
    pairs = CSDataSet(str(folder), split="train").pairs
    lines = []
    for number in range(IMAGES):
        pair = pairs[number % len(pairs)]
        names = f"{number}_leftImg8bit.png", f"{number}_gtFine_labelIds.png"
        for old, new in zip((pair.image, pair.label), names, strict=True):
            os.link(folder / old, folder / new)
        lines.append("\t".join(names) + "\n")
    (folder / "train.lst").write_text("".join(lines))
    return ["--data-dir", str(folder), "--data-list", str(folder / "train.lst")]


def seconds_until(step: int, flags: list[str], snapshots: Path, file: str | None = None) -> float:
    """Return the seconds from the start of train.py to the end of a step. Then the run is killed.

    Args:
        step: the step.
        flags: flags of train.py.
        snapshots: its --snapshot-dir.
        file: file in `snapshots` to wait for before the run is killed.

    Raises:
        RuntimeError: the run ended earlier, or did not reach the step within LIMIT.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", *FLAGS.split(), *flags, "--snapshot-dir", str(snapshots)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Several threads would wait for each other on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"step {step}/"):
                seconds = time.perf_counter() - begin
                while file and not (snapshots / file).exists() and process.poll() is None:
                    time.sleep(0.01)
                return seconds
    finally:
        timer.cancel()
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.wait()
        process.stdout.close()
    raise RuntimeError(f"train.py did not reach step {step}:\n{''.join(lines[-5:])}")


def measured(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each new and each resumed run."""
    images = write_images(folder / "data")
    old, new = folder / "old", folder / "new"
    # One step, the last one before the state, is enough: all states have the same size.
    begin = ["--start-iters", str(DONE - 1), "--save-state-every", str(DONE), "--save-pred-every", str(STEPS)]
    seconds_until(DONE, [*images, *begin], old, file=f"state_{DONE}.json")
    times: dict[str, list[float]] = {"fresh": [], "resumed": []}
    for _ in range(rounds):
        times["fresh"].append(seconds_until(1, images, new))
        shutil.rmtree(new)
        times["resumed"].append(seconds_until(DONE + 1, [*images, "--resume"], old))
        print("fresh {:.2f} s, resumed {:.2f} s".format(*(each[-1] for each in times.values())), flush=True)
    return times


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Return the exit status."""
    parser = flags.Parser(prog="python -m benchmarks.resume", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds",
        type=flags.positive_int,
        default=7,
        help="number of measurements of both (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file to write the results to")
    args = parser.parse_args(argv)
    if args.out:
        check_output_file("--out", args.out)
    with tempfile.TemporaryDirectory() as folder:
        times = measured(Path(folder), args.rounds)
    fresh, resumed = (timing.quartiles(each)["median"] for each in times.values())
    report = {
        "machine": machine("cpu") | {"threads": 1},
        "setting": f"train.py {FLAGS}, {IMAGES} images, the state of step {DONE}",
        "seconds": {name: timing.quartiles(each) | {"all": each} for name, each in times.items()},
        "later": resumed - fresh,
        "ratio": resumed / fresh,
        "bar": BAR,
    }
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")
    print(
        f"median of {args.rounds}: fresh {fresh:.2f} s, resumed {resumed:.2f} s, ratio "
        f"{resumed / fresh:.2f}, {resumed - fresh:.2f} s later (limit {BAR:.0f} s)"
    )
    return int(resumed - fresh > BAR)


if __name__ == "__main__":
    end(main)
