"""Entry points of torch.hub.

    import torch

    segmenter = torch.hub.load(FOLDER, "ccnet", weights="CS_scenes_60000.pth", source="local")
    classes = segmenter.predict("street.jpg").classes

FOLDER is a clone of this repository. The process may have packages of its own with the names of the packages
here, such as utils or dataset: the modules of the repository are imported below a name of their own (PREFIX),
and their imports of each other are rewritten to it. cc_attention is imported under its own name, because its
operators can be registered only once in a process. The operators of fused are those of the copy that is
imported first.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

dependencies = ["cv2", "numpy", "PIL", "torch"]

_FOLDER = os.path.dirname(os.path.abspath(__file__))
#: Packages and modules of the repository that are imported below the prefix.
_OWN = ("dataset", "engine", "fused", "loss", "networks", "segmenter", "tools", "utils")
#: Package of the modules of this clone in sys.modules; another clone has another name.
PREFIX = f"ccnet_{hashlib.sha256(_FOLDER.encode()).hexdigest()[:8]}"


def ccnet(weights: str | None = None, **options: Any) -> Any:
    """Load CCNet, or another model of networks/models.py.

    Args:
        weights: checkpoint file; None for random weights.
        **options: see `segmenter.Segmenter.load`: device, amp, model, backbone, num_classes and others.

    Returns:
        A `segmenter.Segmenter`, with the methods predict(picture) and attention(picture, pixels).
    """
    return _module("segmenter").Segmenter.load(weights, **options)


def _module(name: str) -> ModuleType:
    """Import a module of the repository below the prefix."""
    if PREFIX not in sys.modules:
        package = ModuleType(PREFIX)
        package.__path__ = []
        sys.modules[PREFIX] = package
        sys.meta_path.insert(0, _Finder())  # before the finder of files, which would not rewrite imports
    if importlib.util.find_spec("cc_attention") is None:
        raise ImportError(f"cc_attention is not in {_FOLDER}; load the whole repository")
    return importlib.import_module(f"{PREFIX}.{name}")


class _Finder(MetaPathFinder):
    """Find the modules of the repository below the prefix."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        prefix, _, name = fullname.partition(".")
        if prefix != PREFIX or name.partition(".")[0] not in _OWN:
            return None
        place = os.path.join(_FOLDER, *name.split("."))
        if os.path.isfile(file := os.path.join(place, "__init__.py")):
            folders = [place]
        elif os.path.isfile(file := f"{place}.py"):
            folders = None
        else:
            return None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_Loader(fullname, file), submodule_search_locations=folders
        )


class _Loader(SourceFileLoader):
    """Load a module whose imports of the repository are rewritten."""

    def get_code(self, fullname: str) -> CodeType:
        # Neither read nor write the bytecode cache: it belongs to the modules under their usual names.
        tree = _Rewriter().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)


class _Rewriter(ast.NodeTransformer):
    """Put the prefix before the names of the repository's modules in import statements."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level == 0 and node.module and node.module.partition(".")[0] in _OWN:
            node.module = f"{PREFIX}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            if alias.name.partition(".")[0] not in _OWN:
                continue
            if alias.asname is None and "." in alias.name:  # `import a.b` binds a, which can't be prefixed
                raise ImportError(f"import {alias.name}: write it as from ... import ...")
            alias.asname = alias.asname or alias.name
            alias.name = f"{PREFIX}.{alias.name}"
        return node
