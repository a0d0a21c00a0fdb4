"""The published data sets: layouts, label encodings, mirrors, and messages about what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, status_of
from PIL import Image

import evaluate
import train
from dataset import CSDataSet, check, mini, transforms
from dataset.catalog import DATA_SETS
from dataset.classes import choose_classes
from dataset.labels import (
    ClassTable,
    Label,
    LabelReader,
    format_table,
    read_table,
    rows_of_table,
    table_of_rows,
)
from dataset.published import DataSet, Split
from dataset.recognition import CITYSCAPES, FOLDERS, Place, discover, recognize
from engine.data.loader import SampleStream
from engine.inference import predict_classes, predict_multiscale
from utils.errors import DataError, InputError

TRAIN, VAL = 4, 2
#: Where the labels of the training pictures are, from the root of a generated data set.
LABELS = {
    "ade20k": "ADEChallengeData2016/annotations/training/*.png",
    "camvid": "CamVid/trainannot/*.png",
    "camvid_stills": "CamVid/LabeledApproved_full/0001TP_*_L.png",
    "coarse": "gtCoarse/train_extra/*/*_gtCoarse_labelIds.png",
    "lip": "LIP/TrainVal_parsing_annotations/train_segmentations/*.png",
    "voc2012": "VOCdevkit/VOC2012/SegmentationClass/2007_*.png",
    "voc2012_aug": "VOCdevkit/VOC2012/SegmentationClassAug/2007_*.png",
}
PICTURES = {
    "ade20k": "ADEChallengeData2016/images/training/*.jpg",
    "camvid": "CamVid/train/*.png",
    "camvid_stills": "CamVid/701_StillsRaw_full/0001TP_*.png",
    "coarse": "leftImg8bit/train_extra/*/*_leftImg8bit.png",
    "lip": "LIP/TrainVal_images/train_images/*.jpg",
    "voc2012": "VOCdevkit/VOC2012/JPEGImages/2007_*.jpg",
    "voc2012_aug": "VOCdevkit/VOC2012/JPEGImages/2007_*.jpg",
}
#: Cityscapes' label ids of the train ids 0 to 18.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
#: Colors of the original labels of CamVid by class, from its label_colors.txt and SegNet's grouping.
CAMVID = (
    [(128, 128, 128)],
    [(128, 0, 0), (64, 192, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64)],
    [(192, 192, 128), (0, 0, 64)],
    [(128, 64, 128), (128, 0, 192), (192, 0, 64)],
    [(0, 0, 192), (64, 192, 128), (128, 128, 192)],
    [(128, 128, 0), (192, 192, 0)],
    [(192, 128, 128), (128, 128, 64), (0, 64, 64)],
    [(64, 64, 128)],
    [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],
    [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],
    [(0, 128, 192), (192, 0, 192)],
)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a generated data set by the name of its layout."""
    folder = tmp_path_factory.mktemp("published")

    def get(layout: str) -> Path:
        mini.write(folder / layout, TRAIN, VAL, (48, 96), 0, layout)
        return folder / layout

    return get


def copy(source: Path, target: Path) -> Path:
    """Copy a generated data set without the mark of one."""
    shutil.copytree(source, target)
    os.remove(target / "mini.json")
    return target


layouts = pytest.mark.parametrize("layout", DATA_SETS)


def expected_of(layout: str, path: Path) -> np.ndarray:
    """Return the train ids of a label picture, with Pillow and NumPy only."""
    picture = Image.open(path)
    assert picture.mode == {"voc2012": "P", "camvid_stills": "RGB"}.get(layout, "L")
    values = np.asarray(picture).astype(int)
    found = np.full(values.shape[:2], 255)
    if layout == "ade20k":
        assert values.max() <= 150
        return np.where(values > 0, values - 1, 255)
    if layout == "camvid":
        assert values.max() <= 11
        return np.where(values == 11, 255, values)
    if layout == "coarse":
        for train_id, label_id in enumerate(CITYSCAPES_IDS):
            found[values == label_id] = train_id
        return found
    if layout == "camvid_stills":
        for train_id, colors in enumerate(CAMVID):
            for color in colors:
                found[(values == color).all(2)] = train_id
        assert (values[found == 255] == 0).all()
        return found
    assert set(np.unique(values)) <= {*range(21), 255}
    return values


