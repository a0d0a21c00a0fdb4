"""The benchmarks: they compare the same function, compute correctly, and write complete reports."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import last_line, run_process
from PIL import Image

from benchmarks import attention, builds, evaluation, gpu_report, loader, step
from benchmarks.attention import Case, Contender
from benchmarks.gpu_report import Part
from cc_attention import ops
from dataset import CSDataSet
from utils import timing
from utils.errors import UsageError

PEERS = [
    contender
    for contender in attention.make_contenders(list(attention.CHOICES))
    if not contender.compiled and contender.family != "ours"
]


@pytest.mark.parametrize("height, width", [(4, 7), (7, 4), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_formulations_are_the_reference_forward_and_backward(peer: Contender, height: int, width: int):
    *operands, grad = (
        x.detach().double() for x in Case((2, height, width), (4, 32), "float32", "cpu").inputs(peer.layout)
    )
    assert operands[0].is_contiguous(memory_format=attention.LAYOUTS[peer.layout])
    _, function, exact = attention.FORMULATIONS[peer.formulation]
    results = []
    for each in (function, exact):
        leaves = [x.clone().requires_grad_() for x in operands]
        out = each(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, check_stride=False)


def test_floors_are_those_of_the_published_table():
    forward, backward = attention.necessary_work((8, 97, 97), (64, 512), 2)
    assert [round(part.flop / 1e9, 2) for part in (forward, backward)] == [16.74, 35.33]
    assert [round(part.bytes / 1e6, 1) for part in (forward, backward)] == [173.7, 347.2]
    assert forward.seconds(790e12, 4.3e12) == pytest.approx(40.4e-6, rel=1e-2)
    wide, _ = attention.necessary_work((1, 129, 257), (64, 512), 2)
    assert wide.seconds(790e12, 4.3e12) == pytest.approx(18.6e-6, rel=1e-2)


def test_a_wrong_contender_and_a_failing_one_are_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    def fail(*_):
        raise RuntimeError("out of memory\nand more")

    reference = attention.reference.criss_cross_attention
    monkeypatch.setitem(
        attention.FORMULATIONS, "bmm", ("pure PyTorch", lambda q, k, v: v + 0 * (q + k).sum(), reference)
    )
    monkeypatch.setitem(attention.FORMULATIONS, "einsum", ("pure PyTorch", fail, reference))
    contenders = attention.make_contenders(["ours", "bmm", "einsum"])
    case = Case((1, 3, 5), (2, 16), "float32", "cpu")
    results = attention.measure_case(case, contenders, timed=True, memory=False, graphs=False, rounds=1)
    assert results["bmm, contiguous"]["wrong"] and "wrong" in results["bmm, contiguous"]["failed"]["all"]
    assert results["einsum, contiguous"]["failed"] == {"all": "RuntimeError: out of memory"}
    assert (
        "forward" not in results["bmm, contiguous"] and results["ours, contiguous"]["forward"]["median"] > 0
    )
    assert list(attention.compare(results, {"forward": 1.0})) == ["forward", "forward+backward"]


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
    assert 2 * scores < attention.peak(contender, attention.bmm_attention, case, "forward") < 20 * scores


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
            "shape": (1, 2, 3),
            "dtype": dtype,
            "ratios": {"forward": {"ours": {"name": "ours", "value": value}}},
        }
        for dtype, value in (("float32", 3.0), ("bfloat16", 2.0))
    ]
    assert attention.float32_over_bfloat16(cases) == {"1x2x3": {"forward": 1.5}}


@pytest.mark.slow
class TestParts:
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


@pytest.mark.parametrize("name", ["ours", "bmm"])
def test_stopwatch_marks_the_attention_and_nothing_behind_it(name: str):
    _, function, _ = attention.FORMULATIONS[name]
    watch = gpu_report.Stopwatch(function, "cpu")
    events: list[str] = []
    watch.mark = lambda: events.append("mark") or float(len(events))
    x = torch.randn(1, 8, 3, 4, requires_grad=True)
    operands = [torch.nn.functional.conv2d(x, torch.randn(k, 8, 1, 1)) for k in (2, 2, 8)]
    out = watch(*operands)
    x.register_hook(lambda _: events.append("behind"))
    out.sum().backward()
    assert events == ["mark"] * 4 + ["behind"] and watch.seconds() == 2


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
        ["environment", "tests", "attention", "training", "training-bmm", "kernels"], "passed"
    )
    assert report["parts"]["tests"]["result"]["passed"] == 1
    step = report["parts"]["training"]["result"]
    assert 0 < step["attention_seconds"] < step["step_seconds"] and step["images_per_second"] > 0
    page = (tmp_path / "report.md").read_text()
    assert all(heading in page for heading in ("## Parts", "## Tests", "## attention", "## Training step"))


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
def test_the_step_and_prediction_are_measured_in_every_setting(tmp_path, capsys):
    pytest.importorskip("torchvision")
    step.main(["--batch-size", "2", "--input-size", "33,33", "--picture", "41,33", "--rounds", "1",
               "--out", str(tmp_path / "a.json")])  # fmt: skip
    report = json.loads((tmp_path / "a.json").read_text())
    assert list(report["step"]) == list(step.SETTINGS)
    assert next(iter(report["prediction"])) == "as trained, float32" and len(report["prediction"]) == 7
    for group in ("step", "prediction"):
        found = list(report[group].values())
        assert not any("error" in each for each in found) and found[0]["ratio"] == 1
        for each in found:
            assert each["ratio"] == pytest.approx(found[0]["seconds"]["median"] / each["seconds"]["median"])
    assert "bf16, channels_last" in capsys.readouterr().out


def test_the_contenders_of_the_prediction_compute_the_same():
    args = step.get_parser().parse_args(["--picture", "41,33"])
    runs = step.predictions(args, torch.device("cpu"))
    right = runs["as trained, float32"]()
    for name, tolerance in (("float32", 1e-4), ("float32, channels_last", 1e-4), ("bf16", 0.1)):
        difference = (runs[name]() - right).abs().max() / right.abs().max()
        assert difference < tolerance and (name == "bf16") == (difference > 1e-3), name
