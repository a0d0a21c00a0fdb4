"""Train and evaluate the recipes of a published table, and print it with the scores measured here.

    python -m tools.table context                         what has been measured; trains nothing
    python -m tools.table context --data CS --seeds 3     train and evaluate what is missing
    python -m tools.table context --data mini             rehearse it on the generated data set
    python -m tools.table context --data CS --train --gpu 0,1,2,3 --restore-from resnet101-imagenet.pth

Tables: context and context50 (context modules, with ResNet-101 and ResNet-50), recurrence (number of
applications of the attention), original (README of the original), ade20k, lip, and camvid (2-D and 3-D
attention). --train and --evaluate add flags of train.py and evaluate.py to those of the recipes and of the
published evaluation. The runs are in DIR/RECIPE/seed_S, where other tables find them too. The table is
written to DIR/TABLE.md and DIR/TABLE.json. The same command resumes after an interruption and skips finished
runs.

Parameters, FLOPs and memory are those of the recipe, counted as by tools.profile. The time is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import evaluate
import train
from cc_attention import ops
from dataset import mini
from dataset.catalog import DATA_SETS
from dataset.labels import NUM_CLASSES
from engine.acceleration import choose_precision, resolve_fused
from engine.options import TrainOptions
from engine.recipes import ENDING
from engine.runtime.distributed import choose_devices
from networks import make_network
from networks.models import MODELS, recurrence_of
from networks.of_run import Description
from tools import common, profile, seeds
from tools.cost import GIB, Setting, measure, paper_formulas, parameters_of, simulate
from tools.published import ATTENTION_COST, TABLES, Row, Table
from utils import args as flags
from utils import run_files
from utils.environment import machine
from utils.errors import UsageError
from utils.files import check_outputs, check_writable, write_file
from utils.resources import check_memory

MINI = "mini"
#: --data mini: pictures, and flags of both commands. Their scores mean nothing.
MINI_PICTURES: dict[str, Any] = {"train": 12, "val": 4, "size": (96, 192), "seed": 0}
MINI_TRAIN = [
    *("--backbone", "resnet50", "--restore-from", "random", "--input-size", "65,65", "--batch-size", "2"),
    *("--num-steps", "10", "--num-workers", "0", "--print-frequency", "5", "--keep-states", "1"),
]
MINI_EVALUATE = ["--whole", "--num-workers", "0"]
#: In place of sizes that a data set has instead of scales.
MINI_SIDES = ["--short-sides", "65,97"]
#: Flags that this command sets, of train.py and of evaluate.py.
OWN = ((*seeds.OWN[0], "--data-dir", "--recipe"), (*seeds.OWN[1], "--data-dir"))
#: Pictures in the training step whose memory is estimated: those of one of four GPUs. Two are also what the
#: batch norm of psp and aspp needs.
PICTURES = 2
#: Parts of the head that frame the context module.
FRAME = ("head.conva", "head.convb", "head.bottleneck")
#: Flags whose values may differ from those of the recipe, because the device or the data set determines them.
INCIDENTAL = {"random_seed", "num_classes", "fused"}
#: Flags of evaluate.py that change a score.
SCORING = ("split", "whole", "scales", "short_sides", "long_side", "flip")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("table", __doc__)
    parser.usage = (
        "%(prog)s [-h] [--data DIR] [--seeds N] [--out DIR] [--rounds N] [--dry-run] TABLE "
        "[--train FLAGS ...] [--evaluate FLAGS ...]"
    )
    add = parser.add_argument
    add("table", metavar="TABLE", choices=TABLES, help=f"one of {', '.join(TABLES)}")
    add(
        "--data",
        metavar="DIR",
        help="folder of the data set, to train and evaluate what is missing; mini: a generated data set and "
        "ten steps, whose scores mean nothing (default: train nothing)",
    )
    add(
        "--seeds",
        type=flags.number(int, 1, 1000),
        metavar="N",
        help="number of runs of each recipe (default: 3, or 1 with --data mini)",
    )
    add(
        "--out",
        metavar="DIR",
        help="folder of the runs (default: snapshots/tables, or snapshots/tables_mini with --data mini)",
    )
    add(
        "--rounds",
        type=flags.number(int, 0, 10000),
        metavar="N",
        help="number of timed predictions (default: 3, or 0 without --data)",
    )
    add("--dry-run", action="store_true", help="print the commands that are missing, and run nothing")
    return parser


# Cost


class Cost(NamedTuple):
    """Cost of a recipe for one picture of the size of its crops.

    Attributes:
        parameters: parameters of the network that predicts.
        gflops: of a prediction, with the auxiliary head.
        context: GFLOPs of the context module, counted as in the papers.
        memory: estimated peak memory of a training step with PICTURES crops, in bytes.
    """

    parameters: int
    gflops: float
    context: float
    memory: int


def setting_of(args: argparse.Namespace, classes: int = NUM_CLASSES) -> Setting:
    """Return the setting of a prediction with the network and the crop size of parsed flags of train.py.

    Args:
        args: the flags.
        classes: number of classes of the data set, if they do not give it.
    """
    return Setting(
        backbone=args.backbone,
        num_classes=args.num_classes or classes,
        recurrence=args.recurrence,
        amp=args.amp,
        channels_last=args.channels_last,
        ohem=args.ohem,
        size=args.input_size,
        model=args.model,
        clip=args.clip or MODELS[args.model].clip or 1,
    )


@cache
def cost_of(setting: Setting) -> Cost:
    """Count the cost of a setting with tensors without data.

    The features for the category-consistent loss, which only training computes, are not counted.
    """
    training = simulate(setting._replace(train=True, batch=PICTURES))
    counted = simulate(setting, formulas=paper_formulas()).parts
    context = [part for part in counted if part.startswith("head.") and part not in FRAME]
    with torch.device("meta"):
        classes, recurrence = setting.num_classes, setting.recurrence
        model = make_network(setting.model, classes, recurrence, backbone=setting.backbone)
    return Cost(
        sum(parameters_of(model).values()),
        sum(part.flops_forward for part in training.parts.values()) / PICTURES / 1e9,
        sum(counted[part].flops_forward for part in context) / 1e9,
        training.peak,
    )


def seconds_of(setting: Setting, device: torch.device, rounds: int) -> float:
    """Return the median time of a prediction of one picture on a device."""
    setting = setting._replace(
        amp=choose_precision(setting.amp, device)[0], fused=resolve_fused("auto", device) == "on"
    )
    if device.type == "cpu":
        check_memory("--train --input-size", simulate(setting).peak)
    network = Description(setting.model, setting.backbone, setting.recurrence, setting.num_classes)
    model = profile.network_of(network, None, None)
    return sum(measure(setting, model, device, rounds).seconds.values())


# Finished runs


class Found(NamedTuple):
    """Finished runs of a recipe: mean IoU by seed, and what differs from the recipe."""

    scores: dict[int, float]
    differences: tuple[str, ...]
    is_rehearsal: bool


def find(folder: str, recipe: argparse.Namespace, evaluation: Sequence[str] = ()) -> Found:
    """Return the finished runs in the folder of a recipe.

    Args:
        folder: folder with a folder seed_S for each run.
        recipe: parsed flags of the recipe.
        evaluation: flags of the published evaluation.
    """
    scores: dict[int, float] = {}
    differences: dict[str, None] = {}
    is_rehearsal = False
    for path in sorted(Path(folder).glob("seed_*")):
        seed = path.name.removeprefix("seed_")
        if not seed.isdecimal():
            continue
        used, result = run_files.read_arguments(str(path)), run_files.read_result(str(path))
        last = path / f"CS_scenes_{used.get('num_steps')}.pth"
        if result is None or result["meanIU"] is None or not last.exists():
            continue
        how = run_files.arguments_of(str(path), result)
        evaluated = os.path.basename(str(how["restore_from"]))
        if evaluated != last.name or (path / run_files.RESULT).stat().st_mtime < last.stat().st_mtime:
            continue  # another snapshot was evaluated, or an earlier one of this name
        scores[int(seed)] = result["meanIU"]
        differences.update(dict.fromkeys(differing(used, how, recipe, evaluation)))
        is_rehearsal |= os.path.exists(os.path.join(str(how["data_dir"]), "mini.json"))
    return Found(dict(sorted(scores.items())), tuple(differences), is_rehearsal)


def differing(
    used: dict[str, Any], how: dict[str, Any], recipe: argparse.Namespace, evaluation: Sequence[str]
) -> list[str]:
    """Return the flags of a run and of its evaluation that differ from those of the recipe.

    Args:
        used: args.json of the run.
        how: arguments in its result.txt.
        recipe: parsed flags of the recipe.
        evaluation: flags of the published evaluation.
    """
    names = [*TrainOptions.names(lambda flag: flag.recipe), "restore_from"]
    wanted = {name: getattr(recipe, name) for name in names if name not in INCIDENTAL}
    wanted["recurrence"] = recurrence_of(recipe.model, recipe.recurrence)
    scoring = evaluate.get_parser().parse_args(["--data-dir", recipe.data_dir, *evaluation])
    asked = {name: getattr(scoring, name) for name in SCORING}
    asked["input_size"] = recipe.input_size  # one tile size for both commands
    lines = []
    for command, values, given in (("", wanted, used), ("evaluate.py ", asked, how)):
        for name, value in values.items():
            plain = json.loads(json.dumps(value))
            if name in given and given[name] != plain:
                flag = f"{command}--{name.replace('_', '-')}"
                lines.append(f"{flag} {_text(given[name])} (recipe: {_text(plain)})")
    return lines


def _text(value: Any) -> str:
    if value is None:
        return "unset"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# The table


def entry(table: Table, row: Row, args: argparse.Namespace, out: str) -> dict[str, Any]:
    """Return what is known about a row, for JSON: published and measured scores in percent, and its cost.

    Args:
        table: the table.
        row: the row.
        args: parsed flags of its recipe.
        out: folder of the runs of all recipes.
    """
    folder, setting = folder_of(out, row), setting_of(args, classes_of(table))
    found = find(folder, args, evaluation_of(table))
    percent = {seed: 100 * score for seed, score in found.scores.items()}
    scores = [{"seed": seed, "meanIU": score} for seed, score in percent.items()]
    return {
        "row": row.label,
        "recipe": row.recipe,
        "published": list(row.scores),
        "source": row.source,
        "measured": seeds.summary(scores) if scores else None,
        "differences": list(found.differences),
        "rehearsal": found.is_rehearsal,
        "folder": folder,
        **cost_of(setting)._asdict(),
        "setting": setting._asdict(),
    }


def page(name: str, table: Table, entries: Sequence[dict[str, Any]], timed: str | None) -> str:
    """Format a table as Markdown.

    Args:
        name: name of the table.
        table: the table.
        entries: results of `entry`, with "seconds" if `timed`.
        timed: what was timed, on which machine; None if nothing was.
    """
    height, width = entries[0]["setting"]["size"]
    headings = [
        "row",
        "published mean IoU",
        "mean IoU here (runs)",
        "parameters",
        "GFLOPs",
        "GFLOPs, context module",
        "memory, GiB",
        *(["forward, ms"] if timed else []),
        "runs",
    ]
    lines = [f"# {name}", ""]
    if any(each["rehearsal"] for each in entries):
        lines += ["**Rehearsal on the generated data set: these scores mean nothing.**", ""]
    lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row, each in zip(table.rows, entries, strict=True):
        cells = [
            row.label,
            row.published,
            score_of(each["measured"]),
            f"{each['parameters']:,}",
            f"{each['gflops']:.1f}",
            context_of(each),
            f"{each['memory'] / GIB:.2f}",
            *([f"{1e3 * each['seconds']:.1f}"] if timed else []),
            f"`{each['folder']}`" if each["measured"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    sources = grouped(entries, lambda each: [each["source"]])
    lines += [
        "",
        f"Mean IoU: in percent on {table.scores_of}; here mean ± standard deviation over the runs. "
        f"Parameters, GFLOPs and memory are those of the recipe, at {height}x{width}. GFLOPs: of one "
        "picture, two for a multiply-add; those of the context module are counted as in the papers. "
        f"Memory: estimated peak of a training step with {PICTURES} pictures, without the features for CCL."
        + (f" Forward: {timed}." if timed else ""),
        "",
        "Published:",
        "",
        *(f"- {source}: {rows}" for source, rows in sources.items()),
    ]
    if differences := grouped(entries, lambda each: each["differences"]):
        lines += ["", "Runs that differ from their recipes:", ""]
        lines += [f"- {difference}: {rows}" for difference, rows in differences.items()]
    return "\n".join(lines) + "\n"


def context_of(entry: dict[str, Any]) -> str:
    """Format the GFLOPs of the context module, with those of the papers where they have the same input."""
    setting = entry["setting"]
    number = recurrence_of(setting["model"], setting["recurrence"])
    paper = ATTENTION_COST.get((setting["model"], number)) if tuple(setting["size"]) == (769, 769) else None
    return f"{entry['context']:.2f}" + (f" (papers: {paper[0]})" if paper else "")


def score_of(measured: dict[str, Any] | None) -> str:
    """Format the measured mean, standard deviation and number of runs."""
    if measured is None:
        return "not measured"
    deviation = measured["standard_deviation"]
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    return f"{measured['mean']:.2f}{spread} ({len(measured['seeds'])})"


def grouped(entries: Sequence[dict[str, Any]], keys: Any) -> dict[str, str]:
    """Return, for each key, the names of the rows that have it."""
    found: dict[str, list[str]] = {}
    for each in entries:
        for key in keys(each):
            found.setdefault(key, []).append(each["row"])
    return {key: "all rows" if len(rows) == len(entries) else "; ".join(rows) for key, rows in found.items()}


# The command


def classes_of(table: Table) -> int:
    """Return the number of classes of the data set of a table."""
    classes = DATA_SETS[table.data].classes() if table.data in DATA_SETS else None
    return NUM_CLASSES if classes is None else len(classes.classes)


def evaluation_of(table: Table) -> list[str]:
    """Return the flags of evaluate.py that come closest to the published evaluation."""
    return shlex.split(DATA_SETS[table.data].evaluate) if table.data in DATA_SETS else []


def folder_of(out: str, row: Row) -> str:
    """Return the folder of the runs of a recipe."""
    return os.path.join(out, os.path.basename(row.recipe).removesuffix(ENDING))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Parse the command line into the flags of this command, of train.py and of evaluate.py.

    Raises:
        UsageError: a flag is invalid.
    """
    if seeds.TRAIN not in argv:
        at = argv.index(seeds.EVALUATE) if seeds.EVALUATE in argv else len(argv)
        argv = [*argv[:at], seeds.TRAIN, *argv[at:]]
    own, of_train, of_evaluate = seeds.split(argv, OWN)
    args = get_parser().parse_args(own)
    if args.data is None and (of_train or of_evaluate or args.seeds or args.dry_run):
        raise UsageError("--data: missing; --seeds, --dry-run, --train and --evaluate need it")
    if not ops.DEVICE_TYPES:
        raise UsageError(
            "the operator, whose FLOPs are counted, is not compiled; run python setup.py build_ext --inplace"
        )
    args.rehearses = args.data == MINI
    evaluation = evaluation_of(TABLES[args.table])
    if args.rehearses:
        sides = MINI_SIDES if "--short-sides" in evaluation else []
        device = "0" if torch.cuda.is_available() else "cpu"
        of_train = [*MINI_TRAIN, *sides, "--gpu", device, *of_train]
        evaluation = [*evaluation, *MINI_EVALUATE, *sides]
    of_evaluate = [*evaluation, *of_evaluate]
    args.out = args.out or os.path.join("snapshots", "tables_mini" if args.rehearses else "tables")
    args.seeds = args.seeds or (1 if args.rehearses else 3)
    args.rounds = (3 if args.data else 0) if args.rounds is None else args.rounds
    return args, of_train, of_evaluate


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    args, of_train, of_evaluate = parse(sys.argv[1:] if argv is None else argv)
    table = TABLES[args.table]
    rows = table.rows
    data = args.data or os.curdir
    if args.rehearses:
        data = os.path.abspath(os.path.join(args.out, f"data_{table.data}"))
    given = [["--recipe", row.recipe, "--data-dir", data] for row in rows]
    recipes = [train.get_parser().parse_args(each) for each in given]
    given = [[*each, *of_train] for each in given]
    used = [train.get_parser().parse_args(each) for each in given]
    device = choose_devices(used[0].gpu, used[0].nproc)[0]
    numbers = range(used[0].random_seed, used[0].random_seed + args.seeds)
    if args.dry_run:
        print_commands(args.out, rows, numbers, given, of_evaluate)
        return
    tables = [os.path.join(args.out, f"{args.table}.{ending}") for ending in ("md", "json")]
    check_outputs(f"--out {args.out}", tables, [])
    check_writable("--out", args.out)

    def write(times: Sequence[float] = (), timed: str | None = None) -> str:
        entries = [entry(table, row, recipe, args.out) for row, recipe in zip(rows, recipes, strict=True)]
        for each, seconds in zip(entries, times, strict=False):
            each["seconds"] = seconds
        text = page(args.table, table, entries, timed)
        content = {"table": args.table, "timed": timed, "rows": entries}
        for path, what in zip(tables, (text, json.dumps(content, indent=2) + "\n"), strict=True):
            write_file(path, what)
        return text

    print(f"counting parameters, FLOPs and memory of {len(rows)} recipes", flush=True)
    text = write()
    if args.data:
        if args.rehearses:
            mini.write(data, **MINI_PICTURES, layout=table.data)
        for row, flags_of_run in zip(rows, given, strict=True):
            seeds.measure(folder_of(args.out, row), numbers, flags_of_run, of_evaluate)
            text = write()  # what is finished is in the table, also after an interruption
    if args.rounds:
        times = [seconds_of(setting_of(each, classes_of(table)), device, args.rounds) for each in used]
        height, width = used[0].input_size
        name = machine(str(device))["name"]
        what = f"{used[0].backbone}, one picture of {height}x{width}, median of {args.rounds} runs on {name}"
        text = write(times, what)
    print(text, end="")


def print_commands(
    out: str, rows: Sequence[Row], numbers: Sequence[int], given: Sequence[list[str]], of_evaluate: list[str]
) -> None:
    """Print the commands of the runs that are not finished.

    Args:
        out: folder of the runs of all recipes.
        rows: rows of the table.
        numbers: the seeds.
        given: flags of train.py for each row.
        of_evaluate: flags of evaluate.py.
    """
    for row, of_train in zip(rows, given, strict=True):
        for plan in seeds.plans(folder_of(out, row), numbers, of_train, of_evaluate).values():
            if plan.is_finished:
                print(f"{plan.folder}: is finished")
                continue
            for command in plan.commands():
                print("python", shlex.join(command))


if __name__ == "__main__":
    common.end(main)
