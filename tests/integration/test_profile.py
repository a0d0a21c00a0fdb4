"""tools.profile: counts against those by hand and brute force, the paper's table, memory of a step."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
from conftest import run_process
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fused
from cc_attention import criss_cross_attention, ops, reference
from networks import Seg_Model
from networks.variants import DEPTHS
from tools import profile
from tools.cost import BACKWARD, FORWARD, STEM, Alive, Setting, Simulation, parameters_of, simulate
from utils.errors import InputError, UsageError

compiled = pytest.mark.skipif(
    "cpu" not in ops.DEVICE_TYPES, reason="the compiled operator, which is counted, was not built"
)
#: 65 x 97 pictures have 9 x 13 features.
SMALL = Setting(backbone="tiny", num_classes=5, batch=2, size=(65, 97), train=True, channels_last=True)
N, H, W = 2, 9, 13
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
PARTS = [*LAYERS, "head.conva", "head.cca", "head.convb", "head.bottleneck", "dsn"]


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Register a backbone with few blocks, for tests that do not depend on their number."""
    DEPTHS["tiny"] = (2, 1, 1, 1)
    yield
    del DEPTHS["tiny"]


def run_main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["profile", *map(str, arguments)])
    profile.main()


#: Flags of the smallest profile.
TINY = ["--backbone", "tiny", "--input-size", "33,41", "--gpu", "cpu", "--rounds", "1"]


@compiled
@pytest.mark.slow
def test_counted_as_the_paper_counts_the_papers_gflops_come_out():
    rows = profile.paper()
    counted = {name: round(row["gflops_as_the_paper_counts"], 2) for name, row in rows.items()}
    assert counted == {
        "ccnet, R=1": 8.29,
        "ccnet, R=2": 16.58,
        "ccnet, R=3": 24.88,
        "nonlocal, R=1": 108.16,
        "nonlocal, R=2": 216.33,
    }
    # The exact count has 193 positions instead of 195, and no biases.
    for model, numbers, seen in (("ccnet", (1, 2, 3), 193), ("nonlocal", (1, 2), 97 * 97)):
        for recurrence in numbers:
            exact = recurrence * 2 * 97 * 97 * (512 * (64 + 64 + 512) + seen * (64 + 512))
            found = rows[f"{model}, R={recurrence}"]["gflops"] * 1e9
            assert found == pytest.approx(exact, rel=1e-12)
    # Non-local attention keeps 338 MiB more, its map.
    more = rows["nonlocal, R=1"]["memory_kept"] - rows["ccnet, R=1"]["memory_kept"]
    assert more == pytest.approx(338, abs=1)
    assert "108.16" in profile.paper_page(rows)


def test_parameters_of_the_parts_add_up():
    with torch.device("meta"):
        model = Seg_Model(19, backbone="resnet101")
    counts = parameters_of(model)
    assert sum(counts.values()) == 71_287_911
    stem = (model.conv1, model.bn1, model.conv2, model.bn2, model.conv3, model.bn3)
    assert counts[STEM] == sum(p.numel() for module in stem for p in module.parameters())
    assert counts["head.cca"] == 2 * (512 * 64 + 64) + 512 * 512 + 512 + 1


def test_flops_of_the_parts_are_those_counted_by_hand():
    parts = simulate(SMALL).parts
    pixels = N * H * W
    by_hand = {
        # 33 x 49 after the stem's stride
        STEM: 2 * N * 33 * 49 * 9 * (3 * 64 + 64 * 64 + 64 * 128),
        "head.conva": 2 * pixels * 9 * 2048 * 512,
        "head.bottleneck": 2 * pixels * (9 * 2560 * 512 + 512 * 5),
        "dsn": 2 * pixels * (9 * 1024 * 512 + 512 * 5),
    }
    assert {name: parts[name].flops_forward for name in by_hand} == by_hand
    # Each product has two in the backward pass, except for the gradient of the pictures, which is not needed.
    for name in set(by_hand) - {STEM}:
        assert parts[name].flops_backward == 2 * by_hand[name]
    assert parts[STEM].flops_backward == 2 * by_hand[STEM] - 2 * N * 33 * 49 * 9 * 3 * 64
    assert list(parts) == [STEM, *PARTS, "loss"]