@layouts
def test_labels_are_decoded_as_published(layout: str, generated) -> None:
    root = generated(layout)
    labels, pictures = sorted(root.glob(LABELS[layout])), sorted(root.glob(PICTURES[layout]))
    data = CSDataSet(str(root))
    assert len(labels) == len(pictures) == len(data) == TRAIN
    seen: set[int] = set()
    for index, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
        found = data.picture(index, instances=False)
        expected = expected_of(layout, label)
        np.testing.assert_array_equal(found.label, expected)
        pixels = cv2.imread(str(picture))
        assert np.abs(pixels.astype(int) - found.image).max() <= 2  # JPEG decoders round differently
        seen |= {*np.unique(expected)}
    assert len(seen) > 4 and (255 in seen) == (layout not in ("lip", "voc2012_aug"))
    classes = {"ade20k": 150, "voc2012": 21, "voc2012_aug": 21, "lip": 20, "coarse": 19}.get(layout, 11)
    assert data.num_classes == choose_classes(str(root), None, None, None).number == classes


@layouts
def test_a_layout_is_recognized_by_itself(layout: str, generated) -> None:
    root = generated(layout)
    assert recognize(str(root)).name == recognize(str(root), layout).name == layout
    data = CSDataSet(str(root), split="val", dataset=layout)
    assert len(data) == VAL and all(pair.label for pair in data.pairs)
    assert f"{VAL} of the official {DATA_SETS[layout].splits['val'].number} pictures" in data.taken[0]
    assert "none missing" in data.check()


def test_the_data_set_may_also_begin_in_the_data_directory(generated) -> None:
    for layout, folder in (
        ("ade20k", "ADEChallengeData2016"),
        ("voc2012", "VOCdevkit/VOC2012"),
        ("voc2012", "VOCdevkit"),
        ("lip", "LIP"),
        ("camvid", "CamVid"),
    ):
        root = generated(layout) / folder
        assert recognize(str(root)).name == layout and len(CSDataSet(str(root))) == TRAIN


@layouts
def test_items_are_those_of_any_data_set(layout: str, generated) -> None:
    data = CSDataSet(str(generated(layout)), crop_size=(33, 49))
    image, label, size, _ = data[1]
    assert image.dtype == np.float32 and image.shape == (3, 33, 49)
    assert label.dtype == np.int64 and label.shape == (33, 49)
    assert {*np.unique(label)} <= {*range(data.num_classes), 255} and size[2] == 3


# Left and right


def swapped_by_hand(label: np.ndarray) -> np.ndarray:
    """Mirror a label of LIP pixel by pixel, and exchange left and right parts."""
    height, width = label.shape
    found = np.empty_like(label)
    for row in range(height):
        for column in range(width):
            value = label[row, width - 1 - column]
            found[row, column] = {14: 15, 15: 14, 16: 17, 17: 16, 18: 19, 19: 18}.get(int(value), value)
    return found


def test_a_mirror_of_lip_exchanges_left_and_right(generated) -> None:
    """A mirrored sample is the other one of the same crop, flipped and swapped; a function of (seed, k)."""
    data = CSDataSet(str(generated("lip")), crop_size=(40, 30))
    stream = SampleStream(data, seed=5)
    mirrored = changed = 0
    for k in range(24):
        sample = stream[k]
        again = stream[k]
        assert sample.augmentation == again.augmentation and (sample.label == again.label).all()
        if not sample.augmentation.mirror:
            continue
        mirrored += 1
        index = next(i for i, pair in enumerate(data.pairs) if pair.name == sample.name)
        whole = data.picture(index, instances=False)
        plain = sample.augmentation._replace(mirror=False)
        image, label, _ = transforms.apply(whole.image, whole.label, whole.label.shape, (40, 30), plain, 255)
        np.testing.assert_array_equal(sample.label, swapped_by_hand(label))
        np.testing.assert_array_equal(sample.image, image[:, ::-1])
        changed += (sample.label != label[:, ::-1]).any()
    assert mirrored > 5 and changed > 3


