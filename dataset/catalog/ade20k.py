"""ADE20K, as in the scene parsing benchmark: 150 classes; label 0 is unlabeled.

Sources: layout, counts and classes: ADEChallengeData2016 and its objectInfo150.txt. Colors: color150.mat of
CSAIL's semantic-segmentation-pytorch. Settings: that code, which the authors of CCNet modified for their
results (github.com/speedinghzl/CCNet/issues/18); its scores are averaged over the 5 sizes.
"""

from dataset.published import DataSet, Split

DATA_SET = DataSet(
    title="ADE20K",
    archives="ADEChallengeData2016.zip",
    folders=("", "ADEChallengeData2016"),
    splits={
        "train": Split(
            pictures=("images/training/{}.jpg",), labels=("annotations/training/{}.png",), number=20210
        ),
        "val": Split(
            pictures=("images/validation/{}.jpg",), labels=("annotations/validation/{}.png",), number=2000
        ),
    },
    table="ade20k.tsv",
    train="--recipe ccnet_r101_ade20k",
    evaluate="--whole --short-sides 300,375,450,525,600 --long-side 1000",
    snapshot="CS_scenes_100000.pth",
)
