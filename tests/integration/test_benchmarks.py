"""The benchmarks: they compare the same function, compute correctly, and write complete reports."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
from conftest import last_line, run_process
from PIL import Image, ImageColor
from small_network import SmallNetwork, registered

from benchmarks import (
    attention,
    attention_peers,
    attention_report,
    bars,
    builds,
    consistency,
    evaluation,
    explore,
    gpu_report,
    loader,
    parts,
    peers,
    scores,
    step,
    video,
)
from benchmarks.attention_peers import FORMULATIONS, Case, Contender
from benchmarks.gpu_report import Part
from cc_attention import ops
from dataset import CSDataSet
from engine.inference import predict_whole
from loss import CriterionDSN
from segmenter import Segmenter
from utils import timing
from utils.errors import UsageError

CONTENDERS = [c for c in attention.make_contenders(list(attention.CHOICES)) if not c.compiles]
OPERATOR_CASES = [
    *(Case((2, *size), (4, 32), "float32", "cpu") for size in ((4, 7), (7, 4), (1, 6), (6, 1), (1, 1))),
    Case((2, 4, 7), (4, 32), "float32", "cpu", heads=2),
    Case((2, 3, 4, 5), (4, 32), "float32", "cpu"),
    Case((1, 2, 5, 3), (4, 32), "float32", "cpu", heads=4),
    Case((2, 4, 7), (4, 32), "float32", "cpu", axes=(0,)),
    Case((2, 4, 7), (4, 32), "float32", "cpu", axes=(1,)),
    Case((2, 3, 4, 5), (4, 32), "float32", "cpu", heads=2, axes=(0, 2)),
]
MODULE_CASES = [
    Case(shape, (4, 32), "float32", "cpu", level)
    for shape in ((2, 4, 7), (1, 3, 4, 5))
    for level in ("module", "R=2")
]


def both(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrize a test with each case and each contender that applies to it."""
    of_a_gpu = [dataclasses.replace(case, device="cuda") for case in cases]  # these are more contenders
    pairs = [
        (case, c)
        for case, on_gpu in zip(cases, of_a_gpu, strict=True)
        for c in CONTENDERS
        if c.family != "ours" and c.applies(on_gpu)
    ]
    names = [f"{case.name} {contender.name}" for case, contender in pairs]
    return pytest.mark.parametrize("case, peer", pairs, ids=names)


@both(OPERATOR_CASES)
def test_formulations_are_the_reference_forward_and_backward(case: Case, peer: Contender):
    *operands, grad = (x.detach().double() for x in case.inputs(peer.layout))
    layout = {3: torch.channels_last, 4: torch.channels_last_3d}[len(case.shape)]
    assert operands[0].is_contiguous(memory_format=layout) or peer.layout == "contiguous"
    results = []
    for function in (peer.function(case, {}), peer.exact_function(case, {})):
        leaves = [x.clone().requires_grad_() for x in operands]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, check_stride=False)


@both(MODULE_CASES)
def test_modules_with_the_same_weights_are_the_same(case: Case, peer: Contender):
    x, grad = (t.detach().double() for t in case.inputs(peer.layout))
    weights = case.weights()
    ours = Contender("ours", peer.layout, compiled=False).function(case, weights)
    right = ours if peer.family != "non-local" else peer.exact_function(case, weights)
    results = []
    for module in (peer.function(case, weights), peer.exact_function(case, weights), right):
        assert isinstance(module, torch.nn.Module)
        module.double()
        leaves = [x.clone().requires_grad_(), *(p for _, p in sorted(module.named_parameters()))]
        out = module(leaves[0])
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
        assert all(gradient.abs().max() > 1e-3 for gradient in results[-1][:3])
    for result, exact, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, check_stride=False)
        torch.testing.assert_close(exact, expected, check_stride=False)


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.name)
def test_flex_attention_is_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch):
    # FlexAttention has no gradients on a CPU, and compiling it takes long.
    monkeypatch.setattr(attention_peers, "_compiled_flex", lambda: attention_peers.flex_attention)
    operands = [x.detach() for x in case.inputs("channels_last")[:3]]
    peers_of_case = [c for c in attention.make_contenders(["flex"]) if c.applies(case)]
    assert [c.formulation for c in peers_of_case] == ["flex", "flex split"][: 1 + (case.heads == 1)]
    for peer in peers_of_case:
        with pytest.raises(RuntimeError, match="on a GPU only"):
            peer.function(case, {})
        function, exact = (
            make(case, {}) for make in (FORMULATIONS[peer.formulation].function, peer.exact_function)
        )
        torch.testing.assert_close(function(*operands), exact(*operands), check_stride=False)


def test_the_contender_in_one_head_ignores_the_heads():
    case = Case((1, 4, 5), (4, 32), "float32", "cpu", heads=2)
    operands = [x.detach() for x in case.inputs("channels_last")[:3]]
    one, several = (FORMULATIONS[name].function(case, {})(*operands) for name in ("heads=1", "ours"))
    torch.testing.assert_close(one, attention_peers.criss_cross_attention(*operands))
    assert not torch.allclose(one, several, atol=1e-2)


def test_floors_are_those_of_the_published_table():
    floor = attention_report.floor_of(Case((8, 97, 97), (64, 512), "bfloat16", "cpu"))
    totals = floor.totals().values()
    assert [round(part["flop"] / 1e9, 2) for part in totals] == [16.74, 35.33]
    assert [round(part["bytes"] / 1e6, 1) for part in totals] == [173.7, 347.2]
    assert floor.seconds(790e12, 4.3e12)["forward"] == pytest.approx(40.4e-6, rel=1e-2)
    wide = attention_report.floor_of(Case((1, 129, 257), (64, 512), "bfloat16", "cpu"))
    assert wide.seconds(790e12, 4.3e12)["forward"] == pytest.approx(18.6e-6, rel=1e-2)
    passes = attention_report.floor_of(Case((1, 97, 97), (64, 512), "bfloat16", "cpu"), 2).totals()
    assert [part["bytes"] / 97**2 for part in passes.values()] == [5644, 9488]


