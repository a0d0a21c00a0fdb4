"""tools.table: what it trains, what it finds, and its arithmetic against tools.profile."""

from __future__ import annotations

import functools
import json
import os
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import run, status_of, write_pair
from small_network import Narrow, registered

import evaluate
import train
from cc_attention import ops
from dataset.catalog import DATA_SETS
from networks import MODELS, make_network
from networks.variants import DEPTHS
from tools import seeds, table
from tools.cost import Setting, simulate
from tools.published import TABLES, Row, Table
from utils.errors import RunError, UsageError

compiled = pytest.mark.skipif(
    "cpu" not in ops.DEVICE_TYPES, reason="the compiled operator, which is counted, was not built"
)
RECIPE = """
model = "{model}"
backbone = "small"
input-size = [33, 33]
batch-size = 2
num-steps = 2
random-mirror = true
"""
#: Flags of the runs of these tests, besides those of the recipes.
OTHERS = ["--gpu", "cpu", "--num-workers", "0", "--save-state-every", "1", "--print-frequency", "1"]


@pytest.fixture
def narrow_models() -> Iterator[None]:
    """Give the models an eighth of the channels, under their own names."""
    before = dict(MODELS)
    with registered():
        for name, each in before.items():
            MODELS[name] = each._replace(network=functools.partial(Narrow, each.head))
        yield
        MODELS.update(before)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Row, ...]:
    """Replace the tables by one of two small recipes."""
    found = []
    for model in ("psp", "ccnet"):
        path = tmp_path / f"{model}.toml"
        path.write_text(RECIPE.format(model=model))
        found.append(Row(f"with {model}", str(path), (78.5, 79.25), "somewhere"))
    monkeypatch.setitem(table.TABLES, "context", Table(tuple(found)))
    return tuple(found)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the commands in this process; return what was run with the end of what it printed."""
    done: list[str] = []

    def in_process(script: str, *arguments: object) -> None:
        ended = run(script, *arguments)
        done.append(f"{script}: {' '.join(ended.stdout.splitlines())}")
        if ended.returncode:
            raise RunError(f"{script}: exit status {ended.returncode}")

    monkeypatch.setattr(seeds, "run", in_process)
    return done


@compiled
@pytest.mark.slow
@pytest.mark.usefixtures("narrow_models")
def test_a_table_is_measured_interrupted_and_continued(
    rows: tuple[Row, ...],
    commands: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, scenes = tmp_path / "tables", tmp_path / "scenes"
    for split in ("train", "val"):
        for number in range(2):
            write_pair(scenes, split, number, (33, 33))
    arguments = ["context", "--data", str(scenes), "--seeds", "2", "--rounds", "1", "--out", str(out)]
    arguments += ["--train", *OTHERS, "--evaluate", "--num-workers", "0"]
    step = train.Stepper.step

    def interrupted(self, number, batch):
        if len(commands) == 4 and number == 2:  # both runs of the first row are trained and evaluated
            raise KeyboardInterrupt
        return step(self, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(train.Stepper, "step", interrupted)
        with pytest.raises(RunError, match="exit status 130"):
            table.main(arguments)
    first, second = json.loads((out / "context.json").read_text())["rows"]
    assert second["measured"] is None and list(first["measured"]["seeds"]) == ["12345", "12346"]
    assert "| with ccnet | 78.50, 79.25 | not measured |" in (out / "context.md").read_text()
    assert (out / "ccnet/seed_12345/state_1.pt").exists()

    del commands[:]
    table.main(arguments)
    text = capsys.readouterr().out
    assert [line.split(":")[0] for line in commands] == ["train.py"] * 2 + ["train.py", "evaluate.py"] * 2
    assert all("the run is finished" in line for line in commands[:2])
    assert "continuing after step 1" in commands[2] and "continuing" not in commands[4]
    for line, row in zip(commands[2::2], rows[1:] * 2, strict=True):
        assert f"recipe {row.recipe}" in line
    content = json.loads((out / "context.json").read_text())
    for name, about in zip(("psp", "ccnet"), content["rows"], strict=True):
        results = [json.loads(path.read_text()) for path in sorted(out.glob(f"{name}/seed_*/result.txt"))]
        scores = [100 * result["meanIU"] for result in results]
        assert len(scores) == 2 and list(about["measured"]["seeds"].values()) == pytest.approx(scores)
        mean, spread = statistics.fmean(scores), statistics.stdev(scores)
        assert f"| with {name} | 78.50, 79.25 | {mean:.2f} ± {spread:.2f} (2) |" in text
        used = json.loads((out / name / "seed_12346/args.json").read_text())
        assert (used["model"], used["num_steps"], used["random_mirror"]) == (name, 2, True)
        assert about["folder"] == str(out / name) and about["seconds"] > 0
        assert about["differences"] == [] and not about["rehearsal"]
    assert text.endswith((out / "context.md").read_text())
    assert "- somewhere: all rows" in text and "small, one picture of 33x33, median of 1 runs" in text
    assert "differ from their recipes" not in text and "Rehearsal" not in text

    # Without --data, nothing is trained. The result of another snapshot is none of the run.
    del commands[:]
    result = out / "psp/seed_12345/result.txt"
    noted = json.loads(result.read_text())
    noted["arguments"]["restore_from"] = str(result.parent / "CS_scenes_1.pth")
    result.write_text(json.dumps(noted))
    used = out / "ccnet/seed_12345/args.json"
    used.write_text(used.read_text().replace('"batch_size": 2', '"batch_size": 4'))
    (scenes / "mini.json").write_text("{}")
    table.main(["context", "--out", str(out)])
    text = capsys.readouterr().out
    about = json.loads((out / "context.json").read_text())["rows"]
    assert commands == [] and [list(each["measured"]["seeds"]) for each in about] == [
        ["12346"],
        ["12345", "12346"],
    ]
    assert "- --batch-size 4 (recipe: 2): with ccnet" in text and "forward, ms" not in text
    assert "**Rehearsal on the generated data set: these scores mean nothing.**" in text


@compiled
@pytest.mark.usefixtures("narrow_models")
def test_a_rehearsal_is_planned_with_its_own_flags(
    rows: tuple[Row, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tables"
    table.main(["context", "--data", "mini", "--out", str(out), "--dry-run", "--train", "--num-steps", "7"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["python", "train.py"], ["python", "evaluate.py"]] * 2
    for row, line in zip(rows, lines[::2], strict=True):
        args = train.get_parser().parse_args(line[2:])
        assert (args.recipe, args.data_dir) == (row.recipe, str(out / "data_cityscapes"))
        assert (args.backbone, args.num_steps, args.restore_from) == ("resnet50", 7, None)
        assert args.snapshot_dir == str(out / Path(row.recipe).stem / "seed_12345") and args.resume
    assert not (out / "data_cityscapes").exists()


@compiled
@pytest.mark.slow
@pytest.mark.usefixtures("narrow_models")
def test_a_table_of_another_data_set(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "MINI_PICTURES", table.MINI_PICTURES | {"train": 4, "val": 2})
    out = tmp_path / "tables"
    arguments = ["camvid", "--data", "mini", "--rounds", "0", "--out", str(out)]
    table.main([*arguments, "--train", "--backbone", "small", "--num-steps", "2"])
    text = capsys.readouterr().out
    assert "| 3-D RCCA, T=5 | 79.1 |" in text and "in percent on CamVid test;" in text
    differences = [line for line in text.splitlines() if line.endswith(": all rows") and "recipe: " in line]
    assert any("--num-steps 2 (recipe: 20000)" in line for line in differences)
    assert not any("--whole" in line or "--split" in line for line in differences)
    rows = json.loads((out / "camvid.json").read_text())["rows"]
    for row, clip in zip(rows, (1, 5), strict=True):
        folder = Path(row["folder"]) / "seed_12345"
        result = json.loads((folder / "result.txt").read_text())
        how = result["arguments"]
        assert (how["split"], how["whole"], len(result["IU_array"])) == ("test", True, 11)
        assert (json.loads((folder / "args.json").read_text())["clip"] or 1) == clip == row["setting"]["clip"]
        assert (row["setting"]["num_classes"], row["rehearsal"]) == (11, True)
    assert rows[1]["gflops"] > 3 * rows[0]["gflops"]

    # A score of another split is none of the table.
    noted = json.loads((folder / "result.txt").read_text())
    noted["arguments"]["split"] = "val"
    (folder / "result.txt").write_text(json.dumps(noted))
    table.main(["camvid", "--out", str(out)])
    assert "evaluate.py --split val (recipe: test): 3-D RCCA, T=5" in capsys.readouterr().out


@compiled
def test_the_evaluation_is_the_published_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = TABLES["ade20k"]
    assert table.evaluation_of(published) == shlex.split(DATA_SETS["ade20k"].evaluate)
    assert table.classes_of(published) == 150 and table.classes_of(TABLES["context"]) == 19
    sides = {}
    for data in ("ADE", "mini"):
        table.main(["ade20k", "--data", data, "--seeds", "1", "--out", str(tmp_path), "--dry-run"])
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        scoring = evaluate.get_parser().parse_args(lines[1][2:])
        sides[data] = (train.get_parser().parse_args(lines[0][2:]).short_sides, scoring.short_sides)
        assert scoring.whole and scoring.long_side == 1000
    assert sides == {"ADE": ([300, 375, 450, 525, 600],) * 2, "mini": ([65, 97],) * 2}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    "model, recurrence, gflops",
    [
        ("ccnet", 2, 16.58),
        ("ccnet", 3, 24.88),
        ("nonlocal", 1, 108.16),
        ("fcn", None, 0),
        ("psp", None, None),
    ],
)
def test_cost_is_that_of_the_profile(
    model: str, recurrence: int | None, gflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEPTHS, "tiny", (1, 1, 1, 1))
    args = train.get_parser().parse_args(["--data-dir", "CS", "--model", model])
    args.backbone, args.recurrence = "tiny", recurrence
    setting = table.setting_of(args)
    published = {
        ("ccnet", 2): " (papers: 16.5)",
        ("ccnet", 3): " (papers: 24.7)",
        ("nonlocal", 1): " (papers: 108)",
    }
    entry = {"setting": setting._asdict(), "context": 1.0}
    assert table.context_of(entry) == "1.00" + published.get((model, recurrence), "")
    assert table.context_of(entry | {"setting": setting._replace(size=(33, 33))._asdict()}) == "1.00"
    assert (setting.model, setting.recurrence, setting.size) == (model, recurrence, (769, 769))
    cost = table.cost_of(setting)
    if gflops is not None:  # as the papers count, whatever the backbone
        assert round(cost.context, 2) == gflops
    prediction = simulate(Setting(backbone="tiny", model=model, recurrence=recurrence))
    flops = sum(part.flops_forward for part in prediction.parts.values())
    assert cost.gflops == pytest.approx(flops / 1e9, rel=1e-12)
    with torch.device("meta"):
        network = make_network(model, 19, recurrence, backbone="tiny")
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    step = Setting(backbone="tiny", model=model, recurrence=recurrence, train=True, batch=2)
    assert cost.memory == simulate(step).peak


@compiled
def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["context", "--seeds", "2"], "--data: missing"),
        (["context", "--dry-run"], "--data: missing"),
        (["context", "--train", "--gpu", "cpu"], "--data: missing"),
        (["context", "--data", "CS", "--train", "--data-dir", "x"], "--data-dir: set by this command"),
        (["context", "--data", "CS", "--train", "--recipe=x"], "--recipe=x: set by this command"),
        (["context", "--data", "CS", "--evaluate", "--restore-from", "x"], "--restore-from: set by"),
    ):
        with pytest.raises(UsageError, match=message):
            table.main(arguments)
    wrong = ["context", "--data", "CS", "--out", str(tmp_path), "--train", "--no-flag"]
    for arguments in (["ccnet"], wrong):
        assert status_of(lambda given: table.main(given), *arguments) == 2
        assert "error" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
