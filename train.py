r"""Train CCNet.

    python train.py --data-dir CS --random-mirror --random-scale --restore-from resnet101-imagenet.pth \
        --gpu 0,1,2,3

One process for each GPU of --gpu (or each of --nproc CPU processes) is started from here; torchrun works too,
on one machine or many. See --help for all flags and README.md for the published recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch

from dataset import IMG_MEAN, CSDataSet, cache
from dataset.labels import choose_table
from engine.data import loader
from engine.data.transfer import Batch
from engine.evaluation.evaluate import evaluate
from engine.evaluation.metrics import mean_iou
from engine.inference import predict_classes
from engine.runtime import apex, distributed, signals
from engine.training import checkpoint, schedule
from engine.training.ema import WeightAverage
from engine.training.run import Intervals, Run, Task
from engine.training.step import PRECISIONS, Stepper
from loss import CriterionDSN, CriterionOhemDSN
from loss.criterion import upsample
from networks import MODELS, Seg_Model, load_weights, match_weights, synchronize, train_mode
from networks.attention import picture_attention
from networks.pretrained import read_weights
from networks.variants import DEPTHS, options_of
from utils import args as flags
from utils.drawing.attention_figure import draw_attention
from utils.drawing.palette import colored, make_palette
from utils.errors import DataError, UsageError
from utils.files import check_outputs, check_writable
from utils.resources import LEAST_BYTES, check_fits

#: Of which the features at 1/8 size are 2 x 2, enough for the statistics of a batch of one.
SMALLEST_CROP = 9
#: The flags that decide what a run computes: it is resumed with the same ones, or with --change-recipe.
RECIPE = (
    "model backbone recurrence num_classes ignore_label dropout abn backend input_size batch_size "
    "random_mirror random_scale random_seed learning_rate momentum power weight_decay num_steps ohem "
    "ohem_thres ohem_keep class_weights freeze_bn ema amp channels_last compile fused_sgd grad_accum"
).split()


def get_parser() -> argparse.ArgumentParser:
    parser = flags.Parser(description="Train CCNet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    data = parser.add_argument_group("data").add_argument
    data(
        "--data-dir",
        required=True,
        help="data set in the Cityscapes layout, or what --data-list is relative to",
    )
    data("--data-list", help="file of 'image<TAB>label' lines; without it the layout's train split")
    data("--classes", metavar="TABLE", help="what the labels of another data set mean: docs/own_data.md")
    data("--num-classes", type=flags.classes, help="number of train ids; those of --classes, or 19")
    data("--ignore-label", type=flags.label, default=255, help="train id of void pixels")
    data("--input-size", type=flags.size, default=(769, 769), metavar="H,W", help="crop")
    data("--random-mirror", action="store_true", help="mirror half of the samples")
    data("--random-scale", action="store_true", help="scale samples by 0.7 to 2.1")
    data(
        "--num-workers",
        type=flags.workers,
        default=8,
        help="processes that read pictures, for each training process",
    )
    data("--cache", choices=("ram", "disk"), help="keep decoded pictures, of 8 MB each, for the next epochs")
    data(
        "--cache-gb",
        type=flags.number(float, 0, 1e6, open_low=True),
        default=32.0,
        metavar="GB",
        help="room for them, of all processes of a machine together",
    )
    data("--cache-dir", metavar="DIR", help="where --cache disk goes; without it --snapshot-dir")
    net = parser.add_argument_group("network").add_argument
    net("--model", choices=sorted(MODELS), default="ccnet", help="network")
    net("--backbone", choices=sorted(DEPTHS), default="resnet101", help="backbone")
    net("--recurrence", type=flags.recurrence, default=2, help="how often the attention is applied")
    net("--dropout", type=flags.fraction, default=0.1, help="channel dropout of both heads")
    net(
        "--abn",
        choices=("torch", "inplace"),
        default="torch",
        help="activated batch norm: torch's, or the inplace-abn package's",
    )
    net("--freeze-bn", action="store_true", help="normalize by the checkpoint's statistics, and keep them")
    net(
        "--restore-from",
        metavar="FILE",
        help="weights to start from, ImageNet's or CCNet's; torchvision, or timm:NAME, downloads those of a "
        "library; random ones without it",
    )
    net(
        "--not-restore-last",
        action="store_true",
        help="start both classifiers fresh (fine-tuning to other classes)",
    )
    recipe = parser.add_argument_group("recipe").add_argument
    recipe("--batch-size", type=flags.batch, default=8, help="of all processes together")
    recipe("--num-steps", type=flags.positive_int, default=60000, help="training steps")
    recipe("--learning-rate", type=flags.positive_float, default=1e-2, help="at the first step")
    recipe(
        "--power",
        type=flags.number(float, 0, 100, open_low=True),
        default=0.9,
        help="of the polynomial decay of the learning rate",
    )
    recipe("--momentum", type=flags.fraction, default=0.9, help="of SGD")
    recipe("--weight-decay", type=flags.number(float, 0), default=1e-4, help="of all parameters")
    recipe(
        "--ohem", type=flags.boolean, nargs="?", const=True, default=False, help="online hard example mining"
    )
    recipe("--ohem-thres", type=flags.fraction, default=0.7, help="keep pixels of at most this probability")
    recipe("--ohem-keep", type=flags.count, default=100000, help="pixels to keep at least, for each process")
    recipe(
        "--class-weights",
        type=flags.numbers,
        metavar="W,W",
        help="how much the pixels of each class count; all the same without it",
    )
    recipe(
        "--ema",
        type=flags.number(float, 0, 1 - 1e-9),
        metavar="DECAY",
        help="also keep the moving average of the weights, such as 0.9999",
    )
    recipe(
        "--random-seed", type=flags.seed, default=12345, help="of weights, order, augmentation and dropout"
    )
    speed = parser.add_argument_group("speed").add_argument
    speed("--amp", choices=sorted(PRECISIONS), help="mixed precision")
    speed("--channels-last", action="store_true", help="the layout [N, h, w, C], which tensor cores want")
    speed("--compile", action="store_true", help="compile the network with torch.compile")
    speed("--fused-sgd", action="store_true", help="update all weights in one kernel")
    speed(
        "--grad-accum",
        type=flags.batch,
        default=1,
        metavar="N",
        help="compute each batch in N parts, one after the other, where memory is short",
    )
    speed(
        "--backend",
        choices=("torch", "apex"),
        default="torch",
        help="of optimizer, data parallelism, synchronized batch norm: torch, or NVIDIA's apex (tag 25.05)",
    )
    run = parser.add_argument_group("run").add_argument
    run("--gpu", metavar="IDS", help="such as 0,1,2,3, or cpu; without it every visible GPU, or the CPU")
    run("--nproc", type=flags.processes, metavar="N", help="run N processes on the CPU")
    run("--deterministic", action="store_true", help="the same bits each time on GPUs too, more slowly")
    run("--snapshot-dir", default="snapshots", help="where snapshots, states and the log go")
    run(
        "--save-pred-every", type=flags.positive_int, default=10000, metavar="STEPS", help="between snapshots"
    )
    run(
        "--save-state-every",
        type=flags.positive_int,
        default=1000,
        metavar="STEPS",
        help="between the states that a run can be resumed from",
    )
    run("--keep-states", type=flags.positive_int, default=2, metavar="N", help="newest states to keep")
    run(
        "--val-every",
        type=flags.count,
        default=0,
        metavar="STEPS",
        help="between validations, whose best weights are kept; 0 is never",
    )
    run("--val-list", help="as --data-list, for the validation; without it the layout's val split")
    run(
        "--print-frequency",
        type=flags.positive_int,
        default=50,
        metavar="STEPS",
        help="between lines of the log",
    )
    run("--start-iters", type=flags.count, default=0, metavar="STEP", help="steps that count as done")
    run(
        "--resume",
        action="store_true",
        help="continue from the newest state in --snapshot-dir, if there is one",
    )
    run("--change-recipe", action="store_true", help="resume with other flags than the run had so far")
    # torch.distributed.launch passes it; the environment says the same.
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = get_parser().parse_args()
    _, args.num_classes = choose_table(args.classes, args.num_classes)
    devices = distributed.choose_devices(args.gpu, args.nproc)
    return distributed.run(
        devices,
        check=lambda: check(args, distributed.processes(devices), devices[0]),
        body=lambda world: train(args, world),
    )


def check(args: argparse.Namespace, processes: int, device: torch.device) -> None:
    """Everything that can be known before the first step.

    Raises:
        InputError: one line that says which flag or file is wrong.
    """
    if args.batch_size % (processes * args.grad_accum):
        by = f"{processes} processes" + (f" in {args.grad_accum} parts each" if args.grad_accum > 1 else "")
        raise UsageError(
            f"--batch-size {args.batch_size}: can't be shared by {by}; "
            f"give a multiple of {processes * args.grad_accum}"
        )
    if args.start_iters >= args.num_steps:
        raise UsageError(f"--start-iters {args.start_iters}: must be less than --num-steps {args.num_steps}")
    if args.class_weights and len(args.class_weights) != args.num_classes:
        raise UsageError(
            f"--class-weights: has {len(args.class_weights)} weights; give one for each of the "
            f"{args.num_classes} classes"
        )
    if args.abn == "inplace":
        require_inplace_abn(processes, device)
        if args.amp:
            raise UsageError(
                f"--amp {args.amp}: the inplace-abn package takes float32 alone; use --abn torch"
            )
    if args.backend == "apex":
        apex.require(device.type)
        for flag in ("channels_last", "compile", "fused_sgd"):
            if getattr(args, flag):
                raise UsageError(
                    f"--{flag.replace('_', '-')}: not with --backend apex; leave out one of the two"
                )
    if args.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16: is for GPUs; give --amp bf16")
    if min(args.input_size) < SMALLEST_CROP:
        raise UsageError(
            f"--input-size {args.input_size[0]},{args.input_size[1]}: leaves one row or column of features; "
            f"give at least {SMALLEST_CROP},{SMALLEST_CROP}"
        )
    # A library's weights are downloaded here, once on each machine: the processes find them on the disk.
    weights = read_start(args)
    with torch.device("meta"):
        model = make_model(args, weights)
    if weights:
        print(match_weights(model, args.restore_from, args.not_restore_last, state=weights)[0], flush=True)
    else:
        print("no --restore-from: training from random weights", flush=True)
    if device.type == "cpu":
        pixels = args.batch_size // (processes * args.grad_accum) * math.prod(args.input_size)
        check_fits("--batch-size, --input-size", LEAST_BYTES * pixels)
    dataset = make_dataset(args)
    print(dataset.check(), flush=True)
    inputs = [args.restore_from, args.data_list, args.val_list, args.classes, *dataset.files()]
    if args.val_every:
        val_dataset = make_val_dataset(args)
        print(val_dataset.check(), flush=True)
        inputs += val_dataset.files()
    check_outputs(f"--snapshot-dir {args.snapshot_dir}", replaced(args), inputs)
    check_writable("--snapshot-dir", args.snapshot_dir)
    if args.cache:
        print(check_cache(args, dataset), flush=True)


def replaced(args: argparse.Namespace) -> list[str]:
    """Return the files of --snapshot-dir that the run replaces or moves away, of those that are there now."""
    folder = glob.escape(args.snapshot_dir)
    found = [path for name in checkpoint.RUN_FILES for path in glob.glob(os.path.join(folder, name))]
    found += glob.glob(os.path.join(folder, "state_*"))
    for path in glob.glob(checkpoint.snapshot_path(folder, "*")):
        step = re.search(r"_(\d+)(_ema)?\.pth$", path)
        number = int(step[1]) if step else 0
        if number == args.num_steps or (0 < number < args.num_steps and number % args.save_pred_every == 0):
            found.append(path)
    return [path for path in found if not os.path.isdir(path)]


def require_inplace_abn(processes: int, device: torch.device) -> None:
    if processes > 1 and device.type == "cpu":
        raise UsageError(
            "--abn inplace: the package has no statistics over several CPU processes; use --abn torch"
        )
    try:
        import inplace_abn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--abn inplace: the inplace-abn package is not installed; install it, or use --abn torch"
        ) from error


def make_dataset(args: argparse.Namespace) -> CSDataSet:
    return CSDataSet(
        args.data_dir,
        args.data_list,
        args.input_size,
        scale=args.random_scale,
        mirror=args.random_mirror,
        ignore_label=args.ignore_label,
        num_classes=args.num_classes,
        split="train",
        table=choose_table(args.classes, None)[0],
    )


def check_cache(args: argparse.Namespace, dataset: CSDataSet) -> str:
    """The line that says what --cache will hold.

    Raises:
        UsageError: --cache-gb is more than there is.
    """
    if args.cache == "disk":
        check_writable("--cache-dir", args.cache_dir or args.snapshot_dir)
    plan = cache.Plan(dataset.sizes(), int(args.cache_gb * cache.GB))
    free = cache.room(args.cache, cache_file(args, dataset))
    if plan.bytes > free:
        raise UsageError(
            f"--cache-gb {args.cache_gb:g}: {plan.bytes / cache.GB:.1f} GB for {plan.number} pictures, but "
            f"{free / cache.GB:.1f} GB are free; give less"
        )
    size = f"{plan.bytes / cache.GB:.1f} GB"
    return f"--cache {args.cache}: room for {plan.number} of {len(dataset)} decoded pictures, {size}"


def cache_file(args: argparse.Namespace, dataset: CSDataSet) -> str:
    """Where --cache disk keeps the pictures."""
    return dataset.cache_file(args.cache_dir or args.snapshot_dir)


def make_cache(args: argparse.Namespace, dataset: CSDataSet, world: distributed.World) -> cache.PictureCache:
    """The cache of the decoded pictures, the same for all processes of a machine."""
    made, failure = None, None
    path = cache_file(args, dataset) if args.cache == "disk" else cache.in_memory()
    machine = cache.machine()
    path = next(file for name, file in world.gather((machine, path)) if name == machine)
    try:
        made = cache.PictureCache(path, cache.Plan(dataset.sizes(), int(args.cache_gb * cache.GB)))
    except DataError as error:
        failure = error
    # The process that made it is there until all have opened it.
    if failure := world.first(failure):
        raise failure
    assert made is not None
    return made


def make_val_dataset(args: argparse.Namespace) -> CSDataSet:
    if args.data_list and not args.val_list:
        raise UsageError("--val-every: with --data-list it needs --val-list, the pictures to validate on")
    return CSDataSet(
        args.data_dir,
        args.val_list,
        crop_size=None,
        scale=False,
        mirror=False,
        ignore_label=args.ignore_label,
        num_classes=args.num_classes,
        split="val",
        table=choose_table(args.classes, None)[0],
    )


def read_start(args: argparse.Namespace) -> dict[str, torch.Tensor] | None:
    """The weights of --restore-from, None without it."""
    return read_weights(args.restore_from, IMG_MEAN.tolist(), args.backbone) if args.restore_from else None


def make_start(args: argparse.Namespace) -> torch.nn.Module:
    """The network with the weights that it starts from."""
    weights = read_start(args)
    model = make_model(args, weights)
    if weights:
        load_weights(model, args.restore_from, args.not_restore_last, state=weights)
    return model


def make_model(args: argparse.Namespace, weights: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    """The network, in the variant that `weights` are of."""
    return MODELS[args.model](
        args.num_classes,
        recurrence=args.recurrence,
        backbone=args.backbone,
        dropout=args.dropout,
        abn="apex" if args.backend == "apex" and args.abn == "torch" else args.abn,
        **options_of(weights),
    )


def layout_of(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def make_criterion(args: argparse.Namespace) -> CriterionDSN:
    class_weights = torch.tensor(args.class_weights) if args.class_weights else None
    if args.ohem:
        return CriterionOhemDSN(args.ignore_label, args.ohem_thres, args.ohem_keep, class_weights)
    return CriterionDSN(args.ignore_label, class_weights)


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    options = {"lr": args.learning_rate, "momentum": args.momentum, "weight_decay": args.weight_decay}
    if args.backend == "apex":
        return apex.optimizer(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), **options, fused=args.fused_sgd or None)


def make_parallel(
    args: argparse.Namespace, model: torch.nn.Module, world: distributed.World
) -> torch.nn.Module:
    if args.backend == "apex":
        parallel = apex.data_parallel(model) if world.size > 1 else model
    else:
        parallel = world.data_parallel(model, all_used=uses_all_weights(args))
    return cast(torch.nn.Module, torch.compile(parallel)) if args.compile else parallel


def uses_all_weights(args: argparse.Namespace) -> bool:
    """Return whether every weight has a gradient: without recurrence, the attention's have none."""
    return args.recurrence > 0


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, mixed so that neighbors share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train(args: argparse.Namespace, world: distributed.World) -> None:
    """Train one process's share of every batch; rank 0 writes the log and the snapshots."""
    with contextlib.ExitStack() as held:
        # Not earlier: a process that waits for one that never comes has to end at the first signal.
        stop = held.enter_context(signals.stop_request())
        world.on_main(lambda: held.enter_context(checkpoint.locked(args.snapshot_dir)))
        torch.backends.cudnn.benchmark = not args.deterministic
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        dataset = make_dataset(args)
        if args.cache:
            dataset.cache = make_cache(args, dataset, world)
        torch.manual_seed(seed_of(args.random_seed))
        model = make_start(args)
        model.to(world.device).to(memory_format=layout_of(args))
        average = WeightAverage(model, args.ema) if args.ema is not None else None
        synchronize(model, world)
        train_mode(model, args.freeze_bn)
        optimizer = make_optimizer(args, model)
        stepper = Stepper(
            model,
            make_parallel(args, model, world),
            make_criterion(args).to(world.device),
            optimizer,
            world,
            precision=args.amp,
            accumulate=args.grad_accum,
            seed=args.random_seed,
        )
        run = Run(
            args.snapshot_dir,
            world,
            stop,
            make_task(args, world, dataset, model),
            model,
            optimizer,
            stepper,
            average,
            args.num_steps,
            Intervals(args.print_frequency, args.save_pred_every, args.save_state_every, args.val_every),
            args.keep_states,
            recipe={name: getattr(args, name) for name in RECIPE} | {"data": dataset.digest()},
            arguments=vars(args),
            all_used=uses_all_weights(args),
        )
        # Restarts are counted on each machine by itself.
        if world.first(args.resume or distributed.is_restarted() or None):
            run.restore(args.change_recipe)
        run.train(args.start_iters)


