"""Files, commands and flags in README and docs exist, and their Python code runs."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

import evaluate
import train
from cc_attention import RecurrentCrissCrossAttention
from engine.options import TrainOptions
from networks import MODELS, fold_batch_norm
from networks.models import Architecture, models_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "cc_attention/README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: A command of a page: module or script, then its arguments.
COMMAND = re.compile(r"python (?:-m ([\w.]+)|(\w[\w/]*)\.py)((?: |\\\n)[^`#\n|]*(?:\\\n[^`#\n|]*)*)?")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read(file), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Paths in code style exist."""
    for name in re.findall(r"`((?:\w+/)+[\w.-]+\.(?:py|sh|md|json|png|tsv|sbatch))`", read(page)):
        if name.split("/")[0] in {path.name for path in ROOT.iterdir() if path.is_dir()} - {
            "snapshots",
            "data",
        }:
            assert (ROOT / name).exists(), name


@cache
def options_of(module: str) -> set[str] | None:
    """Return the flags of a command, or None if its module has no parser."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    if hasattr(found, "get_parser"):
        return set(found.get_parser()._option_string_actions)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    for module, script, rest in COMMAND.findall(read(page)):
        name = module or script.replace("/", ".")
        if name in ("pip", "pytest", "venv"):
            continue
        assert importlib.util.find_spec(name), name
        options = options_of(name) if name.split(".")[0] in ("train", "evaluate", "tools") else None
        if options is None:
            continue
        known = options | (options_of("train") or set()) | (options_of("evaluate") or set())
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest.replace("\\\n", " ")):
            # These pass on the flags after --train and --evaluate.
            passes = name in ("tools.seeds", "tools.table")
            allowed = known | options | {"--train", "--evaluate"} if passes else options
            assert flag in allowed, f"{name} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_them_runs(
    page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block runs by itself. `module` and `x` are what the page says, and the checkpoint is there."""
    (tmp_path / "snapshots/mini").mkdir(parents=True)
    (tmp_path / "snapshots/mini/CS_scenes_300.pth").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    given = {"module": RecurrentCrissCrossAttention(16), "x": torch.randn(1, 16, 20, 50)}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)):
        if "ccnet." in block:  # a file that tools.export writes: test_export.py runs it
            continue
        file = tmp_path / f"block_{number}.py"
        file.write_text(block)
        names = runpy.run_path(str(file), given)
        if "classes" in names:
            assert names["classes"].shape == (1, 128, 256)
        if "prediction" in names:
            assert names["prediction"].probabilities.shape == (19, 128, 256)
        if "maps" in names:
            assert names["maps"].shape in ((2, 1, 20, 50), (1, 2, 17, 33))
        if "PlainHead" in names:
            monkeypatch.setitem(MODELS, "plain", Architecture(names["PlainHead"]))
            for command in (train, evaluate):
                own = ["--model", "plain", "--backbone", "resnet50", "--num-classes", "4"]
                args = command.get_parser().parse_args(["--data-dir", "CS", *own])
                network = command.make_model(args, None).eval()
                assert isinstance(network.head, names["PlainHead"])
            with torch.no_grad():
                outputs, folded = (
                    each(torch.randn(1, 3, 33, 41)) for each in (network, fold_batch_norm(network))
                )
            assert [output.shape[1] for output in outputs] == [4, 4] and len(folded) == 1
            assert models_of(network.state_dict()) == ["plain"]


def test_the_page_about_resuming_lists_the_recipe() -> None:
    section = read(ROOT / "docs/resume.md").split("## Flags that a resumed run must repeat")[1].split("\n\n")
    table = next(part for part in section if part.startswith("| Group"))
    wanted = {f"--{name.replace('_', '-')}" for name in TrainOptions.names(lambda flag: flag.recipe)}
    assert set(re.findall(r"--[a-z][a-z-]*", table)) == wanted


def test_the_parsers_that_are_asked_are_there() -> None:
    for module in (
        "train",
        "evaluate",
        "tools.predict",
        "tools.attention",
        "tools.explore",
        "tools.report",
        "tools.prepare",
    ):
        options = options_of(module)
        assert options is not None and "--help" in options
    assert isinstance(importlib.import_module("train").get_parser(), argparse.ArgumentParser)
