"""Clips: their frames against brute force, the network against ccnet, and the generated clips."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import fill
from small_network import Narrow, registered
from torch import nn

from cc_attention import RecurrentCrissCrossAttention3d, attention_maps
from dataset import IMG_MEAN, CSDataSet, clips, mini
from dataset.clips import Frames
from dataset.mini import video
from engine.data.loader import Loading, SampleStream, train_batches
from engine.inference import predict_classes, predict_multiscale
from engine.runtime.distributed import World
from networks import fold_batch_norm, make_network
from networks.attention import picture_attention
from networks.clips import middle_frame
from networks.heads import RCCA3dHead, RCCAHead
from utils.errors import DataError

CLASSES, SIZE = 5, (32, 64)


@pytest.fixture(scope="module", autouse=True)
def small_backbone():
    with registered():
        yield


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("video") / "set"
    assert mini.write(out, 3, 2, SIZE, 0, with_frames=True)
    return out


# The network


def narrow(head: type[nn.Module], **options) -> Narrow:
    torch.manual_seed(1)
    model = Narrow(head, CLASSES, **options)
    for name, value in model.state_dict().items():
        if name.endswith(("gamma", "bn3.weight")):
            value.fill_(0.7)
    return model


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_one_frame_gives_exactly_ccnet(recurrence: int, layout: torch.memory_format) -> None:
    """Initial weights, outputs, gradients and running statistics are those of ccnet to the bit."""
    results = []
    for head in (RCCAHead, RCCA3dHead):
        model = narrow(head, recurrence=recurrence).train().to(memory_format=layout)
        images = torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(3)
        outputs = model(images.contiguous(memory_format=layout))
        sum(output.square().mean() for output in outputs).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        folded = fold_batch_norm(model)(images)
        results.append([*outputs, *folded, model.state_dict(), gradients])
    for two, three in zip(*results, strict=True):
        if isinstance(two, dict):
            assert list(two) == list(three)
            assert all(torch.equal(two[name], three[name]) for name in two)
        else:
            assert torch.equal(two, three)


def test_registry_network_has_the_weights_of_ccnet() -> None:
    with torch.device("meta"):
        two, three = (make_network(name, CLASSES, backbone="resnet50") for name in ("ccnet", "ccnet3d"))
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (two, three)]
    assert shapes[0] == shapes[1] and (two.head.recurrence, three.head.recurrence) == (2, 3)


def test_clips_against_the_module_for_videos() -> None:
    """The network frame by frame, with Conv3d weights in the published form of the attention."""
    model = narrow(RCCA3dHead, recurrence=3).eval().double()
    fill(model)
    frames = [50 * torch.randn(2, 3, 33, 41, dtype=torch.float64) for _ in range(3)]
    attention = RecurrentCrissCrossAttention3d(64, 3).double()
    attention.load_state_dict(
        {
            name: value[..., None] if value.dim() == 4 else value
            for name, value in model.head.cca.state_dict().items()
        }
    )
    with torch.no_grad():
        features = [model.features(frame) for frame in frames]
        reduced = torch.stack([model.head.conva(layer4) for _, layer4 in features], 2)
        y = model.head.convb(attention(reduced)[:, :, 1])
        right = model.head.bottleneck(torch.cat([features[1][1], y], 1)), model.dsn(features[1][0])
        found = model(torch.cat(frames, 1))
        for one, other in zip(found, right, strict=True):
            assert (one - other).abs().max() < 1e-10 * other.abs().max()
        # The neighbors matter, and their order does not: the attention has no position.
        exchanged = model(torch.cat([frames[2], frames[1], frames[0]], 1))[0]
        assert (exchanged - found[0]).abs().max() < 1e-9 * found[0].abs().max()
        repeated = model(torch.cat([frames[1]] * 3, 1))[0]
        assert (repeated - found[0]).abs().max() > 1e-6 * found[0].abs().max()
        maps = picture_attention(model, torch.cat([frame[:1] for frame in frames], 1), [(32, 20)])
        right_maps = attention_maps(attention, reduced[:1], [(1, 4, 2)])
    torch.testing.assert_close(maps, right_maps)
    assert maps.shape == (3, 1, 3, 5, 6)


def test_prediction_of_clips_by_tiles_scales_and_mirroring() -> None:
    """A tile, a scale or a mirror image of a clip is that of each of its frames."""
    taken: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        taken.append(images)
        return middle_frame(images)

    clip = torch.randn(1, 9, 24, 40)
    logits = predict_multiscale(model, clip, [1.0, 1.5], True, (16, 16), 3)
    whole = predict_multiscale(lambda images: images, clip[:, 3:6], [1.0, 1.5], True, (16, 16), 3)
    torch.testing.assert_close(logits, whole)
    assert {images.shape[1] for images in taken} == {9}
    classes = predict_classes(model, clip, [1.0], False)
    assert torch.equal(classes, predict_classes(lambda images: images, clip[:, 3:6], [1.0], False))


# The frames


def by_hand(present: list[int], number: int, clip: int, stride: int) -> list[int]:
    """Return the numbers of the frames of a clip: each missing one is that one step nearer to the middle."""
    found = []
    for offset in range(-(clip // 2), clip // 2 + 1):
        while offset and number + offset * stride not in present:
            offset += 1 if offset < 0 else -1
        found.append(number + offset * stride)
    return found


@pytest.mark.parametrize("clip, stride", [(1, 1), (3, 1), (3, 2), (5, 1), (5, 3), (7, 2)])
@pytest.mark.parametrize("pattern", ["a_{:06d}_leftImg8bit.png", "seq2_f{}.jpg", "{:03d}x.png"])
def test_frames_are_found_by_number(pattern: str, clip: int, stride: int, tmp_path: Path) -> None:
    present = [0, 1, 2, 3, 5, 8, 9, 10, 11, 12]
    for number in present:
        (tmp_path / pattern.format(number)).touch()
    for other in (9, 11):  # other names, and another ending
        (tmp_path / f"b_{pattern.format(other)}").touch()
        (tmp_path / f"{pattern.format(4)}.txt").touch()
    frames = Frames(clip, stride, str(tmp_path))
    for number in present:
        files, missing = frames.of(pattern.format(number))
        right = by_hand(present, number, clip, stride)
        assert files == tuple(map(pattern.format, right))
        offsets = [*range(-(clip // 2), 0), *range(1, clip // 2 + 1)]
        assert missing == sum(number + offset * stride not in present for offset in offsets)


def test_a_name_without_a_number_has_no_other_frame(tmp_path: Path) -> None:
    (tmp_path / "street.png").touch()
    assert Frames(3, 1, str(tmp_path)).of("street.png") == (("street.png",) * 3, 2)


@pytest.mark.parametrize("clip, stride", [(1, 2), (3, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_frames_of_a_video_are_those_of_a_folder(number: int, clip: int, stride: int) -> None:
    frames = [np.full((1, 1, 3), index, np.uint8) for index in range(number)]
    found = [each[0, 0, ::3].tolist() for each in clips.of_video(iter(frames), clip, stride)]
    assert found == [by_hand(list(range(number)), index, clip, stride) for index in range(number)]


def test_all_frames_of_a_sample_are_augmented_alike(generated: Path) -> None:
    """Sample k depends on (seed, k) only, and each of its frames is the sample of that frame alone."""
    data = CSDataSet(str(generated), crop_size=(24, 40), clip=3)
    stream = SampleStream(data, seed=5)
    for k in range(6):
        sample = stream[k]
        assert sample.image.shape == (24, 40, 9)
        index = next(i for i, pair in enumerate(data.pairs) if pair.name == sample.name)
        for place, file in enumerate(data.clips[index].files):
            alone = CSDataSet(str(generated), crop_size=(24, 40))
            alone.pairs[index] = alone.pairs[index]._replace(image=file)
            one = SampleStream(alone, seed=5)[k]
            assert one.augmentation == sample.augmentation and one.content == sample.content
            assert np.array_equal(one.label, sample.label)
            assert np.array_equal(one.image, sample.image[..., 3 * place : 3 * place + 3])
    assert data[0][0].shape == (9, 24, 40)
    batch = next(train_batches(data, 5, range(1), World(0, 1, torch.device("cpu")), Loading(2)))
    right = torch.from_numpy(stream[0].image.astype(np.float32) - np.tile(IMG_MEAN, 3)).permute(2, 0, 1)
    bottom, left, width = stream[0].content
    assert torch.equal(batch.images[0, :, :bottom, left:width], right[:, :bottom, left:width])
    assert batch.images.shape == (2, 9, 24, 40)


def test_whole_clips_and_what_a_check_tells(generated: Path, tmp_path: Path) -> None:
    data = CSDataSet(str(generated), crop_size=None, split="val", clip=3)
    image = data.picture(0, False).image
    folder = "leftImg8bit_sequence/val/ivenstadt/ivenstadt_000000_0000{}_leftImg8bit.png"
    for place, number in enumerate((18, 19, 20)):
        right = cv2.imread(str(generated / folder.format(number)))
        assert np.array_equal(image[..., 3 * place : 3 * place + 3], right)
    assert "clips of 3 frames: 0 of 4 neighbors are missing" in data.check()
    assert str(generated / folder.format(18)) in data.files()
    other = CSDataSet(str(generated), crop_size=None, split="val", clip=1)
    assert other.picture(0, False).image.shape == (*SIZE, 3) and other.digest() != data.digest()

    copy = tmp_path / "copy"
    shutil.copytree(generated, copy)
    (copy / folder.format(20)).unlink()
    text = CSDataSet(str(copy), crop_size=None, split="val", clip=3).check()
    assert "1 of 4 neighbors are missing and replaced by the nearest frame toward the middle" in text
    cv2.imwrite(str(copy / folder.format(18)), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="_000018_leftImg8bit.png: 8x8 pixels, but .* has 64x32"):
        CSDataSet(str(copy), crop_size=None, split="val", clip=3).check()
    shutil.rmtree(copy / "leftImg8bit_sequence")
    with pytest.raises(DataError, match="no picture has another frame next to it, .*_000020_.*--clip 1"):
        CSDataSet(str(copy), crop_size=None, split="val", clip=3).check()


# The generated clips


def test_the_neighbors_show_exactly_what_is_hidden(generated: Path, tmp_path: Path) -> None:
    """They are the scene without noise; hidden pixels have labels; the same seed gives the same files."""
    for split, count in (("train", 3), ("val", 2)):
        for index in range(count):
            city, stem, (scene, labels, _) = mini.picture(split, index, SIZE, 0)
            folder = f"leftImg8bit_sequence/{split}/{city}"
            names = [f"{stem[:-6]}{number:06d}_leftImg8bit.png" for number in (18, 19, 20)]
            before, middle, after = (cv2.imread(str(generated / folder / name)) for name in names)
            picture = cv2.imread(str(generated / f"leftImg8bit/{split}/{city}/{names[1]}"))
            truth = generated / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"
            assert np.array_equal(before, scene) and np.array_equal(after, scene)
            assert np.array_equal(picture, middle)
            assert np.array_equal(cv2.imread(str(truth), cv2.IMREAD_UNCHANGED), labels)
            hidden = (middle != before).any(2)
            _, right = video.hide(scene, np.random.default_rng((0, split == "val", 3, index)))
            assert np.array_equal(hidden, right)
            assert 0.6 <= hidden.mean() < 0.95 and len(np.unique(labels[hidden])) > 3
    assert mini.write(tmp_path / "again", 3, 2, SIZE, 0, with_frames=True)
    for path in sorted(generated.rglob("*.png")):
        assert (tmp_path / "again" / path.relative_to(generated)).read_bytes() == path.read_bytes()


def test_noise_hides_scenes_of_any_color() -> None:
    """Even pixels whose noise would have the color of the scene differ from it."""
    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8), np.zeros((*SIZE, 3), np.uint8)):
        found, hidden = video.hide(image, np.random.default_rng(1))
        assert np.array_equal((found != image).any(2), hidden)
    assert video.names("ulm_000003_000019") == ("ulm_000003_000018", "ulm_000003_000020")
    assert all(a != b for a, b in pairwise([*video.names("a_9"), "a_9"]))
