"""Formats that tools.prepare reads, and their recognition by content."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module

from tools.prepare.reading import annotation_files
from tools.prepare.source import Found, Wanted
from utils.errors import DataError
from utils.files import open_input

#: Names for --from, with the module and function that reads each, and what it is.
FORMATS = {
    "labelme": ("labelme", "read_labelme", "labelme JSON files"),
    "coco": ("coco", "read_coco", "COCO JSON files"),
    "cvat": ("cvat", "read_cvat", "XML files of CVAT for images 1.1"),
    "voc": ("masks", "read_voc", "VOC folder"),
    "pair": ("masks", "read_pair", "folder pair images/ and labels/"),
}
#: Number of bytes from the start and from the end of a file that are looked at.
LOOKED_AT = 2**16
#: Keys of JSON files. A file has a format if two of its keys occur.
KEYS = {
    "labelme": (b"shapes", b"imagePath", b"imageData", b"imageHeight", b"shape_type"),
    "coco": (b"images", b"annotations", b"categories", b"file_name", b"category_id", b"segmentation"),
}


def reader(name: str) -> Callable[[str, Wanted], Found]:
    """Return the function that reads a format; its packages are imported only if it is used."""
    module, function, _ = FORMATS[name]
    return getattr(import_module(f"tools.prepare.{module}"), function)


def recognize(source: str) -> tuple[str, str]:
    """Return the format of a file or folder, and a description of what was found.

    Raises:
        DataError: no format fits, or several do.
    """
    found: dict[str, str] = {}
    for ending, of_file in ((".json", _format_of_json), (".xml", _format_of_xml)):
        files = (
            annotation_files(source, ending)
            if os.path.isdir(source) or source.lower().endswith(ending)
            else []
        )
        formats = [of_file(path) for path in files]
        for name in sorted({*formats} - {""}):
            number = formats.count(name)
            what = FORMATS[name][2]
            found[name] = f"{number} {what}" if number > 1 else f"1 {what.replace('files', 'file', 1)}"
    if os.path.isdir(source):
        masks = import_module("tools.prepare.masks")
        for name, is_one in (("voc", masks.is_voc), ("pair", masks.is_pair)):
            if is_one(source):
                found[name] = FORMATS[name][2]
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        found = {name: found[name] for name in FORMATS if name in found}
        raise DataError(
            f"{source}: has {' and '.join(found.values())}; choose with --from {' or --from '.join(found)}"
        )
    accepted = ", ".join(f"{what} ({name})" for name, (_, _, what) in FORMATS.items())
    raise DataError(f"{source}: has no labels of a known format; accepted are {accepted}; see --from")


def _read_ends(path: str) -> bytes:
    """Return the start and the end of a file; nothing if it can't be read, which its reader reports."""
    try:
        with open_input(path) as file:
            start = file.read(LOOKED_AT)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(len(start), size - LOOKED_AT))
            return start + file.read()
    except OSError:
        return b""


def _format_of_json(path: str) -> str:
    content = _read_ends(path)
    for name, keys in KEYS.items():
        if sum(re.search(rb'"%s"\s*:' % key, content) is not None for key in keys) >= 2:
            return name
    return ""


def _format_of_xml(path: str) -> str:
    # Files of VOC begin with <annotation>.
    return "cvat" if re.search(rb"<annotations\b", _read_ends(path)) else ""
