"""Predict the pictures of a folder in Python.

    python examples/predict_folder.py snapshots/mini/CS_scenes_300.pth data/mini/leftImg8bit/val/ivenstadt out

Run from the repository root, with the environment activated. The result of each picture is a PNG file with a
palette, whose values are train ids, the class numbers of the network. `python -m tools.predict` does the same
with more options.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from segmenter import Segmenter
from utils.drawing.palette import save_indexed_png


def main(checkpoint: str, pictures: str, out: str) -> None:
    """Predict every PNG and JPEG file in the folder `pictures` and write the classes to the folder `out`."""
    segmenter = Segmenter.load(checkpoint)
    Path(out).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(pictures).iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            continue
        prediction = segmenter.predict(path, probabilities=False)
        save_indexed_png(str(Path(out) / f"{path.stem}.png"), prediction.classes, segmenter.palette)
        print(path.name, "->", f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
