"""Reader of CVAT: XML files of the export "CVAT for images 1.1".

Shapes are drawn in the order of their z_order, as CVAT's own export of masks draws them: polygons and boxes
by pycocotools, ellipses by OpenCV. Polylines, points, cuboids and skeletons have no area and are left out.
"""

from __future__ import annotations

from tools.prepare.cvat_file import parse_file
from tools.prepare.listed import Listed, find_all
from tools.prepare.reading import annotation_files, parse_all
from tools.prepare.source import Class, Found, Wanted


def read_cvat(source: str, wanted: Wanted) -> Found:
    """Read CVAT's XML files: a file, or all of a folder and its subfolders.

    Raises:
        Problems: a file is invalid, a picture is missing, or a label is unknown.
    """
    problems: list[str] = []
    labels: list[Class] = []
    pictures: list[Listed] = []
    left_out = 0
    for content in parse_all(annotation_files(source, ".xml"), parse_file, problems):
        labels += content.labels
        pictures += content.pictures
        left_out += content.left_out
    found = find_all(source, wanted, labels, pictures, problems, "shapes with an area")
    if left_out:
        found.notes.append(
            f"{left_out} polylines, points, cuboids or skeletons have no area, and are left out"
        )
    return found
