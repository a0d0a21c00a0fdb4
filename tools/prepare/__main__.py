"""Prepare labeled pictures of labelme, COCO, CVAT, VOC or two folders for training.

    python -m tools.prepare SOURCE OUT [--val SHARE] [--seed S] [--group PATTERN]

SOURCE is a file or folder of one of these formats:

    labelme   JSON files, next to their pictures
    coco      JSON files with polygons, RLE, or both
    cvat      XML files of the export "CVAT for images 1.1"
    voc       folder with JPEGImages and SegmentationClass (palette masks)
    pair      folder with images/ and labels/

OUT, a new folder, gets what train.py needs:

    images/      the pictures, as links (--copy: copies); turned upright where labels belong to that
    labels/      label pictures (PNG), whose values are train ids, with 255 for void
    train.lst    list of the training pictures
    val.lst      list of the validation pictures
    test.lst     list of the pictures for testing, if the source has some
    classes.tsv  class table

Everything is checked first. If something is wrong with SOURCE, nothing is written, the problems are printed,
and the exit status is 2. docs/prepare.md has the rules for overlaps, holes, void and the split.
"""

from __future__ import annotations

import argparse
import os

from dataset.split import SEED, SHARE, TEST, TRAIN, VAL, divide, groups_of, say_coarse, series_of
from tools import common
from tools.prepare import advice, formats
from tools.prepare.classes import problems_of, read_classes, similar_names
from tools.prepare.reading import count
from tools.prepare.source import Class, Found, Problems, Scene, Wanted
from tools.prepare.writing import Writer, check_out, new_folder
from utils import args as flags
from utils.errors import UsageError

#: Maximum number of printed problems and notes.
MOST_LINES, MOST_NOTES = 20, 20
#: Maximum numbers of classes, and of series of pictures, named in one line.
MOST_NAMES, MOST_SERIES = 12, 3


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser("prepare", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="annotation file, or folder with pictures and labels")
    add("out", metavar="OUT", help="folder to write, which is new or empty")
    add(
        "--from",
        dest="format",
        choices=tuple(formats.FORMATS),
        help="format of SOURCE; recognized by default",
    )
    add(
        "--val",
        type=flags.number(float, 0.001, 0.999),
        metavar="SHARE",
        help=f"share of the pictures for validation (default: {SHARE}, or the source's own split)",
    )
    add("--seed", type=flags.seed, metavar="S", help=f"seed of the split (default: {SEED})")
    add(
        "--group",
        metavar="PATTERN",
        help="regular expression; pictures in whose paths it finds the same text stay on one side of the "
        "split (by default, those of one folder)",
    )
    add(
        "--unlabeled",
        choices=("background", "void"),
        default="background",
        help="class of the pixels that no shape covers",
    )
    add(
        "--classes",
        metavar="FILE",
        help="class table, or text file with a name in each line; by default the classes of the source",
    )
    add("--images", metavar="DIR", help="folder with the pictures, if they are not next to the labels")
    add("--copy", action="store_true", help="copy the pictures instead of linking them")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = get_parser().parse_args(argv)
    if not os.path.exists(args.source):
        raise UsageError(f"{args.source}: no such file or folder; name the annotations or their folder")
    if args.images is not None and not os.path.isdir(args.images):
        raise UsageError(f"--images {args.images}: no such folder; name the folder of the pictures")
    check_out(args.out, args.source, args.images)
    wanted, given = Wanted(unlabeled_void=args.unlabeled == "void"), None
    if args.classes is not None:
        wanted, given = read_classes(args.classes, wanted.unlabeled_void)
    found = read(args, wanted._replace(pictures=args.images))
    classes = found.classes if given is None else with_colors(found.classes, given)
    scenes, parts, split = split_of(args, found)
    print(f"{args.source}: {say_found(found)}; {split}", flush=True)
    for note in found.notes[:MOST_NOTES]:
        print(f"note: {printable(note)}")
    if len(found.notes) > MOST_NOTES:
        print(f"... and {len(found.notes) - MOST_NOTES} more such notes")
    with new_folder(args.out) as folder:
        counts = Writer(folder, args.copy).write(scenes, parts, classes)
    print("\n".join(advice.describe(counts, classes)))
    for note in advice.remarks(counts, classes):
        print(f"note: {printable(note)}")
    numbers = ", ".join(f"{each.pictures} in {part}.lst" for part, each in counts.items())
    print(f"{args.out}: {len(scenes)} pictures, {numbers}")
    print("\n".join(advice.suggestions(args.out, counts, classes)))
    return 0


