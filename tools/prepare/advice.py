"""Advice on training with a prepared data set: shares of the classes, weights, sizes, and commands."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence

import numpy as np

from dataset.labels import IGNORE
from dataset.split import TRAIN, VAL
from tools.prepare.source import Class
from tools.prepare.writing import Counts

#: Largest crop: that of the Cityscapes recipe.
LARGEST_CROP, SMALLEST_CROP = 769, 9
#: Epochs of the Cityscapes recipe: 60000 steps of 8 crops of 2975 pictures.
EPOCHS = 160
#: Bounds of the number of steps. A network needs about 2000 to adapt from ImageNet to other pictures.
FEWEST_STEPS, MOST_STEPS = 2000, 60000
BATCH = 8
#: Ratio of the largest and the smallest share of a class, from which on weights are suggested.
UNEVEN = 20
#: Share of one class above which a note is printed.
ALMOST_ALL = 0.99
#: Largest picture in pixels that is predicted as a whole, that of Cityscapes.
LARGEST_WHOLE = 1024 * 2048
#: Longest line of a command.
WIDTH = 110


def shares_of(counts: Counts, number: int) -> np.ndarray:
    """Return the shares of `number` classes in the pixels that are not void, float64 [K]."""
    return counts.pixels[:number] / max(int(counts.pixels[:IGNORE].sum()), 1)


def describe(counts: dict[str, Counts], classes: Sequence[Class]) -> list[str]:
    """Return the table of class shares in percent, and numbers of pictures, of all parts."""
    width = max(len(name) for name in (*(each.name for each in classes), "class"))
    heads = "".join(f"  {part + ' %':>9}  {'pictures':>8}" for part in counts)
    lines = [f"{'class':<{width}}{heads}"]
    shares = {part: shares_of(each, len(classes)) for part, each in counts.items()}
    for number, each in enumerate(classes):
        cells = "".join(
            f"  {100 * shares[part][number]:>9.3f}  {counts[part].containing[number]:>8}" for part in counts
        )
        lines.append(f"{each.name:<{width}}{cells}")
    if any(each.pixels[IGNORE] for each in counts.values()):
        cells = "".join(
            f"  {100 * each.pixels[IGNORE] / max(int(each.pixels.sum()), 1):>9.3f}"
            f"  {each.containing[IGNORE]:>8}"
            for each in counts.values()
        )
        lines.append(f"{'(void)':<{width}}{cells}  of all pixels; classes: of the others")
    return lines


def remarks(counts: dict[str, Counts], classes: Sequence[Class]) -> list[str]:
    """Return lines about classes that training or validation lacks, or that cover nearly everything."""
    lines = []
    for part, then in ((TRAIN, "can't be learned"), (VAL, "is not scored")):
        for number, each in enumerate(classes):
            if not counts[part].pixels[number]:
                other = counts[VAL if part == TRAIN else TRAIN].pixels[number]
                advice = (
                    "give another --seed or --val" if other else "label it, or leave it out of the classes"
                )
                lines.append(f"class {each.name} has no pixel in {part}, so it {then}; {advice}")
    shares = shares_of(counts[TRAIN], len(classes))
    if shares.max() > ALMOST_ALL:
        name = classes[int(shares.argmax())].name
        lines.append(
            f"class {name} covers {100 * shares.max():.2f} % of the training pixels; a network that predicts "
            "only this class has a high accuracy, so compare the IoU of the other classes"
        )
    return lines


def class_weights(shares: np.ndarray) -> list[float] | None:
    """Return loss weights 1 / ln(1.02 + share), relative to the smallest; None if the shares are even enough.

    The formula limits the ratio of two weights to 36. A class without pixels gets 1.

    Args:
        shares: float64 [K].

    Source: "ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation", section 5.2.
    """
    present = shares[shares > 0]
    if len(present) < 2 or present.max() < UNEVEN * present.min():
        return None
    weights = 1 / np.log(1.02 + shares)
    weights = np.where(shares > 0, weights / weights[shares > 0].min(), 1)
    return [float(f"{weight:.3g}") for weight in weights]


def crop_of(sizes: Counts) -> tuple[int, int]:
    """Return the crop: sides 8k + 1 up to the median sides of the pictures, and at most 769."""
    sides = []
    for axis in range(2):
        lengths = sorted(size[axis] for size, number in sizes.sizes.items() for _ in range(number))
        median = lengths[len(lengths) // 2]
        sides.append(max(SMALLEST_CROP, min(LARGEST_CROP, (median - 1) // 8 * 8 + 1)))
    return sides[0], sides[1]


def steps_of(pictures: int) -> int:
    """Return a number of steps for training pictures: the epochs of the Cityscapes recipe, within bounds."""
    steps = max(FEWEST_STEPS, min(MOST_STEPS, EPOCHS * pictures / BATCH))
    return math.ceil(steps / 100) * 100


def commands(out: str, counts: dict[str, Counts], name: str) -> list[tuple[str, list[str]]]:
    """Return commands with what each is for: training, evaluation, prediction, and a quick try.

    Args:
        out: folder of the data set.
        counts: statistics of its parts.
        name: name for the folders of results.
    """
    crop, steps = crop_of(counts[TRAIN]), steps_of(counts[TRAIN].pictures)
    data = ["--data-dir", out]  # with its lists and its class table
    augmented = ["--random-mirror", "--random-scale"]
    snapshots = os.path.join("snapshots", name)
    size = f"{crop[0]},{crop[1]}"
    train = ["python", "train.py", *data, "--input-size", size, "--batch-size", str(BATCH)]
    train += ["--num-steps", str(steps), *augmented, "--val-every", str(steps // 10)]
    train += ["--restore-from", "torchvision", "--snapshot-dir", snapshots]
    best = ["--restore-from", os.path.join(snapshots, "CS_scenes_best.pth")]
    largest = max(h * w for each in counts.values() for h, w in each.sizes)
    whole = ["--whole"] if largest <= LARGEST_WHOLE else ["--input-size", size]
    evaluate = ["python", "evaluate.py", *data]
    predict = ["python", "-m", "tools.predict", os.path.join(out, f"{VAL}.lst"), *best, *whole]
    small = ",".join(str(min(side, 129)) for side in crop)
    quick = ["python", "train.py", *data, "--input-size", small, "--batch-size", "2", "--num-steps", "20"]
    quick += ["--gpu", "cpu", "--backbone", "resnet50", "--num-workers", "0", "--val-every", "20"]
    quick += ["--print-frequency", "5", "--snapshot-dir", f"{snapshots}-try"]
    best_of_try = os.path.join(f"{snapshots}-try", "CS_scenes_best.pth")
    return [
        ("train from ImageNet weights, on a GPU", train),
        ("evaluate the best weights of the validation", [*evaluate, *best, *whole]),
        ("predict the validation pictures", [*predict, "--out", os.path.join("predictions", name)]),
        (
            "or try all of it first, in minutes on a CPU: train a useless network like this, then evaluate "
            f"and predict as above with --restore-from {best_of_try}",
            quick,
        ),
    ]


def as_command(words: Sequence[str]) -> str:
    r"""Return a command to copy into a shell; long lines are continued with \."""
    parts: list[str] = []
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += f" {word}"  # keep a flag and its value together
        else:
            parts.append(word)
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > WIDTH - 3:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return "\n".join(lines)


def suggestions(out: str, counts: dict[str, Counts], classes: Sequence[Class]) -> list[str]:
    """Return the lines that end the command: suggested flags, and the commands to run next."""
    pictures = counts[TRAIN].pictures
    crop, steps = crop_of(counts[TRAIN]), steps_of(pictures)
    lines = [
        f"suggested: --input-size {crop[0]},{crop[1]} (median size of the pictures, at most {LARGEST_CROP}), "
        f"--batch-size {BATCH}, --num-steps {steps} ({steps * BATCH / pictures:.0f} epochs of {pictures} "
        "pictures)"
    ]
    if weights := class_weights(shares_of(counts[TRAIN], len(classes))):
        text = ",".join(f"{weight:g}" for weight in weights)
        lines.append(
            f"the shares differ much; to favor rare classes, add --class-weights {text} to the first command"
        )
    name = os.path.basename(os.path.realpath(out))
    for what, words in commands(out, counts, name):
        lines += ["", f"# {what}", as_command(words)]
    return lines