@pytest.mark.parametrize(
    "case, passes, flop, size",
    [
        # 6 pixels of 4 positions: 24 scores. The joint map has 4 channels, 16 bytes.
        (Case((1, 2, 3), (1, 2), "float32", "cpu"), 1, (144, 336), (6 * 28, 6 * 52)),
        (Case((1, 2, 3), (1, 2), "float32", "cpu"), 2, (144, 336), (6 * 68, 6 * 120)),
        (Case((1, 2, 3), (2, 4), "float32", "cpu", heads=2), 2, (288, 672), (6 * 136, 6 * 240)),
        # 12 pixels of 5 positions: 60 scores
        (Case((1, 2, 2, 3), (1, 2), "float32", "cpu"), 3, (360, 840), (12 * 108, 12 * 184)),
        # 2 positions along the columns: 12 scores
        (Case((1, 2, 3), (1, 2), "bfloat16", "cpu", axes=(0,)), 1, (72, 168), (6 * 16, 6 * 28)),
        # the attention and a map of 8 bytes for each pixel; 8 weights, 36 and 60 elements of maps
        (
            Case((1, 2, 3), (1, 2), "float32", "cpu", "module"),
            1,
            (144 + 96, 336 + 192),
            (6 * 36 + 4 * 44, 6 * 60 + 4 * 76),
        ),
        (
            Case((1, 2, 3), (1, 2), "float32", "cpu", "R=2"),
            2,
            (2 * 240, 2 * 528),
            (2 * (6 * 76 + 4 * 44), 2 * (6 * 128 + 4 * 76)),
        ),
    ],
    ids=str,
)
def test_work_computed_by_hand(case: Case, passes: int, flop: tuple, size: tuple):
    totals = attention_report.floor_of(case, passes).totals()
    assert tuple(part["flop"] for part in totals.values()) == flop
    assert tuple(part["bytes"] for part in totals.values()) == size


def test_ratios_of_times():
    case = Case((1, 2, 3), (1, 2), "float32", "cpu")
    floors = attention_report.floors(case, 72.0, 24.0)  # FLOP and bytes per second
    assert floors["floors"] == {"forward": 7, "backward": 13, "forward+backward": 20}
    assert attention_report.floors(case, 12.0, 24.0)["floors"]["backward"] == 28  # by the FLOP
    assert floors["byte_floors"]["passes"] == {"forward": 17, "backward": 30, "forward+backward": 47}
    assert floors["passes"] == 2

    def result(family: str, **columns: float) -> dict:
        return {"family": family, "forward": {"median": columns.pop("forward")}, **columns}

    peak = {"forward peak": 60}
    results = {
        "a": result("ours", forward=34.0, **peak, **{"forward+backward allocated": 50}),
        "b": result("ours", forward=40.0, **{"forward peak": 40}),
        "c": result("before", forward=51.0, **peak, **{"forward+backward allocated": 75}),
        "d": result("heads=1", forward=17.0),
    }
    ratios = attention_report.compare(results, floors)
    assert list(ratios) == ["forward", "forward peak", "forward+backward allocated"]
    forward = ratios["forward"]
    assert forward["ours"] == {"name": "a", "value": 34}
    assert (forward["before"]["over_ours"], forward["heads=1"]["over_ours"]) == (1.5, 0.5)
    assert forward["ours_over_floor"] == 34 / 7
    assert forward["ideal_bytes_over_ours"] == 7 / 34 and forward["passes_bytes_over_ours"] == 0.5
    assert ratios["forward peak"]["before"]["over_ours"] == 1.5
    assert ratios["forward+backward allocated"]["before"]["over_ours"] == 1.5


def test_a_wrong_contender_and_a_failing_one_are_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory\nand more")

    def wrong(query, key, value, **_):
        return value + 0 * (query + key).sum()

    for name, operator in (("bmm", wrong), ("einsum", fail)):
        monkeypatch.setitem(FORMULATIONS, name, attention_peers.Formulation("pure PyTorch", operator))
    contenders = attention.make_contenders(["ours", "bmm", "einsum"])
    case = Case((1, 3, 5), (2, 16), "float32", "cpu")
    results = attention.measure_case(case, contenders, timed=True, memory=False, graphs=False, rounds=1)
    assert results["bmm, contiguous"]["wrong"] and "wrong" in results["bmm, contiguous"]["failed"]["all"]
    assert results["einsum, contiguous"]["failed"] == {"all": "RuntimeError: out of memory"}
    assert (
        "forward" not in results["bmm, contiguous"] and results["ours, contiguous"]["forward"]["median"] > 0
    )
    assert not any("before" in name or "heads=1" in name for name in results)
    floors = attention_report.floors(case, 1.0, 1.0)
    assert list(attention.compare(results, floors)) == ["forward", "forward+backward"]


def test_a_run_that_fails_later_leaves_the_others():
    calls = []

    def fails_at_the_third() -> None:
        calls.append(0)
        if len(calls) == 3:
            raise ValueError("third")

    times, failures = timing.interleaved({"a": lambda: None, "b": fails_at_the_third}, "cpu", 2)
    assert failures == {"b": "ValueError: third"} and list(times) == ["a"] and len(times["a"]) > 2


