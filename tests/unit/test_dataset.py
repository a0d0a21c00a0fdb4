"""Reading, discovery and augmentation of pictures against the original, and errors of wrong files."""

from __future__ import annotations

import os
import re
import socket
import struct
import zlib

import cv2
import numpy as np
import pytest
from conftest import write_pair
from PIL import Image

from dataset import IMG_MEAN, CSDataSet, DataError, pictures
from dataset.labels import CITYSCAPES
from dataset.transforms import SCALES, Augmentation, apply, draw, rows_needed, subtract_mean

#: The original's table (dataset/datasets.py).
TRAIN_IDS = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
}
TRAIN_IDS |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def test_label_table():
    table = CITYSCAPES.train_ids()
    for label_id in range(34):
        assert table[label_id] == TRAIN_IDS.get(label_id, 255)
    assert (table[34:255] == -1).all() and table[255] == 255
    assert CITYSCAPES.train_ids(250)[0] == 250
    assert [TRAIN_IDS[label_id] for label_id in CITYSCAPES.label_ids()] == list(range(19))
    assert CITYSCAPES.names[0] == "road" and CITYSCAPES.names[18] == "bicycle"


def augmented_by_the_original(image, label, crop, augmentation):
    """Augment as the original: resize bytes, convert, subtract the mean, pad, crop, transpose, mirror."""
    scale, top, left, mirror, _ = augmentation
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    image = np.asarray(image, np.float32)
    image -= np.array((104.00698793, 116.66876762, 122.67891434))
    below, beside = max(crop[0] - label.shape[0], 0), max(crop[1] - label.shape[1], 0)
    image = cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=(0.0, 0.0, 0.0))
    label = cv2.copyMakeBorder(label, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=(255,))
    image = image[top : top + crop[0], left : left + crop[1]].transpose(2, 0, 1)
    label = label[top : top + crop[0], left : left + crop[1]]
    return (image[:, :, ::-1], label[:, ::-1]) if mirror else (image, label)


def sampled(image, label, crop, augmentation):
    """Return a sample as the loader makes it, from the rows that it needs, in the original's layout."""
    size = label.shape
    rows = rows_needed(size, crop, augmentation)
    image, label, content = apply(image[:rows], label[:rows], size, crop, augmentation, 255)
    assert image.shape == (*crop, 3) and image.dtype == label.dtype == np.uint8
    return subtract_mean(image, np.array((104.00698793, 116.66876762, 122.67891434)), content), label


