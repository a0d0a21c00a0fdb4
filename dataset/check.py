"""Look at every file of a data set, and say what is wrong with it and what is in it.

    python -m dataset.check CS [--split S] [--data-list L] [--classes TABLE] [--plot PNG] [--json FILE]

Reads all pictures, labels and instances, in several processes. Prints how many there are of each split,
beside the official numbers if it is Cityscapes, their sizes, how often each class occurs, and a line for each
problem: the file, what is wrong, what to do. Exit status 0 where all is well, 2 where it is not.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import numpy as np

from dataset import layout
from dataset.class_chart import draw_chart
from dataset.labels import IGNORE, LabelReader, choose_table
from dataset.layout import LABEL_IDS, Pair, instances_of
from dataset.pictures import check_size, decode_image, decode_label, load
from utils import args as flags
from utils.errors import DataError, RunError
from utils.files import check_output_file, unwritable, write_file

#: Pictures of each city of Cityscapes' fine annotations.
OFFICIAL = {
    "train": {
        "aachen": 174, "bochum": 96, "bremen": 316, "cologne": 154, "darmstadt": 85, "dusseldorf": 221,
        "erfurt": 109, "hamburg": 248, "hanover": 196, "jena": 119, "krefeld": 99, "monchengladbach": 94,
        "strasbourg": 365, "stuttgart": 196, "tubingen": 144, "ulm": 95, "weimar": 142, "zurich": 122,
    },
    "val": {"frankfurt": 267, "lindau": 59, "munster": 174},
    "test": {"berlin": 544, "bielefeld": 181, "bonn": 46, "leverkusen": 58, "mainz": 298, "munich": 398},
}  # fmt: skip
#: Of what is shown of the problems, the notes, the bars.
MOST_LINES, MOST_NOTES, BAR = 50, 10, 40
#: An instance id is the label id * 1000 + a number.
SINGLE = 1000


class Looked(NamedTuple):
    """What a look at the files of one pair found."""

    problems: list[str]
    size: tuple[int, int] | None  # (height, width), None where the picture can't be read
    pixels: np.ndarray | None  # int64 [256], of each train id; None where the label can't be read


class Split(NamedTuple):
    """What is known of a split."""

    name: str
    cities: Counter[str]
    problems: list[str]
    notes: list[str]
    sizes: Counter[tuple[int, int]]
    pixels: np.ndarray  # int64 [256]
    pictures: np.ndarray  # int64 [256]: how many have pixels of each train id


# One pair


def look(root: str, pair: Pair, labels: LabelReader) -> Looked:
    """Decode picture, label and instances of a pair; a problem of one does not hide those of the others."""
    problems: list[str] = []
    size = pixels = None
    try:
        picture = load(os.path.join(root, pair.image))
        decode_image(picture)
        size = picture.height, picture.width
    except DataError as error:
        problems.append(str(error))
    if pair.label:
        try:
            label = load(os.path.join(root, pair.label))
            if size is not None:
                check_size(label.path, label, pair.image, picture)
            pixels = np.bincount(labels.read(label).ravel(), minlength=256)
        except DataError as error:
            problems.append(str(error))
    instances = os.path.join(root, instances_of(pair.label))
    if pixels is not None and _has_ids(pair) and os.path.lexists(instances):
        try:
            found = load(instances)
            check_size(found.path, found, pair.label, label)
            check_instances(instances, decode_label(found), decode_label(label))
        except DataError as error:
            problems.append(str(error))
    return Looked(problems, size, pixels)


def _has_ids(pair: Pair) -> bool:
    return pair.label.endswith(LABEL_IDS)


def check_instances(path: str, instances: np.ndarray, ids: np.ndarray) -> None:
    """Raises DataError where instance ids [h, w] belong to other labels than the label ids [h, w] say."""
    if instances.ndim != 2:
        raise DataError(
            f"{path}: instances have one channel of ids, this is a picture of colours; copy it again"
        )
    values = instances.astype(np.int64)
    of_label = np.where(values < SINGLE, values, values // SINGLE)
    wrong = of_label != ids
    if wrong.any():
        raise DataError(
            f"{path}: instance {values[wrong][0]} where the label id is {ids[wrong][0]}; give the one that "
            "belongs to the label"
        )


# All pairs, in processes

_job: tuple[str, LabelReader]


def _begin(root: str, labels: LabelReader) -> None:
    """What a process needs: that OpenCV has one thread, and that Ctrl-C is the parent's."""
    global _job
    _job = root, labels
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _look(pair: Pair) -> Looked:
    return look(_job[0], pair, _job[1])