@pytest.mark.slow
def test_attention_command_writes_numbers_and_a_plot(tmp_path: Path):
    numbers, picture = tmp_path / "a.json", tmp_path / "a.png"
    arguments = (
        "--device cpu --shapes 1x5x7 1x3x4 --memory-shapes --channels 16 --rounds 1 --contenders bmm ours"
    )
    command = ["benchmarks/attention.py", *arguments.split(), "--out", numbers, "--plot", picture]
    done = run_process(*command, "--dtypes", "float32")  # as a file; gpu_report.py starts it as a module
    assert done.returncode == 0, done.stderr
    assert "best pure PyTorch / ours" in done.stdout and "1x5x7 float32" in done.stdout
    report = json.loads(numbers.read_text())
    assert {"name", "torch", "date", "threads"} <= set(report["machine"])
    assert report["ceilings"]["copy_bytes_per_second"] > 0
    timed, other = report["cases"]
    assert (timed["shape"], other["shape"]) == ([1, 5, 7], [1, 3, 4])
    assert set(timed["floors"]) == {"forward", "backward", "forward+backward"}
    assert set(timed["contenders"]["ours, channels_last"]["forward"]) == {
        "median",
        "lower_quartile",
        "upper_quartile",
    }
    assert timed["ratios"]["forward"]["pure PyTorch"]["over_ours"] > 0
    with Image.open(picture) as image:
        assert image.size[0] > 100 and len(image.convert("RGB").getcolors(1 << 16)) > 2


def test_peak_memory_on_the_cpu_is_that_of_the_run_alone():
    case = Case((1, 64, 64), (4, 32), "float32", "cpu")
    contender = Contender("bmm", "channels_last", compiled=False)
    scores = 4 * 64 * 64 * 128
    peak, allocated = attention.memory_of(contender, attention_peers.bmm_attention, case, "forward")
    assert 2 * scores < peak < 20 * scores and allocated is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_module_allocates_less_than_before(precision: str):
    case = Case((1, 24, 24), (8, 64), precision, "cpu", "module")
    contenders = [c for c in attention.make_contenders(["ours"]) if c.layout == "channels_last"]
    results = attention.measure_case(case, contenders, timed=False, memory=True, graphs=False, rounds=1)
    ours, before = (results[f"{name}, channels_last"] for name in ("ours", "before"))
    assert ours["failed"] == before["failed"] == {}
    # At least the projection and its gradient, and the attention, the result and its gradient.
    one = 24 * 24 * 64 * case.dtype.itemsize
    column = "forward+backward allocated"
    assert (2 * 1.25 + 3) * one < ours[column] < before[column] < 20 * one
    ratios = attention.compare(results, attention_report.floors(case, 1.0, 1.0))
    assert ratios[column]["before"]["over_ours"] == before[column] / ours[column]
    assert "forward allocated" not in ours and "forward peak" in ours


def test_gradients_of_a_layer_are_one_vector():
    case = Case((1, 3, 4), (4, 32), "float32", "cpu", "module")
    module = Contender("ours", "channels_last", compiled=False).function(case, case.weights())
    (x, grad) = case.inputs("channels_last")
    found = attention.gradients(module, module(x), [x], grad)
    assert [g.numel() for g in found] == [x.numel(), 1, 33 * 4, 33 * 4, 33 * 32]


