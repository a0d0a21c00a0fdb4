"""Train CCNet.

    python train.py --data-dir CS --random-mirror --random-scale --restore-from torchvision --gpu 0,1,2,3

The command starts one process for each GPU of --gpu, or --nproc processes on the CPU. torchrun works too, on
one or more machines. README.md has the published recipe; docs/ describes memory, scaling and other data sets.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from torch import Tensor, nn

import fused
from dataset import IMG_MEAN, CSDataSet, cache, recognition, transforms
from dataset.classes import Classes, choose_classes
from dataset.labels import ClassTable
from engine import recipes
from engine.data.loader import Loading, train_batches
from engine.options import TrainOptions, ValuesOf, add_flags, for_device
from engine.randomness import seed_of, set_deterministic
from engine.runtime import apex, distributed, signals
from engine.training import checkpoint
from engine.training.ema import WeightAverage
from engine.training.optimizer import make_optimizer
from engine.training.run import Data, Parts, Run, exclusive
from engine.training.schedule import poly_lr, set_learning_rate, warm_up
from engine.training.step import Stepper, updates_at_once
from loss import CategoryConsistentLoss, CriterionDSN, CriterionOhemDSN, WithConsistency
from networks import MODELS, Network, load_weights, make_network, match_weights, synchronize, train_mode
from networks.abn import require_inplace_abn
from networks.models import backbone_name, check_statistics, model_flags
from networks.pretrained import read_weights
from networks.sample_picture import draw_sample
from networks.variants import options_of
from utils import args as flags
from utils.drawing.palette import make_palette
from utils.files import check_outputs, check_writable
from utils.resources import check_fits

#: Accepted values of flags that depend on other packages.
CHOICES: ValuesOf = {"model": MODELS, "backbone": backbone_name, "dataset": recognition.NAMES}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of train.py."""
    parser = recipes.Parser("train.py", __doc__)
    add_flags(parser, TrainOptions, CHOICES)
    return parser


def main() -> int:
    """Parse the flags, check them, and train; return the exit status."""
    args = get_parser().parse_args()
    with distributed.reported_once():
        classes = choose_classes(args.data_dir, args.data_list, args.classes, args.num_classes, args.dataset)
        vars(args).update(model_flags(**vars(args)), num_classes=classes.number)
        options = TrainOptions.of(args)
        devices = distributed.choose_devices(options.gpu, options.nproc)
        options, notes = for_device(options, devices[0])
        notes += [f"recipe {recipes.path_of(args.recipe)}"] if args.recipe else []
    return distributed.run(
        devices,
        check=lambda: check(options, classes, notes, distributed.processes(devices), devices[0]),
        body=lambda world: train(options, classes, world),
    )


