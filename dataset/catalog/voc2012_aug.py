"""PASCAL VOC 2012 with the labels of the Semantic Boundaries Dataset (SBD) for more training pictures.

Sources: the number 10582 is that of the list of the original code (VOC's train, and SBD without VOC's val).
The folder SegmentationClassAug and its lists are not official; the names are those that DeepLab and
mmsegmentation use. mmsegmentation's converter writes only the labels of SBD there, so labels of VOC that it
lacks are those of VOC. The validation is that of VOC.
"""

from dataclasses import replace

from dataset.catalog import voc2012
from dataset.published import Split

DATA_SET = replace(
    voc2012.DATA_SET,
    title="PASCAL VOC 2012 with SBD",
    archives="VOCtrainval_11-May-2012.tar, SegmentationClassAug and its list train_aug.txt",
    splits={
        "train": Split(
            pictures=voc2012.PICTURES,
            labels=("SegmentationClassAug/{}.png", *voc2012.LABELS),
            number=10582,
            lists=voc2012.AUG,
        ),
        "val": voc2012.DATA_SET.splits["val"],
    },
    unless=(),
)