def test_a_mirror_of_other_data_sets_keeps_the_labels(generated) -> None:
    for layout in set(DATA_SETS) - {"lip"}:
        data = CSDataSet(str(generated(layout)), crop_size=None, scale=False)
        rng = (np.random.default_rng(number) for number in range(99))
        sample = next(s for s in (data.sample(0, each) for each in rng) if s.augmentation.mirror)
        np.testing.assert_array_equal(sample.label, data.picture(0, False).label[:, ::-1])


def test_void_stays_void_in_a_mirror_also_where_it_is_a_class() -> None:
    table = DATA_SETS["lip"].classes()
    assert table is not None
    usual, look_up = table.mirror_lookup(), table.mirror_lookup(ignore_label=14)
    assert usual is not None and look_up is not None
    assert usual[[14, 15, 18, 13, 255]].tolist() == [15, 14, 19, 13, 255]
    assert look_up[[14, 15, 18]].tolist() == [14, 15, 19]


def test_a_flipped_prediction_is_averaged_with_left_and_right_exchanged() -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3, padding=1).double()
    image = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    order = (0, 2, 1, 3)
    other = network(image.flip(3)).flip(3)
    expected = (network(image) + torch.stack([other[:, k] for k in order], 1)) / 2
    for tile in (None, (9, 14)):
        options = {"tile_size": tile, "num_classes": 4}
        found = predict_multiscale(network, image, [1.0], order, **options)
        torch.testing.assert_close(found, expected)
        classes = predict_classes(network, image, [1.0], order, **options)
        assert (classes == expected.argmax(1)).all()
        assert (found != predict_multiscale(network, image, [1.0], True, **options)).any()


def test_a_class_table_keeps_its_mirrors(tmp_path: Path) -> None:
    table = DATA_SETS["lip"].classes()
    assert table is not None and table.mirrored is not None
    (tmp_path / "t.tsv").write_text(format_table(table))
    assert read_table(str(tmp_path / "t.tsv")).labels == table.labels
    rows = json.loads(json.dumps(rows_of_table(table)))
    again = table_of_rows("x", rows)
    assert again is not None and again.mirrored == table.mirrored
    assert "mirror" not in format_table(ClassTable(table.labels[:14]))
    assert not any("mirror" in row for row in rows_of_table(DATA_SETS["voc2012"].classes()))
    assert LabelReader(again).mirrored() == table.mirrored


@pytest.mark.parametrize("mirror", [1, 2, 255])
def test_a_mirror_that_is_not_mutual_is_refused(mirror: int) -> None:
    colors = [(k, k, k) for k in range(2)]
    rows = [Label("a", 0, 0, "", False, colors[0], mirror), Label("b", 1, 1, "", False, colors[1])]
    with pytest.raises(ValueError, match=f"a has the mirror {mirror}, but the class {mirror} does not"):
        ClassTable(rows)


def test_mirrors_are_part_of_the_data_of_a_run(generated, tmp_path: Path) -> None:
    """A run can't be resumed with a table that has other mirrors."""
    table = DATA_SETS["lip"].classes()
    assert table is not None
    plain = ClassTable([label._replace(mirror=None) for label in table.labels])
    digests = {CSDataSet(str(generated("lip")), table=each).digest() for each in (table, plain)}
    assert len(digests) == 2


# Scaling to short sides


def test_short_sides_follow_the_published_rule() -> None:
    scaling = transforms.choose_scaling(False, (0.7, 2.1), [300, 375, 450, 525, 600], 1000)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(400):
        size = tuple(rng.integers(100, 2400, 2).tolist())
        scale = transforms.draw(rng, size, (473, 473), scaling, True).scale
        height, width = transforms.scaled_size(size, scale)
        assert max(height, width) <= 1000
        if max(height, width) < 1000:
            seen.append(min(height, width))
    assert {*seen} == {300, 375, 450, 525, 600}
    assert min(map(seen.count, {*seen})) > 0.1 * len(seen)


