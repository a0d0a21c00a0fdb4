"""The layers of the repository: which package may import which, and calls that no code makes."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from engine.runtime.distributed import OPERATOR_MISSING

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"cc_attention", "dataset", "engine", "fused", "loss", "networks", "utils"}
#: What may import everything below it and is imported by nothing below it, besides train.py and evaluate.py.
TOP = {"tools", "benchmarks", "examples", "tests"}
#: Packages that a package may import besides itself. The operators need nothing else; the others use utils.
ALLOWED = {name: {"utils"} for name in PACKAGES - {"cc_attention", "fused", "utils"}}
ALLOWED["networks"] = {"utils", "cc_attention", "fused"}
ALLOWED["engine"] = ALLOWED["loss"] = {"utils", "fused"}
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
COMMANDS = [
    *(ROOT / name for name in ("train.py", "evaluate.py", "segmenter.py", "hubconf.py", "setup.py")),
    *sorted(path for name in ("tools", "examples") for path in (ROOT / name).rglob("*.py")),
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


def packages(path: Path) -> set[str]:
    """Return the top-level names that a file imports."""
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_what_it_may(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = (
        (PACKAGES | TOP | {"train", "evaluate", "segmenter"}) - {package} - ALLOWED.get(package, set())
    )
    assert not packages(path) & forbidden


def test_tools_do_not_import_benchmarks_or_tests():
    for path in COMMANDS:
        assert not packages(path) & {"benchmarks", "tests"}, path
    for name in ("train.py", "evaluate.py", "segmenter.py", "setup.py"):
        assert not packages(ROOT / name) & TOP, name


def test_no_modules_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    graph = {}
    for module, path in modules.items():
        found = set()
        for name in imports(path):
            # `from a.b import c`: c is a module or a name in a.b.
            found |= {name, name.rpartition(".")[0]} & modules.keys()
        graph[module] = found - {module}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(modules)  # raises CycleError


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
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    assert [path for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []
