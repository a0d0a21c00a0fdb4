"""Check every file of a data set, and print its problems and statistics.

    python -m dataset.check CS [--split S] [--data-list L] [--classes TABLE] [--plot PNG] [--json FILE]

Reads all pictures, labels and instances in several processes. For each split it prints the number of pictures
(for a published data set next to the official number), their sizes, and how often each class occurs. For
each problem it prints a line with the file, what is wrong and what to do. The exit status is 0 without
problems, otherwise 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence, Set
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from dataset import clips, folder_pair, layout, mini, recognition
from dataset.class_chart import draw_chart
from dataset.classes import choose_classes
from dataset.inspection import has_ids, look_at_all
from dataset.labels import IGNORE, Counts, LabelReader
from dataset.layout import Pair, instances_of
from dataset.pictures import say_turned
from dataset.recognition import Place
from utils import args as flags
from utils.errors import DataError, RunError, UsageError
from utils.files import check_output_file, unwritable, write_file

#: Number of pictures of each city, in Cityscapes with fine annotations.
OFFICIAL = {
    "train": {
        "aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85, "dusseldorf": 221,
        "erfurt": 109, "hamburg": 248, "hanover": 196, "jena": 119, "krefeld": 99, "monchengladbach": 94,
        "strasbourg": 365, "stuttgart": 196, "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122,
    },
    "val": {"frankfurt": 267, "lindau": 59, "munster": 174},
    "test": {"berlin": 544, "bielefeld": 181, "bonn": 46, "leverkusen": 58, "mainz": 298, "munich": 398},
}  # fmt: skip
#: Maximum number of printed problems and notes, and length of the longest bar in characters.
MOST_LINES, MOST_NOTES, BAR = 50, 10, 40


class Found(NamedTuple):
    """A split before its files are checked."""

    name: str
    pairs: list[Pair]
    problems: list[str]
    notes: list[str]
    official: dict[str, int]  # number of pictures that each city of Cityscapes should have
    number: int | None = None  # official number of pictures


class Split(NamedTuple):
    """A split after its files were checked."""

    name: str
    cities: Counter[str]
    problems: list[str]
    notes: list[str]
    sizes: Counter[tuple[int, int]]
    counts: Counts
    pictures: np.ndarray  # int64 [256]: number of pictures that contain each train id
    official: int | None  # official number of pictures

    @property
    def pixels(self) -> np.ndarray:
        """Return the number of pixels of each train id, int64 [256]."""
        return self.counts.train_ids


# Checking a split


def look_at(found: Found, root: str, labels: LabelReader, workers: int) -> Split:
    """Check all files of a split.

    Args:
        found: the split.
        root: the data directory.
        labels: reader of the labels.
        workers: number of processes.
    """
    name, pairs = found.name, found.pairs
    split = Split(
        name,
        Counter(os.path.basename(os.path.dirname(pair.image)) for pair in pairs),
        list(found.problems),
        list(found.notes),
        Counter(),
        Counts(),
        np.zeros(256, np.int64),
        found.number,
    )
    for city, number in found.official.items():
        if split.cities[city] != number:
            split.problems.append(
                f"leftImg8bit/{name}/{city}: {split.cities[city]} of {number} pictures; unpack the whole "
                "leftImg8bit_trainvaltest.zip, or give --partial"
            )
    instances = [os.path.join(root, instances_of(pair.label)) for pair in pairs if has_ids(pair)]
    missing = [path for path in instances if not os.path.lexists(path)]
    if 0 < len(missing) < len(instances):
        split.problems.append(
            f"{missing[0]}: no such file, {len(missing)} of {len(instances)} labels have no instances; "
            "unpack the whole gtFine_trainvaltest.zip"
        )
    for image, times in Counter(pair.image for pair in pairs).items():
        if times > 1:
            split.notes.append(f"{image}: is listed {times} times")
    dark: list[str] = []
    turned: list[str] = []
    said: dict[str, list[str]] = {}  # files by message of a decoder
    for pair, looked in zip(pairs, look_at_all(root, pairs, labels, workers), strict=True):
        split.problems.extend(looked.problems)
        dark += looked.notes
        turned += [pair.image] if looked.is_turned else []
        for file, message in looked.said:
            said.setdefault(message, []).append(file)
        if looked.size is not None:
            split.sizes[looked.size] += 1
        if looked.counts is not None:
            split.counts.add(looked.counts)
            pixels = looked.counts.train_ids
            split.pictures[:] += pixels > 0
            if pixels[labels.ignore_label] == pixels.sum():
                split.notes.append(f"{pair.label}: has only void pixels")
    if turned:
        split.notes.append(say_turned(turned))
    if dark:
        split.notes.append(dark[0] + _and_more(dark))
    split.notes.extend(f"{files[0]}: {message}{_and_more(files)}" for message, files in said.items())
    if split.pixels.any():
        split.notes[:0] = labels.notes(split.counts)
    return split


def _and_more(files: Sequence[str]) -> str:
    return f" (and {len(files) - 1} more such files)" if len(files) > 1 else ""


def official_cities(split: str, cities: Set[str]) -> dict[str, int]:
    """Return the official number of pictures by city; empty unless all `cities` belong to the split."""
    known = OFFICIAL.get(split, {})
    return known if cities and cities <= known.keys() else {}


def find(args: argparse.Namespace) -> list[Found]:
    """Find the pairs of every requested split.

    Raises:
        DataError: the data set, split or list does not exist.
    """
    root = args.root
    place = recognition.recognize(root, args.dataset, args.data_list is not None)
    if args.data_list:
        if not os.path.isdir(root):
            layout.check_root(root)
        return [Found(args.data_list, layout.read_list(root, args.data_list), [], [], {})]
    if place.data:
        return find_published(place, list(dict.fromkeys(args.split or ())), args.partial)
    if place.is_pair:
        return find_sides(root, list(dict.fromkeys(args.split or ())))
    for name in args.split or ():
        layout.check_split(name)
    layout.check_root(root)
    names = list(dict.fromkeys(args.split or ())) or sorted(
        layout.splits(root), key=lambda name: ["train", "val", "test", name].index(name)
    )
    if not names:
        raise DataError(
            f"{root}: leftImg8bit has no folder train, val or test; unpack leftImg8bit_trainvaltest.zip again"
        )
    return [find_split(root, name, args.partial) for name in names]


def find_published(place: Place, names: Sequence[str], partial: bool) -> list[Found]:
    """Find the pairs of the splits of a published data set, and what is missing.

    Args:
        place: the data directory.
        names: the splits; empty for all or, with `partial`, all that have files.
        partial: whether a part of the pictures is enough.

    Raises:
        DataError: there is no such split, or a list is missing.
    """
    data = place.data
    assert data is not None
    generated = mini.is_generated(place.root)
    splits = []
    for name in names or data.splits:
        found, number = recognition.scan(place, name), recognition.check_side(place, name).number
        problems = recognition.problems_of(place, name, found)
        # Pictures without a label are checked as well.
        pairs = [*found.pairs, *(pair._replace(label="") for pair in found.without_label)]
        if partial and not names and not (pairs or found.without_picture):
            continue
        if pairs and len(pairs) != number and not partial and not generated:
            problems.append(
                f"{place.root}: has {len(pairs)} of the {number} pictures of {name}; unpack all of "
                f"{data.archives}, or give --partial"
            )
        notes = [layout.say_skipped(found.skipped)] if found.skipped else []
        if generated:
            notes.append("written by dataset.mini, so the number of pictures need not be the official one")
        splits.append(Found(name, pairs, problems, notes, {}, number))
    return splits


def find_sides(root: str, names: Sequence[str]) -> list[Found]:
    """Find the pairs of the sides of a folder pair, and problems with their names.

    Args:
        root: the data directory.
        names: the sides; empty for all that have pictures.

    Raises:
        DataError: a name is not that of a side, or no pairs can be found.
    """
    for name in names:
        folder_pair.check_side(root, name)
    found = folder_pair.find(root)
    print(*found.notes, sep="\n", flush=True)
    if not found.sides[folder_pair.TEST]:
        found.sides[folder_pair.TEST] = folder_pair.pictures_to_predict(root)
    names = names or [name for name, pairs in found.sides.items() if pairs]
    notes = [layout.say_skipped(found.skipped)] if found.skipped else []
    return [
        Found(name, found.sides[name], [] if number else found.problems, [] if number else notes, {})
        for number, name in enumerate(names)
    ]


def find_split(root: str, name: str, partial: bool) -> Found:
    """Find the pairs of a split in the Cityscapes layout, and problems with their names.

    Args:
        root: the data directory.
        name: name of the split.
        partial: whether a part of the cities of Cityscapes is enough.
    """
    found = layout.scan(root, name)
    cities = {os.path.basename(os.path.dirname(pair.image)) for pair in (*found.pairs, *found.without_label)}
    official = official_cities(name, cities)
    unlabeled = not os.path.isdir(os.path.join(root, "gtFine", name)) and name not in ("train", "val")
    if unlabeled or (name == "test" and official):
        # The labels of the test set are not public; those in gtFine/test have only void pixels.
        found = layout.scan(root, name, labeled=False)
    problems = [
        f"{os.path.join(root, pair.label)}: no such label; unpack the whole gtFine_trainvaltest.zip"
        for pair in found.without_label
    ]
    problems += [
        f"{os.path.join(root, label)}: has no picture; unpack the whole leftImg8bit_trainvaltest.zip"
        for label in found.without_picture
    ]
    problems += [
        f"{os.path.join(root, stray)}: not named *{layout.PICTURE}.png; rename it" for stray in found.strays
    ]
    # Pictures without a label are checked as well.
    pairs = [*found.pairs, *(pair._replace(label="") for pair in found.without_label)]
    if not pairs and not problems:
        problems.append(
            f"{os.path.join(root, 'leftImg8bit', name)}: has no pictures; unpack leftImg8bit_trainvaltest.zip"
        )
    notes = [layout.say_skipped(found.skipped)] if found.skipped else []
    return Found(name, pairs, problems, notes, {} if partial else official, sum(official.values()) or None)


def check_written(args: argparse.Namespace, found: Sequence[Found]) -> None:
    """Check that --plot and --json can be written, and do not overwrite a file of the data set.

    Raises:
        UsageError: they can't, or they do; the message names the flag.
    """
    pairs = [pair for each in found for pair in each.pairs]
    files = [file for pair in pairs for file in (pair.image, pair.label, instances_of(pair.label)) if file]
    inputs = [args.data_list, args.classes, *(os.path.join(args.root, file) for file in files)]
    outputs = {f"--{flag}": getattr(args, flag) for flag in ("plot", "json") if getattr(args, flag)}
    for flag, path in outputs.items():
        check_output_file(flag, path, inputs)
    if len(outputs) == 2 and os.path.realpath(args.plot) == os.path.realpath(args.json):
        raise UsageError(f"--plot {args.plot}: is also the file of --json; name another file")


# Results


def describe(split: Split, labels: LabelReader) -> str:
    """Return the counts, sizes and class frequencies of a split as text."""
    number = split.cities.total()
    beside = "" if split.official is None else f" of the official {split.official}"
    number_of_folders = len(split.cities)
    folders = "1 folder" if number_of_folders == 1 else f"{number_of_folders} folders"
    lines = [f"{split.name}: {number} pictures{beside} in {folders}"]
    sizes = ", ".join(f"{width}x{height} ({times})" for (height, width), times in split.sizes.most_common(5))
    if sizes:
        more = f" and {len(split.sizes) - 5} more" if len(split.sizes) > 5 else ""
        lines.append(f"  width x height (pictures): {sizes}{more}")
    total = int(split.pixels.sum())
    if total:
        names = labels.names()
        width = max(len(name) for name in (*names, "void"))
        shares = split.pixels / max(total - int(split.pixels[labels.ignore_label]), 1)
        largest = max(float(shares[: len(names)].max()), 1e-12)
        lines.append(f"  {'class':<{width}}  {'pixels':>9}  {'pictures':>8}")
        for train_id, name in enumerate(names):
            bar = "#" * math.ceil(BAR * float(shares[train_id]) / largest)
            occurs = f"{split.pictures[train_id]:>8}"
            lines.append(f"  {name:<{width}}  {100 * shares[train_id]:>8.3f}%  {occurs}  {bar}".rstrip())
        void = 100 * split.pixels[labels.ignore_label] / total
        lines.append(
            f"  {'void':<{width}}  {void:>8.3f}%  of all pixels; class shares are of the other pixels"
        )
    for note in split.notes[:MOST_NOTES]:
        lines.append(f"  note: {note}")
    if len(split.notes) > MOST_NOTES:
        lines.append(f"  ... and {len(split.notes) - MOST_NOTES} more such notes")
    return "\n".join(lines)


def as_json(splits: Sequence[Split], labels: LabelReader) -> dict[str, Any]:
    """Return the results of all splits as JSON values."""
    return {
        split.name: {
            "pictures": split.cities.total(),
            "official": split.official,
            "folders": dict(sorted(split.cities.items())),
            "sizes": [{"height": h, "width": w, "pictures": n} for (h, w), n in split.sizes.most_common()],
            "classes": {
                name: {"pixels": int(split.pixels[k]), "pictures": int(split.pictures[k])}
                for k, name in [*enumerate(labels.names()), (labels.ignore_label, "void")]
            },
            "problems": split.problems,
            "notes": split.notes,
        }
        for split in splits
    }


def commands(place: Place) -> list[str]:
    """Return the commands that train and evaluate with the settings closest to the published ones."""
    if place.data is None:
        return []
    chosen = f"--data-dir {shlex.quote(place.root)} --dataset {place.name}"
    return [f"python {name}.py {chosen} {flags}\n" for name, flags in place.data.settings.items()]


# The command


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = flags.Parser(
        prog="python -m dataset.check",
        usage="python -m dataset.check [options] CS",
        description=(__doc__ or "").splitlines()[0],
    )
    add = parser.add_argument
    add(
        "root",
        metavar="CS",
        help="folder of a published data set (docs/datasets.md), or with images and labels, or that of the "
        "paths in --data-list",
    )
    add("--dataset", choices=recognition.NAMES, help="name of the data set, if its folders do not tell it")
    add(
        "--split",
        action="append",
        metavar="S",
        help="train, val or test, or a folder below leftImg8bit; can be repeated; default: all",
    )
    add("--data-list", metavar="L", help="file of 'image<TAB>label' lines, used instead of the folders")
    add("--classes", metavar="TABLE", help="class table of another data set (docs/own_data.md)")
    add(
        "--num-classes",
        type=flags.classes,
        metavar="K",
        help="number of classes, if the class table does not tell it (19 without either)",
    )
    add(
        "--ignore-label",
        type=flags.label,
        default=IGNORE,
        metavar="ID",
        help="label of void pixels",
    )
    add(
        "--num-workers",
        type=flags.number(int, 1, 999),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of processes (default: number of CPU cores)",
    )
    add("--clip", type=flags.frames, default=1, metavar="T", help="count the missing frames of such clips")
    add(
        "--clip-stride",
        type=flags.number(int, 1, 99),
        default=1,
        metavar="FRAMES",
        help="distance of the frames of a clip",
    )
    add("--partial", action="store_true", help="accept a part of the pictures of a published data set")
    add("--plot", metavar="PNG", help="write a chart of the class frequencies")
    add("--json", metavar="FILE", help="write all results as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = get_parser().parse_args(argv)
    classes = choose_classes(
        args.root, args.data_list, args.classes, args.num_classes, args.dataset, skip=True
    )
    print("\n".join(classes.notes), end="\n" if classes.notes else "", flush=True)
    labels = LabelReader(classes.table, args.ignore_label, classes.number)
    splits: list[Split] = []
    found = find(args)
    check_written(args, found)
    for each in found:
        if args.clip > 1 and each.pairs:
            frames = clips.Frames(args.clip, args.clip_stride, args.root)
            each.notes.insert(0, clips.say_missing(each.name, [frames.of(pair.image) for pair in each.pairs]))
    try:
        for each in found:
            splits.append(look_at(each, args.root, labels, args.num_workers))
            print(describe(splits[-1], labels), flush=True)
    except OSError as error:
        raise RunError(
            f"{error.filename or args.root}: can't be read ({error.strerror or error}); check the disk"
        ) from error
    except BrokenProcessPool as error:
        raise RunError(
            "a process that reads pictures was killed (possibly out of memory); give a smaller --num-workers"
        ) from error
    try:
        if args.json:
            write_file(args.json, json.dumps(as_json(splits, labels), indent=2) + "\n")
        if args.plot:
            write_file(args.plot, draw_chart([(split.name, split.pixels) for split in splits], labels))
    except OSError as error:
        raise unwritable(error) from error
    problems = [problem for split in splits for problem in split.problems]
    for problem in problems[:MOST_LINES]:
        print(problem)
    if len(problems) > MOST_LINES:
        print(f"... and {len(problems) - MOST_LINES} more (--json FILE has all of them)")
    pictures = sum(split.cities.total() for split in splits)
    if problems:
        raise DataError(
            f"{args.root}: {len(problems)} problems in {pictures} pictures, the first is {problems[0]}"
        )
    print(f"{args.root}: no problems in {pictures} pictures")
    if args.data_list is None:
        print(*commands(recognition.recognize(args.root, args.dataset)), sep="", end="")
    return 0


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
