"""ADE20K, as in the scene parsing benchmark: 150 classes; label 0 is unlabeled.

Sources: layout, counts and classes: ADEChallengeData2016 and its objectInfo150.txt. Colors: color150.mat of
CSAIL's semantic-segmentation-pytorch. Settings: that code's config ade20k-resnet50dilated-ppm_deepsup, which
the authors of CCNet modified for their results (CCNet, issue 18): 20 epochs of 5000 steps on 8 GPUs with 2
pictures each, SGD at 0.02, weight decay 1e-4, and scores averaged over the 5 sizes. It trains on whole
pictures; the crop of 473 is that of PSPNet.
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
    train="--random-mirror --short-sides 300,375,450,525,600 --long-side 1000 --input-size 473,473 "
    "--batch-size 16 --num-steps 100000 --learning-rate 0.02 --weight-decay 1e-4",
    evaluate="--whole --short-sides 300,375,450,525,600 --long-side 1000",
)
