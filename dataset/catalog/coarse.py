"""Cityscapes with coarse annotations for training: 19998 pictures. The validation has fine annotations.

Sources: layout and counts: leftImg8bit_trainextra.zip and gtCoarse.zip. In a folder that has the fine
annotations of the training pictures too, they are used, unless --dataset coarse is given. Settings: the
recipe of Cityscapes; CCNet has no published result with coarse annotations alone.
"""

from dataset.published import DataSet, Split


def _labels(folder: str, split: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{split}/{{}}_{folder}_label{kind}.png" for kind in ("Ids", "TrainIds"))


DATA_SET = DataSet(
    title="Cityscapes with coarse annotations",
    archives="leftImg8bit_trainextra.zip, gtCoarse.zip, leftImg8bit_trainvaltest.zip and "
    "gtFine_trainvaltest.zip",
    splits={
        "train": Split(
            pictures=("leftImg8bit/train_extra/{}_leftImg8bit.png",),
            labels=_labels("gtCoarse", "train_extra"),
            number=19998,
        ),
        "val": Split(
            pictures=("leftImg8bit/val/{}_leftImg8bit.png",), labels=_labels("gtFine", "val"), number=500
        ),
    },
    table=None,
    unless=("gtFine/train",),
    train="--recipe ccnet_r101_cityscapes",
    evaluate="--input-size 769,769",
    snapshot="CS_scenes_60000.pth",
)