def test_wrong_gradients_of_weights_are_found(monkeypatch: pytest.MonkeyPatch):
    class Wrong(attention_peers.ComposedModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out + 0.1 * (self.gamma - self.gamma.detach()) * x

    case = Case((1, 3, 4), (4, 32), "float32", "cpu", "module")
    operator = attention_peers.bmm_attention
    wrong = attention_peers.Formulation("pure PyTorch", operator, module=lambda case: Wrong(case, operator))
    monkeypatch.setitem(FORMULATIONS, "bmm", wrong)
    contenders = attention.make_contenders(["bmm", "einsum"])
    results = attention.measure_case(case, contenders, timed=False, memory=False, graphs=False, rounds=1)
    assert {name: result["wrong"] for name, result in results.items()} == {
        "bmm, contiguous": True,
        "bmm, channels_last": True,
        "einsum, contiguous": False,
        "einsum, channels_last": False,
    }


def rows(*flags: str) -> list[attention.Row]:
    return list(attention.rows_of(attention.get_parser().parse_args(flags)))


def test_rows_of_the_default_run_on_a_cpu():
    found = rows("--device", "cpu", "--dtypes", "float32", "bfloat16")
    names = [(row.case.name, row.case.precision, row.timed, row.memory) for row in found]
    assert names == [
        ("1x97x97", "float32", True, True),
        ("1x97x97", "bfloat16", True, True),
        ("1x193x193", "float32", False, True),
        ("1x193x193", "bfloat16", False, True),
        ("1x97x97 module", "float32", True, True),
        ("1x97x97 module", "bfloat16", True, True),
        ("1x97x97 heads=8", "float32", True, False),
        ("1x5x49x49", "float32", True, False),
    ]
    families = [{c.family for c in row.contenders() if c.applies(row.case)} for row in found]
    plain = {"ours", "pure PyTorch", "views"}
    assert families[0] == families[1] == plain | {"non-local", "FlexAttention"}
    assert families[2:] == [plain, plain, *[plain | {"before"}] * 2, plain | {"heads=1"}, plain]
    assert {c.layout for row in found[4:] for c in row.contenders()} == {"channels_last"}


def test_rows_of_flags_and_of_a_gpu():
    names = [row.case.name for row in rows("--device", "cuda", "--dtypes", "float32")]
    assert names == [*("8x97x97", "2x97x97", "1x129x257", "8x97x97 module", "8x97x97 heads=8", "2x5x97x97")]
    flags = "--device cpu --dtypes float32 --level R=2 operator --shapes 1x5x7 1x2x3x4 --memory-shapes"
    found = rows(*flags.split(), *["--heads", "2", "--axes", "1"])
    assert [row.case.name for row in found] == [
        *("1x5x7 R=2", "1x2x3x4 R=2", "1x5x7 heads=2 axes=1", "1x2x3x4 heads=2 axes=1")
    ]
    assert all(row.choices == list(attention.CHOICES) and not row.memory for row in found)


@pytest.mark.parametrize("flags", [[], ["--untested"]])
def test_untested_kernels_are_used_during_one_run(flags: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "WHOLE_DEVICE_TYPES", set())
    monkeypatch.delenv(ops.UNTESTED, raising=False)
    during = []

    def compare(args: argparse.Namespace) -> None:
        during.append((os.environ.get(ops.UNTESTED), set(ops.WHOLE_DEVICE_TYPES)))

    monkeypatch.setattr(attention, "compare_all", compare)
    attention.main(["--device", "cpu", "--dtypes", "float32", *flags])
    assert during == [("1", set(ops.DEVICE_TYPES)) if flags else (None, set())]
    assert ops.UNTESTED not in os.environ and not ops.WHOLE_DEVICE_TYPES


@pytest.mark.slow
def test_attention_command_with_every_level_and_option(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(timing.SLICE, "cpu", 0)  # one run in each turn
    numbers, picture = tmp_path / "a.json", tmp_path / "a.png"
    flags = "--device cpu --level operator module R=2 --shapes 1x5x7 1x2x3x4 --memory-shapes --heads 2"
    flags += " --axes 1 --channels 16 --rounds 1 --contenders ours bmm einsum views flex non-local"
    flags += " --dtypes float32"
    paths = ["--out", str(numbers), "--plot", str(picture)]
    assert attention.main([*flags.split(), *paths]) == 0
    cases = {case["name"]: case for case in json.loads(numbers.read_text())["cases"]}
    assert list(cases) == [
        *("1x5x7 heads=2 axes=1", "1x2x3x4 heads=2 axes=1"),
        *("1x5x7 module", "1x2x3x4 module", "1x5x7 R=2", "1x2x3x4 R=2"),
    ]
    for name, case in cases.items():
        failed = {key for key, result in case["contenders"].items() if result["failed"]}
        assert {key.partition(",")[0] for key in failed} <= {"flex", "flex split"}, name
        assert ("before" in case["ratios"]["forward"]) == (case["level"] != "operator")
        assert ("heads=1" in case["ratios"]["forward"]) == (case["level"] == "operator")
        for families in ("pure PyTorch", "views", "non-local"):
            assert case["ratios"]["forward+backward"][families]["over_ours"] > 0
        assert {"ideal_bytes_over_ours", "passes_bytes_over_ours"} <= case["ratios"]["forward"].keys()
    out = capsys.readouterr().out
    for line in ("heads=1 / ours", "before / ours", "1-pass bytes / ours", "3-pass bytes", "on a GPU only"):
        assert line in out, line
    with Image.open(picture) as image:
        assert image.size[1] > 6 * 100


@pytest.mark.parametrize(
    "arguments",
    [
        "--shapes 8x97",
        "--shapes 0x3x3",
        "--dtypes int8",
        "--channels 24",
        "--device cpu --dtypes tf32",
        "--contenders theirs",
        "--rounds 0",
        "--level theirs",
        "--shapes 1x2x3x4x5",
        "--heads 0",
        "--heads 3",
        "--level module --heads 8",
        "--level module R=2 --axes 1",
        "--axes -1",
        "--axes two",
        "--device cpu --shapes 1x5x7 1x2x3x4 --axes 2",
        "--device cpu --axes 3",
    ],
)
def test_bad_arguments_end_in_status_2(arguments: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        attention.main(arguments.split())
    assert ended.value.code == 2 and arguments.split()[-2] in last_line(capsys.readouterr().err)


def test_a_folder_that_is_missing_is_named():
    with pytest.raises(UsageError, match=r"--out no/folder/a.json: no file can be written in"):
        attention.main(["--out", "no/folder/a.json"])


def test_our_float32_over_our_bfloat16():
    cases = [
        {
            "name": name,
            "dtype": dtype,
            "ratios": {"forward": {"ours": {"name": "ours", "value": value}}},
        }
        for name, dtype, value in (
            ("1x2x3", "float32", 3.0),
            ("1x2x3", "bfloat16", 2.0),
            ("1x2x3 module", "bfloat16", 1.0),
        )
    ]
    assert attention.float32_over_bfloat16(cases) == {"1x2x3": {"forward": 1.5}}


def test_an_axis_is_given_once(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        attention.main(["--axes", "1", "1"])
    assert ended.value.code == 2 and "--axes" in last_line(capsys.readouterr().err)


def test_bfloat16_is_left_out_where_it_is_slow(monkeypatch, capsys):
    times = iter([[1.0], [5.0], [1.0], [3.0]])
    monkeypatch.setattr(timing, "samples", lambda *_: next(times))
    assert attention.default_dtypes("cpu") == ["float32"]
    assert "bfloat16 is left out" in capsys.readouterr().out
    assert attention.default_dtypes("cpu") == attention.default_dtypes("cuda") == ["float32", "bfloat16"]


@pytest.mark.slow
class TestPartsOfTheReport:
    """A part of the GPU report is a process. However it ends, the report has an entry."""

    def entry(self, tmp_path: Path, code: str, seconds: float = 30, **options) -> dict:
        part = Part("one", [sys.executable, "-c", code], 60, **options)
        return gpu_report.run_part(part, tmp_path, seconds)

    def test_result(self, tmp_path: Path):
        code = f"open({str(tmp_path / 'one.json')!r}, 'w').write('[3]')"
        entry = self.entry(tmp_path, code)
        assert entry["status"] == "passed" and entry["result"] == [3] and "note" not in entry
        assert "result" not in self.entry(
            tmp_path, ""
        )  # what an earlier run left is not taken for this one's

    def test_failure_leaves_its_last_line(self, tmp_path: Path):
        entry = self.entry(tmp_path, "print('a'); raise SystemExit('broken')")
        assert entry["status"] == "failed" and entry["note"] == "broken"
        assert (tmp_path / "one.log").read_text() == "a\nbroken\n"

    def test_hanging_part_is_ended_with_its_children(self, tmp_path: Path):
        code = (
            "import subprocess, sys; print('began'); "
            "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        )
        begin = time.monotonic()
        part = Part("one", [sys.executable, "-c", code], 2)
        entry = gpu_report.run_part(part, tmp_path, 2)
        assert entry["status"] == "timed out" and entry["note"] == "began" and time.monotonic() - begin < 30

    def test_no_time_left_or_no_tool(self, tmp_path: Path):
        assert self.entry(tmp_path, "", seconds=1) == {"status": "skipped", "note": "no time left"}
        assert self.entry(tmp_path, "", missing="no tool") == {"status": "skipped", "note": "no tool"}

    def test_what_logs_say(self, tmp_path: Path):
        log = (
            "tests/a.py::one[cuda-1 x] PASSED [ 50%]\ntests/a.py::two[cuda] FAILED [100%]\ntests/a.py::three "
        )
        assert gpu_report.tests_of(log) == {
            "passed": 1,
            "failed": 1,
            "error": 0,
            "skipped": 0,
            "failures": ["tests/a.py::two[cuda]"],
        }
        entry = self.entry(tmp_path, "print('=== ERROR SUMMARY: 2 errors')")
        assert entry["result"] == {"errors": 2}


def test_without_a_gpu_the_report_ends_in_status_2(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([str(tmp_path / "out")]) == 2
    assert "PyTorch finds no GPU" in last_line(capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_quick_report_on_the_cpu(tmp_path: Path):
    done = run_process("benchmarks/gpu_report.py", tmp_path, "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: entry["status"] for name, entry in report["parts"].items()} == dict.fromkeys(
        ["environment", "tests", "step-parts", "step", "prediction", "attention", "kernels"], "passed"
    )
    assert report["parts"]["tests"]["result"]["passed"] == 1
    page = (tmp_path / "report.md").read_text()
    headings = ["Parts", "Tests", "attention", "Step by part, float32", "Training step", "Prediction"]
    assert [heading for heading in headings if f"## {heading}\n" not in page] == []
    seconds = report["parts"]["step"]["result"]["step"]["float32"]["seconds"]["median"]
    assert f"| float32 | {1e3 * seconds:.4g} | {2 / seconds:.4g} |" in page
    assert "| prediction by tiles | float32 |" in page and "| attention |" in page


def test_page_of_the_steps():
    def timed(name: str, **others: object) -> dict:
        times = {name: {"seconds": {"median": 0.2}}, "broken": {"error": "out of memory"}}
        return {"setting": "the setting", "batch_size": 8, "step": times, **others}

    results = {
        "step-parts": {"setting": "", "parts": {"step": {"bf16": {"parts": {"a": 0.003, "b": 0.001}}}}},
        "step": timed("bf16", memory={"bf16": {"bytes": 3 * 2**30}}),
        "step-bmm": timed("bf16"),
        "step-compiled": timed("bf16, compiled"),
    }
    lines = gpu_report.step_page(results)
    for line in (
        "## Step by part, bf16",
        "| a | 3 | 75 % |",
        "| sum | 4 |  |",
        "| bf16 | 200 | 40 | 3 |",
        "| broken | out of memory |  |  |",
        "| bf16, attention bmm | 200 | 40 |  |",
        "| bf16, compiled | 200 | 40 |  |",
    ):
        assert line in lines, line


@pytest.mark.slow
@pytest.mark.parametrize(
    "benchmark, arms", [(video, {*video.ARMS, "T=3, evaluated repeated"}), (consistency, {*consistency.ARMS})]
)
def test_arms_are_trained_and_scored(benchmark, arms, tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--seeds", "2", "--steps", "2", "--train", "8", "--val", "2", "--size", "64,128"]
    benchmark.main([*flags, "--out", str(out)])
    report = json.loads(out.read_text())
    assert set(report["mean_iou"]) == arms
    for found in report["mean_iou"].values():
        assert len(set(found["all"])) == 2 and found["mean"] == pytest.approx(sum(found["all"]) / 2)
    one, other = [report["mean_iou"][name]["all"] for name in (*benchmark.ARMS,)[:2]]
    assert report["gain"]["all"] == pytest.approx(
        [after - before for before, after in zip(one, other, strict=True)]
    )
    assert capsys.readouterr().out.count("seed 1") == len(arms)


class TestLoader:
    def test_both_ways_give_the_same_samples(self, scenes):
        dataset = CSDataSet(str(scenes), crop_size=loader.CROP)
        plain = loader.Plain(dataset)
        loader.check_same(plain, dataset)
        plain.mean = plain.mean + 2
        with pytest.raises(AssertionError):
            loader.check_same(plain, dataset)

    def test_stages_are_those_of_a_sample(self, scenes):
        dataset = CSDataSet(str(scenes), crop_size=loader.CROP)
        times = loader.stages(loader.Plain(dataset), dataset, 1)
        assert list(times) == ["plain", "ours"] and list(times["plain"]) == list(times["ours"])
        assert all(value > 0 for stages in times.values() for value in stages.values())


@pytest.mark.slow
def test_evaluation_is_measured_beside_its_forward_passes(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = "--backbone resnet50 --pictures 4 --size 32x64 --tile 33,33 --tile-batch 2 --rounds 1"
    evaluation.main([*arguments.split(), "--out", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    (passes,), (whole,) = (report["seconds"][name]["all"] for name in ("forward passes", "evaluation"))
    assert passes > 0 and report["ratio"] == pytest.approx(whole / passes)
    assert "picture 4/4" in capsys.readouterr().out


@pytest.mark.slow
def test_builds_beside_each_other(root, tmp_path, capsys):
    if "cpu" not in ops.DEVICE_TYPES:
        pytest.skip("cc_attention._C is not built")
    flags = ["--device", "cpu", "--shapes", "1x5x7", "--channels", "8", "16"]
    flags += ["--out", str(tmp_path / "r.json")]
    assert builds.main([f"old={root}", f"new={root}", *flags]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["builds"]) == ["old", "new"] and len(report["builds"]["new"]["times"]) == 6
    assert report["builds"]["old"]["worst_relative_error"]["float32"] < 3e-6
    assert "1x5x7 tf32 backward" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        builds.main([f"old={tmp_path}", *flags])
    assert end.value.code == 2


@pytest.mark.slow
def test_step_prediction_parts_and_memory_are_measured(tmp_path, capsys):
    pytest.importorskip("torchvision")
    numbers, picture = tmp_path / "a.json", tmp_path / "a.png"
    flags = "--batch-size 2 --input-size 33,33 --picture 41,33 --tile 33,33 --rounds 1 --profile float32"
    flags += " --settings float32 bf16+channels_last"
    assert step.main([*flags.split(), "--out", str(numbers), "--plot", str(picture)]) == 0
    report = json.loads(numbers.read_text())
    assert {"name", "torch", "threads", "load"} <= report["machine"].keys() and flags in report["command"]
    assert report["peers"]["mmsegmentation"] == {"skipped": "no --peer-site"}
    assert report["peers"]["torchvision"].keys() == {"version"}
    settings = ["float32", "bf16, channels_last"]
    assert list(report["step"]) == list(report["prediction by tiles"]) == settings
    assert list(report["memory"]) == settings
    torchvision = [f"torchvision's {name}, float32" for name in peers.TORCHVISION]
    assert list(report["prediction"]) == ["as trained, float32", *settings, *torchvision]
    for group in ("step", "prediction", "prediction by tiles"):
        found = list(report[group].values())
        assert not any("error" in each for each in found) and found[0]["ratio"] == 1
        for each in found:
            assert each["ratio"] == pytest.approx(found[0]["seconds"]["median"] / each["seconds"]["median"])

    profiled, predicted = (report["parts"][group]["float32"] for group in ("step", "prediction"))
    for each in (profiled, predicted):
        assert sum(each["parts"].values()) == pytest.approx(each["profiled"], rel=0.1) and each["seconds"] > 0
    assert profiled["parts"].keys() == set(parts.PARTS) - {parts.GRADIENTS}
    training = {parts.DATA, parts.WEIGHTS, parts.GRADIENTS, parts.NORMALIZATION, parts.OPTIMIZER}
    assert predicted["parts"].keys() == set(parts.PARTS) - training  # batch norm is folded
    assert max(profiled["parts"][part] for part in (parts.OTHER, parts.IDLE)) < profiled["profiled"] / 4

    weights = sum(parameter.numel() for parameter in step.Seg_Model(19, backbone="resnet50").parameters())
    for each in report["memory"].values():  # at least gradients and momentum in float32
        assert 2 * 4 * weights < each["bytes"] < 4 * 4 * weights
    out = capsys.readouterr().out
    assert "mmsegmentation is not measured: no --peer-site" in out and "bf16, channels_last" in out
    with Image.open(picture) as image:
        assert image.size[0] > 100 and len(image.convert("RGB").getcolors(1 << 16)) > 8


@pytest.mark.usefixtures("small_network")
def test_the_contenders_of_the_prediction_compute_the_same():
    args = step.parse(["--backbone", "small", "--picture", "41,33"])
    builders = step.networks(args, torch.device("cpu"))
    image = torch.randn(1, 3, 41, 33) * 50
    with torch.inference_mode():
        right = predict_whole(builders["as trained, float32"](), image)
        for name, tolerance in (("float32", 1e-4), ("float32, channels_last", 1e-4), ("bf16", 0.1)):
            difference = (predict_whole(builders[name](), image) - right).abs().max() / right.abs().max()
            assert difference < tolerance and (name == "bf16") == (difference > 1e-3), name
    whole = step.predictions(args, torch.device("cpu"))["float32"]()()
    by_tiles = step.predictions(args, torch.device("cpu"), (33, 33))["float32"]()()
    assert whole.shape == by_tiles.shape == (1, 41, 33) and whole.dtype == torch.uint8
    assert 0 < (whole != by_tiles).float().mean() < 0.5


class Recorded:
    """An event of a profile; `below` is the event around it. Its kernels are given as name=microseconds."""

    def __init__(self, name: str, own: float = 0, below: Recorded | None = None, number: int = -1, **kernels):
        self.name, self.self_cpu_time_total, self.cpu_parent = name, own, below
        self.sequence_nr, self.thread = number, 1
        self.kernels = [SimpleNamespace(name=name, duration=time) for name, time in kernels.items()]


class TestParts:
    def events(self) -> list[Recorded]:
        run = Recorded(parts.RUN, 1, whole=1000, **{parts.RUN: 999})
        conv = Recorded("aten::convolution", 2, run, 3, implicit_gemm=20)
        norm = Recorded("aten::batch_norm", 4, run, 4)
        loss = Recorded(parts.LOSS, 8, run, **{parts.LOSS: 998})
        back = Recorded(f"{parts.NODE}ConvolutionBackward0", 16, run, 3)
        both = Recorded("aten::convolution_backward", 32, back, sm90_xmma_dgrad=320, Wgrad=640, reduce=5)
        of_loss = Recorded(f"{parts.NODE}MulBackward0", 64, run, 6)
        update = Recorded("Optimizer.step#SGD.step", 128, run)
        other_thread = Recorded("aten::relu", 1e6)
        other_thread.thread = 2
        return [
            *(run, conv, norm, loss, back, both, of_loss, update, other_thread),
            Recorded("aten::empty", 256, norm, fill=7),
            Recorded("aten::mul", 512, loss, 6, mul=9),
            Recorded("aten::mul", 1024, of_loss, mul=11),
            Recorded("aten::add", 2048, back, add=13),
            Recorded("aten::mul", 4096, update, mul=15),
            Recorded("aten::max_pool2d_with_indices", 8192, run, 5, pool=17),
        ]

    def test_on_a_cpu_the_own_times_of_all_operators_of_the_run_add_up(self):
        sums = parts.microseconds(self.events(), "cpu")
        assert {part: time for part, time in sums.items() if time} == {
            parts.IDLE: 1,
            parts.FORWARD: 2,
            parts.NORMALIZATION: 4 + 256,
            parts.GRADIENTS: 16 + 32,
            parts.LOSS: 8 + 64 + 512 + 1024,
            parts.ELEMENTWISE: 2048,
            parts.OPTIMIZER: 128 + 4096,
            parts.OTHER: 8192,
        }

    def test_on_a_gpu_the_kernels_count(self):
        sums = parts.microseconds(self.events(), "cuda")
        assert {part: time for part, time in sums.items() if time} == {
            parts.FORWARD: 20,
            parts.DATA: 320,
            parts.WEIGHTS: 640,
            parts.GRADIENTS: 5,
            parts.NORMALIZATION: 7,
            parts.LOSS: 9 + 11,
            parts.ELEMENTWISE: 13,
            parts.OPTIMIZER: 15,
            parts.OTHER: 17 + 1000,
        }

    @pytest.mark.parametrize(
        "name, part",
        [
            ("aten::cudnn_convolution", parts.FORWARD),
            ("aten::native_batch_norm_backward", parts.NORMALIZATION),
            ("fused::batch_norm_backward", parts.NORMALIZATION),
            ("fused::segmentation_loss", parts.LOSS),
            ("fused::coarse_probability", parts.LOSS),
            ("fused::upsampled_classes", parts.LOSS),
            ("aten::_log_softmax_backward_data", parts.LOSS),
            ("aten::upsample_bilinear2d_backward", parts.LOSS),
            ("cc_attention::criss_cross_attention_backward", parts.ATTENTION),
            ("aten::_softmax", parts.ATTENTION),
            ("aten::_foreach_norm", parts.OPTIMIZER),
            ("aten::threshold_backward", parts.ELEMENTWISE),
            ("aten::leaky_relu_backward", parts.ELEMENTWISE),
            ("aten::clamp_min", parts.ELEMENTWISE),
            ("aten::_to_copy", parts.ELEMENTWISE),
            ("aten::add_", parts.ELEMENTWISE),
            ("aten::addmm", parts.OTHER),
            ("fused::unknown", parts.OTHER),
            ("", parts.OTHER),
        ],
    )
    def test_names(self, name: str, part: str):
        assert parts.part_of(Recorded(name)) == part

    def test_computing_the_two_gradients_one_after_the_other_changes_neither(self):
        x = torch.randn(1, 3, 8, 8, requires_grad=True)
        conv = torch.nn.Conv2d(3, 4, 3)
        leaves = [x, *conv.parameters()]
        right = torch.autograd.grad(conv(x).square().sum(), leaves)
        with parts.GradientTimer() as timer:
            timed = torch.autograd.grad(conv(x).square().sum(), leaves)
        torch.testing.assert_close(timed, right)
        assert all(seconds > 0 for seconds in timer.seconds.values())


@pytest.mark.usefixtures("small_network")
class TestPeers:
    """Peers are optional, and measured only if they compute the same."""

    class Copy:
        """A peer with the interface of MMSegmentation, which is our network."""

        version = "1"

        def __init__(self, *_: object):
            torch.manual_seed(0)
            self.network = step.Seg_Model(19, backbone="small", variant="mmseg")

        def copied(self) -> torch.nn.Module:
            return copy.deepcopy(self.network)

        def labelled(self, labels: torch.Tensor) -> torch.Tensor:
            return labels

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            return predict_whole(self.network, images)

        def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return CriterionDSN()(self.network(images), labels)

    flags = ("--variant", "mmseg", "--backbone", "small", "--input-size", "33,33")

    def test_a_missing_one_is_skipped_with_a_reason(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "path", list(sys.path))
        args = step.parse([*self.flags, "--backbone", "resnet50", "--peer-site", str(tmp_path)])
        skipped = step.check_peer(args)["skipped"]
        assert str(tmp_path) in skipped and "get_peers.sh" in skipped and args.peer_site is None
        assert not any("mmseg" in name for name in [*step.steps(args, torch.device("cpu")),
                                                    *step.networks(args, torch.device("cpu"))])  # fmt: skip

    def test_an_equal_one_is_measured(self, monkeypatch):
        monkeypatch.setattr(peers, "MMSegmentation", self.Copy)
        args = step.parse([*self.flags, "--settings", "float32", "bf16", "--peer-site", "x"])
        result = step.check_peer(args)
        assert result == {"version": "1", "differences": {"logits": 0, "loss": 0}}
        names = ["float32", "bf16", "mmsegmentation, float32", "mmsegmentation, bf16"]
        assert list(step.steps(args, torch.device("cpu"))) == names
        step.copied_network.cache_clear()
        theirs, ours = self.Copy().network, step.make_network(args, torch.device("cpu"))
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(own, other)
        step.copied_network.cache_clear()
        run = step.peer_step(args, torch.device("cpu"), step.SETTINGS["bf16"])
        run()

    def test_a_different_one_is_not_measured_and_ends_in_status_1(self, monkeypatch):
        class Different(self.Copy):
            def logits(self, images: torch.Tensor) -> torch.Tensor:
                return super().logits(images) * 1.01

        monkeypatch.setattr(peers, "MMSegmentation", Different)
        monkeypatch.setattr(step, "measure_times", lambda makes, *_: {name: {} for name in makes})
        flags = [*self.flags, "--settings", "float32", "--measure", "step", "--peer-site", "x"]
        args = step.parse(flags)
        result = step.check_peer(args)
        assert result["differences"]["logits"] == pytest.approx(0.01, rel=0.01)
        assert "wrong" in result["skipped"] and args.peer_site is None
        assert step.main(flags) == 1
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        assert step.check_torchvision()["skipped"].startswith("ModuleNotFoundError")


def test_peak_of_two_runs_on_the_cpu():
    torch.ones(150_000_000)  # an earlier peak is not counted
    sizes = iter([10, 60])
    kept = []

    def run() -> None:
        kept.append(torch.ones(next(sizes) * 10**6))

    later, first = step.peaks(run, torch.device("cpu"))
    # The smaller tensor may use memory that the process already has.
    assert 4 * 60e6 <= later < 4 * 80e6 and first < 4 * 15e6


def test_lengths_of_bars(tmp_path):
    panel = bars.Panel("title", {"long": {"a": 3.0, "b": 1.0}, "short": {"a": 1.0, "b": 0.0}})
    bars.draw(str(tmp_path / "a.png"), ["one", "two"], [panel, bars.Panel("empty", {})])
    with Image.open(tmp_path / "a.png") as image:
        pixels = image.convert("RGB")
        width, height = image.size
        rows = [[pixels.getpixel((x, y)) for x in range(bars.LEFT, width)] for y in range(height)]
    assert len(parts.PARTS) <= len(bars.COLORS)
    first, second = (ImageColor.getrgb(color) for color in bars.COLORS[:2])
    lengths = [(row.count(first), row.count(second)) for row in rows]
    long = max(lengths)
    assert long[0] + long[1] == pytest.approx(bars.LENGTH, abs=2)
    assert long[0] == pytest.approx(3 * long[1], abs=3)
    assert max(pair for pair in lengths if not pair[1])[0] == pytest.approx(long[1], abs=2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--settings fp16", "--settings"),
        ("--settings float64", "float64"),
        ("--profile float32 fp16+channels_last", "--profile"),
        ("--peer-site DIR", "--peer-site"),
        ("--measure speed", "--measure"),
    ],
)
def test_bad_arguments_of_the_step(arguments: str, named: str, capsys):
    with pytest.raises(SystemExit) as ended:
        step.main(arguments.split())
    assert ended.value.code == 2 and named in last_line(capsys.readouterr().err)


@pytest.mark.slow
def test_peers_are_not_installed_into_a_folder_that_exists(root, tmp_path):
    done = subprocess.run(
        ["bash", root / "benchmarks/get_peers.sh", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2 and "does not exist" in done.stderr and not list(tmp_path.iterdir())


def test_an_unknown_contender_is_named():
    with pytest.raises(UsageError, match="--peak-of x: is not one of float32, "):
        step.main(["--peak-of", "x"])


@pytest.mark.slow
def test_clicks_are_measured_beside_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
    if not shutil.which("chromium"):
        pytest.skip("no Chromium: apt-get install chromium")

    def open_small(folder: str) -> Segmenter:
        path = Path(folder) / "small.pth"
        with registered():
            torch.save(SmallNetwork(19).state_dict(), path)
            return Segmenter.load(path, model="small", backbone="small", device="cpu", say=lambda line: None)

    monkeypatch.setattr(explore, "open_network", open_small)
    monkeypatch.setattr(explore, "BAR", 1e9)  # no timed assertion
    assert explore.main(["--size", "64x96", "--clicks", "3", "--out", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    times = result["milliseconds"]
    assert [len(times[name]) for name in ("opening", "page", "segmenter")] == [1, 3, 2]
    assert result["grid"] == [9, 13] and result["recurrence"] == 2 and result["machine"]["device"] == "cpu"
    medians = result["median_milliseconds"]
    assert result["attention_to_click"] == medians["segmenter"] / medians["page"]


def test_scores_are_compared_with_the_confusion_matrix(tmp_path, capsys):
    threads = torch.get_num_threads(), cv2.getNumThreads()
    scores.main(
        ["--size", "48x96", "--pictures", "20", "--rounds", "1", "--out", str(tmp_path / "scores.json")]
    )
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["ratio"][scores.BASE] == 1 and report["ratio"].keys() == report["seconds"].keys()
    assert "boundary scores" in capsys.readouterr().out
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads  # it measures with one