def look_at_all(root: str, pairs: Sequence[Pair], labels: LabelReader, workers: int) -> Iterator[Looked]:
    """What each pair's files are like, in the order of the pairs, with a bar of the progress."""
    progress = _Progress(len(pairs))
    # Not threads, which would wait for each other: the decoder holds Python's lock. And not forks of this
    # process: where it has had threads, a copy without them can wait for one for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dataset.check"])
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(root, labels)) as pool:
        try:
            for done, looked in enumerate(pool.map(_look, pairs, chunksize=4), 1):
                progress.show(done)
                yield looked
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Progress:
    """A bar on standard error: redrawn in place on a terminal, else a line now and then."""

    def __init__(self, total: int):
        self.total = total
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if done < self.total and now - self.last < (0.1 if self.terminal else 10.0):
            return
        self.last = now
        rate = done / max(now - self.start, 1e-9)
        filled = 30 * done // self.total
        left = timedelta(seconds=round((self.total - done) / rate))
        line = f"[{'#' * filled:<30}] {done}/{self.total}  {rate:.1f} pictures/s  {left} left"
        end = "\n" if done == self.total or not self.terminal else ""
        print(f"\r{line}" if self.terminal else line, end=end, file=sys.stderr, flush=True)


# A split


def split_of(
    name: str,
    root: str,
    pairs: Sequence[Pair],
    labels: LabelReader,
    workers: int,
    problems: Iterable[str] = (),
    official: Mapping[str, int] = MappingProxyType({}),
) -> Split:
    """Look at the pairs of a split.

    Args:
        problems: what is known to be wrong before.
        official: pictures that each city ought to have.
    """
    split = Split(
        name,
        Counter(os.path.basename(os.path.dirname(pair.image)) for pair in pairs),
        list(problems),
        [],
        Counter(),
        np.zeros(256, np.int64),
        np.zeros(256, np.int64),
    )
    for city, number in official.items():
        if split.cities[city] != number:
            split.problems.append(
                f"leftImg8bit/{name}/{city}: {split.cities[city]} of {number} pictures; unpack the whole "
                "leftImg8bit_trainvaltest.zip, or say --partial"
            )
    instances = [os.path.join(root, instances_of(pair.label)) for pair in pairs if _has_ids(pair)]
    missing = [path for path in instances if not os.path.lexists(path)]
    if 0 < len(missing) < len(instances):
        split.problems.append(
            f"{missing[0]}: no such file, one of {len(missing)} where other labels have instances; unpack "
            "the whole gtFine_trainvaltest.zip"
        )
    for image, times in Counter(pair.image for pair in pairs).items():
        if times > 1:
            split.notes.append(f"{image}: {times} times in the list")
    for pair, looked in zip(pairs, look_at_all(root, pairs, labels, workers), strict=True):
        split.problems.extend(looked.problems)
        if looked.size is not None:
            split.sizes[looked.size] += 1
        if looked.pixels is not None:
            split.pixels[:] += looked.pixels
            split.pictures[:] += looked.pixels > 0
            if looked.pixels[labels.ignore_label] == looked.pixels.sum():
                split.notes.append(f"{pair.label}: void alone")
    return split


def official_cities(split: str, cities: Set[str]) -> dict[str, int]:
    """Pictures of each city of a split of Cityscapes; none where `cities` are not Cityscapes'."""
    known = OFFICIAL.get(split, {})
    return known if cities and cities <= known.keys() else {}


