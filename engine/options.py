"""The flags of train.py and evaluate.py, in groups of typed options.

Each field of a group defines a flag of the same name. The `Flag` of a field holds the settings of the
argument parser, and says where the value of the flag is used. A command parses its flags once, and passes the
options to other functions. An options object can't be changed.

The recipe of a run is the values of the flags with recipe=True, which determine how the weights change from
one step to the next. Each state of the run holds the recipe, and a resumed run must have the same recipe. In
contrast, args.json holds the values of all flags (utils.run_files.ARGUMENTS).
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

import fused
from engine.acceleration import AUTO, PRECISIONS, Speed, choose_precision, resolve_fused, use_fused
from engine.training.optimizer import ENTRIES as OPTIMIZERS
from engine.training.step import StepOptions, waits_late
from fused import MODES
from utils import args as flags
from utils.errors import UsageError

#: Minimum side of a crop. It gives 2x2 features at stride 8, enough for batch statistics of one sample.
SMALLEST_CROP = 9
#: Smallest and largest factor of the random scale, as in the original.
SCALE_RANGE = (0.7, 2.1)

Group = TypeVar("Group", bound="Options")
#: Accepted values of flags, by name, or a function that returns an accepted value.
ValuesOf = Mapping[str, Iterable[str] | Callable[[str], str]]


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
        help: text for --help.
        parse: function that converts the text of the command line. If None, the value is the text, or True
            for a flag whose default is False.
        choices: accepted values.
        metavar: name of the value in --help.
        required: whether the flag must be given.
        bare: whether the flag may be given without a value, which means True.
        recipe: whether the value determines how the weights change in a step, and is part of the recipe.
        noted: whether the value affects the scores of an evaluation, and is written to result.txt.
        from_run: whether the default value is that of the run that wrote the checkpoint, in a command that
            reads a checkpoint.
        shared: whether tools.seeds passes the value of train.py to evaluate.py.
    """

    help: str
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    required: bool = False
    bare: bool = False
    recipe: bool = False
    noted: bool = False
    from_run: bool = False
    shared: bool = False


#: The flag --fused of train.py and of the commands that predict.
FUSED = Flag(
    "fused batch norm, loss, optimizer and prediction; auto: on CPUs only, because no GPU has run them yet",
    choices=MODES,
    recipe=True,
    noted=True,
)


def option(default: Any, flag: Flag) -> Any:
    """Return the dataclass field of a flag."""
    return field(default=default, metadata={"flag": flag})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of all groups of options."""

    #: Heading of the group in --help.
    title: ClassVar[str] = ""

    @classmethod
    def of(cls: type[Group], args: argparse.Namespace) -> Group:
        """Create the options from parsed arguments."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls)})

    @classmethod
    def names(cls, wanted: Callable[[Flag], bool]) -> list[str]:
        """Return the names of the flags for which `wanted` is true."""
        return [each.name for each in fields(cls) if wanted(_flag_of(each))]

    def recipe(self) -> dict[str, Any]:
        """Return the recipe: the options that determine how the weights change in a step."""
        return {name: getattr(self, name) for name in self.names(lambda flag: flag.recipe)}

    def noted(self) -> dict[str, Any]:
        """Return the options that affect the scores of an evaluation."""
        return {name: getattr(self, name) for name in self.names(lambda flag: flag.noted)}


def _flag_of(each: Field[Any]) -> Flag:
    return each.metadata["flag"]


def for_device(options: Group, device: torch.device) -> tuple[Group, list[str]]:
    """Replace --amp auto and --fused auto by their values for `device`, and check both.

    Returns:
        The options, and lines about the choices.

    Raises:
        UsageError: the device does not support a flag.
    """
    values: Any = options
    notes = [use_fused(values.fused, device)]
    amp, chosen = choose_precision(values.amp, device)
    resolved = {"amp": amp, "fused": resolve_fused(values.fused, device)}
    return replace(options, **resolved), [note for note in (*notes, chosen) if note]


