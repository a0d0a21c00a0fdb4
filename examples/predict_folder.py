"""Predict the pictures of a folder in Python.

    python examples/predict_folder.py snapshots/mini/CS_scenes_300.pth data/mini/leftImg8bit/val/ivenstadt out

Run from the repository root, with the environment activated. The result of each picture is a PNG file with a
palette, whose values are train ids, the class numbers of the network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, when run as a script

from dataset import IMG_MEAN
from dataset.labels import LabelReader
from dataset.pictures import decode_upright, load
from engine.inference import predict_whole
from networks import Seg_Model, load_weights
from networks.of_run import describe
from networks.variants import variant_of
from networks.weights import read_state_dict
from utils.drawing.palette import make_palette, save_indexed_png


def load_network(checkpoint: str) -> Seg_Model:
    """Return the network of a checkpoint, as args.json beside it and the weights describe it."""
    state = read_state_dict(checkpoint)
    found, _ = describe(checkpoint, state, given={})
    assert found.num_classes is not None
    model = Seg_Model(
        found.num_classes, recurrence=found.recurrence, backbone=found.backbone, variant=variant_of(state)
    )
    load_weights(model, checkpoint, complete=True, state=state)
    return model.eval()


def main(checkpoint: str, pictures: str, out: str) -> None:
    """Predict every PNG and JPEG file in the folder `pictures` and write the classes to the folder `out`."""
    model = load_network(checkpoint)
    palette = make_palette(LabelReader().colors())
    Path(out).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(pictures).iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            continue
        pixels = decode_upright(load(str(path)))  # uint8 [h, w, 3], BGR as the network expects it
        image = torch.from_numpy(pixels - IMG_MEAN).permute(2, 0, 1).float()[None]
        with torch.inference_mode():
            classes = predict_whole(model, image).argmax(1)[0]
        save_indexed_png(str(Path(out) / f"{path.stem}.png"), classes.byte().numpy(), palette)
        print(path.name, "->", f"{path.stem}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
