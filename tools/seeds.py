"""Train and evaluate a recipe with several seeds, and print the table.

    python -m tools.seeds DIR [--seeds N] --train FLAGS OF train.py [--evaluate FLAGS OF evaluate.py]

Results of one recipe differ by about a point between seeds, so a single run says little. DIR gets a folder
for each seed, seed_S, with all that train.py and evaluate.py write, and the table as seeds.md and seeds.json.
What evaluate.py has to know of network and data is taken from --train's flags; --evaluate adds to them, for
example --whole, or the list of the validation pictures. Called again, it goes on where it ended, and does not
repeat what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import evaluate
import train
from engine.options import EvaluateOptions, TrainOptions
from tools import common
from utils import args as flags
from utils import run_files
from utils.errors import InputError, RunError, UsageError
from utils.files import check_outputs, check_writable, write_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN, EVALUATE = "--train", "--evaluate"
TABLES = ("seeds.md", "seeds.json")
#: Flags whose value evaluate.py takes from --train; it takes those of the network from args.json.
SHARED = TrainOptions.names(lambda flag: flag.shared)
#: What this command sets, of train.py and of evaluate.py.
OWN = (("--snapshot-dir", "--random-seed", "--resume"), ("--restore-from", "--output-dir"))


def get_parser() -> argparse.ArgumentParser:
    parser = common.Parser("seeds", __doc__)
    add = parser.add_argument
    add("out", metavar="DIR", help="folder of the runs")
    add(
        "--seeds",
        type=flags.number(int, 1, 1000),
        default=3,
        metavar="N",
        help="how many (default: %(default)s)",
    )
    add(
        "--first-seed",
        type=flags.number(int, 0, 2**63 - 1001),
        default=12345,
        help="they count up from it (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    own, of_train, of_evaluate = split(sys.argv[1:] if argv is None else argv)
    args = get_parser().parse_args(own)
    recipe = train.get_parser().parse_args(of_train)  # says what is wrong before anything starts
    shared = [
        part for name in SHARED if (value := getattr(recipe, name)) is not None for part in flag(name, value)
    ]
    scoring = evaluate.get_parser().parse_args([*shared, *of_evaluate])
    tables = [os.path.join(args.out, name) for name in TABLES]
    inputs = [recipe.restore_from, recipe.data_list, recipe.val_list, recipe.classes]
    check_outputs(f"DIR {args.out}", tables, [*inputs, scoring.data_list, scoring.classes])
    check_writable("DIR", args.out)

    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        folder = os.path.join(args.out, f"seed_{seed}")
        run("train.py", *of_train, "--random-seed", seed, "--snapshot-dir", folder, "--resume")
        checkpoint = os.path.join(folder, f"CS_scenes_{recipe.num_steps}.pth")
        if not is_result_of(folder, checkpoint, [*shared, *of_evaluate]):
            run("evaluate.py", *shared, *of_evaluate, "--restore-from", checkpoint)
        found = run_files.read_result(folder)
        if found is None or found["meanIU"] is None:
            raise RunError(
                f"{folder}: evaluate.py gave no score, as no class occurs; evaluate on other pictures"
            )
        rows.append({"seed": seed, "meanIU": found["meanIU"]})

    text = table(rows)
    for path, content in zip(tables, (text, json.dumps(summary(rows), indent=2) + "\n"), strict=True):
        write_file(path, content)
    print(text, end="")


def is_result_of(folder: str, checkpoint: str, given: Sequence[str]) -> bool:
    """Return whether the result.txt of a folder is what evaluate.py would write now."""
    try:
        result = run_files.read_result(folder)
        if result is None or os.path.getmtime(os.path.join(folder, run_files.RESULT)) < os.path.getmtime(
            checkpoint
        ):
            return False
    except (InputError, OSError):
        return False
    noted = result.get("arguments")
    wanted = vars(evaluate.get_parser().parse_args([*given, "--restore-from", checkpoint]))
    # Flags that are not given come from the run, whose recipe does not change.
    from_run = EvaluateOptions.names(lambda flag: flag.from_run)
    return isinstance(noted, dict) and all(
        json.loads(json.dumps(wanted[name])) == noted.get(name)
        for name in EvaluateOptions.names(lambda flag: flag.noted)
        if not (name in from_run and wanted[name] is None)
    )


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """This command's flags, those of train.py and those of evaluate.py."""
    if TRAIN not in argv:
        get_parser().parse_args(list(argv))  # answers --help
        raise UsageError(f"{TRAIN}: is missing; give it last, followed by flags of train.py")
    first = argv.index(TRAIN)
    second = argv.index(EVALUATE) if EVALUATE in argv else len(argv)
    if second < first:
        raise UsageError(f"{EVALUATE}: comes after {TRAIN}")
    own = list(argv[:first])
    of_train, of_evaluate = list(argv[first + 1 : second]), list(argv[second + 1 :])
    for given, taken in zip((of_train, of_evaluate), OWN, strict=True):
        for part in given:
            name = part.split("=")[0]
            # Argparse takes beginnings of a flag for the flag.
            if name.startswith("--") and any(flag.startswith(name) for flag in taken):
                raise UsageError(f"{part}: is set for each seed by this command; leave it out")
    return own, of_train, of_evaluate


def flag(name: str, value: Any) -> list[str]:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [f"--{name.replace('_', '-')}", text]


def run(script: str, *arguments: object) -> None:
    """A command of the project, its output shown as it comes; ends this one with it."""
    command = [sys.executable, os.path.join(ROOT, script), *map(str, arguments)]
    print(" ".join(["python", script, *map(str, arguments)]), flush=True)
    status = subprocess.run(command).returncode
    if status == 2:
        raise UsageError(f"{script}: says above which flag or file is wrong")
    if status:
        raise RunError(f"{script}: ended with status {status}; the same command goes on from there")


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = [row["meanIU"] for row in rows]
    return {
        "seeds": {row["seed"]: row["meanIU"] for row in rows},
        "mean": statistics.fmean(scores),
        "standard_deviation": statistics.stdev(scores) if len(scores) > 1 else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the mean IoU of each seed, their mean and standard deviation, in per cent."""
    about = summary(rows)
    deviation = about["standard_deviation"]
    lines = ["| seed | mean IoU |", "|---|---|"]
    lines += [f"| {seed} | {100 * score:.2f} |" for seed, score in about["seeds"].items()]
    spread = "" if deviation is None else f" ± {100 * deviation:.2f}"
    return "\n".join([*lines, f"| mean of {len(rows)} | {100 * about['mean']:.2f}{spread} |", ""])


if __name__ == "__main__":
    common.end(main)
