"""Train and evaluate a recipe with several seeds, and print a table of the scores.

    python -m tools.seeds DIR [--seeds N] --train FLAGS OF train.py [--evaluate FLAGS OF evaluate.py]

The mean IoU of a recipe varies by about one point between seeds. For each seed, DIR receives a folder seed_S
with the output of train.py and evaluate.py. The table is written to seeds.md and seeds.json. evaluate.py
receives the flags of --train that describe the network and the data; --evaluate adds others, for example
--whole or the list of validation pictures. The same command resumes after an interruption and skips finished
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import evaluate
import train
from engine.acceleration import choose_precision, resolve_fused
from engine.options import EvaluateOptions, TrainOptions
from engine.runtime.distributed import choose_devices
from networks.of_run import table_path
from tools import common
from utils import args as flags
from utils import run_files
from utils.errors import InputError, RunError, UsageError
from utils.files import check_outputs, check_writable, write_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN, EVALUATE = "--train", "--evaluate"
TABLES = ("seeds.md", "seeds.json")
#: Flags whose value evaluate.py takes from --train. It takes those of the network from args.json.
SHARED = TrainOptions.names(lambda flag: flag.shared)
#: Flags of train.py and of evaluate.py that this command sets.
OWN = (("--snapshot-dir", "--random-seed", "--resume"), ("--restore-from", "--output-dir"))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("seeds", __doc__)
    parser.usage = (
        "%(prog)s [-h] [--seeds N] [--first-seed SEED] DIR --train FLAGS ... [--evaluate FLAGS ...]"
    )
    add = parser.add_argument
    add("out", metavar="DIR", help="output folder")
    add(
        "--seeds",
        type=flags.number(int, 1, 1000),
        default=3,
        metavar="N",
        help="number of seeds (default: %(default)s)",
    )
    add(
        "--first-seed",
        type=flags.number(int, 0, 2**63 - 1001),
        default=12345,
        metavar="SEED",
        help="first seed; the others follow it (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    own, of_train, of_evaluate = split(sys.argv[1:] if argv is None else argv)
    args = get_parser().parse_args(own)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    print(table(measure(args.out, seeds, of_train, of_evaluate)), end="")


class Plan(NamedTuple):
    """The run of a seed: its folder, its last snapshot, and the flags of both commands."""

    folder: str
    checkpoint: str
    of_train: list[str]
    of_evaluate: list[str]

    @property
    def is_finished(self) -> bool:
        """Whether the run is trained, and evaluated with these flags."""
        return is_result_of(self.folder, self.checkpoint, self.of_evaluate)

    def commands(self) -> list[list[str]]:
        """Return the commands that train, or resume, and evaluate."""
        return [
            ["train.py", *self.of_train],
            ["evaluate.py", *self.of_evaluate, "--restore-from", self.checkpoint],
        ]


def plans(out: str, seeds: Iterable[int], of_train: list[str], of_evaluate: list[str]) -> dict[int, Plan]:
    """Return the run of each seed, after checking the flags and that nothing is overwritten.

    Args:
        out: folder of the runs.
        seeds: the seeds.
        of_train: flags of train.py.
        of_evaluate: flags of evaluate.py besides those that it shares with train.py.

    Raises:
        UsageError: a flag or a file is invalid.
        SystemExit: a flag can't be parsed.
    """
    recipe = train.get_parser().parse_args(of_train)
    shared = [
        part for name in SHARED if (value := getattr(recipe, name)) is not None for part in flag(name, value)
    ]
    scoring = evaluate.get_parser().parse_args([*shared, *of_evaluate])
    inputs = [recipe.restore_from, recipe.data_list, recipe.val_list, recipe.classes]
    outputs = [os.path.join(out, name) for name in TABLES]
    check_outputs(f"DIR {out}", outputs, [*inputs, scoring.data_list, scoring.classes])
    check_writable("DIR", out)
    found = {}
    for seed in seeds:
        folder = os.path.join(out, f"seed_{seed}")
        own = ["--random-seed", str(seed), "--snapshot-dir", folder, "--resume"]
        checkpoint = os.path.join(folder, f"CS_scenes_{recipe.num_steps}.pth")
        found[seed] = Plan(folder, checkpoint, [*of_train, *own], [*shared, *of_evaluate])
    return found


def measure(
    out: str, seeds: Iterable[int], of_train: list[str], of_evaluate: list[str]
) -> list[dict[str, Any]]:
    """Train and evaluate with each seed, write the tables, and return the seed and the mean IoU of each run.

    Args:
        out: see `plans`, as for the others.
        seeds: the seeds.
        of_train: flags of train.py.
        of_evaluate: flags of evaluate.py.

    Raises:
        UsageError, RunError: a flag is invalid, or a command failed.
        SystemExit: a flag can't be parsed.
    """
    rows = []
    for seed, plan in plans(out, seeds, of_train, of_evaluate).items():
        training, evaluation = plan.commands()
        run(*training)
        if not plan.is_finished:
            run(*evaluation)
        found = run_files.read_result(plan.folder)
        if found is None or found["meanIU"] is None:
            raise RunError(
                f"{plan.folder}: evaluate.py gave no score, because no class occurs; evaluate other pictures"
            )
        rows.append({"seed": seed, "meanIU": found["meanIU"]})
    for name, content in zip(TABLES, (table(rows), json.dumps(summary(rows), indent=2) + "\n"), strict=True):
        write_file(os.path.join(out, name), content)
    return rows


def is_result_of(folder: str, checkpoint: str, given: Sequence[str]) -> bool:
    """Return whether the result.txt of a folder is up to date.

    Args:
        folder: folder of a run.
        checkpoint: the evaluated checkpoint.
        given: flags of evaluate.py.
    """
    try:
        result = run_files.read_result(folder)
        if result is None or os.path.getmtime(os.path.join(folder, run_files.RESULT)) < os.path.getmtime(
            checkpoint
        ):
            return False
        of_run = run_files.read_arguments(folder)
    except (InputError, OSError):
        return False
    noted = result.get("arguments")
    wanted = vars(evaluate.get_parser().parse_args([*given, "--restore-from", checkpoint]))
    if not isinstance(noted, dict):
        return False
    defaults = {
        each.name: each.default for each in fields(EvaluateOptions)
    }  # for results before a flag was added
    device = choose_devices(wanted["gpu"], wanted["nproc"])[0]
    # result.txt has what "auto" chose.
    wanted["amp"] = choose_precision(wanted["amp"], device)[0]
    wanted["fused"] = resolve_fused(wanted["fused"], device)
    for name in EvaluateOptions.names(lambda flag: flag.from_run):
        if wanted[name] is None:
            wanted[name] = of_run.get(name, noted.get(name))
            if name == "classes" and isinstance(wanted[name], str):
                wanted[name] = table_path(checkpoint, wanted[name])
    return all(
        json.loads(json.dumps(wanted[name])) == noted.get(name, defaults[name])
        for name in EvaluateOptions.names(lambda flag: flag.noted)
    )


def split(
    argv: Sequence[str], own: tuple[Sequence[str], Sequence[str]] = OWN
) -> tuple[list[str], list[str], list[str]]:
    """Split a command line into the flags of this command, of train.py and of evaluate.py.

    Args:
        argv: the command line.
        own: flags of train.py and of evaluate.py that this command sets.

    Raises:
        UsageError: --train is missing, or a flag is set by this command.
    """
    if TRAIN not in argv:
        get_parser().parse_args(list(argv))  # answers --help
        raise UsageError(f"{TRAIN}: missing; give it after the other flags, followed by flags of train.py")
    first = argv.index(TRAIN)
    second = argv.index(EVALUATE) if EVALUATE in argv else len(argv)
    if second < first:
        raise UsageError(f"{EVALUATE}: stands before {TRAIN}; give it after {TRAIN} and its flags")
    of_train, of_evaluate = list(argv[first + 1 : second]), list(argv[second + 1 :])
    for given, taken in zip((of_train, of_evaluate), own, strict=True):
        for part in given:
            name = part.split("=")[0]
            # argparse accepts abbreviations of flags.
            if name.startswith("--") and any(flag.startswith(name) for flag in taken):
                raise UsageError(f"{part}: set by this command for each seed; omit it")
    return list(argv[:first]), of_train, of_evaluate


def flag(name: str, value: Any) -> list[str]:
    """Return the command line arguments for a flag."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [f"--{name.replace('_', '-')}", text]


def run(script: str, *arguments: object) -> None:
    """Run a command of the project and show its output.

    Raises:
        UsageError, RunError: the command failed.
    """
    command = [sys.executable, os.path.join(ROOT, script), *map(str, arguments)]
    print(" ".join(["python", script, *map(str, arguments)]), flush=True)
    status = subprocess.run(command).returncode
    if status == 2:
        raise UsageError(f"{script}: wrong usage or input; see its message above")
    if status:
        raise RunError(f"{script}: exit status {status}; run the same command again to resume")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores by seed, their mean and their standard deviation (None for a single seed)."""
    scores = [row["meanIU"] for row in rows]
    return {
        "seeds": {row["seed"]: row["meanIU"] for row in rows},
        "mean": statistics.fmean(scores),
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: mean IoU of each seed, their mean and standard deviation, in percent."""
    about = summary(rows)
    deviation = about["standard_deviation"]
    lines = ["| seed | mean IoU |", "|---|---|"]
    lines += [f"| {seed} | {100 * score:.2f} |" for seed, score in about["seeds"].items()]
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    return "\n".join([*lines, f"| mean of {len(rows)} | {100 * about['mean']:.2f}{spread} |", ""])


if __name__ == "__main__":
    common.end(main)
