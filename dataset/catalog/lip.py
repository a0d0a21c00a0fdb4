"""Look into Person (LIP), single persons: 19 parts and background. A mirror exchanges left and right parts.

Sources: layout and counts: the overview of the data set's authors (30462 and 10000 pictures; the 10000 test
labels are not published). Left and right: CE2P's README. Settings: run.sh and dataset/datasets.py of CE2P,
which CCNet's result on LIP is based on. CE2P evaluates pictures that are resized to the crop, which is not
done here.
"""

from dataset.published import DataSet, Split


def _split(side: str, number: int) -> Split:
    # The archives unpack into the first of the folders; CE2P moves the inner folders one up.
    return Split(
        pictures=(f"TrainVal_images/{side}_images/{{}}.jpg", f"{side}_images/{{}}.jpg"),
        labels=(
            f"TrainVal_parsing_annotations/{side}_segmentations/{{}}.png",
            f"{side}_segmentations/{{}}.png",
        ),
        number=number,
        lists=(f"TrainVal_images/{side}_id.txt", f"{side}_id.txt"),
    )


DATA_SET = DataSet(
    title="Look into Person (LIP)",
    archives="TrainVal_images.zip and TrainVal_parsing_annotations.zip",
    folders=("", "LIP"),
    splits={"train": _split("train", 30462), "val": _split("val", 10000)},
    table="lip.tsv",
    train="--recipe ccnet_r101_ccl_lip",
    evaluate="--whole",
    snapshot="CS_scenes_190388.pth",
)