@compiled
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 6), (1, 4, 1)])
def test_flops_of_the_operator_are_those_of_brute_force(shape):
    n, h, w = shape
    c, channels = 3, 11
    query, key = (torch.randn(n, c, h, w, requires_grad=True) for _ in range(2))
    value = torch.randn(n, channels, h, w, requires_grad=True)
    seen = sum(
        len({(y, u) for u in range(w)} | {(v, x) for v in range(h)}) for y in range(h) for x in range(w)
    )
    products = n * seen * (c + channels)  # a multiply-add for each channel of each position seen
    with FlopCounterMode(display=False) as counter:
        out = criss_cross_attention(query, key, value)
    assert counter.get_total_flops() == 2 * products
    if h > 1 < w:  # where PyTorch makes matrix products of all contractions
        # The plain formulation has each pixel in its column too, multiplied by zero.
        with FlopCounterMode(display=False) as plain:
            reference.criss_cross_attention(query, key, value)
        assert plain.get_total_flops() * (h + w - 1) == 2 * products * (h + w)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 4 * products + 2 * n * seen * c


@compiled
@pytest.mark.parametrize("amp, width", [(None, 4), ("bf16", 2)])
def test_kept_bytes_are_those_counted_by_hand(amp, width):
    parts = simulate(SMALL._replace(amp=amp, recurrence=1)).parts
    # Input, query, key, value and result, and two float32 numbers for each pixel; with autocast also the
    # weights in its type.
    kept = N * H * W * (width * (512 + 64 + 64 + 512 + 512) + 8)
    if amp:
        kept += 2 * 512 * (64 + 64 + 512)
    assert parts["head.cca"].memory == kept


def test_peak_of_what_is_alive():
    model = nn.Linear(3, 4)  # 64 bytes
    with Alive(model) as alive:
        assert alive.now == 64
        x = torch.ones(100)
        y = x * 2
        assert alive.now == alive.peak == 64 + 800
        z = y.view(10, 10)[2:]  # no memory of its own
        del x, y
        assert (alive.now, alive.peak) == (64 + 400, 64 + 800)
        del z
        assert alive.now == 64


@pytest.mark.slow
def test_memory_of_a_step():
    model = Seg_Model(5, backbone="tiny")
    setting = SMALL._replace(size=(257, 257))
    bytes_of = 4 * sum(p.numel() for p in model.parameters())
    one, two, five = (simulate(setting._replace(batch=batch), passes=2) for batch in (1, 2, 5))
    assert two.gradients == two.optimizer == bytes_of
    assert two.weights == bytes_of + 4 * sum(b.numel() for b in model.buffers())
    kept = sum(cost.memory for cost in two.parts.values())
    assert two.peak > two.weights + two.optimizer + two.gradients + kept
    # --fit relies on this.
    assert five.peak == pytest.approx(one.peak + 4 * (two.peak - one.peak), rel=1e-6)
    # A single pass has no gradients of an earlier one.
    assert simulate(setting).peak < two.peak
    assert sum(c.memory for c in simulate(setting._replace(amp="bf16")).parts.values()) < 0.8 * kept


@compiled
@pytest.mark.skipif("cpu" not in fused.DEVICE_TYPES, reason="the fused operators are not built")
def test_recomputation_keeps_less():
    settings = [SMALL._replace(fused=True, recompute=each) for each in (False, True)]
    kept, less = (simulate(setting) for setting in settings)
    model = Seg_Model(5, backbone="tiny")
    sides = {"layer1": (17, 25), "layer2": (9, 13), "layer3": (9, 13), "layer4": (9, 13)}
    for part, side in sides.items():
        saved = 0
        for number, block in enumerate(getattr(model, part)):
            before = sides["layer1"] if (part, number) == ("layer2", 0) else side  # its conv2 has stride 2
            saved += 4 * SMALL.batch * block.conv1.out_channels * (math.prod(before) + math.prod(side))
            if number % 2 == 0:  # every second sum is recomputed
                saved += 4 * SMALL.batch * block.conv3.out_channels * math.prod(side)
        assert kept.parts[part].memory - less.parts[part].memory == saved, part
    peaks = [simulate(one._replace(batch=4, size=(257, 257))).peak for one in (*settings[::-1], SMALL)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_prediction_keeps_nothing():
    training, prediction = simulate(SMALL), simulate(SMALL._replace(train=False))
    assert prediction.peak < training.peak
    assert prediction.gradients == prediction.optimizer == 0
    assert list(prediction.parts) == [STEM, *PARTS]
    assert prediction.peak == prediction.weights + max(c.memory for c in prediction.parts.values())


def test_fit_names_the_largest_batches(monkeypatch):
    def need(setting: Setting) -> float:  # the highest of two moments, as a step's memory
        width = 2 if setting.amp else 4
        return 1 + width * max(1 + 0.1 * setting.batch, 0.3 * setting.batch)

    monkeypatch.setattr(profile, "need", need)
    result = profile.fit(SMALL, [5.3, 8.0, 40.0], [(257, 385), (129, 129)])
    assert [(row["size"], row["amp"]) for row in result["rows"]] == [
        (size, amp) for size in ((257, 385), (129, 129)) for amp in (None, "bf16")
    ]
    for row in result["rows"]:
        for room, batch in zip(result["rooms"], row["batches"], strict=True):
            fitting = [b for b in range(1, 100) if need(SMALL._replace(amp=row["amp"], batch=b)) <= room]
            assert batch == max(fitting, default=0)
    page = profile.fit_page(result).splitlines()
    assert page[2] == "| 257x385 | float32 | 5.40 | 0.40 | - | 5 | 32 |"


def test_command_times_every_part_and_writes_json(monkeypatch, tmp_path, capsys):
    flags = [
        *TINY,
        "--train",
        "--num-classes",
        "4",
    ]
    run_main(monkeypatch, *flags, "--json", tmp_path / "profile.json")
    result = json.loads((tmp_path / "profile.json").read_text())
    parts = result["parts"]
    assert list(parts) == [STEM, *PARTS, "loss", "optimizer"]
    for name, part in parts.items():
        assert part[f"seconds_{FORWARD}"] > 0
        assert name == "optimizer" or part[f"seconds_{BACKWARD}"] > 0
    assert result["setting"]["num_classes"] == 4 and result["peak_measured"] is None
    printed = capsys.readouterr().out
    assert "head.cca" in printed and "peak of a step" in printed


def test_attention_left_out_has_no_part(monkeypatch, capsys):
    run_main(monkeypatch, *TINY, "--recurrence", "0")
    assert "head.convb" in (printed := capsys.readouterr().out) and "head.cca" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input-size", "65", "97"], "--input-size"),
        (["--amp", "fp16", "--gpu", "cpu"], "--amp fp16"),
        (["--restore-from", "nowhere.pth", "--gpu", "cpu"], "nowhere.pth"),
    ],
)
def test_wrong_usage_is_one_line(monkeypatch, arguments, message):
    with pytest.raises(InputError, match=message):
        run_main(monkeypatch, *arguments)


