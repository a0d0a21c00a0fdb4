"""pictures.npz: what is stored of each picture, and damaged files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.evaluation import pictures
from engine.evaluation.bootstrap import Ratios
from engine.evaluation.metrics import iou_per_class
from engine.evaluation.pictures import BOUNDARY_IOU, Pictures
from utils.errors import UsageError

NAMES = ["b<b>", "a|a", "odd \udcff \u9053 ' \" \n"]


def confusions():
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 3, (5, 5)) * rng.integers(0, 2**33, (5, 5))) for _ in NAMES]


def some():
    counts = np.arange(15).reshape(3, 5)
    return Pictures.of(NAMES, confusions(), {BOUNDARY_IOU: Ratios(counts, counts + 1)})


def test_sums_are_those_of_the_matrices():
    found, several = some(), confusions()
    assert torch.equal(found.confusion(), sum(several)) and found.confusion().dtype == torch.int64
    for index, confusion in enumerate(several):
        numerator, denominator = (part[index] for part in found.iou())
        np.testing.assert_array_equal(numerator / denominator, iou_per_class(confusion).numpy())
        assert np.array_equal(found.labeled()[index], confusion.sum(1).numpy())
    np.testing.assert_allclose(found.iou().scores()[:-1], iou_per_class(sum(several)).numpy())


def test_written_and_read(tmp_path):
    found = some()
    found.write(str(tmp_path / "pictures.npz"))
    again = pictures.read(str(tmp_path))
    assert again.names == NAMES and again.num_classes == 5
    for one, other in zip(found[2:6], again[2:6], strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(found.others[BOUNDARY_IOU], again.others[BOUNDARY_IOU], strict=True):
        assert np.array_equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.npz"]


def test_no_pictures(tmp_path):
    nothing = Pictures.of_cells([], 3, [])
    nothing.write(str(tmp_path / "pictures.npz"))
    assert pictures.read(str(tmp_path)).confusion().tolist() == [[0] * 3] * 3


def arrays():
    found = some()
    entries = {name: getattr(found, name) for name in ("picture", "label", "prediction", "pixels")}
    return {"names": np.array(["a", "b", "c"]), "num_classes": np.int64(5), **entries}


@pytest.mark.parametrize(
    "changed",
    [
        {"pixels": None},
        {"names": np.arange(3)},
        {"names": np.array(["a", "b"])},
        {"names": np.array(["a", "b", "c"], dtype=object)},
        {"num_classes": np.int64(0)},
        {"num_classes": np.int64(300)},
        {"label": np.full_like(some().label, 5)},
        {"pixels": -some().pixels},
        {"pixels": some().pixels[1:]},
        {"pixels": some().pixels.astype(float)},
        {"boundary_iou_numerator": np.ones((3, 5))},
        {"boundary_iou_numerator": np.ones((3, 4)), "boundary_iou_denominator": np.ones((3, 4))},
        {"boundary_iou_numerator": np.full((3, 5), np.nan), "boundary_iou_denominator": np.ones((3, 5))},
    ],
)
def test_damaged_arrays_are_one_line(tmp_path, changed):
    content = {name: value for name, value in (arrays() | changed).items() if value is not None}
    np.savez(tmp_path / "pictures.npz", **content)
    with pytest.raises(UsageError, match=r"pictures.npz: can't be read \(.*\); run evaluate.py again"):
        pictures.read(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100, None])
def test_damaged_files_are_one_line(tmp_path, content):
    if content is None:
        some().write(str(tmp_path / "pictures.npz"))
        content = (tmp_path / "pictures.npz").read_bytes()
        content = content[:200] + bytes(100) + content[300:]
    (tmp_path / "pictures.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"pictures.npz: can't be read \("):
        pictures.read(str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"pictures.npz: is missing; run evaluate.py"):
        pictures.read(str(tmp_path))