@pytest.mark.parametrize("crop", [(33, 49), (90, 40), (200, 220)])
@pytest.mark.parametrize("size", [(61, 83), (64, 97), (125, 33), (16, 250)])
def test_augmentation_equals_the_originals(crop, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    label = rng.integers(0, 19, size, dtype=np.uint8)
    for number in range(60):
        augmentation = draw(np.random.default_rng(number), size, crop, True, True)
        ours, theirs = (
            sampled(image, label, crop, augmentation),
            augmented_by_the_original(image, label, crop, augmentation),
        )
        assert ours[0].shape == (3, *crop) and np.array_equal(ours[1], theirs[1]), augmentation
        assert np.abs(ours[0] - theirs[0]).max() <= 1.01, augmentation


@pytest.mark.parametrize("scale", SCALES)
def test_resized_window_equals_the_resized_whole_at_every_border(scale):
    """Resized windows of noise differ from the resized picture seldom, and by at most one gray level."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (1024, 2048, 3), dtype=np.uint8)
    label = rng.integers(0, 34, (1024, 2048), dtype=np.uint8)
    height, width = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST).shape
    crop = (257, 769)
    down, across = height - crop[0], width - crop[1]
    for top, left in [
        (0, 0),
        (0, across),
        (down, 0),
        (down, across),
        (down // 3, across // 2),
        (1, across - 1),
    ]:
        augmentation = Augmentation(scale, top, left, False)
        ours = sampled(image, label, crop, augmentation)
        theirs = augmented_by_the_original(image, label, crop, augmentation)
        assert np.array_equal(ours[1], theirs[1])
        off = np.abs(ours[0] - theirs[0])
        assert off.max() <= 1.01 and (off > 0.5).mean() < 0.03


@pytest.mark.parametrize("scale", SCALES)
def test_last_line_is_there_however_sizes_are_rounded(scale):
    """Halves are rounded to even, so the size of the window may go down where that of the picture goes up."""
    for height in (61, 62, 63, 64, 125, 127):
        image = np.random.default_rng(height).integers(0, 256, (height, 65, 3), dtype=np.uint8)
        label = image[:, :, 0] % 19
        whole = cv2.resize(label, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST).shape
        for crop in ((5, 7), (8, 9), (12, 12)):
            augmentation = Augmentation(scale, whole[0] - crop[0], whole[1] - crop[1], False)
            ours = sampled(image, label, crop, augmentation)
            theirs = augmented_by_the_original(image, label, crop, augmentation)
            assert np.array_equal(ours[1], theirs[1]) and np.abs(ours[0] - theirs[0]).max() <= 1.01


def test_a_sample_needs_no_rows_below_its_crop():
    assert rows_needed((1024, 2048), (769, 769), Augmentation(2.0, 0, 0, False)) < 400
    assert rows_needed((1024, 2048), (769, 769), Augmentation(0.7, 0, 0, False)) == 1024


def test_draws_cover_the_original_range_evenly():
    draws = [draw(np.random.default_rng(k), (100, 200), (50, 60), True, True) for k in range(6000)]
    assert [round(scale, 6) for scale in SCALES] == [round(0.7 + k / 10, 6) for k in range(15)]
    counts = np.bincount([SCALES.index(d.scale) for d in draws], minlength=15)
    assert counts.min() > 300 and counts.max() < 500
    at_one = [d for d in draws if abs(d.scale - 1.0) < 1e-9]
    assert {d.top for d in at_one} >= {0, 50} or max(d.top for d in at_one) >= 48
    assert all(0 <= d.top <= 50 and 0 <= d.left <= 140 for d in at_one)
    assert 0.45 < np.mean([d.mirror for d in draws]) < 0.55
    plain = draw(np.random.default_rng(0), (100, 200), (100, 200), False, False)
    assert plain == Augmentation(1.0, 0, 0, False)


def test_items(scenes):
    dataset = CSDataSet(str(scenes), None, crop_size=(40, 72))
    assert len(dataset) == 6 and "6 pictures" in dataset.check()
    image, label, size, name = dataset[3]
    assert image.shape == (3, 40, 72) and image.dtype == np.float32
    assert label.shape == (40, 72) and np.issubdtype(label.dtype, np.integer)
    assert set(np.unique(label)) <= {*range(19), 255}
    assert tuple(size) == (48, 64, 3) and name == "ulm_000000_000003"
    whole = CSDataSet(str(scenes), None, crop_size=None, scale=False, mirror=False)
    pixels = cv2.imread(str(scenes / "leftImg8bit/train/ulm/ulm_000000_000003_leftImg8bit.png"))
    ids = cv2.imread(
        str(scenes / "gtFine/train/ulm/ulm_000000_000003_gtFine_labelIds.png"), cv2.IMREAD_GRAYSCALE
    )
    image, label, *_ = whole[3]
    np.testing.assert_allclose(image.transpose(1, 2, 0), pixels.astype(np.float64) - IMG_MEAN, atol=1e-5)
    assert np.array_equal(label, np.vectorize(lambda value: TRAIN_IDS.get(value, 255))(ids))


def test_labels_of_train_ids_are_taken_as_they_are_and_may_have_a_palette(scenes):
    ids = np.array([[0, 5, 255], [18, 1, 2]], np.uint8).repeat(24, 0).repeat(22, 1)[:48, :64]
    picture = Image.fromarray(ids)
    picture.putpalette([value for k in range(256) for value in (k, 255 - k, k // 2)])
    picture.save(scenes / "gtFine/train/ulm/ulm_000000_000000_gtFine_labelTrainIds.png")
    listing = scenes / "list.txt"
    listing.write_text(
        "leftImg8bit/train/ulm/ulm_000000_000000_leftImg8bit.png\t"
        "gtFine/train/ulm/ulm_000000_000000_gtFine_labelTrainIds.png\n\n"
    )
    dataset = CSDataSet(str(scenes), str(listing), crop_size=None, scale=False, mirror=False)
    assert len(dataset) == 1 and np.array_equal(dataset[0][1], ids)


@pytest.mark.parametrize("bits", [2, 4])
def test_grays_of_few_bits_keep_their_ids(scenes, bits):
    ids = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64) % 4
    (scenes / "label.png").write_bytes(png(64, 48, bits, b"".join(b"\0" + packed(row, bits) for row in ids)))
    (scenes / "list").write_text(f"{image_of(scenes).relative_to(scenes)}\tlabel.png\n")
    dataset = CSDataSet(str(scenes), str(scenes / "list"), crop_size=None, scale=False, mirror=False)
    assert np.array_equal(dataset[0][1], ids)


def packed(row: np.ndarray, bits: int) -> bytes:
    """Pack several pixels into a byte, the first in the highest bits."""
    shifts = np.arange(8 - bits, -1, -bits)
    return (row.reshape(-1, 8 // bits) << shifts).sum(1).astype(np.uint8).tobytes()


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """Return a grayscale PNG with filtered rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(params=["libspng", "OpenCV"])
def decoder(request, monkeypatch):
    if request.param == "OpenCV":
        monkeypatch.setattr(pictures, "pyspng", None)
    else:
        pytest.importorskip("pyspng")


class TestDecoders:
    """Both decoders give the same bytes, for the whole picture and for its first rows."""

    def kinds(self, folder):
        rng = np.random.default_rng(0)
        for shape in ((37, 53, 3), (37, 53), (37, 53, 4)):
            for depth in (np.uint8, np.uint16):
                yield cv2.imencode(".png", rng.integers(0, np.iinfo(depth).max, shape).astype(depth))[1]
        yield cv2.imencode(".jpg", rng.integers(0, 255, (37, 53, 3)).astype(np.uint8))[1]
        transparent = Image.fromarray(rng.integers(0, 4, (37, 53, 3)).astype(np.uint8))
        transparent.save(folder / "a.png", transparency=(1, 2, 3))
        yield np.frombuffer((folder / "a.png").read_bytes(), np.uint8)

    def test_images(self, tmp_path, decoder):
        for number, content in enumerate(self.kinds(tmp_path)):
            path = tmp_path / str(number)
            path.write_bytes(content.tobytes())
            encoded = pictures.load(str(path))
            assert (encoded.height, encoded.width) == (37, 53)
            expected = cv2.imdecode(content, cv2.IMREAD_COLOR)
            assert np.array_equal(pictures.decode_image(encoded), expected)
            for rows in (1, 20, 37, 99):
                some = pictures.decode_image(encoded, rows)
                assert len(some) >= min(rows, 37) and np.array_equal(some, expected[: len(some)])

    def test_labels(self, tmp_path, decoder):
        ids = np.random.default_rng(1).integers(0, 34, (37, 53))
        for number, kind in enumerate((np.uint8, np.uint16)):
            path = tmp_path / f"{number}.png"
            cv2.imwrite(str(path), ids.astype(kind))
            for rows in (None, 12):
                some = pictures.decode_label(pictures.load(str(path)), rows)
                assert some.dtype == kind and np.array_equal(some, ids[: len(some)]) and len(some) >= 12

    def test_interlaced(self, tmp_path, decoder):
        """Interlaced pictures, which can't be decoded from the top, are read whole."""
        pixels = np.random.default_rng(2).integers(0, 256, (9, 13, 3), dtype=np.uint8)
        (tmp_path / "a.png").write_bytes(interlaced_png(pixels))
        encoded = pictures.load(str(tmp_path / "a.png"))
        assert np.array_equal(pictures.decode_image(encoded, 2), pixels[:, :, ::-1])

    def test_content_that_is_no_picture(self, tmp_path, decoder):
        whole = cv2.imencode(".png", np.zeros((9, 13, 3), np.uint8))[1].tobytes()
        header = whole[12:33]
        for number, damaged in enumerate(
            (whole.replace(b"IDAT", b"IDAX"), whole.replace(header, b"abcd" * 5))
        ):
            (tmp_path / str(number)).write_bytes(damaged)
            with pytest.raises(DataError, match=f"{number}: damaged"):
                pictures.load(str(tmp_path / str(number)))
        data = zlib.compress(b"no rows at all")
        chunks = [b"IDAT" + data, b"IEND"]
        content = whole[:33] + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            for chunk in chunks
        )
        (tmp_path / "short.png").write_bytes(content)
        encoded = pictures.load(str(tmp_path / "short.png"))
        with pytest.raises(DataError, match="short.png: not a readable picture"):
            pictures.decode_image(encoded)


