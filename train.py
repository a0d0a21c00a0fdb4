r"""Train CCNet.

    python train.py --data-dir CS --random-mirror --random-scale --restore-from resnet101-imagenet.pth \
        --gpu 0,1,2,3

One process for each GPU of --gpu (or each of --nproc CPU processes) is started from here; torchrun works too,
on one machine or many. See --help for all flags and README.md for the published recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import numpy as np
import torch

from dataset import CSDataSet, DataError
from engine import checkpoint, distributed, loader, schedule
from loss import CriterionDSN, CriterionOhemDSN
from loss.criterion import AUXILIARY_WEIGHT
from networks import MODELS, CheckpointError, load_weights, match_weights, synchronise
from networks.abn import BACKENDS
from networks.resnet import DEPTHS
from utils import args as flags
from utils.files import check_writable, replacing
from utils.logger import RunLog

#: Of which the features at 1/8 size are 2 x 2, enough for the statistics of a batch of one.
SMALLEST_CROP = 9
#: What ends a run with exit status 2.
INPUT_ERRORS = (flags.UsageError, DataError, CheckpointError)
#: The flags that decide what a run computes: it is resumed with the same ones only.
RECIPE = (
    "model backbone recurrence num_classes ignore_label dropout abn input_size batch_size random_mirror "
    "random_scale random_seed learning_rate momentum power weight_decay num_steps ohem ohem_thres ohem_keep"
).split()


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train CCNet.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    data = parser.add_argument_group("data").add_argument
    data(
        "--data-dir",
        required=True,
        help="data set in the Cityscapes layout, or what --data-list is relative to",
    )
    data("--data-list", help="file of 'image<TAB>label' lines; without it the layout's train split")
    data("--num-classes", type=flags.classes, default=19, help="number of train ids")
    data("--ignore-label", type=flags.label, default=255, help="train id of void pixels")
    data("--input-size", type=flags.size, default=(769, 769), metavar="H,W", help="crop")
    data("--random-mirror", action="store_true", help="mirror half of the samples")
    data("--random-scale", action="store_true", help="scale samples by 0.7 to 2.1")
    data(
        "--num-workers",
        type=flags.count,
        default=8,
        help="processes that read pictures, for each training process",
    )
    net = parser.add_argument_group("network").add_argument
    net("--model", choices=sorted(MODELS), default="ccnet", help="network")
    net("--backbone", choices=sorted(DEPTHS), default="resnet101", help="backbone")
    net("--recurrence", type=flags.count, default=2, help="how often the attention is applied")
    net("--dropout", type=flags.fraction, default=0.1, help="channel dropout of both heads")
    net(
        "--abn",
        choices=BACKENDS,
        default="torch",
        help="activated batch norm: torch's, or the inplace-abn package's",
    )
    net(
        "--restore-from",
        metavar="FILE",
        help="weights to start from, ImageNet's or CCNet's; random ones without it",
    )
    net(
        "--not-restore-last",
        action="store_true",
        help="start both classifiers fresh (fine-tuning to other classes)",
    )
    recipe = parser.add_argument_group("recipe").add_argument
    recipe("--batch-size", type=flags.positive_int, default=8, help="of all processes together")
    recipe("--num-steps", type=flags.positive_int, default=60000, help="training steps")
    recipe("--learning-rate", type=flags.positive_float, default=1e-2, help="at the first step")
    recipe(
        "--power", type=flags.positive_float, default=0.9, help="of the polynomial decay of the learning rate"
    )
    recipe("--momentum", type=flags.fraction, default=0.9, help="of SGD")
    recipe("--weight-decay", type=flags.number(float, 0), default=1e-4, help="of all parameters")
    recipe(
        "--ohem", type=flags.boolean, nargs="?", const=True, default=False, help="online hard example mining"
    )
    recipe("--ohem-thres", type=flags.fraction, default=0.7, help="keep pixels of at most this probability")
    recipe("--ohem-keep", type=flags.count, default=100000, help="pixels to keep at least, for each process")
    recipe(
        "--random-seed", type=flags.count, default=12345, help="of weights, order, augmentation and dropout"
    )
    run = parser.add_argument_group("run").add_argument
    run("--gpu", metavar="IDS", help="such as 0,1,2,3, or cpu; without it every visible GPU, or the CPU")
    run("--nproc", type=flags.positive_int, metavar="N", help="run N processes on the CPU")
    run("--snapshot-dir", default="snapshots", help="where snapshots, states and the log go")
    run(
        "--save-pred-every", type=flags.positive_int, default=10000, metavar="STEPS", help="between snapshots"
    )
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
    # torch.distributed.launch passes it; the environment says the same.
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = get_parser().parse_args()
    devices = distributed.choose_devices(args.gpu, args.nproc)
    return distributed.run(
        devices,
        check=lambda: check(args, distributed.processes(devices), devices[0]),
        body=lambda world: train(args, world),
        agreed=INPUT_ERRORS,
    )


def check(args: argparse.Namespace, processes: int, device: torch.device) -> None:
    """Everything that can be known before the first step.

    Raises:
        flags.UsageError, DataError, CheckpointError: one line that says which flag or file is wrong.
    """
    if args.batch_size % processes:
        raise flags.UsageError(
            f"--batch-size {args.batch_size}: can't be shared by {processes} processes; "
            f"give a multiple of {processes}"
        )
    if args.start_iters >= args.num_steps:
        raise flags.UsageError(
            f"--start-iters {args.start_iters}: must be less than --num-steps {args.num_steps}"
        )
    if args.abn == "inplace":
        require_inplace_abn(processes, device)
    if min(args.input_size) < SMALLEST_CROP:
        raise flags.UsageError(
            f"--input-size {args.input_size[0]},{args.input_size[1]}: leaves one row or column of features; "
            f"give at least {SMALLEST_CROP},{SMALLEST_CROP}"
        )
    with torch.device("meta"):
        model = make_model(args)
    if args.restore_from:
        print(match_weights(model, args.restore_from, args.not_restore_last)[0], flush=True)
    else:
        print("no --restore-from: training from random weights", flush=True)
    print(make_dataset(args).check(), flush=True)
    check_writable("--snapshot-dir", args.snapshot_dir)


def require_inplace_abn(processes: int, device: torch.device) -> None:
    if processes > 1 and device.type == "cpu":
        raise flags.UsageError(
            "--abn inplace: the package has no statistics over several CPU processes; use --abn torch"
        )
    try:
        import inplace_abn  # noqa: F401
    except ImportError as error:
        raise flags.UsageError(
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
    )


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    return MODELS[args.model](
        args.num_classes,
        recurrence=args.recurrence,
        backbone=args.backbone,
        dropout=args.dropout,
        abn=args.abn,
    )


def make_criterion(args: argparse.Namespace) -> CriterionDSN:
    if args.ohem:
        return CriterionOhemDSN(args.ignore_label, args.ohem_thres, args.ohem_keep)
    return CriterionDSN(args.ignore_label)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, mixed so that neighbours share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train(args: argparse.Namespace, world: distributed.World) -> None:
    """Train one process's share of every batch; rank 0 writes the log and the snapshots."""
    torch.backends.cudnn.benchmark = True
    dataset = make_dataset(args)
    torch.manual_seed(seed_of(args.random_seed))
    model = make_model(args)
    if args.restore_from:
        load_weights(model, args.restore_from, args.not_restore_last)
    model.to(world.device).train()
    synchronise(model, world)
    criterion = make_criterion(args)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )

    recipe = {name: getattr(args, name) for name in RECIPE} | {"data": dataset.digest()}
    start = args.start_iters
    # Rank 0 decides for all: the others may see another state of a shared disk.
    state = world.gather(
        checkpoint.newest_state(args.snapshot_dir) if args.resume and world.is_main else None
    )[0]
    if state is not None:
        unseen = None if os.path.exists(state.path) else state.path
        if unseen := world.first(unseen):
            raise flags.UsageError(f"--snapshot-dir: {unseen} is not on every machine; share the directory")
        checkpoint.restore(state, model, optimizer, recipe)
        start = state.step
        if start >= args.num_steps:
            if world.is_main:
                print(f"{state.path}: the run is finished, all {args.num_steps} steps are done", flush=True)
            return
    if world.is_main:
        if state is not None:
            print(f"{state.path}: continuing after step {start}", flush=True)
        elif earlier := checkpoint.set_aside(args.snapshot_dir):
            print(f"{args.snapshot_dir}: states and log of an earlier run are now in {earlier}", flush=True)
        with replacing(os.path.join(args.snapshot_dir, "args.json")) as path, open(path, "w") as file:
            json.dump(vars(args), file, indent=2)
        log = RunLog(args.snapshot_dir, start, args.num_steps, args.batch_size)
    parallel = world.data_parallel(model, all_used=args.recurrence > 0)

    def save(step: int) -> None:
        if world.is_main:
            path = checkpoint.save(args.snapshot_dir, step, model, optimizer, recipe)
            print(f"saved {path}", flush=True)

    batches = loader.train_batches(
        dataset,
        DataError,
        seed=args.random_seed,
        batch_size=args.batch_size,
        steps=range(start, args.num_steps),
        rank=world.rank,
        processes=world.size,
        workers=args.num_workers,
        pin_memory=world.device.type == "cuda",
    )
    waited = 0.0
    for step in range(start + 1, args.num_steps + 1):
        lr = schedule.poly_lr(args.learning_rate, step - 1, args.num_steps, args.power)
        schedule.set_lr(optimizer, lr)
        before = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        # A picture that one process can't use ends the run for all, after the same step.
        error = world.first(batch if isinstance(batch, Exception) else None)
        if error is not None:
            if step - 1 > start:
                save(step - 1)
            world.barrier()  # a launcher may end rank 0 as soon as another one is gone
            raise error

        # Dropout is a function of (seed, step, rank), so that a resumed run needs no random state.
        torch.manual_seed(seed_of(args.random_seed, step, world.rank))
        images = batch.images.to(world.device, non_blocking=True)
        labels = batch.labels.to(world.device, non_blocking=True)
        main_loss, auxiliary_loss = criterion.parts(parallel(images), labels)
        loss = main_loss + AUXILIARY_WEIGHT * auxiliary_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        last = step == args.num_steps
        log_due, save_due = step % args.print_frequency == 0 or last, step % args.save_pred_every == 0 or last
        if log_due or save_due:
            losses = torch.stack([loss, main_loss, auxiliary_loss]).detach()
            world.all_reduce(losses)
            mean_loss, mean_main, mean_auxiliary = (losses / world.size).tolist()
            if not np.isfinite(mean_loss):
                raise RuntimeError(
                    f"the loss is {mean_loss} at step {step}; lower --learning-rate, or look at the samples: "
                    f"{'; '.join(batch.records)}"
                )
        if log_due:
            records = [record for share in world.gather(batch.records) for record in share]
            if world.is_main:
                log.write(
                    step,
                    mean_loss,
                    lr,
                    main_loss=mean_main,
                    auxiliary_loss=mean_auxiliary,
                    data_seconds=round(waited, 4),
                    epoch=step * args.batch_size // len(dataset),
                    samples=records,
                )
            waited = 0.0
        if save_due:
            save(step)
    if world.is_main:
        log.close()


if __name__ == "__main__":
    sys.exit(flags.exit_status(main, INPUT_ERRORS))