def add_flags(
    parser: argparse.ArgumentParser,
    options: type[Options],
    choices: ValuesOf = MappingProxyType({}),
    reads_checkpoint: bool = False,
) -> None:
    """Add the flags of `options` to a parser, group by group.

    Args:
        parser: parser to add the flags to.
        options: class of the options of the command.
        choices: accepted values of flags, by name, or a function that returns an accepted value, for flags
            whose choices depend on the caller.
        reads_checkpoint: whether flags with `from_run` take their default from the run of the checkpoint.
    """
    groups: dict[str, Any] = {}
    by_name = {each.name: each for each in fields(options)}
    classes = [each for each in options.__mro__ if issubclass(each, Options)]
    for group in reversed(classes):
        for name in inspect.get_annotations(group):
            # Add a flag that a subclass redefines only once, in the group of the subclass.
            if name not in by_name or group is not next(
                each for each in classes if name in inspect.get_annotations(each)
            ):
                continue
            flag, default = _flag_of(by_name[name]), by_name[name].default
            if group.title not in groups:
                groups[group.title] = parser.add_argument_group(group.title)
            settings: dict[str, Any] = {"help": flag.help, "default": None if flag.required else default}
            if reads_checkpoint and flag.from_run:
                other = f", or {default}" if default is not None else ""
                settings |= {
                    "help": f"{flag.help}; by default that of the checkpoint{other}",
                    "default": None,
                }
            if default is False and flag.parse is None and issubclass(options, TrainOptions):
                # The command has no positional arguments that could be taken for the value. A value overrides
                # a recipe: --random-mirror 0.
                settings |= {"type": flags.boolean, "nargs": "?", "const": True, "metavar": "0|1"}
            elif default is False and flag.parse is None:
                settings["action"] = "store_true"
            else:
                settings["type"] = flag.parse or str
                settings["metavar"] = flag.metavar
                accepted = choices.get(name, flag.choices)
                if callable(accepted):
                    settings["type"] = accepted
                else:
                    settings["choices"] = sorted(accepted or ()) if name in choices else accepted
                settings["required"] = flag.required
            if flag.bare:
                settings |= {"nargs": "?", "const": True}
            groups[group.title].add_argument(f"--{name.replace('_', '-')}", **settings)
    if issubclass(options, ProcessOptions):
        # torch.distributed.launch passes this flag. It is ignored: the environment has the same number.
        parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Options for the pictures of the data set."""

    title = "data"
    data_dir: str = option(
        "",
        Flag(
            "published data set (docs/datasets.md), folder with your images/ and labels/, or the folder that "
            "the paths of --data-list are relative to",
            required=True,
            noted=True,
            shared=True,
        ),
    )
    dataset: str | None = option(
        None, Flag("name of the data set, if its folders do not tell it", noted=True, shared=True)
    )
    data_list: str | None = option(
        None, Flag("file of 'image<TAB>label' lines; by default the split of the data set", noted=True)
    )
    ignore_label: int = option(
        255, Flag("train id of void pixels", flags.label, recipe=True, noted=True, shared=True)
    )


@dataclass(frozen=True, kw_only=True)
class ClassOptions(Options):
    """Options for the classes of the data set."""

    title = "data"
    classes: str | None = option(
        None,
        Flag(
            "class table of a data set other than Cityscapes (docs/own_data.md)",
            metavar="TABLE",
            noted=True,
            from_run=True,
        ),
    )
    num_classes: int = option(
        None,
        Flag(
            "number of classes, if there is no class table",
            flags.classes,
            recipe=True,
            noted=True,
            from_run=True,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """Options for the architecture of the network."""

    title = "network"
    model: str = option("ccnet", Flag("network", recipe=True, noted=True, from_run=True))
    backbone: str = option(
        "resnet101",
        Flag(
            "backbone: resnet50, resnet101, or timm:NAME for a network of the timm library",
            metavar="NAME",
            recipe=True,
            noted=True,
            from_run=True,
        ),
    )
    recurrence: int | None = option(
        None,
        Flag(
            "number of applications of the attention (R in the paper), by default 2 for ccnet, 3 for ccnet3d "
            "and 1 for nonlocal; 0 omits it",
            flags.recurrence,
            recipe=True,
            noted=True,
            from_run=True,
        ),
    )
    clip: int | None = option(
        None,
        Flag(
            "frames of a clip, odd, for ccnet3d (docs/video.md), by default 3; the middle one has the label",
            flags.frames,
            metavar="T",
            recipe=True,
            noted=True,
            from_run=True,
        ),
    )
    clip_stride: int | None = option(
        None,
        Flag(
            "distance of the frames of a clip, by default 1",
            flags.number(int, 1, 99),
            metavar="FRAMES",
            recipe=True,
            noted=True,
            from_run=True,
        ),
    )

    @property
    def frames(self) -> dict[str, Any]:
        """Arguments of the data set: number of frames of a clip, 1 for a picture, and their distance."""
        return {"clip": self.clip or 1, "clip_stride": self.clip_stride or 1}


@dataclass(frozen=True, kw_only=True)
class ProcessOptions(Options):
    """Options for the processes of a command."""

    title = "processes"
    gpu: str | None = option(
        None,
        Flag(
            "GPU ids such as 0,1,2,3 (one process each), or cpu; by default all visible GPUs, or the CPU",
            metavar="IDS",
            shared=True,
        ),
    )
    nproc: int | None = option(
        None, Flag("number of CPU processes", flags.processes, metavar="N", shared=True)
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """Options for the training samples and the data workers."""

    title = "samples"
    input_size: tuple[int, int] = option(
        (769, 769), Flag("size of the crops", flags.size, metavar="H,W", recipe=True, shared=True)
    )
    photometric: bool = option(
        False, Flag("change brightness, contrast, saturation and hue at random", recipe=True)
    )
    random_mirror: bool = option(False, Flag("mirror half of the samples", recipe=True))
    random_scale: bool = option(False, Flag("scale each sample by a random factor", recipe=True))
    scale_range: tuple[float, float] = option(
        SCALE_RANGE,
        Flag(
            "smallest and largest factor of --random-scale, in steps of 0.1",
            flags.factors,
            metavar="LOW,HIGH",
            recipe=True,
        ),
    )
    short_sides: Sequence[int] | None = option(
        None,
        Flag(
            "scale each sample so that its short side has one of these lengths",
            flags.sides,
            metavar="S,S",
            recipe=True,
        ),
    )
    long_side: int | None = option(
        None,
        Flag("maximum length of the long side with --short-sides", flags.side, metavar="S", recipe=True),
    )
    num_workers: int = option(8, Flag("data workers per training process", flags.workers))
    cache: str | None = option(
        None, Flag("keep decoded pictures (8 MB each) for the next epochs", choices=("ram", "disk"))
    )
    cache_gb: float = option(
        32.0,
        Flag(
            "size of the cache, shared by all processes of a machine",
            flags.number(float, 0, 1e6, open_low=True),
            metavar="GB",
        ),
    )
    cache_dir: str | None = option(
        None, Flag("folder of --cache disk; by default --snapshot-dir", metavar="DIR")
    )

    @property
    def scaling(self) -> tuple[bool, tuple[float, float], Sequence[int] | None, int | None]:
        """The arguments of dataset.transforms.choose_scaling."""
        return self.random_scale, self.scale_range, self.short_sides, self.long_side


@dataclass(frozen=True, kw_only=True)
class StartOptions(NetworkOptions):
    """Options for the network in training: its architecture, dropout, batch norm and initial weights."""

    title = "network"
    dropout: float = option(
        0.1, Flag("rate of the channel dropout of both heads", flags.fraction, recipe=True)
    )
    abn: str = option(
        "torch",
        Flag(
            "implementation of the activated batch norm: PyTorch's, or the inplace-abn package's",
            choices=("torch", "inplace"),
            recipe=True,
        ),
    )
    freeze_bn: bool = option(
        False, Flag("normalize with the checkpoint's running statistics and keep them fixed", recipe=True)
    )
    restore_from: str | None = option(
        None,
        Flag(
            "initial weights, of an ImageNet backbone or of this network: a file, or torchvision or "
            "timm:NAME to download them; random by default, or with the word random",
            flags.initial_weights,
            metavar="FILE",
        ),
    )
    not_restore_last: bool = option(
        False, Flag("initialize both classifiers at random (fine-tuning to other classes)")
    )


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """Options for the optimization. The recipe of a run has flags of other groups too."""

    title = "recipe"
    batch_size: int = option(8, Flag("global batch size, over all processes", flags.batch, recipe=True))
    num_steps: int = option(60000, Flag("training steps", flags.positive_int, recipe=True))
    optimizer: str = option(
        "sgd",
        Flag(
            "sgd, as in the paper, or adamw, for transformers (try --learning-rate 6e-5 --weight-decay 0.01 "
            "--warmup 1500)",
            choices=tuple(OPTIMIZERS),
            recipe=True,
        ),
    )
    learning_rate: float = option(1e-2, Flag("initial learning rate", flags.positive_float, recipe=True))
    warmup: int = option(
        0,
        Flag(
            "steps in which the learning rate grows linearly to its value",
            flags.count,
            metavar="STEPS",
            recipe=True,
        ),
    )
    power: float = option(
        0.9,
        Flag(
            "exponent of the polynomial decay of the learning rate",
            flags.number(float, 0, 100, open_low=True),
            recipe=True,
        ),
    )
    momentum: float = option(0.9, Flag("momentum of SGD", flags.fraction, recipe=True))
    weight_decay: float = option(
        1e-4,
        Flag(
            "weight decay, of all parameters with sgd, not of norms and biases with adamw",
            flags.number(float, 0),
            recipe=True,
        ),
    )
    ohem: bool = option(False, Flag("online hard example mining", flags.boolean, bare=True, recipe=True))
    ohem_thres: float = option(
        0.7,
        Flag("OHEM keeps pixels whose class has at most this probability", flags.fraction, recipe=True),
    )
    ohem_keep: int = option(
        100000, Flag("minimum number of pixels that OHEM keeps per process", flags.count, recipe=True)
    )
    class_weights: Sequence[float] | None = option(
        None,
        Flag("loss weight of each class; by default all equal", flags.numbers, metavar="W,W", recipe=True),
    )
    ccl: bool = option(
        False, Flag("add the category-consistent loss (--model ccnet, ccnet3d and nonlocal)", recipe=True)
    )
    ccl_channels: int = option(
        16, Flag("channels of the features of --ccl", flags.positive_int, metavar="N", recipe=True)
    )
    ema: float | None = option(
        None,
        Flag(
            "also keep an exponential moving average of the weights, with a decay such as 0.9999",
            flags.number(float, 0, 1 - 1e-9),
            metavar="DECAY",
            recipe=True,
        ),
    )
    random_seed: int = option(
        12345, Flag("seed of weights, sample order, augmentation and dropout", flags.seed, recipe=True)
    )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(Options):
    """Options for the precision and the implementation of a training step."""

    title = "speed"
    amp: str | None = option(
        None,
        Flag(
            "mixed precision; auto: bf16 if the device has fast products of it; float32 by default",
            choices=(AUTO, *sorted(PRECISIONS)),
            recipe=True,
        ),
    )
    channels_last: bool = option(
        False, Flag("store tensors as [N, h, w, C], the layout that tensor cores use", recipe=True)
    )
    compile: bool = option(False, Flag("compile the network with torch.compile", recipe=True))
    fused: str = option("auto", FUSED)
    recompute: bool = option(
        False,
        Flag(
            "recompute outputs of batch norm in the backward pass: less memory, the same results; requires "
            "--fused"
        ),
    )
    cuda_graph: bool = option(
        False, Flag("record the kernels of a step once and launch them together (on one GPU)", recipe=True)
    )
    grad_accum: int = option(
        1, Flag("split each batch into N parts to save memory", flags.batch, metavar="N", recipe=True)
    )
    backend: str = option(
        "torch",
        Flag(
            "implementation of optimizer, data parallelism and synchronized batch norm: PyTorch's, or NVIDIA "
            "apex's (tag 25.05)",
            choices=("torch", "apex"),
            recipe=True,
        ),
    )
    deterministic: bool = option(False, Flag("make runs on GPUs bit-identical too, which is slower"))


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Options for the files of a run and the intervals at which the files are written."""

    title = "run"
    snapshot_dir: str = option("snapshots", Flag("folder of the snapshots, states and log of the run"))
    save_pred_every: int = option(10000, Flag("steps between snapshots", flags.positive_int, metavar="STEPS"))
    save_state_every: int = option(
        1000, Flag("steps between states, which --resume continues from", flags.positive_int, metavar="STEPS")
    )
    keep_states: int = option(2, Flag("number of states to keep", flags.positive_int, metavar="N"))
    val_every: int = option(
        0,
        Flag(
            "steps between validations, whose best weights are kept; 0: never", flags.count, metavar="STEPS"
        ),
    )
    val_list: str | None = option(
        None, Flag("like --data-list, for the validation; by default the val split of the data set")
    )
    print_frequency: int = option(
        50, Flag("steps between lines of the log", flags.positive_int, metavar="STEPS")
    )
    start_iters: int = option(0, Flag("number of steps to count as done", flags.count, metavar="STEP"))
    resume: bool = option(False, Flag("continue from the newest state in --snapshot-dir, if there is one"))
    change_recipe: bool = option(False, Flag("allow --resume with flags that change the recipe of the run"))


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    RunOptions,
    SpeedOptions,
    RecipeOptions,
    StartOptions,
    SampleOptions,
    ProcessOptions,
    ClassOptions,
    DataOptions,
):
    """All options of train.py."""

    title = "run"

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def all_weights_used(self) -> bool:
        """Whether every weight gets a gradient; with --recurrence 0, those of the attention get none."""
        return self.recurrence != 0

    def pixels(self, processes: int) -> int:
        """Return the number of pixels that each of several processes trains on at a time."""
        pictures = self.batch_size // (processes * self.grad_accum)
        return pictures * self.frames["clip"] * math.prod(self.input_size)

    def stepping(self, device: torch.device) -> StepOptions:
        """Return the options of a step on `device`."""
        late = self.backend == "torch" and waits_late(device, self.amp)
        return StepOptions(self.amp, self.grad_accum, self.random_seed, late, self.cuda_graph)

    def check(self, processes: int, device_type: str) -> None:
        """Check the options against each other and against the processes of the run.

        Args:
            processes: number of processes of the run.
            device_type: "cuda" or "cpu".

        Raises:
            UsageError: options contradict each other. The message names the flag.
        """
        if self.batch_size % (processes * self.grad_accum):
            by = f"{processes} processes" + (f" x {self.grad_accum} parts" if self.grad_accum > 1 else "")
            raise UsageError(
                f"--batch-size {self.batch_size}: not divisible by {by}; "
                f"give a multiple of {processes * self.grad_accum}"
            )
        if self.start_iters >= self.num_steps:
            raise UsageError(
                f"--start-iters {self.start_iters}: must be less than --num-steps {self.num_steps}"
            )
        if self.warmup >= self.num_steps:
            raise UsageError(f"--warmup {self.warmup}: must be less than --num-steps {self.num_steps}")
        if self.class_weights and len(self.class_weights) != self.num_classes:
            raise UsageError(
                f"--class-weights: has {len(self.class_weights)} weights; give one for each of the "
                f"{self.num_classes} classes"
            )
        if min(self.input_size) < SMALLEST_CROP:
            raise UsageError(
                f"--input-size {self.input_size[0]},{self.input_size[1]}: leaves one row or column of "
                f"features; give at least {SMALLEST_CROP},{SMALLEST_CROP}"
            )
        if self.short_sides and self.random_scale:
            raise UsageError("--short-sides: replaces --random-scale; omit one of them")
        if self.scale_range != SCALE_RANGE and not self.random_scale:
            raise UsageError("--scale-range: requires --random-scale; add it")
        check_long_side(self.short_sides, self.long_side)
        if self.data_list and self.val_every and not self.val_list:
            raise UsageError("--val-every: requires --val-list if --data-list is given; add it")
        if self.abn == "inplace" and self.amp:
            raise UsageError(
                f"--amp {self.amp}: the inplace-abn package supports float32 only; use --abn torch"
            )
        if self.recompute and not fused.active(torch.device(device_type)):
            raise UsageError("--recompute: requires the fused operators; add --fused on, or omit it")
        if self.recompute and device_type == "cuda" and not self.channels_last:
            raise UsageError("--recompute: requires --channels-last on a GPU; add it")
        if self.recompute and (self.abn != "torch" or self.compile):
            raise UsageError("--recompute: not supported by --abn inplace and --compile; omit one of them")
        if self.cuda_graph and (device_type != "cuda" or processes > 1):
            raise UsageError(
                "--cuda-graph: requires a single process on a GPU; omit it, or give one --gpu id"
            )
        if self.cuda_graph and (self.grad_accum > 1 or self.amp == "fp16" or self.compile):
            raise UsageError(
                "--cuda-graph: not supported by --grad-accum, --amp fp16 and --compile; omit one of them"
            )
        if self.clip is not None and self.cache is not None:
            raise UsageError(f"--cache {self.cache}: not supported by --model {self.model}; omit it")
        if self.backend == "apex":
            if self.optimizer != "sgd":
                raise UsageError(
                    f"--optimizer {self.optimizer}: not supported by --backend apex; omit one of them"
                )
            for name in ("channels_last", "compile", "recompute", "cuda_graph"):
                if getattr(self, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')}: not supported by --backend apex; omit one of them"
                    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(NetworkOptions):
    """Options for the checkpoint that a command reads."""

    title = "network"
    restore_from: str | None = option(
        None, Flag("checkpoint; random weights by default", metavar="FILE", noted=True)
    )


@dataclass(frozen=True, kw_only=True)
class ToolOptions(CheckpointOptions, ClassOptions):
    """Options for the network of a tool that reads a checkpoint."""

    restore_from: str = option("", Flag("checkpoint", metavar="FILE", required=True))


@dataclass(frozen=True, kw_only=True)
class AveragingOptions(Options):
    """Options for averaging the predictions of a picture (engine.inference.predict_multiscale)."""

    title = "prediction"
    scales: Sequence[float] = option(
        (1.0,), Flag("average the predictions at these scales", flags.scales, metavar="S,S", noted=True)
    )
    flip: bool = option(False, Flag("average each prediction with that of the mirrored picture", noted=True))


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(Options):
    """Options for the precision and the implementation of a prediction."""

    title = "speed"
    amp: str | None = option(
        None,
        Flag(
            "mixed precision; auto: bf16 if the device has fast products of it; float32 by default",
            choices=(AUTO, *sorted(PRECISIONS)),
            noted=True,
        ),
    )
    channels_last: bool = option(
        False,
        Flag("store tensors as [N, h, w, C], the layout that tensor cores and CPUs use", noted=True),
    )
    compile: bool = option(False, Flag("compile the network with torch.compile", noted=True))
    fused: str = option("auto", FUSED)
    cuda_graph: bool = option(
        False, Flag("record the kernels of the network once for each size of its input (on a GPU)")
    )

    @property
    def speed(self) -> Speed:
        """The precision and the implementation of the network."""
        return Speed(self.amp, self.channels_last, self.compile, self.cuda_graph, self.fused)


@dataclass(frozen=True, kw_only=True)
class PredictionOptions(AveragingOptions):
    """Options for predicting a picture, whole or by tiles."""

    title = "prediction"
    input_size: tuple[int, int] = option(
        (769, 769), Flag("size of the tiles", flags.size, metavar="H,W", noted=True)
    )
    whole: bool = option(
        False, Flag("predict whole pictures instead of tiles", flags.boolean, bare=True, noted=True)
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(
    PredictionOptions, InferenceOptions, CheckpointOptions, ProcessOptions, ClassOptions, DataOptions
):
    """All options of evaluate.py."""

    title = "evaluation"
    short_sides: Sequence[int] | None = option(
        None,
        Flag(
            "average the predictions at these lengths of the short side, instead of --scales",
            flags.sides,
            metavar="S,S",
            noted=True,
        ),
    )
    long_side: int | None = option(
        None,
        Flag("maximum length of the long side with --short-sides", flags.side, metavar="S", noted=True),
    )
    boundary: bool = option(
        False,
        Flag("compute boundary IoU and boundary F score too", flags.boolean, bare=True, noted=True),
    )
    calibration: bool = option(
        False,
        Flag(
            "compute the expected calibration error too, and draw reliability.png",
            flags.boolean,
            bare=True,
            noted=True,
        ),
    )
    split: str = option(
        "val",
        Flag("split of the data set; test without labels gives an archive to submit", noted=True),
    )
    batch_size: int = option(1, Flag("pictures of equal size to predict together, per process", flags.batch))
    tile_batch: int | None = option(
        None,
        Flag(
            "tiles to predict together, per process; by default 4 on a GPU and 1 on the CPU, or --batch-size "
            "if that is more",
            flags.batch,
            metavar="N",
        ),
    )
    num_workers: int = option(2, Flag("data workers per process", flags.workers))
    output_dir: str = option(None, Flag("folder of the results; by default that of the checkpoint"))

    def check(self) -> None:
        """Check the options against each other.

        Raises:
            UsageError: options contradict each other. The message names the flag.
        """
        if self.short_sides and tuple(self.scales) != (1.0,):
            raise UsageError("--short-sides: replaces --scales; omit one of them")
        check_long_side(self.short_sides, self.long_side)


def check_long_side(short_sides: Sequence[int] | None, long_side: int | None) -> None:
    """Raise UsageError if --long-side is given without --short-sides."""
    if long_side and not short_sides:
        raise UsageError("--long-side: requires --short-sides; add it")