def splits_of(args: argparse.Namespace, labels: LabelReader) -> Iterator[Split]:
    """Every split that is asked for.

    Raises:
        DataError: there is no such data set, split or list.
    """
    root, workers = args.root, args.num_workers
    if args.data_list:
        pairs = layout.read_list(root, args.data_list)
        yield split_of(args.data_list, root, pairs, labels, workers)
        return
    layout.check_root(root)
    names = args.split or sorted(
        layout.splits(root), key=lambda name: (["train", "val", "test"] + [name]).index(name)
    )
    if not names:
        raise DataError(
            f"{root}: leftImg8bit has no folder train, val or test; unpack leftImg8bit_trainvaltest.zip again"
        )
    for name in names:
        found = layout.scan(root, name)
        files = [*(pair.image for pair in found.pairs), *found.without_label]
        official = official_cities(name, {os.path.basename(os.path.dirname(file)) for file in files})
        unlabelled = not os.path.isdir(os.path.join(root, "gtFine", name)) and name not in ("train", "val")
        if unlabelled or (name == "test" and official):
            # The benchmark keeps its labels: what gtFine/test has is void alone.
            found = layout.scan(root, name, labelled=False)
        problems = [
            f"{os.path.join(root, label)}: no such label; unpack the whole gtFine_trainvaltest.zip"
            for label in found.without_label
        ]
        problems += [
            f"{os.path.join(root, label)}: has no picture; unpack the whole leftImg8bit_trainvaltest.zip"
            for label in found.without_picture
        ]
        problems += [
            f"{os.path.join(root, stray)}: not named *{layout.PICTURE}.png; rename it"
            for stray in found.strays
        ]
        if not found.pairs and not problems:
            problems.append(
                f"{os.path.join(root, 'leftImg8bit', name)}: no picture; unpack leftImg8bit_trainvaltest.zip"
            )
        wanted = {} if args.partial else official
        yield split_of(name, root, found.pairs, labels, workers, problems, wanted)


# What is said of it


def describe(split: Split, labels: LabelReader) -> str:
    """Counts, sizes and class frequencies of a split, as text."""
    number = split.cities.total()
    official = official_cities(split.name, split.cities.keys())
    beside = f" of the official {sum(official.values())}" if official else ""
    lines = [f"{split.name}: {number} pictures{beside} in {len(split.cities)} folders"]
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
            f"  {'void':<{width}}  {void:>8.3f}%  of all pixels; the classes' shares are of the rest"
        )
    for note in split.notes[:MOST_NOTES]:
        lines.append(f"  note: {note}")
    if len(split.notes) > MOST_NOTES:
        lines.append(f"  ... and {len(split.notes) - MOST_NOTES} more such notes")
    return "\n".join(lines)


def as_json(splits: Sequence[Split], labels: LabelReader) -> dict[str, Any]:
    """All that is known of the splits."""
    return {
        split.name: {
            "pictures": split.cities.total(),
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


# The command


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(
        prog="python -m dataset.check",
        usage="python -m dataset.check [options] CS",
        description=(__doc__ or "").splitlines()[0],
    )
    add = parser.add_argument
    add("root", metavar="CS", help="folder with leftImg8bit and gtFine, or what --data-list is relative to")
    add(
        "--split",
        action="append",
        metavar="S",
        help="folder below leftImg8bit; may be given again; default: all",
    )
    add("--data-list", metavar="L", help="file of 'image<TAB>label' lines, instead of the folders")
    add("--classes", metavar="TABLE", help="what the labels of another data set mean: docs/own_data.md")
    add(
        "--num-classes",
        type=flags.classes,
        metavar="K",
        help="number of train ids; those of --classes, or 19",
    )
    add(
        "--ignore-label",
        type=flags.label,
        default=IGNORE,
        metavar="ID",
        help="of void; default: 255",
    )
    add(
        "--num-workers",
        type=flags.number(int, 1, 999),
        default=os.cpu_count() or 1,
        metavar="N",
        help="default: the cores",
    )
    add("--partial", action="store_true", help="a part of Cityscapes is wanted: do not miss the rest")
    add("--plot", metavar="PNG", help="write a chart of the class frequencies")
    add("--json", metavar="FILE", help="write all that is found, as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    for flag in ("plot", "json"):
        if named := getattr(args, flag):
            check_output_file(f"--{flag}", named)
    table, num_classes = choose_table(args.classes, args.num_classes)
    labels = LabelReader(table, args.ignore_label, num_classes)
    splits: list[Split] = []
    try:
        for split in splits_of(args, labels):
            splits.append(split)
            print(describe(split, labels), flush=True)
    except OSError as error:
        raise RunError(
            f"{error.filename or args.root}: can't be read ({error.strerror or error}); check the disk"
        ) from error
    except BrokenProcessPool as error:
        raise RunError(
            "a process that reads pictures was killed (out of memory, perhaps); give fewer --num-workers"
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
            f"{args.root}: {len(problems)} problems in {pictures} pictures; the first: {problems[0]}"
        )
    print(f"{args.root}: all is well with {pictures} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
