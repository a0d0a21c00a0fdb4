"""examples/ccnet.ipynb runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


@pytest.mark.slow
def test_every_cell_runs(root: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(root / "examples/ccnet.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    # Fewer steps and pictures, in folders of this test.
    folders = [f"Path({str(tmp_path / name)!r})" for name in ("data", "run")]
    for given, own in (
        ("STEPS = 300", "STEPS = 2"),
        ('Path("data/mini"), Path("snapshots/notebook")', ", ".join(folders)),
        ("-m dataset.mini {DATA}", "-m dataset.mini {DATA} --train 6 --val 2 --size 96x192"),
    ):
        (cell,) = (cell for cell in cells if given in cell.source)
        cell.source = cell.source.replace(given, own)
    place = {"metadata": {"path": str(root / "examples")}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()

    outputs = [output for cell in cells for output in cell.outputs]
    text = "\n".join(output.text for output in outputs if output.output_type == "stream")
    # A command that fails does not stop a notebook.
    assert "Traceback" not in text and "error:" not in text, text
    assert (tmp_path / "run/CS_scenes_2.pth").exists() and "mean IoU 0." in text
    assert "1 picture" in text and (tmp_path / "run/explore.html").stat().st_size > 10_000
    sums = re.search(r"\(2, \d+, \d+\) \[(\S+) +(\S+) *\]", text)  # of the attention maps
    assert sums and [float(each) for each in sums.groups()] == pytest.approx([1, 1], abs=1e-5)
    equal = re.search(r"([\d.]+) % of the pixels have the class of the segmenter", text)
    assert equal and float(equal[1]) > 99.9
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5, text