def test_paper_needs_what_it_counts(monkeypatch):
    monkeypatch.setattr(ops, "DEVICE_TYPES", frozenset())
    with pytest.raises(UsageError, match="--paper.*build_ext"):
        profile.paper()


@pytest.mark.slow
def test_started_as_a_file_it_says_how_to_start_it():
    result = run_process("tools/profile.py")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [
        "tools/profile.py: can't be started as a file; run python -m tools.profile in the project folder"
    ]


def test_other_variants_are_profiled_as_they_are(monkeypatch, tmp_path):
    model = Seg_Model(3, backbone="tiny", variant="torchvision")
    torch.save(model.state_dict(), tmp_path / "variant.pth")
    flags = ["--restore-from", tmp_path / "variant.pth", "--backbone", "tiny", "--num-classes", "3"]
    flags += ["--input-size", "65,97", "--rounds", "0", "--gpu", "cpu"]
    run_main(monkeypatch, *flags, "--json", tmp_path / "profile.json")
    parts = json.loads((tmp_path / "profile.json").read_text())["parts"]
    assert parts["stem"]["parameters"] == 64 * 3 * 49 + 2 * 64
    assert parts["stem"]["flops_forward"] == 2 * 33 * 49 * 64 * 3 * 49


def test_json_replaces_no_input_and_no_pipe(tmp_path, monkeypatch, checkpoint):
    link = tmp_path / "x.json"
    link.symlink_to(checkpoint)
    for path, words in ((link, "would replace its own input"), (tmp_path / "pipe", "is a FIFO, not a file")):
        if path != link:
            os.mkfifo(path)
        with pytest.raises(UsageError, match=f"--json.*{words}"):
            run_main(monkeypatch, "--restore-from", checkpoint, "--json", path)


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(profile, "simulate", lambda setting: Simulation({}, 1 << 60, 0, 0, 0))
    with pytest.raises(UsageError, match="--batch-size, --input-size: needs more than"):
        run_main(monkeypatch, "--backbone", "tiny", "--input-size", "33,33", "--gpu", "cpu")


def test_the_largest_batch_is_found_wherever_it_is(monkeypatch):
    """The needed memory may grow linearly, or much faster than its first two values suggest."""
    for needs in (lambda batch: 2.0 + batch, lambda batch: 2.0 + batch + 3 * max(0, batch - 2)):
        monkeypatch.setattr(profile, "need", lambda setting, needs=needs: needs(setting.batch))
        rooms = [1.0, 3.0, 4.5, 30.0, 401.0]
        rows = profile.fit(SMALL, rooms, [(9, 9)])["rows"]
        best = [max((b for b in range(1, 500) if needs(b) <= room), default=0) for room in rooms]
        assert [row["batches"] for row in rows] == [best, best]