def read(args: argparse.Namespace, wanted: Wanted) -> Found:
    """Read and check the source.

    Raises:
        DataError: its format is unknown, or it has problems, the first of which were printed.
    """
    if args.format is None:
        name, what = formats.recognize(args.source)
        print(f"{args.source}: {what}", flush=True)
    else:
        name = args.format
    try:
        found = formats.reader(name)(args.source, wanted)
        if problems := problems_of(args.source, found.classes):
            raise Problems(args.source, problems)
    except Problems as error:
        if len(error.lines) > 1:
            print("\n".join(map(printable, error.lines[:MOST_LINES])))
        if len(error.lines) > MOST_LINES:
            print(f"... and {len(error.lines) - MOST_LINES} more")
        raise
    return found._replace(notes=[*found.notes, *similar_names(found.classes)])


def printable(line: str) -> str:
    """Return a line without line breaks and control characters, which names in a source may have."""
    return "".join(char if char.isprintable() else "?" for char in line)


def with_colors(classes: tuple[Class, ...], given: list[Class]) -> tuple[Class, ...]:
    """Return classes with the colors that --classes gives them."""
    colors = {each.name: each.color for each in given}
    return tuple(each._replace(color=colors.get(each.name) or each.color) for each in classes)


def split_of(args: argparse.Namespace, found: Found) -> tuple[list[Scene], list[str], str]:
    """Return the scenes, the part of each (train, val or test), and a description of the split.

    Raises:
        DataError: the pictures can't be divided.
    """
    own = [scene.part for scene in found.scenes]
    if {TRAIN, VAL} <= {*own} and (args.val, args.seed, args.group) == (None, None, None):
        scenes = [scene for scene, part in zip(found.scenes, own, strict=True) if part]
        parts = [part for part in own if part]
        if left := [scene.picture for scene, part in zip(found.scenes, own, strict=True) if not part]:
            found.notes.append(
                f"{count(left, 'picture')} in no part of the source's own split, and left out; the first is "
                f"{left[0]}"
            )
        numbers = ", ".join(f"{parts.count(part)} {part}" for part in (TRAIN, VAL, TEST) if part in parts)
        return scenes, parts, f"its own split ({numbers})"
    # Pictures for testing remain that, however the others are divided.
    names = [
        scene.name + os.path.splitext(scene.picture)[1]
        for scene, part in zip(found.scenes, own, strict=True)
        if part != TEST
    ]
    groups = groups_of(names, args.group)
    share = SHARE if args.val is None else args.val
    seed = SEED if args.seed is None else args.seed
    is_val = divide(groups, share, seed)
    drawn = iter(is_val)
    parts = [TEST if part == TEST else VAL if next(drawn) else TRAIN for part in own]
    number = len(set(groups))
    grouped = "" if number == len(groups) else f" in {number} groups"
    if tests := parts.count(TEST):
        grouped += f", with {tests} for testing"
    if coarse := say_coarse(groups, is_val):
        found.notes.append(coarse)
    if number == len(groups) and args.group is None and (series := series_of(names)):
        examples = ", ".join([*list(series)[:MOST_SERIES], *["..."] * (len(series) > MOST_SERIES)])
        found.notes.append(
            f"each picture is a group of its own; if those of a series ({examples}) show one scene, "
            r"give --group '^(.*?)\d+\D*$'"
        )
    return found.scenes, parts, f"split by seed {seed}{grouped}"


def say_found(found: Found) -> str:
    """Return the numbers of pictures and classes, and the names of the classes."""
    names = [each.name for each in found.classes]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{len(found.scenes)} pictures, {len(names)} classes: {', '.join(names[:MOST_NAMES])}{more}"


if __name__ == "__main__":
    common.end(main)
