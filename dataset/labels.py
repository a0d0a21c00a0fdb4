"""The Cityscapes label table: ids, train ids, categories, colours (facts as published with the data set)."""

from typing import NamedTuple

import numpy as np

IGNORE = 255


class Label(NamedTuple):
    """One row of the table. `train_id` is 255 where the class is not trained and not evaluated."""

    name: str
    id: int
    train_id: int
    category: str
    has_instances: bool
    color: tuple[int, int, int]  # RGB


LABELS = (
    Label("unlabeled", 0, 255, "void", False, (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", False, (0, 0, 0)),
    Label("rectification border", 2, 255, "void", False, (0, 0, 0)),
    Label("out of roi", 3, 255, "void", False, (0, 0, 0)),
    Label("static", 4, 255, "void", False, (0, 0, 0)),
    Label("dynamic", 5, 255, "void", False, (111, 74, 0)),
    Label("ground", 6, 255, "void", False, (81, 0, 81)),
    Label("road", 7, 0, "flat", False, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", False, (244, 35, 232)),
    Label("parking", 9, 255, "flat", False, (250, 170, 160)),
    Label("rail track", 10, 255, "flat", False, (230, 150, 140)),
    Label("building", 11, 2, "construction", False, (70, 70, 70)),
    Label("wall", 12, 3, "construction", False, (102, 102, 156)),
    Label("fence", 13, 4, "construction", False, (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", False, (180, 165, 180)),
    Label("bridge", 15, 255, "construction", False, (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", False, (150, 120, 90)),
    Label("pole", 17, 5, "object", False, (153, 153, 153)),
    Label("polegroup", 18, 255, "object", False, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", False, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", False, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", False, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", False, (152, 251, 152)),
    Label("sky", 23, 10, "sky", False, (70, 130, 180)),
    Label("person", 24, 11, "human", True, (220, 20, 60)),
    Label("rider", 25, 12, "human", True, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", True, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", True, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", True, (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", True, (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", True, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", True, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", True, (119, 11, 32)),
)

TRAIN_LABELS = tuple(
    sorted((label for label in LABELS if label.train_id != IGNORE), key=lambda label: label.train_id)
)
CLASS_NAMES = tuple(label.name for label in TRAIN_LABELS)
NUM_CLASSES = len(TRAIN_LABELS)

#: `ID_OF_TRAIN_ID[t]` is the label id of train id t (uint8 [19]).
ID_OF_TRAIN_ID = np.array([label.id for label in TRAIN_LABELS], dtype=np.uint8)


def train_id_table(ignore_label: int = IGNORE) -> np.ndarray:
    """Look-up table int16 [256] from label id to train id; -1 marks ids that Cityscapes does not have.

    The license plate's id -1 is 255 once stored in eight bits, so 255 is ignored as the other void ids are.
    """
    table = np.full(256, -1, dtype=np.int16)
    for label in LABELS:
        table[label.id] = ignore_label if label.train_id == IGNORE else label.train_id
    table[255] = ignore_label
    return table