@pytest.mark.parametrize("size", [(61, 83), (83, 61), (40, 200)])
def test_a_crop_of_any_scale_is_that_of_the_whole_resized_picture(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    label = rng.integers(0, 20, size, dtype=np.uint8)
    scaling = transforms.Scaling((), (37, 50, 97), 160)
    for _ in range(30):
        drawn = transforms.draw(rng, size, (33, 41), scaling, False)
        rows = transforms.rows_needed(size, (33, 41), drawn)
        found, ids, content = transforms.apply(image[:rows], label[:rows], size, (33, 41), drawn, 255)
        options = {"dsize": None, "fx": drawn.scale, "fy": drawn.scale}
        whole = cv2.resize(image, interpolation=cv2.INTER_LINEAR, **options)
        nearest = cv2.resize(label, interpolation=cv2.INTER_NEAREST, **options)
        assert whole.shape[:2] == transforms.scaled_size(size, drawn.scale)
        window = slice(drawn.top, drawn.top + 33), slice(drawn.left, drawn.left + 41)
        height, width = nearest[window].shape
        assert content == (height, 0, width)
        np.testing.assert_array_equal(ids[:height, :width], nearest[window])
        assert (ids[height:] == 255).all() and (ids[:, width:] == 255).all()
        assert np.abs(found[:height, :width].astype(int) - whole[window]).max() <= 1


def test_a_range_of_factors_is_that_of_the_lists(generated) -> None:
    scaling = transforms.choose_scaling(True, (0.5, 1.6), None, None)
    assert isinstance(scaling, transforms.Scaling)
    assert np.allclose(scaling.factors, [0.5 + k / 10 for k in range(12)])
    assert transforms.choose_scaling(False, (0.7, 2.1), None, None) is False
    assert transforms.choose_scaling(True, (0.7, 2.1), None, None) == transforms.Scaling()
    data = CSDataSet(str(generated("voc2012")), crop_size=(33, 33), scale=transforms.Scaling((), (40,), 70))
    sample = data.sample(0, np.random.default_rng(0))
    height, width = data.sizes()[0]
    scale = min(40 / min(height, width), 70 / max(height, width))
    assert sample.augmentation.scale == scale and f" scale={scale:.6f} crop=" in sample.record()


# What a data set lists


def test_lists_of_voc_with_sbd(generated, tmp_path: Path) -> None:
    """DeepLab's lists have paths; labels that SegmentationClassAug lacks are those of VOC."""
    root = copy(generated("voc2012_aug"), tmp_path / "voc")
    base = root / "VOCdevkit/VOC2012"
    sets = base / "ImageSets/Segmentation"
    names = (sets / "train_aug.txt").read_text().split()
    os.rename(base / f"SegmentationClassAug/{names[0]}.png", base / f"SegmentationClass/{names[0]}.png")
    os.remove(sets / "train_aug.txt")
    (sets / "trainaug.txt").write_text(
        "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names[:3])
    )
    pairs = CSDataSet(str(root)).pairs
    assert [pair.name for pair in pairs] == names[:3]
    folders = [os.path.basename(os.path.dirname(pair.label)) for pair in pairs]
    assert folders == ["SegmentationClass", "SegmentationClassAug", "SegmentationClassAug"]
    (sets / "train.txt").write_text(f"{names[0]}\n")
    assert recognize(str(root)).name == "voc2012_aug"
    assert [pair.name for pair in CSDataSet(str(root), dataset="voc2012").pairs] == names[:1]


def test_the_frames_of_camvid_are_divided_as_by_segnet(tmp_path: Path) -> None:
    """The names of all 701 frames, by sequence, with the official numbers of each split."""
    frames = [f"0001TP_{n:06d}" for n in range(6690, 10381, 30)]
    frames += [f"0006R0_f{n:05d}" for n in range(930, 3931, 30)]
    frames += [
        f"0016E5_{n:05d}" for n in (*range(390, 2401, 30), *range(4350, 7921, 30), *range(8190, 8641, 30))
    ]
    frames += [f"0016E5_{n:05d}" for n in range(7959, 8160, 2)]
    frames += [f"Seq05VD_f{n:05d}" for n in range(0, 5101, 30)]
    for name in frames:
        for path in (f"701_StillsRaw_full/{name}.png", f"LabeledApproved_full/{name}_L.png"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
    found = {split: CSDataSet(str(tmp_path), split=split) for split in ("train", "val", "test")}
    assert {split: len(data) for split, data in found.items()} == {"train": 367, "val": 101, "test": 233}
    names = [pair.name for data in found.values() for pair in data.pairs]
    assert sorted(names) == sorted(frames)


def test_generated_frames_of_camvid_are_of_their_split() -> None:
    stills = DATA_SETS["camvid_stills"].splits
    counts = mini.layouts.splits("camvid_stills", 367, 101)
    names = {
        split: [mini.layouts.name_of("camvid_stills", split, index) for index in range(number)]
        for split, number in counts.items()
    }
    assert len({name for each in names.values() for name in each}) == 367 + 2 * 101
    for split, each in names.items():
        assert {re.fullmatch(stills[split].names, name) is not None for name in each} == {True}
        others = [other.names for other_name, other in stills.items() if other_name != split]
        assert not any(re.fullmatch(pattern, name) for pattern in others for name in each)
    with pytest.raises(InputError, match="--val 102: CamVid has 101 pictures for val; give at most"):
        mini.layouts.splits("camvid", 1, 102)


@pytest.mark.slow
def test_real_camvid_in_the_folders_of_segnet(tmp_path: Path, root: Path) -> None:
    """Real pictures, linked: official numbers, known colors and the split of the full-size pictures."""
    source = root.parent / "shared/data/camvid"
    if not source.is_dir():
        pytest.skip("no CamVid beside the project")
    lines = (source / "mapping.tsv").read_text().splitlines()[1:]
    stills = DATA_SETS["camvid_stills"].splits
    for line in lines:
        image, label, picture, annotation = line.split("\t")
        for path, target in ((image, picture), (label, annotation)):
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(source / path, tmp_path / target)
        side, name = Path(picture).parent.name, Path(picture).stem
        for split, where in stills.items():
            assert (re.fullmatch(where.names, name) is not None) == (split == side)
    for split in ("train", "val", "test"):
        data = CSDataSet(str(tmp_path), split=split)
        official = DATA_SETS["camvid"].splits[split].number
        assert len(data) == official and f"{official} of the official {official}" in data.taken[0]
        found = data.picture(3, instances=False)
        expected = np.asarray(Image.open(tmp_path / data.pairs[3].label))
        np.testing.assert_array_equal(found.label, expected)


# What is wrong or missing


def without(*paths: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for path in paths:
            found = sorted(root.glob(path))
            assert found
            for each in found:
                shutil.rmtree(each) if each.is_dir() else each.unlink()

    return damage


def with_file(path: str, content: str = "") -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    return damage


ADE, VOC = "ADEChallengeData2016", "VOCdevkit/VOC2012"
DAMAGED = {
    "no annotations": (
        "ade20k",
        without(f"{ADE}/annotations"),
        "has the folder ADEChallengeData2016/images/training of ADE20K, but no "
        "ADEChallengeData2016/annotations/training; unpack ADEChallengeData2016.zip",
    ),
    "no lists": (
        "voc2012",
        without(f"{VOC}/ImageSets"),
        "but no VOCdevkit/VOC2012/ImageSets/Segmentation/train",
    ),
    "a label is missing": (
        "ade20k",
        without(f"{ADE}/annotations/training/*1.png"),
        "ADE_train_00000001.png: no such label, of ",
    ),
    "a picture is missing": (
        "camvid",
        without("CamVid/train/*6690.png"),
        "CamVid/trainannot/0001TP_006690.png: has no picture; unpack",
    ),
    "an empty list": (
        "lip",
        with_file("LIP/TrainVal_images/train_id.txt"),
        "train_id.txt: the list is empty",
    ),
    "two data sets": (
        "ade20k",
        lambda root: [(root / name).mkdir() for name in ("train", "trainannot")],
        "has the folders of several data sets, ade20k and camvid; name one of them with --dataset",
    ),
    "a folder pair too": (
        "camvid",
        lambda root: [(root / name).mkdir() for name in ("images", "labels")],
        "has the folders of several data sets, folders and camvid; name one of them with --dataset",
    ),
    "no pictures": (
        "camvid",
        without("CamVid/train/*", "CamVid/trainannot/*"),
        "CamVid/train/*.png: no such pictures for train; unpack",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_wrong_layout_gives_one_line(name: str, generated, tmp_path: Path) -> None:
    layout, damage, message = DAMAGED[name]
    root = copy(generated(layout), tmp_path / "data")
    damage(root)
    with pytest.raises(InputError) as raised:
        CSDataSet(str(root))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_listed_picture_that_is_missing_is_named(generated, tmp_path: Path) -> None:
    root = copy(generated("lip"), tmp_path / "lip")
    without("LIP/TrainVal_images/train_images/2_2.jpg")(root)
    with pytest.raises(DataError, match=r"train_images/2_2.jpg: no such file"):
        CSDataSet(str(root)).check()


@pytest.mark.parametrize(
    "layout, name, message",
    [
        ("voc2012", "ade20k", "--dataset ade20k: .* has no images/training; give --data-dir the folder"),
        ("camvid", "voc2012", "--dataset voc2012: .* has no JPEGImages"),
        ("camvid", "camvod", "--dataset camvod: is not known; give one of cityscapes, folders, ade20k"),
    ],
)
def test_a_named_data_set_has_to_be_there(layout: str, name: str, message: str, generated) -> None:
    with pytest.raises(InputError, match=message):
        CSDataSet(str(generated(layout)), dataset=name)


def test_one_of_two_data_sets_is_chosen_by_name(generated, tmp_path: Path) -> None:
    root = copy(generated("ade20k"), tmp_path / "both")
    shutil.copytree(generated("camvid") / "CamVid", root / "CamVid")
    for name in ("ade20k", "camvid"):
        assert CSDataSet(str(root), dataset=name).num_classes == {"ade20k": 150, "camvid": 11}[name]
    assert choose_classes(str(root), None, None, None, "camvid").number == 11


def test_fine_annotations_go_before_coarse_ones(generated, tmp_path: Path) -> None:
    root = copy(generated("coarse"), tmp_path / "CS")
    fine = tmp_path / "fine"
    mini.write(fine, 2, 1, (48, 96), 0)
    for folder in ("leftImg8bit/train", "gtFine/train"):
        shutil.copytree(fine / folder, root / folder)
    assert recognize(str(root)).name == CITYSCAPES and len(CSDataSet(str(root))) == 2
    assert len(CSDataSet(str(root), dataset="coarse")) == TRAIN
    assert recognize(str(fine)).name == recognize(str(fine), CITYSCAPES).name == CITYSCAPES


def test_own_folders_are_not_taken_for_a_data_set(tmp_path: Path) -> None:
    for name in ("images/training", "labels/training"):
        (tmp_path / name).mkdir(parents=True)
    assert recognize(str(tmp_path)).name == FOLDERS


def test_a_list_has_the_classes_of_the_data_set(generated, tmp_path: Path) -> None:
    root = generated("ade20k")
    pictures, labels = (sorted(root.glob(each["ade20k"])) for each in (PICTURES, LABELS))
    listing = tmp_path / "some.lst"
    listing.write_text(f"{pictures[1].relative_to(root)}\t{labels[1].relative_to(root)}\n")
    assert choose_classes(str(root), str(listing), None, None).number == 150
    data = CSDataSet(str(root), str(listing))
    np.testing.assert_array_equal(data.picture(0, False).label, expected_of("ade20k", labels[1]))
    assert CSDataSet(str(tmp_path), str(root / "x" / ".." / listing), dataset="lip").num_classes == 20


def test_a_split_that_is_not_published_is_refused(generated) -> None:
    with pytest.raises(DataError, match="--split test: ADE20K has labels for train and val; give"):
        CSDataSet(str(generated("ade20k")), split="test")


# Numbers


@pytest.mark.slow
def test_official_numbers_are_beside_those_found(generated, tmp_path: Path, capsys) -> None:
    """A copy of a generated data set is an incomplete one; --partial accepts it."""
    root = copy(generated("camvid"), tmp_path / "camvid")
    flags = ["--num-workers", 1, "--json", tmp_path / "counts.json"]
    assert status_of(check.main, root, *flags) == 2
    said = capsys.readouterr()
    assert f"{root}: has {TRAIN} of the 367 pictures of train" in said.out
    assert "val: 2 pictures of the official 101 in 1 folder" in said.out
    assert "3 problems in 8 pictures" in said.err.splitlines()[-1]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert {name: split["official"] for name, split in counts.items()} == {
        "train": 367,
        "val": 101,
        "test": 233,
    }
    assert [split["pictures"] for split in counts.values()] == [TRAIN, VAL, VAL]
    assert status_of(check.main, root, *flags, "--partial", "--split", "val") == 0
    said = capsys.readouterr()
    assert "of the official 101" in said.out
    assert f"python train.py --data-dir {root} --dataset camvid {DATA_SETS['camvid'].train}" in said.out
    without("CamVid/val", "CamVid/valannot")(root)
    assert status_of(check.main, root, *flags, "--partial") == 0
    assert not re.search("^val", capsys.readouterr().out, re.MULTILINE)
    assert status_of(check.main, root, *flags) == 2
    assert "CamVid/val/*.png: no such pictures for val" in capsys.readouterr().out


@pytest.mark.slow
@layouts
def test_a_generated_data_set_is_clean(layout: str, generated, capsys) -> None:
    assert status_of(check.main, generated(layout), "--num-workers", 1) == 0
    said = capsys.readouterr().out
    for split in DATA_SETS[layout].splits.values():
        assert f"pictures of the official {split.number} in" in said


# The declarations


@layouts
def test_declarations_are_complete(layout: str) -> None:
    data = DATA_SETS[layout]
    assert {"train", "val"} <= data.splits.keys() <= {"train", "val", "test"}
    patterns = [p for split in data.splits.values() for p in (*split.pictures, *split.labels)]
    assert all(pattern.count("{}") == 1 for pattern in patterns)
    for module, flags in data.settings.items():
        parser = {"train": train, "evaluate": evaluate}[module].get_parser()
        args = parser.parse_args(["--data-dir", "X", "--dataset", layout, *flags.split()])
        assert args.dataset == layout
    page = (ROOT / "docs/datasets.md").read_text()
    assert data.title in page
    text = " ".join(page.replace("\\\n", " ").split())
    assert all(flags in text for flags in data.settings.values())


def test_another_data_set_is_one_declaration(tmp_path: Path) -> None:
    """Names with folders, a list with other words, and the second of two patterns."""
    pictures, labels = ("gone/{}.jpg", "rgb/{}_rgb.jpg"), ("ids/{}.png",)
    data = DataSet(
        title="Another",
        archives="another.zip",
        splits={
            "train": Split(pictures=pictures, labels=labels, number=3, names=r"a/.*"),
            "val": Split(pictures=pictures, labels=labels, number=1, lists=("val.txt",)),
        },
        table=None,
        train="",
        evaluate="",
        snapshot="CS_scenes_9.pth",
    )
    for name in ("a/1", "a/2", "b/1", "3"):
        for path in (f"rgb/{name}_rgb.jpg", f"ids/{name}.png"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    (tmp_path / "rgb/a/1.jpg").touch()  # another ending
    (tmp_path / "val.txt").write_text("any/where/3.jpg 17\n\n")
    place = Place(str(tmp_path), "another", data)
    found = {name: discover(place, name).pairs for name in data.splits}
    assert found["train"] == [
        ("rgb/a/1_rgb.jpg", "ids/a/1.png", "1_rgb"),
        ("rgb/a/2_rgb.jpg", "ids/a/2.png", "2_rgb"),
    ]
    assert found["val"] == [("rgb/3_rgb.jpg", "ids/3.png", "3_rgb")]


def test_names_and_colors_are_the_published_ones() -> None:
    ade, voc, lip = (DATA_SETS[name].classes() for name in ("ade20k", "voc2012", "lip"))
    assert ade is not None and voc is not None and lip is not None
    assert (ade.names[0], ade.names[12], ade.names[149]) == ("wall", "person", "flag")
    assert len(ade.names) == 150 and ade.classes[149].id == 150 and len(set(ade.names)) == 150
    for label in voc.labels:  # VOC's palette: the bits of the id, in turn, from the highest bit of R, G, B
        color = [sum((label.id >> (3 * bit + c) & 1) << (7 - bit) for bit in range(3)) for c in range(3)]
        assert label.color == tuple(color)
    assert (voc.names[15], voc.names[20]) == ("person", "tvmonitor")
    assert [lip.names[k] for k in range(13, 20)] == (
        ["face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe", "right-shoe"]
    )
