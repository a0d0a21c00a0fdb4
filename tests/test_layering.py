"""Layers: which package may import which, and what no file may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from engine.runtime.distributed import OPERATOR_MISSING

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"cc_attention", "dataset", "engine", "loss", "networks", "utils"}
#: Each package, and the siblings that it may import. Commands, tests, benchmarks import what they like.
ALLOWED = {"dataset": {"utils"}, "networks": {"cc_attention", "utils"}, "engine": {"utils"}}
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
COMMANDS = [
    ROOT / "train.py",
    ROOT / "evaluate.py",
    ROOT / "setup.py",
    *sorted((ROOT / "tools").glob("*.py")),
]


def imports(path: Path) -> set[str]:
    """Return the names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_the_siblings_they_may(path):
    package = path.relative_to(ROOT).parts[0]
    siblings = {name.split(".")[0] for name in imports(path)} & PACKAGES - {package}
    assert siblings <= ALLOWED.get(package, set())


def test_one_file_knows_torch_distributed():
    def names(path: Path) -> set[str]:
        attributes = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute))
        return imports(path) | {ast.unparse(attribute) for attribute in attributes}

    users = {path for path in SOURCES if any(name.startswith("torch.distributed") for name in names(path))}
    assert users == {ROOT / "engine/runtime/distributed.py"}


@pytest.mark.parametrize("path", [*SOURCES, *COMMANDS], ids=str)
def test_nothing_evaluates_text_or_unpickles_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        assert called not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads")
        assert options.get("shell") != "True"
        if called == "torch.load":
            assert options.get("weights_only") == "True"


def test_the_warning_that_launched_processes_leave_out_is_the_one_given():
    action, text = OPERATOR_MISSING.split(":", 1)
    assert action == "ignore" and f'f"{text}' in (ROOT / "cc_attention/ops.py").read_text()


def test_every_python_file_says_what_it_is_for():
    files = [
        *SOURCES,
        *COMMANDS,
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    assert [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []
