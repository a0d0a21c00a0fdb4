"""Flags: their groups, their marks, and the options that they become."""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest
import torch

import evaluate
import fused
import train
from engine.options import EvaluateOptions, Options, ToolOptions, TrainOptions, add_flags, for_device
from networks.models import recurrence_of
from tools import predict
from utils.args import Parser
from utils.errors import UsageError


def options(**values: object) -> TrainOptions:
    return TrainOptions(**{"data_dir": ".", "num_classes": 19, **values})


def test_defaults_are_the_published_recipe() -> None:
    args = train.get_parser().parse_args(["--data-dir", "CS"])
    args.num_classes = 19
    found = TrainOptions.of(args)
    assert (found.learning_rate, found.momentum, found.weight_decay, found.power) == (1e-2, 0.9, 1e-4, 0.9)
    assert (found.input_size, found.batch_size, found.num_steps) == ((769, 769), 8, 60000)
    assert recurrence_of(found.model, found.recurrence) == 2
    assert (found.ohem, found.ohem_thres, found.ohem_keep, found.dropout) == (False, 0.7, 100000, 0.1)
    assert (found.backbone, found.model, found.snapshot_dir) == ("resnet101", "ccnet", "snapshots")


def test_recipe_is_what_changes_the_weights() -> None:
    names = set(options().recipe())
    assert {"batch_size", "num_steps", "input_size", "ohem", "amp", "grad_accum", "random_seed"} <= names
    assert not names & {"gpu", "nproc", "num_workers", "cache", "snapshot_dir", "resume", "val_every"}


def test_noted_is_what_changes_the_scores() -> None:
    names = set(EvaluateOptions.names(lambda flag: flag.noted))
    assert {"data_dir", "split", "whole", "scales", "flip", "recurrence", "restore_from"} <= names
    assert not names & {"batch_size", "tile_batch", "num_workers", "output_dir", "gpu"}


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        options().batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", [TrainOptions, EvaluateOptions, ToolOptions])
def test_each_flag_is_added_once_with_help(kind: type[Options]) -> None:
    parser = Parser("x")
    add_flags(parser, kind)
    names = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    assert sorted(names) == sorted(["help", *(each.name for each in dataclasses.fields(kind))])
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("command", [train, evaluate, predict])
def test_help_shows_no_empty_default(command) -> None:
    text = command.get_parser().format_help()
    assert not re.search(r"\(default: (None|False|)\)", text)
    assert all(len(line) < 100 for line in text.splitlines() if line.startswith("  -"))


def test_flags_of_the_run_have_no_default_where_a_checkpoint_is_read() -> None:
    args = evaluate.get_parser().parse_args(["--data-dir", "CS"])
    assert [getattr(args, name) for name in EvaluateOptions.names(lambda flag: flag.from_run)] == [None] * 7
    assert args.input_size == (769, 769)


@pytest.mark.parametrize(
    "values, processes, device, message",
    [
        ({"batch_size": 8}, 3, "cpu", "--batch-size 8: not divisible by 3 processes; give a multiple of 3"),
        ({"batch_size": 8, "grad_accum": 3}, 2, "cpu", r"2 processes x 3 parts; give a multiple of 6"),
        ({"start_iters": 9, "num_steps": 9}, 1, "cpu", "--start-iters 9: must be less than"),
        ({"class_weights": [1.0]}, 1, "cpu", "--class-weights: has 1 weights"),
        ({"input_size": (8, 97)}, 1, "cpu", "--input-size 8,97: .* give at least 9,9"),
        ({"data_list": "a", "val_every": 3}, 1, "cpu", "--val-every: .*--val-list"),
        ({"abn": "inplace", "amp": "bf16"}, 1, "cuda", "--amp bf16: .*--abn torch"),
        ({"backend": "apex", "compile": True}, 1, "cuda", "--compile: not supported by --backend apex"),
        ({"recompute": True}, 1, "cuda", "--recompute: requires the fused operators; add --fused on"),
        ({"recompute": True, "abn": "inplace"}, 1, "cpu", "--recompute: not supported by --abn inplace"),
        ({"recompute": True, "compile": True}, 1, "cpu", "--recompute: not supported by .*--compile"),
        ({"recompute": True, "backend": "apex"}, 1, "cpu", "--recompute: not supported by --backend apex"),
        ({"cuda_graph": True}, 1, "cpu", "--cuda-graph: requires a single process on a GPU"),
        ({"cuda_graph": True, "grad_accum": 2}, 1, "cuda", "--cuda-graph: not supported by --grad-accum"),
        ({"cuda_graph": True, "compile": True}, 1, "cuda", "--cuda-graph: not supported by .*--compile"),
        ({"cuda_graph": True}, 2, "cuda", "--cuda-graph: requires a single process on a GPU"),
        ({"cuda_graph": True, "amp": "fp16"}, 1, "cuda", "--cuda-graph: not supported by .*--amp fp16"),
    ],
)
def test_contradictions_are_named(values: dict, processes: int, device: str, message: str) -> None:
    if values.get("recompute") and device == "cpu" and "cpu" not in fused.DEVICE_TYPES:
        pytest.skip("the fused operators are not built")
    with pytest.raises(UsageError, match=message):
        options(**values).check(processes, device)
    options().check(1, "cpu")


def test_recomputation_on_a_gpu_needs_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused._library.DEVICE_TYPES", frozenset({"cuda"}))
    with fused.using("on"):
        options(recompute=True, channels_last=True).check(1, "cuda")
        with pytest.raises(UsageError, match="--recompute: requires --channels-last on a GPU"):
            options(recompute=True).check(1, "cuda")


def test_fused_on_needs_operators_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICE_TYPES", frozenset())
    monkeypatch.setattr("fused._library.DEVICE_TYPES", frozenset())
    (line,) = for_device(options(fused="auto"), torch.device("cpu"))[1]
    assert line.startswith("the fused operators are not built")
    assert for_device(options(fused="off"), torch.device("cpu"))[1] == []
    with pytest.raises(UsageError, match="--fused on: there are no fused operators for this processor"):
        for_device(options(fused="on"), torch.device("cpu"))


def test_the_mode_of_the_fused_operators_is_recorded_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for built, recorded in (({"cpu"}, "on"), (set(), "off")):
        monkeypatch.setattr(fused, "DEVICE_TYPES", built)
        monkeypatch.setattr("fused._library.DEVICE_TYPES", built)
        assert for_device(options(), torch.device("cpu"))[0].recipe()["fused"] == recorded
        assert for_device(options(fused="off"), torch.device("cpu"))[0].fused == "off"


def test_precision_auto_is_chosen_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, amp in ((True, "bf16"), (False, None)):
        monkeypatch.setattr("engine.acceleration.has_fast_bf16", lambda device, fast=fast: fast)
        found, (line,) = for_device(options(amp="auto", fused="off"), torch.device("cpu"))
        assert found.amp == amp and line.startswith("--amp auto: ")


def test_a_gpu_waits_late_only_with_the_fused_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("fused._library.DEVICE_TYPES", frozenset({"cpu", "cuda"}))
    assert not options().stepping(gpu).late and not options().stepping(torch.device("cpu")).late
    with fused.using("on"):
        assert options().stepping(gpu).late and options(amp="bf16").stepping(gpu).late
        assert not options(amp="fp16").stepping(gpu).late
        assert not options().stepping(torch.device("cpu")).late