def make_task(
    args: argparse.Namespace, world: distributed.World, dataset: CSDataSet, model: torch.nn.Module
) -> Task:
    colors = make_palette(dataset.labels.colors())
    val_dataset = make_val_dataset(args) if args.val_every else None

    def batches(steps: range) -> Iterator[Batch | Exception]:
        return loader.train_batches(
            dataset,
            seed=args.random_seed,
            batch_size=args.batch_size,
            steps=steps,
            rank=world.rank,
            processes=world.size,
            workers=args.num_workers,
            device=world.device,
            memory_format=layout_of(args),
        )

    def validate(model: torch.nn.Module, interrupted: Callable[[], Exception | None]) -> float:
        assert val_dataset is not None
        model.eval()
        result = evaluate(
            lambda images: predict_classes(model, images, [1.0], False, args.input_size, args.num_classes),
            val_dataset,
            world,
            args.num_classes,
            args.ignore_label,
            workers=args.num_workers,
            interrupted=interrupted,
        )
        return mean_iou(result.confusion)

    def examples(image: torch.Tensor, label: torch.Tensor, logits: torch.Tensor) -> dict[str, np.ndarray]:
        pixels = image.permute(1, 2, 0).cpu().numpy() + IMG_MEAN
        picture = pixels[..., ::-1].round().clip(0, 255).astype(np.uint8)
        prediction = upsample(logits[None], label.shape)[0].argmax(0)
        classes = [colored(each.cpu().numpy(), colors) for each in (label, prediction)]
        shown = {"train/image_label_prediction": np.hstack([picture, *classes])}
        if isinstance(model, Seg_Model) and args.recurrence:
            middle = label.shape[0] // 2, label.shape[1] // 2
            model.eval()
            maps = picture_attention(model, image[None], [middle])[:, 0].cpu().numpy()
            shown["train/attention"] = np.array(draw_attention(picture, middle, maps))
        return shown

    return Task(
        batches,
        learning_rate=lambda step: schedule.poly_lr(args.learning_rate, step, args.num_steps, args.power),
        seed=lambda step: seed_of(args.random_seed, step, world.rank),
        train_mode=lambda: train_mode(model, args.freeze_bn),
        validate=validate,
        examples=examples,
    )


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
