"""PASCAL VOC 2012, segmentation: 20 classes and background; 255 is void, as on the borders of objects.

Sources: layout, counts, classes and palette: VOCtrainval_11-May-2012.tar and its development kit. Settings:
PSPNet's (its rotation and blur are left out); CCNet has no result on VOC
(github.com/speedinghzl/CCNet/issues/42).
"""

from dataset.published import DataSet, Split

PICTURES = ("JPEGImages/{}.jpg",)
LABELS = ("SegmentationClass/{}.png",)
LISTS = "ImageSets/Segmentation"
#: Lists of the larger training set, voc2012_aug.
AUG = (f"{LISTS}/train_aug.txt", f"{LISTS}/trainaug.txt")

DATA_SET = DataSet(
    title="PASCAL VOC 2012",
    archives="VOCtrainval_11-May-2012.tar",
    folders=("", "VOC2012", "VOCdevkit/VOC2012"),
    splits={
        "train": Split(pictures=PICTURES, labels=LABELS, number=1464, lists=(f"{LISTS}/train.txt",)),
        "val": Split(pictures=PICTURES, labels=LABELS, number=1449, lists=(f"{LISTS}/val.txt",)),
    },
    table="voc2012.tsv",
    unless=AUG,
    train="--random-mirror --random-scale --scale-range 0.5,2.0 --input-size 473,473 --batch-size 16 "
    "--num-steps 30000 --learning-rate 0.01 --weight-decay 1e-4 --restore-from torchvision",
    evaluate="--whole --scales 0.5,0.75,1,1.25,1.5,1.75 --flip",
    snapshot="CS_scenes_30000.pth",
)
