"""tools.seeds: the commands that it runs, and the table of their results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import evaluate
import train
from engine.acceleration import resolve_fused
from engine.options import EvaluateOptions
from tools import seeds
from utils.errors import RunError, UsageError

NOTED = EvaluateOptions.names(lambda flag: flag.noted)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the commands by ones that only write the files of the real ones; return those that were run."""
    done: list[list[str]] = []

    def run(script: str, *arguments: object) -> None:
        given = [str(part) for part in arguments]
        done.append([script, *given])
        if script == "train.py":
            args = train.get_parser().parse_args(given)
            folder = Path(args.snapshot_dir)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"CS_scenes_{args.num_steps}.pth"
            if not path.exists():
                path.write_text(str(args.random_seed))
            (folder / "args.json").write_text(json.dumps({"recurrence": args.recurrence}))
        else:
            args = evaluate.get_parser().parse_args(given)
            path = Path(args.restore_from)
            if args.recurrence is None:
                args.recurrence = json.loads(path.with_name("args.json").read_text())["recurrence"]
            used = resolve_fused(args.fused, torch.device("cpu"))  # as evaluate.py notes it
            result = {
                "meanIU": int(path.read_text()) / 100 + 0.2 * args.flip,
                "arguments": {name: getattr(args, name) for name in NOTED} | {"fused": used},
            }
            path.with_name("result.txt").write_text(json.dumps(result))

    monkeypatch.setattr(seeds, "run", run)
    return done


def test_each_seed_is_trained_and_evaluated(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "runs")
    recipe = "--data-dir CS --backbone resnet50 --num-steps 9 --input-size 97,65 --restore-from start.pth"
    arguments = [out, "--first-seed", "40", "--train", *recipe.split(), "--evaluate", "--whole"]
    seeds.main(arguments)
    assert [command[0] for command in commands] == ["train.py", "evaluate.py"] * 3
    first = train.get_parser().parse_args(commands[0][1:])
    assert (first.random_seed, first.resume, first.restore_from) == (40, True, "start.pth")
    second = evaluate.get_parser().parse_args(commands[1][1:])
    assert (second.data_dir, second.whole, second.input_size) == ("CS", True, (97, 65))
    assert second.backbone is None  # evaluate.py knows it from args.json
    assert second.restore_from == os.path.join(out, "seed_40", "CS_scenes_9.pth")
    summary = json.loads((tmp_path / "runs/seeds.json").read_text())
    assert summary["seeds"] == {"40": 0.4, "41": 0.41, "42": 0.42}
    assert summary["mean"] == pytest.approx(0.41) and summary["standard_deviation"] == pytest.approx(0.01)
    text = (tmp_path / "runs/seeds.md").read_text()
    assert "| 41 | 41.00 |" in text and "| mean of 3 | 41.00 ± 1.00 |" in text
    assert text in capsys.readouterr().out
    # The second time, training says that it is finished, and nothing is evaluated twice.
    del commands[:]
    seeds.main(arguments)
    assert [command[0] for command in commands] == ["train.py"] * 3
    # Other flags of the evaluation give another result.
    seeds.main([*arguments, "--flip"])
    assert [command[0] for command in commands[3:]] == ["train.py", "evaluate.py"] * 3
    assert json.loads((tmp_path / "runs/seeds.json").read_text())["mean"] == pytest.approx(0.61)
    # An evaluation with another recurrence than that of the run does not stand for one without the flag.
    del commands[:]
    seeds.main([*arguments, "--recurrence", "1"])
    seeds.main(arguments)
    assert [command[0] for command in commands] == ["train.py", "evaluate.py"] * 6


def test_wrong_flags(tmp_path: Path, commands: list[list[str]]) -> None:
    out, recipe = str(tmp_path), ["--train", "--data-dir", "CS"]
    for arguments, message in (
        ([out, *recipe, "--random-seed", "1"], "--random-seed: set by this command for each seed"),
        ([out, *recipe, "--evaluate", "--restore-from=x"], "--restore-from=x: set by"),
        ([out, *recipe, "--evaluate", "--output-d", "x"], "--output-d: set by"),
        ([out, "--evaluate", "--whole", *recipe], "--evaluate: stands before --train"),
        ([out], "--train: missing"),
    ):
        with pytest.raises(UsageError, match=message):
            seeds.main(arguments)
    for wrong in ([out, *recipe, "--no-flag"], [out, *recipe, "--evaluate", "--no-flag"]):
        with pytest.raises(SystemExit) as end:
            seeds.main(wrong)
        assert end.value.code == 2
    assert commands == []


@pytest.mark.slow
def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train.py: wrong usage or input"):
        seeds.main([str(tmp_path / "runs"), "--train", "--data-dir", str(tmp_path / "none"), "--gpu", "cpu"])


def test_a_broken_run_names_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        returncode = 1

    monkeypatch.setattr(seeds.subprocess, "run", lambda command: Broken())
    with pytest.raises(RunError, match="exit status 1"):
        seeds.run("train.py")


def test_the_tables_replace_nothing_that_is_read(tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "seeds.md").write_text("a\tb\n")
    for flag in ("--data-list", "--classes", "--restore-from"):
        with pytest.raises(UsageError, match="DIR .*: would replace its own input .*seeds.md"):
            seeds.main([str(tmp_path), "--train", "--data-dir", "CS", flag, str(tmp_path / "seeds.md")])
    os.mkfifo(tmp_path / "seeds.json")
    with pytest.raises(UsageError, match="seeds.json is a FIFO, not a file"):
        seeds.main([str(tmp_path), "--train", "--data-dir", "CS"])
    assert commands == [] and (tmp_path / "seeds.md").read_text() == "a\tb\n"


@pytest.mark.parametrize(
    "content", ["[]", "[" * 99_999, '{"meanIU": "x"}', '{"arguments": 1, "meanIU": 0.5}']
)
def test_a_damaged_result_is_evaluated_again(tmp_path: Path, commands: list[list[str]], content: str) -> None:
    arguments = [str(tmp_path), "--seeds", "1", "--first-seed", "40", "--train", "--data-dir", "CS"]
    seeds.main(arguments)
    (tmp_path / "seed_40/result.txt").write_text(content)
    seeds.main(arguments)
    assert [command[0] for command in commands] == ["train.py", "evaluate.py"] * 2
