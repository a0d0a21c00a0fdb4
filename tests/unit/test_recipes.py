"""--recipe: the published recipes, flags that override them, and files that are wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import status_of

import train
from engine import recipes
from engine.options import TrainOptions
from networks.models import recurrence_of
from tools.published import TABLES, Row
from utils.errors import InputError

ROWS = [row for table in TABLES.values() for row in table.rows]
#: The README's recipe for Cityscapes.
CITYSCAPES = {
    "input_size": (769, 769),
    "random_mirror": True,
    "random_scale": True,
    "batch_size": 8,
    "num_steps": 60000,
    "optimizer": "sgd",
    "learning_rate": 1e-2,
    "power": 0.9,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "dropout": 0.1,
    "warmup": 0,
    "restore_from": "torchvision",
}
#: What differs in the recipes of other data sets.
SETTINGS: dict[str, dict[str, object]] = {
    "ade20k": {
        "input_size": (473, 473),
        "random_scale": False,
        "short_sides": [300, 375, 450, 525, 600],
        "long_side": 1000,
        "batch_size": 16,
        "num_steps": 100000,
        "learning_rate": 2e-2,
    },
    "lip": {
        "input_size": (384, 384),
        "scale_range": (0.5, 1.6),
        "batch_size": 24,
        "num_steps": 190388,
        "learning_rate": 1e-3,
        "weight_decay": 5e-4,
    },
    "camvid": {"input_size": (360, 480), "num_steps": 20000},
}
#: Model, recurrence and loss of a row, by its label.
NETWORKS = {
    "baseline": ("fcn", None, ""),
    "baseline, R=0": ("fcn", None, ""),
    "GCN": ("gcn", None, ""),
    "PSP": ("psp", None, ""),
    "ASPP": ("aspp", None, ""),
    "non-local": ("nonlocal", 1, ""),
    "non-local, R=2": ("nonlocal", 2, ""),
    "RCCA, R=2": ("ccnet", 2, ""),
    "RCCA, R=2, CCL": ("ccnet", 2, "ccl"),
    "R=1": ("ccnet", 1, ""),
    "R=2": ("ccnet", 2, ""),
    "R=3": ("ccnet", 3, ""),
    "R=2, OHEM": ("ccnet", 2, "ohem"),
    "RCCA, T=1": ("ccnet", 2, ""),
    "3-D RCCA, T=5": ("ccnet3d", 3, ""),
}


def parsed(*arguments: str) -> TrainOptions:
    args = train.get_parser().parse_args(["--data-dir", "CS", *arguments])
    args.num_classes = 19
    return TrainOptions.of(args)


@pytest.mark.parametrize("table, row", [(name, row) for name, table in TABLES.items() for row in table.rows])
def test_a_recipe_is_that_of_its_row(table: str, row: Row) -> None:
    found = parsed("--recipe", row.recipe)
    common = CITYSCAPES | SETTINGS.get(table, {})
    assert {name: getattr(found, name) for name in common} == common
    model, recurrence, loss = NETWORKS[row.label]
    assert (found.model, recurrence_of(model, found.recurrence)) == (model, recurrence)
    assert (found.ohem, found.ccl) == (loss == "ohem", loss == "ccl")
    assert not found.ohem or (found.ohem_thres, found.ohem_keep) == (0.7, 100000)
    assert not found.ccl or found.ccl_channels == 16
    assert found.backbone == ("resnet50" if table == "context50" else "resnet101")
    found.check(4, "cuda")
    # Its comment has the published figure with the source.
    comment = Path(recipes.path_of(row.recipe)).read_text().split("\n\n")[0]
    (line,) = re.findall(rf"^#   {re.escape(row.published)}  (.+)$", comment, re.MULTILINE)
    assert row.source.removeprefix("ICCV paper, ") in line


def test_each_recipe_has_a_row() -> None:
    assert set(recipes.names()) == {row.recipe for row in ROWS}
    # Published figures of the two papers and of the original's README.
    assert {row.label: row.scores for row in TABLES["context"].rows} == {
        "baseline": (75.1,),
        "GCN": (78.1,),
        "PSP": (78.5,),
        "ASPP": (78.9,),
        "non-local": (79.1,),
        "RCCA, R=2": (79.8,),
        "RCCA, R=2, CCL": (80.5,),
    }
    assert [row.scores for row in TABLES["context50"].rows] == [
        (73.3,),
        (76.4,),
        (77.1,),
        (77.3,),
        (78.7,),
        (78.5,),
    ]
    assert [row.scores for row in TABLES["recurrence"].rows] == [(75.1,), (78.0,), (79.8,), (80.2,)]
    assert TABLES["original"].rows[2].scores == (78.67, 80.00, 79.83)
    others = [[row.published for row in TABLES[name].rows] for name in ("ade20k", "lip", "camvid")]
    assert others == [["45.22", "45.76"], ["55.47"], ["77.9", "79.1"]]


def test_the_page_has_the_published_scores(root: Path) -> None:
    lines = (root / "docs/recipes.md").read_text().splitlines()
    for name, table in TABLES.items():
        for row in table.rows:
            (line,) = (line for line in lines if line.startswith(f"| `{row.recipe}` |"))
            assert f"`{name}`: {row.label}" in line and row.published in line


def test_flags_override_the_recipe_wherever_they_stand() -> None:
    flags = ["--recipe=ccnet_r101_ccl_cityscapes", "--ccl", "0", "--batch-size", "4", "--random-mirror", "0"]
    for arguments in (flags, [*flags[1:], flags[0]]):
        found = parsed(*arguments, "--restore-from", "random")
        assert (found.ccl, found.batch_size, found.random_mirror) == (False, 4, False)
        assert found.random_scale and found.restore_from is None
    assert parsed("--random-mirror", "--ccl").ccl and not parsed().random_mirror
    assert parsed(*flags, "--recipe", "fcn_r50_cityscapes").model == "fcn"  # the last one counts


def test_a_file_may_hold_every_kind_of_flag(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'data-dir = "mine"\nclass-weights = [1, 2.5]\nema = 0.999\ninput-size = 97\nresume = true\n'
        "compile = false\nlearning-rate = 1\nrestore-from = 'random'\namp = 'bf16'\n"
    )
    args = train.get_parser().parse_args(["--recipe", str(path)])
    assert (args.data_dir, args.class_weights, args.ema) == ("mine", [1, 2.5], 0.999)
    assert (args.input_size, args.resume, args.compile) == ((97, 97), True, False)
    assert (args.learning_rate, args.restore_from, args.amp) == (1.0, None, "bf16")


@pytest.mark.parametrize(
    "content, words",
    [
        ("batchsize = 8", "'batchsize' is not a flag of train.py"),
        ("batch_size = 8", "'batch_size' is not a flag of train.py"),
        ('recipe = "x"', "'recipe' is not a flag"),
        ("local_rank = 1", "'local_rank' is not a flag"),
        ("help = true", "'help' is not a flag"),
        ("batch-size = 0", "batch-size: '0' can't be used; give a whole number from 1 to 65536"),
        ("batch-size = 8.0", "batch-size: '8.0' can't be used; give a whole number"),
        ('batch-size = "8"', "batch-size: '8' can't be used; give a number"),
        ("batch-size = [8]", "batch-size: '[8]' can't be used; give a number"),
        ("learning-rate = true", "learning-rate: 'True' can't be used; give a number"),
        ("learning-rate = nan", "learning-rate: 'nan' can't be used"),
        ("random-mirror = 1", "random-mirror: '1' can't be used; give true or false"),
        ('ohem = "yes"', "ohem: 'yes' can't be used; give true or false"),
        ('input-size = "769,769"', "input-size: '769,769' can't be used; give a list of numbers"),
        ("input-size = [769, 769, 3]", "input-size: '769,769,3' is not a size"),
        ("data-dir = 5", "data-dir: '5' can't be used; give a text in quotes"),
        ('data-dir = ""', "data-dir: '' can't be used; give a text in quotes"),
        ("data-dir = 1979-05-27", "data-dir: '1979-05-27' can't be used; give a text in quotes"),
        ('model = "pspnet"', "model: 'pspnet' is unknown; give one of aspp, ccnet"),
        ("[model]", "model: '{}' is unknown"),
        ("[batch-size]\na = 1", "batch-size: "),
        ("batch-size 8", "is not TOML"),
        ("batch-size = 8\nbatch-size = 4", "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ("batch-size = " + "9" * 5000, "is not TOML"),
        ("a = \0", "not a readable recipe"),
    ],
)
def test_a_wrong_file_takes_one_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        parsed("--recipe", str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and words in message


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--recipe 'ccnet': is unknown; give aspp_r101.*, ccnet_r101_"):
        parsed("--recipe", "ccnet")
    with pytest.raises(InputError, match=r"none.toml: not a readable recipe \(No such file"):
        parsed("--recipe", str(tmp_path / "none.toml"))
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(InputError, match="is a FIFO, not a file"):
        parsed("--recipe", str(tmp_path / "pipe.toml"))


@pytest.mark.parametrize("arguments", [["--recipe"], ["--recipe="], ["--recip", "fcn_r50_cityscapes"]])
def test_a_flag_without_a_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(lambda given: train.get_parser().parse_args(given), "--data-dir", "CS", *arguments) == 2
    assert "argument --recipe: " in capsys.readouterr().err