def check(
    options: TrainOptions, classes: Classes, notes: list[str], processes: int, device: torch.device
) -> None:
    """Check everything that can be known before the first step.

    Raises:
        InputError: a flag or file is invalid. The message names the flag or file.
    """
    options.check(processes, device.type)
    check_statistics(options.model, options.batch_size // options.grad_accum, options.freeze_bn)
    if options.abn == "inplace":
        require_inplace_abn(processes, device.type)
    if options.backend == "apex":
        apex.require(device.type)
    # Weights of a library are downloaded here, once per machine. The processes then read the downloaded file.
    weights = read_start(options)
    with torch.device("meta"):
        model = make_model(options, weights)
    if weights:
        report, _ = match_weights(model, str(options.restore_from), options.not_restore_last, state=weights)
        print(report, flush=True)
    else:
        print("no --restore-from: training from random weights", flush=True)
    if device.type == "cpu":
        check_fits("--batch-size, --input-size, --clip", options.pixels(processes))
    dataset = make_dataset(options, classes.table)
    print(*notes, *dataset.taken, *classes.notes, dataset.check(), sep="\n", flush=True)
    inputs = [options.restore_from, options.data_list, options.val_list, options.classes, *dataset.files()]
    if val_dataset := make_val_dataset(options, classes.table):
        print(val_dataset.check(), flush=True)
        inputs += val_dataset.files()
    classes.check_run_folder(options.snapshot_dir, options.data_dir)
    steps, interval = options.num_steps, options.save_pred_every
    outputs = checkpoint.replaced(options.snapshot_dir, steps, interval, classes.own is not None)
    check_outputs(f"--snapshot-dir {options.snapshot_dir}", outputs, inputs)
    check_writable("--snapshot-dir", options.snapshot_dir)
    if place := cache_place(options):
        if place.kind == "disk":
            check_writable("--cache-dir", place.folder)
        print(cache.check(place, dataset), flush=True)


def train(options: TrainOptions, classes: Classes, world: distributed.World) -> None:
    """Train on this process's share of each batch; rank 0 writes the log, states and snapshots."""
    with signals.stop_request() as stop, exclusive(options.snapshot_dir, world):
        set_deterministic(options.deterministic)
        fused.use(options.fused)
        dataset = make_dataset(options, classes.table)
        if place := cache_place(options):
            dataset.cache = cache.open_shared(place, dataset, world)
        seed = options.random_seed
        torch.manual_seed(seed_of(seed))
        model = make_start(options).to(world.device).to(memory_format=options.memory_format)
        average = WeightAverage(model, options.ema) if options.ema is not None else None
        group = world.statistics()
        synchronize(model, group)
        model.recompute = options.recompute
        train_mode(model, options.freeze_bn)
        optimizer = optimizer_of(options, model)
        parallel = make_parallel(options, model, world)
        criterion = make_criterion(options, group).to(world.device)
        stepper = Stepper(parallel, criterion, optimizer, world, options.stepping(world.device))

        parts = Parts(model, optimizer, stepper.scaler, average)
        recipe = options.recipe() | {"data": dataset.digest()}
        draw = partial(draw_sample, model, make_palette(dataset.labels.colors()), IMG_MEAN)
        data = Data(make_val_dataset(options, classes.table), draw, classes.own)
        with Run(options, world, stop, parts, recipe, data) as run:
            loading = Loading(options.batch_size, options.num_workers)
            batches = train_batches(dataset, seed, run.remaining, world, loading, options.memory_format)
            for step, batch in run.steps(batches):
                lr = poly_lr(options.learning_rate, step - 1, options.num_steps, options.power)
                set_learning_rate(optimizer, lr * warm_up(step - 1, options.warmup))
                result = stepper.step(step, batch)  # forward, loss, backward, check, update
                if average is not None:
                    average.update(step)
                run.record(step, batch, result)  # log, snapshot, state, validation: what is due


def make_dataset(options: TrainOptions, table: ClassTable | None, split: str = "train") -> CSDataSet:
    """Return the data set for training or, whole and without augmentation, the one for validation."""
    train = split == "train"
    return CSDataSet(
        options.data_dir,
        options.data_list if train else options.val_list,
        options.input_size if train else None,
        scale=train and transforms.choose_scaling(*options.scaling),
        mirror=train and options.random_mirror,
        photometric=train and options.photometric,
        ignore_label=options.ignore_label,
        num_classes=options.num_classes,
        split=split,
        table=table,
        dataset=options.dataset,
        **options.frames,
    )


def make_val_dataset(options: TrainOptions, table: ClassTable | None) -> CSDataSet | None:
    """Return the validation data set; None if --val-every is 0."""
    return make_dataset(options, table, "val") if options.val_every else None


def cache_place(options: TrainOptions) -> cache.Place | None:
    """Return the kind, size and folder of the picture cache; None if the flag --cache is not given."""
    if options.cache is None:
        return None
    return cache.Place(options.cache, options.cache_gb, options.cache_dir or options.snapshot_dir)


def read_start(options: TrainOptions) -> dict[str, Tensor] | None:
    """Return the weights of --restore-from; None if the flag is not given."""
    if options.restore_from is None:
        return None
    return read_weights(options.restore_from, IMG_MEAN.tolist(), options.backbone)


def make_start(options: TrainOptions) -> Network:
    """Return the network with its initial weights."""
    weights = read_start(options)
    model = make_model(options, weights)
    if weights:
        load_weights(model, str(options.restore_from), options.not_restore_last, state=weights)
    return model


def make_model(options: TrainOptions, weights: dict[str, Tensor] | None) -> Network:
    """Return the network in the variant of `weights`."""
    return make_network(
        options.model,
        options.num_classes,
        options.recurrence,
        consistency=options.ccl_channels if options.ccl else 0,
        backbone=options.backbone,
        dropout=options.dropout,
        abn="apex" if options.backend == "apex" and options.abn == "torch" else options.abn,
        **options_of(weights),
    )


def make_criterion(options: TrainOptions, group: distributed.Statistics) -> CriterionDSN | WithConsistency:
    """Return the loss module. `group` shares the classes of the category-consistent loss."""
    class_weights = torch.tensor(options.class_weights) if options.class_weights else None
    criterion = CriterionDSN(options.ignore_label, class_weights)
    if options.ohem:
        kept = options.ohem_thres, options.ohem_keep
        criterion = CriterionOhemDSN(options.ignore_label, *kept, class_weights)
    if not options.ccl:
        return criterion
    consistency = CategoryConsistentLoss(ignore_index=options.ignore_label, num_classes=options.num_classes)
    consistency.group = group
    return WithConsistency(criterion, consistency)


def optimizer_of(options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all weights of `model`."""
    lr, momentum, decay = options.learning_rate, options.momentum, options.weight_decay
    if options.backend == "apex":
        return apex.optimizer(model.parameters(), lr, momentum, decay)
    at_once = updates_at_once(next(model.parameters()).device, options.channels_last)
    return make_optimizer(options.optimizer, model, lr, momentum, decay, at_once)


def make_parallel(options: TrainOptions, model: nn.Module, world: distributed.World) -> nn.Module:
    """Return `model`, wrapped for several processes and compiled if requested."""
    if options.backend == "apex":
        parallel = apex.data_parallel(model) if world.size > 1 else model
    else:
        parallel = world.data_parallel(model, all_used=options.all_weights_used)
    return torch.compile(parallel) if options.compile else parallel  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(flags.exit_status(main))