def test_header_of_a_picture_of_two_hundred_million_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(20_000, 10_000, 8, b""))
    assert pictures.read_header(str(tmp_path / "a.png"))[:2] == (10_000, 20_000)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [h, w, 3] as a PNG in the seven passes of Adam7."""
    height, width = pixels.shape[:2]
    passes = [
        (0, 8, 0, 8),
        (0, 8, 4, 8),
        (4, 8, 0, 4),
        (0, 4, 2, 4),
        (2, 4, 0, 2),
        (0, 2, 1, 2),
        (1, 2, 0, 1),
    ]
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, down, left, across in passes
        for row in pixels[top::down, left::across]
        if row.size
    )
    plain = png(width, height, 8, rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return plain[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + plain[33:]


def test_linked_city_folders_are_found(scenes):
    os.rename(scenes / "leftImg8bit/train/ulm", scenes / "elsewhere")
    os.symlink(scenes / "elsewhere", scenes / "leftImg8bit/train/ulm")
    assert len(CSDataSet(str(scenes))) == 6


def test_noted_orientation_of_a_camera_is_left_alone(scenes):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(scenes / "a.jpg", exif=exif)
    (scenes / "list").write_text(f"a.jpg\t{label_of(scenes).relative_to(scenes)}\n")
    assert CSDataSet(str(scenes), str(scenes / "list"), crop_size=None)[0][0].shape[1:] >= (33, 44)


def test_names_of_equal_pictures_in_several_folders_differ(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "1.png"), np.zeros((8, 8, 3), np.uint8))
        cv2.imwrite(str(tmp_path / folder / "1_label.png"), np.zeros((8, 8), np.uint8))
    (tmp_path / "list").write_text("a/1.png a/1_label.png\nb/1.png b/1_label.png\n")
    dataset = CSDataSet(str(tmp_path), str(tmp_path / "list"))
    assert [pair.name for pair in dataset.pairs] == ["a_1", "b_1"]


def test_names_differ_whatever_the_paths(tmp_path):
    lines = ["x/y_z.png l.png", "x_y/z.png l.png", "a.png l.png", "a.jpg l.png"]
    (tmp_path / "list").write_text("\ufeff" + "\n".join(lines))
    names = [pair.name for pair in CSDataSet(str(tmp_path), str(tmp_path / "list")).pairs]
    assert len(set(names)) == 4 and names[0].startswith("x")


def test_list_of_pictures_alone_may_have_spaces_in_their_names(tmp_path):
    (tmp_path / "a b.png").touch()
    (tmp_path / "list").write_text("a b.png\n")
    (pair,) = CSDataSet(str(tmp_path), str(tmp_path / "list"), labeled=False).pairs
    assert pair.image == "a b.png"


def test_jpeg_with_more_behind_its_end(scenes):
    path = scenes / "a.jpg"
    assert cv2.imwrite(str(path), np.zeros((48, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes() + bytes(5000))
    (scenes / "list").write_text(f"a.jpg\t{label_of(scenes).relative_to(scenes)}\n")
    dataset = CSDataSet(str(scenes), str(scenes / "list"))
    dataset.check()
    assert dataset[0][0].shape == (3, 769, 769)


def label_of(scenes, number=0):
    return scenes / f"gtFine/train/ulm/ulm_000000_{number:06d}_gtFine_labelIds.png"


def image_of(scenes, number=0):
    return scenes / f"leftImg8bit/train/ulm/ulm_000000_{number:06d}_leftImg8bit.png"


def test_list_with_names_that_are_no_text(scenes):
    names = [os.fsencode(scenes / "stra\udcdfe.png"), os.fsencode(scenes / "l\udcff_labelIds.png")]
    for name, path in zip(names, (image_of(scenes), label_of(scenes)), strict=True):
        os.rename(path, name)
    (scenes / "list").write_bytes(b"stra\xdfe.png\tl\xff_labelIds.png\r\n")
    dataset = CSDataSet(str(scenes), str(scenes / "list"), crop_size=None)
    assert "1 pictures" in dataset.check() and dataset[0][3] == "stra\udcdfe"
    assert os.path.dirname(dataset.cache_file(str(scenes))) == str(scenes)


class TestWrongData:
    """Each error is one line that names the file."""

    def expect(self, action, *words):
        with pytest.raises(DataError) as error:
            action()
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message
        return message

    def test_directory(self, tmp_path):
        self.expect(lambda: CSDataSet(str(tmp_path / "none")), "none: no such directory")
        self.expect(lambda: CSDataSet(str(tmp_path)), "no folder leftImg8bit", "csDownload")
        (tmp_path / "leftImg8bit").mkdir()
        self.expect(lambda: CSDataSet(str(tmp_path)), "no picture", "leftImg8bit/train")
        (tmp_path / "above").mkdir()
        os.rename(tmp_path / "leftImg8bit", tmp_path / "above" / "leftImg8bit")
        self.expect(lambda: CSDataSet(str(tmp_path)), f"name {tmp_path / 'above'}")

    @pytest.mark.parametrize("line", ["one.png", "a.png b.png c.png", "a.png\t"])
    def test_list_line(self, scenes, line):
        (scenes / "list").write_text(f"x.png\ty.png\n{line}\n")
        self.expect(lambda: CSDataSet(str(scenes), str(scenes / "list")), "list:2:", "image<TAB>label")

    def test_list(self, scenes):
        self.expect(lambda: CSDataSet(str(scenes), str(scenes / "list")), "not a readable list")
        (scenes / "list").write_text("\n")
        self.expect(lambda: CSDataSet(str(scenes), str(scenes / "list")), "empty")

    def test_list_of_something_else(self, scenes):
        (scenes / "list").write_bytes(b"a.png\tb\0.png\n")
        self.expect(lambda: CSDataSet(str(scenes), str(scenes / "list")), "list: not a readable list")
        self.expect(lambda: CSDataSet(str(scenes), "/dev/zero"), "/dev/zero: not a readable list (is a dev")
        self.expect(lambda: CSDataSet(str(scenes), str(scenes)), "is a folder, not a file")
        with open(scenes / "sparse", "wb") as file:
            file.truncate(1 << 40)
        self.expect(lambda: CSDataSet(str(scenes), str(scenes / "sparse")), "has more than")
        self.expect(lambda: CSDataSet(str(image_of(scenes))), "is not a folder")

    def test_folder_that_cannot_be_read(self, scenes, monkeypatch):
        """An unreadable folder is an error, and its pictures are not reported as missing."""
        scandir = os.scandir

        def denied(path):
            if str(path).endswith("ulm"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)
        self.expect(lambda: CSDataSet(str(scenes)), "train/ulm: can't be read (Permission denied)")

    @pytest.mark.parametrize("name", ["/dev/zero", "fifo", "socket", "sparse.png"])
    def test_files_that_never_end(self, scenes, name):
        if name == "fifo":
            os.mkfifo(scenes / "fifo")
        with socket.socket(socket.AF_UNIX) as listener, open(scenes / "sparse.png", "wb") as file:
            if name == "socket":
                listener.bind(os.path.relpath(scenes / "socket"))
            file.write(image_of(scenes).read_bytes())
            file.truncate(1 << 40)
        (scenes / "list").write_text(f"{name}\t{label_of(scenes)}\n")
        dataset = CSDataSet(str(scenes), str(scenes / "list"))
        self.expect(dataset.check, name)
        self.expect(lambda: dataset[0], name)
        (scenes / "list").write_text(f"{image_of(scenes)}\t{name}\n")
        self.expect(CSDataSet(str(scenes), str(scenes / "list")).check, name)

    @pytest.mark.parametrize("size", [(40_000, 30_000), (1, 2**20 + 1), (2**31 - 1, 2**31 - 1)])
    def test_more_pixels_than_opencv_takes(self, scenes, size):
        (scenes / "a.png").write_bytes(png(*size, 8, b""))
        (scenes / "list").write_text(f"a.png\t{label_of(scenes)}\n")
        dataset = CSDataSet(str(scenes), str(scenes / "list"))
        self.expect(dataset.check, f"a.png: {size[0]}x{size[1]} pixels, more than OpenCV decodes (2^30")
        self.expect(lambda: dataset[0], f"a.png: {size[0]}x{size[1]} pixels, more than OpenCV decodes")

    def test_missing_labels_are_counted(self, scenes):
        label_of(scenes, 1).unlink()
        label_of(scenes, 4).unlink()
        self.expect(lambda: CSDataSet(str(scenes)), "2 of 6", "ulm_000000_000001_gtFine_labelIds.png")

    def test_missing_file_of_a_list(self, scenes):
        (scenes / "list").write_text("leftImg8bit/no.png\tgtFine/no.png\n")
        self.expect(CSDataSet(str(scenes), str(scenes / "list")).check, "leftImg8bit/no.png: no such file")

    @pytest.mark.parametrize("part", ["image", "label"])
    @pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
    def test_damaged_file_is_found_by_its_header(self, scenes, part, damage):
        path = image_of(scenes) if part == "image" else label_of(scenes)
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "text": b"hello", "empty": b""}[damage])
        self.expect(CSDataSet(str(scenes)).check, path.name)

    def test_truncated_jpeg(self, scenes):
        path = scenes / "a.jpg"
        assert cv2.imwrite(str(path), np.zeros((48, 64, 3), np.uint8))
        path.write_bytes(path.read_bytes()[:-40])
        (scenes / "list").write_text(f"a.jpg\t{label_of(scenes).relative_to(scenes)}\n")
        dataset = CSDataSet(str(scenes), str(scenes / "list"))
        self.expect(dataset.check, "a.jpg: truncated")
        self.expect(lambda: dataset[0], "a.jpg: truncated")

    @pytest.mark.parametrize("part", ["image", "label"])
    def test_flipped_byte_is_found_at_the_latest_when_read(self, scenes, part):
        path = image_of(scenes) if part == "image" else label_of(scenes)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        dataset = CSDataSet(str(scenes))
        if part == "image":  # of which only the header is looked at before
            dataset.check()
        self.expect(lambda: dataset[0], path.name, "damaged")

    def test_size_of_label(self, scenes):
        cv2.imwrite(str(label_of(scenes, 2)), np.zeros((48, 63), np.uint8))
        self.expect(CSDataSet(str(scenes)).check, label_of(scenes, 2).name, "63x48", "64x48")

    def test_color_picture_as_label(self, scenes):
        cv2.imwrite(str(label_of(scenes)), np.zeros((48, 64, 3), np.uint8))
        dataset = CSDataSet(str(scenes))
        self.expect(dataset.check, label_of(scenes).name, "RGB")
        self.expect(lambda: dataset[0], label_of(scenes).name, "RGB")

    @pytest.mark.parametrize("value", [34, 200])
    def test_label_id_out_of_range(self, scenes, value):
        ids = np.full((48, 64), 7, np.uint8)
        ids[5, 5] = value
        cv2.imwrite(str(label_of(scenes)), ids)
        dataset = CSDataSet(str(scenes))
        for action in (dataset.check, lambda: dataset[0]):
            self.expect(action, label_of(scenes).name, f"label id {value} ")

    def test_train_id_out_of_range_in_sixteen_bits(self, scenes):
        path = scenes / "label.png"
        cv2.imwrite(str(path), np.full((48, 64), 300, np.uint16))
        (scenes / "list").write_text(f"{image_of(scenes).relative_to(scenes)}\tlabel.png\n")
        self.expect(CSDataSet(str(scenes), str(scenes / "list")).check, "label.png: train id 300 ")

    def test_more_classes_than_the_network_has(self, scenes):
        self.expect(CSDataSet(str(scenes), num_classes=3).check, "--num-classes")

    def test_message_has_no_line_break(self, scenes):
        label_of(scenes).unlink()
        message = self.expect(lambda: CSDataSet(str(scenes)), "1 of 6")
        assert re.match(r"^\S.*\S$", message)


def test_official_ids_come_with_the_picture(tmp_path):
    _, label = write_pair(tmp_path, "val", 0, (48, 64))
    dataset = CSDataSet(str(tmp_path), split="val", crop_size=None)
    assert not dataset.has_instances()
    ids = cv2.imread(str(tmp_path / label), cv2.IMREAD_GRAYSCALE)
    instances = np.where(ids >= 24, ids.astype(np.uint16) * 1000 + 3, ids).astype(np.uint16)
    cv2.imwrite(str(tmp_path / label.replace("labelIds", "instanceIds")), instances)
    assert dataset.has_instances()
    picture = dataset.picture(0, instances=True)
    assert np.array_equal(picture.label_ids, ids) and np.array_equal(picture.instance_ids, instances)
