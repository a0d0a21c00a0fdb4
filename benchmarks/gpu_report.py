"""Test and measure the project on a GPU machine within eight minutes, and write a report.

    python benchmarks/gpu_report.py OUT [--seconds 480]

If the extension has no CUDA kernels, it is built in place, for the architecture of this GPU unless
TORCH_CUDA_ARCH_LIST is set. Then the following parts run, the most important ones first. Each one is a
process with a time limit, and none depends on another:

    environment         GPU, driver, clocks, PyTorch
    tests               GPU tests of the operators, of the networks and of the loader
    step-parts          benchmarks/step.py: time of a training step and a prediction by part
    step                training steps in several precisions: time and peak memory
    step-fused          training steps with --fused on, --recompute, --cuda-graph: time and peak memory
    prediction          predictions of 1024x2048 pixels, whole and by tiles, also with --fused, --cuda-graph
    attention           benchmarks/attention.py with all peers that need no compilation, with CUDA graphs
    step-bmm            the training step with the bmm formulation instead of our attention
    evaluation          benchmarks/evaluation.py: overhead of an evaluation over its forward passes
    memcheck            all kinds of kernels under compute-sanitizer, forward and backward
    step-compiled       the training step under torch.compile
    attention-compiled  formulations in plain PyTorch under torch.compile, at 8x97x97
    racecheck, initcheck, synccheck   the other tools of compute-sanitizer

OUT receives report.json and report.md, which are updated after each part, and for each part NAME.log and its
own files. `--part NAME` runs environment or kernels (the part for the sanitizer) in this process.

Exit status: 0 on success, 1 if a part failed, 2 without a GPU. `--device cpu --quick` runs everything with
tiny sizes on a machine without a GPU. It is meant for tests; its numbers have no meaning.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Started as a file, this module can't import the project. Parts that need it run as `python -m`.
ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 10.0  # minimum number of seconds left to start a part


# Parts as processes


@dataclass(frozen=True)
class Part:
    """A command with a time limit."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # reason why the part can't run here


def run_part(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run a part for at most `seconds`. Its output goes to OUT/NAME.log.

    Returns:
        status: "passed", "failed", "timed out" or "skipped"; seconds; note: the last line of a failure;
        result: content of OUT/NAME.json, or results found in the log.
    """
    if part.missing or seconds < min(SHORTEST, part.seconds):
        return {"status": "skipped", "note": part.missing or "no time left"}
    result, log = out / f"{part.name}.json", out / f"{part.name}.log"
    result.unlink(missing_ok=True)  # of an earlier report
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            # Kill the part with its processes, also if this process is interrupted.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - begin, 1)}
    if status != "passed":
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        entry["note"] = lines[-1][:200] if lines else f"exit status {process.returncode}"
    if result.exists():
        entry["result"] = json.loads(result.read_text())
    elif part.name.startswith("tests"):
        entry["result"] = tests_of(text)
    elif found := re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text):
        entry["result"] = {"errors": sum(int(number) for pair in found for number in pair if number)}
    return entry


def tests_of(log: str) -> dict[str, Any]:
    """Count the outcomes in the output of `pytest -v`, which may be incomplete."""
    outcomes = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
    counts = {
        word.lower(): sum(o == word for _, o in outcomes) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    return {**counts, "failures": [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]}


def parts_of(out: Path, device: str, quick: bool) -> list[Part]:
    """Return the parts after environment and build, the most important ones first."""
    python = [sys.executable, "-m"]
    attention = [*python, "benchmarks.attention", "--device", device]
    options = ["--device", device] + ["--quick"] * quick

    def own(name: str) -> list[str]:
        return [*python, "benchmarks.gpu_report", str(out), *options, "--part", name]

    def written(name: str) -> list[str]:
        return ["--out", str(out / f"{name}.json"), "--plot", str(out / f"{name}.png")]

    def stepped(name: str, arguments: str, seconds: float) -> Part:
        command = [*python, "benchmarks.step", "--device", device, *arguments.split()]
        return Part(name, [*command, *written(name)], seconds)

    if quick:
        small = "--batch-size 2 --input-size 17,17 --picture 33,33 --rounds 1 --settings float32"
        tiny = (
            "--shapes 1x5x7 --memory-shapes --dtypes float32 --channels 16 --rounds 1 --contenders ours bmm"
        )
        return [
            Part(
                "tests", [*python, "pytest", "-v", "tests/integration/test_benchmarks.py", "-k", "floors"], 60
            ),
            stepped("step-parts", f"{small} --measure parts", 120),
            stepped("step", f"{small} --measure step memory", 120),
            stepped("prediction", f"{small} --measure prediction --tile 17,17", 120),
            Part("attention", [*attention, *tiny.split(), *written("attention")], 60),
            Part("kernels", own("kernels"), 60),
        ]
    pytest = [*python, "pytest", "-v"]
    files = (
        "unit/test_cc_attention.py",
        "unit/test_attention_options.py",
        "kernels/test_attention_kernels.py",
        "kernels/test_fused_norm.py",
        "kernels/test_fused_loss.py",
        "unit/test_networks.py",
        "unit/test_loader.py",
    )
    tests = [f"tests/{name}" for name in files if (ROOT / "tests" / name).exists()]
    attention_tests = [name for name in tests if "attention" in name]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")

    def sanitized(tool: str, seconds: float) -> Part:
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *own("kernels")]
        # One allocation for each tensor, so that the sanitizer detects every overrun.
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(tool, command, seconds, apart, "" if sanitizer else "compute-sanitizer not found")

    sizes = "--backbone resnet101 --batch-size 8 --input-size 769,769 --picture 1024,2048"
    sizes += " --tile 769,769 --tile-batch 4"
    half, others = "bf16+channels_last", "bf16 fp16+channels_last float32+channels_last"
    peers = shlex.split("--contenders ours bmm einsum non-local --dtypes bfloat16 float32 tf32 --rounds 3")
    ours = shlex.split("--contenders ours --dtypes bfloat16 float32 tf32 --rounds 3")
    compiled = shlex.split(
        "--contenders ours bmm-compiled einsum-compiled flex --shapes 8x97x97 --dtypes bfloat16 float32"
    )
    evaluation = [*python, "benchmarks.evaluation", "--device", device, "--size", "1024x2048"]
    evaluation += shlex.split("--tile 769,769 --tile-batch 4 --num-workers 8 --pictures 128 --rounds 2")
    return [
        Part("tests", [*pytest, *tests, "-k", "cuda"], 100),
        Part("tests-untested", [*pytest, *attention_tests, "-k", "cuda"], 60, {"CC_ATTENTION_UNTESTED": "1"}),
        stepped("step-parts", f"{sizes} --measure parts --settings {half} --fused off on", 80),
        stepped("step", f"{sizes} --measure step memory --rounds 3 --settings {half} {others}", 120),
        stepped(
            "step-fused",
            f"{sizes} --measure step memory --rounds 3 --settings {half} --fused on --recompute --cuda-graph",
            90,
        ),
        stepped(
            "prediction",
            f"{sizes} --measure prediction --rounds 3 --settings {half} float32 --fused off on --cuda-graph",
            90,
        ),
        Part("attention-untested", [*attention, *ours, "--untested", *written("attention-untested")], 60),
        Part("attention", [*attention, *peers, *written("attention")], 200),
        stepped("step-bmm", f"{sizes} --measure step --rounds 3 --settings {half} --attention bmm", 60),
        Part("evaluation", [*evaluation, "--out", str(out / "evaluation.json")], 110),
        sanitized("memcheck", 60),
        stepped("step-compiled", f"{sizes} --measure step --rounds 3 --settings {half} --compile", 120),
        Part("attention-compiled", [*attention, *compiled, *written("attention-compiled")], 120),
        *(sanitized(tool, 45) for tool in ("racecheck", "initcheck", "synccheck")),
    ]


def write(path: Path, text: str) -> None:
    """Write a file atomically; utils.files can't be imported here."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write report.json with all numbers, and report.md."""
    write(out / "report.json", json.dumps(report, indent=2) + "\n")
    write(out / "report.md", page(report))


def make_report(out: Path, device: str, quick: bool, seconds: float) -> int:
    """Run all parts. Return 0 if none failed, otherwise 1."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"device": device, "quick": quick, "parts": {}}
    options = ["--device", device] + ["--quick"] * quick
    environment = [sys.executable, "-m", "benchmarks.gpu_report", str(out), *options, "--part", "environment"]

    def run(part: Part) -> dict[str, Any]:
        print(f"{part.name} ...", end=" ", flush=True)
        entry = run_part(part, out, min(part.seconds, end - time.monotonic()))
        report["parts"][part.name] = entry
        write_report(out, report)
        print(entry["status"], entry.get("note", ""), flush=True)
        return entry

    about = run(Part("environment", environment, 60))
    if device == "cuda" and "cuda" not in about.get("result", {}).get("compiled_for", []):
        major, minor = torch.cuda.get_device_capability()
        architecture = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"{major}.{minor}"
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        run(Part("build", build, 240, {"TORCH_CUDA_ARCH_LIST": architecture}))
        run(Part("environment", environment, 60))
    for part in parts_of(out, device, quick):
        run(part)
    print(f"{out / 'report.md'} and report.json written")
    return int(any(entry["status"] in ("failed", "timed out") for entry in report["parts"].values()))


# The page


def table(headings: list[str], rows: list[list[object]]) -> list[str]:
    """Return the lines of a Markdown table and an empty line."""
    lines: list[Sequence[object]] = [headings, ["---"] * len(headings), *rows]
    cells = [[str(cell).replace("|", "/").replace("\n", "<br>") for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in cells] + [""]


def page(report: dict[str, Any]) -> str:
    """Return the content of report.md."""
    parts = report["parts"]
    results = {name: entry["result"] for name, entry in parts.items() if "result" in entry}
    about = results.get("environment", {})
    lines = [f"# Criss-cross attention on {about.get('name', report['device'])}", ""]
    if report["quick"]:
        lines += ["Quick run with tiny sizes: the numbers have no meaning.", ""]
    lines += table(["", ""], [[key, value] for key, value in about.items() if key != "nvidia_smi"])
    outcomes = [[n, e["status"], e.get("seconds", ""), e.get("note", "")] for n, e in parts.items()]
    lines += ["## Parts", "", *table(["part", "outcome", "seconds", "note"], outcomes)]
    for name in ("tests", "tests-untested"):
        if not (tests := results.get(name)):
            continue
        counts = ", ".join(f"{tests[word]} {word}" for word in ("passed", "failed", "error", "skipped"))
        lines += [
            f"## {name.capitalize()}",
            "",
            counts,
            "",
            *(f"- {failure}" for failure in tests["failures"]),
            "",
        ]
    for name in ("attention", "attention-untested", "attention-compiled"):
        if name in results:
            lines += attention_page(name, results[name])
    lines += step_page(results)
    errors = [[name, results[name]["errors"]] for name in results if "errors" in results[name]]
    if errors:
        lines += ["## compute-sanitizer", "", *table(["tool", "errors"], errors)]
    return "\n".join(lines)


def attention_page(name: str, report: dict[str, Any]) -> list[str]:
    """Return a table of the comparisons in benchmarks/attention.py: our values and ratios of the others."""
    rates = report["ceilings"]["matrix_flop_per_second"]
    ceilings = [f"{dtype} {rate / 1e12:.4g}" for dtype, rate in rates.items()]
    copy = report["ceilings"]["copy_bytes_per_second"] / 1e12
    rows: list[list[object]] = []
    for case in report["cases"]:
        for column, entry in case["ratios"].items():
            scale = 1e-6 if column.endswith("peak") else 1e3
            row: list[object] = [case["name"], case["dtype"]]
            row += [f"{column}, {'MB' if column.endswith('peak') else 'ms'}"]
            row += [f"{scale * entry['ours']['value']:.4g}"]
            row += [f"{entry['ours_over_floor']:.3g}" if "ours_over_floor" in entry else ""]
            for family in ("pure PyTorch", "non-local"):
                peer = entry.get(family)
                row += [f"{peer['over_ours']:.3g} x ({peer['name']})" if peer else ""]
            rows.append(row)
    failed = [
        f"- {contender}, {case['name']} {case['dtype']}, {column}: {why}"
        for case in report["cases"]
        for contender, result in case["contenders"].items()
        for column, why in result["failed"].items()
    ]
    headings = [
        "case",
        "dtype",
        "measure",
        "ours",
        "over floor",
        "best pure PyTorch / ours",
        "best non-local / ours",
    ]
    return [
        f"## {name}",
        "",
        f"Copy {copy:.4g} TB/s; matrix products, TFLOP/s: {', '.join(ceilings)}.",
        "",
        *table(headings, rows),
        *failed,
        "",
        f"![times]({name}.png)",
        "",
    ]


def step_page(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return tables of the results of benchmarks/step.py: by part, training steps, and predictions."""
    lines: list[str] = []
    for title, found in results.get("step-parts", {}).get("parts", {}).items():
        for name, one in found.items():
            if "parts" not in one:
                continue
            whole = sum(one["parts"].values())
            rows: list[list[object]] = [
                [part, f"{1e3 * value:.4g}", f"{100 * value / whole:.3g} %"]
                for part, value in one["parts"].items()
            ]
            rows.append(["sum", f"{1e3 * whole:.4g}", ""])
            lines += [f"## {title.capitalize()} by part, {name}", "", *table(["part", "ms", "share"], rows)]
    rows = []
    notes = {"step": "", "step-fused": "", "step-bmm": ", attention bmm", "step-compiled": ""}
    for part, note in notes.items():
        report = results.get(part, {})
        for name, one in report.get("step", {}).items():
            shown = name + note
            if "error" in one:
                rows.append([shown, one["error"], "", ""])
                continue
            seconds = one["seconds"]["median"]
            peak = report.get("memory", {}).get(name, {}).get("bytes")
            rows.append([shown, f"{1e3 * seconds:.4g}", f"{report['batch_size'] / seconds:.4g}"])
            rows[-1].append(f"{peak / 2**30:.4g}" if peak else "")
    if rows:
        setting = next(results[part]["setting"] for part in results if part.startswith("step"))
        headings = ["", "step, ms", "images/s", "peak, GiB"]
        lines += ["## Training step", "", setting, "", *table(headings, rows)]
    rows = []
    for group in ("prediction", "prediction by tiles"):
        for name, one in results.get("prediction", {}).get(group, {}).items():
            rows.append([group, name, one.get("error") or f"{1e3 * one['seconds']['median']:.4g}"])
    if rows:
        setting = results["prediction"]["setting"]
        lines += ["## Prediction", "", setting, "", *table(["", "", "ms"], rows)]
    return lines


# Parts in this process


def environment(device: str) -> dict[str, Any]:
    """Return facts about the machine, and the devices for which the operator is compiled."""
    from cc_attention import ops
    from utils import timing
    from utils.environment import machine

    about = machine(device) | {"compiled_for": sorted(ops.DEVICE_TYPES)}
    if device == "cuda":
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
        clocks = [f"--query-gpu={query}", "--format=csv"]
        for name, options in (("clocks", clocks), ("nvidia_smi", [])):
            try:
                answer = subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=20)
                about[name] = answer.stdout.strip()
            except (OSError, subprocess.TimeoutExpired) as error:
                about[name] = timing.reason(error)
    return about


def kernels(device: str, quick: bool) -> dict[str, Any]:
    """Compare all kinds of kernels, forward and backward, with float64 on the CPU.

    Returns:
        The largest relative error by precision; "untested" and "options" are those of kernels that are not
        the default.

    Raises:
        RuntimeError: an error is larger than rounding.
    """
    import fused
    from benchmarks.attention import ERROR_LIMITS
    from cc_attention import ops

    errors = attention_kernels(device, quick)
    with ops.untested_kernels():
        if device != "cpu":
            errors |= {f"untested {name}": error for name, error in attention_kernels(device, quick).items()}
        errors |= attention_options(device, ERROR_LIMITS)
    if device in fused.DEVICE_TYPES:
        errors |= fused_kernels(device)
    return {"relative_error": errors}


def attention_kernels(device: str, quick: bool) -> dict[str, float]:
    """Compare the attention of pictures with float64, like `kernels`.

    Rows and columns are short and long. Inputs are made on the CPU, so that the GPU runs mainly our kernels.
    """
    from benchmarks.attention import ERROR_LIMITS, Case
    from cc_attention import criss_cross_attention, reference

    errors: dict[str, float] = {}
    lines = (5, 20) if quick else (20, 97, 130, 257)
    for precision in ERROR_LIMITS:
        if device == "cpu" and precision == "tf32":
            continue
        for line in lines:
            # Rows, columns, and both in the same kernel. The first channels fill matrix tiles, the second
            # ones only copies of 16 bytes, and the last ones neither.
            for shape, channels in (
                ((1, 3, line), (16, 64)),
                ((1, line, 3), (24, 72)),
                ((2, min(line, 130), min(line, 130) - 1), (16, 64)),
                ((1, line, 2), (3, 5)),
            ):
                case = Case(shape, channels, precision, "cpu")
                case.apply_precision()
                *operands, grad = (x.detach() for x in case.inputs("channels_last"))
                answers = []
                for function, move in (
                    (criss_cross_attention, lambda x: x.to(device)),
                    (reference.criss_cross_attention, lambda x: x.double()),
                ):
                    moved = [move(x).requires_grad_() for x in operands]
                    result = function(*moved)
                    gradients = torch.autograd.grad(result, moved, move(grad))
                    answers.append([x.detach().cpu().double() for x in (result, *gradients)])
                found = [(x - y).norm() / y.norm() for x, y in zip(*answers, strict=True)]
                worst = float(torch.stack(found).max())  # max() of Python may lose a NaN
                errors[precision] = max(errors.get(precision, 0.0), worst)
                print(f"{precision} {'x'.join(map(str, shape))} channels {channels}: {worst:.1e}", flush=True)
                if not worst <= ERROR_LIMITS[precision]:
                    raise RuntimeError(f"{precision} {shape} {channels}: relative error {worst:.2g}")
    return errors


def attention_options(device: str, limits: Mapping[str, float]) -> dict[str, float]:
    """Compare the attention with heads, scale, axes, frames and a residual with float64, like `kernels`.

    Query, key and value are parts of a larger map.
    """
    from cc_attention import criss_cross_attention, reference

    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[int, ...], int, tuple[int, ...] | None]] = [
        ((2, 24, 40), 1, None),
        ((1, 97, 20), 4, None),
        ((1, 130, 17), 2, (0,)),
        ((2, 5, 20, 24), 1, None),
        ((1, 3, 17, 40), 2, (0, 2)),
    ]
    for precision, limit in limits.items():
        if device == "cpu" and precision == "tf32":
            continue
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        dtype = getattr(torch, "float32" if precision == "tf32" else precision)
        for (n, *size), heads, axes in cases:
            layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
            joint, residual, grad = (
                torch.randn(n, channels, *size, generator=generator).to(dtype).to(memory_format=layout)
                for channels in (200, 128, 128)
            )
            # Positive values and gradients: otherwise the gradient of gamma, a sum over all, cancels.
            joint[:, 64:].abs_()
            grad.abs_()
            answers = []
            for function, place, exact in (
                (criss_cross_attention, device, dtype),
                (reference.criss_cross_attention, "cpu", torch.float64),
            ):
                parts = joint.to(place, exact)[:, :192].split([32, 32, 128], 1)
                gamma = torch.tensor([0.7], dtype=torch.float64).to(place, torch.float32)
                maps = (*parts, residual.to(place, exact), gamma)
                leaves = [x.detach().requires_grad_() for x in maps]
                result = function(
                    *leaves[:3], heads=heads, scale=0.5, axes=axes, residual=leaves[3], gamma=leaves[4]
                )
                gradients = torch.autograd.grad(result, leaves, grad.to(place, exact))
                answers.append([x.detach().cpu().double() for x in (result, *gradients)])
            found = [(x - y).norm() / y.norm() for x, y in zip(*answers, strict=True)]
            worst = float(torch.stack(found).max())
            name = f"options {precision}"
            errors[name] = max(errors.get(name, 0.0), worst)
            print(f"{name} {'x'.join(map(str, size))} heads {heads} axes {axes}: {worst:.1e}", flush=True)
            if not worst <= limit:
                raise RuntimeError(f"{name} {size} heads {heads} axes {axes}: relative error {worst:.2g}")
    return errors


def fused_kernels(device: str) -> dict[str, float]:
    """Compare the fused operators, forward and backward, with float64 on the CPU, like `kernels`.

    Returns:
        The largest relative error of each operator and precision.

    Raises:
        RuntimeError: an error is larger than rounding.
    """
    import fused
    from benchmarks.attention import ERROR_LIMITS
    from fused import loss_reference, norm_reference

    errors: dict[str, float] = {}

    def compare(name: str, limit: float, ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
        found = [(a.cpu().double() - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]
        worst = float(torch.stack(found).max())
        errors[name] = max(errors.get(name, 0.0), worst)
        print(f"{name}: {worst:.1e}", flush=True)
        if not worst <= limit:
            raise RuntimeError(f"{name}: relative error {worst:.2g}")

    generator = torch.Generator().manual_seed(0)
    options = fused.NormOptions(True, activation="relu")
    for precision in ("float32", "bfloat16", "float16"):
        for channels in (64, 3):
            maps = [torch.randn(2, channels, 9, 11, generator=generator) for _ in range(3)]
            x, residual, grad = (
                each.to(getattr(torch, precision)).contiguous(memory_format=torch.channels_last)
                for each in maps
            )
            weight = torch.rand(channels, generator=generator) + 0.5
            bias = torch.randn(channels, generator=generator)
            results = []
            for module, move in (
                (fused, lambda t: t.to(device)),
                (norm_reference, lambda t: t.double()),
            ):
                inputs = [move(each).requires_grad_() for each in (x, weight, bias, residual)]
                y = module.activated_batch_norm(*inputs[:3], None, None, options, inputs[3])
                results.append([y.detach(), *torch.autograd.grad(y, inputs, move(grad))])
            compare(f"norm {precision}", ERROR_LIMITS[precision], *results)
    for size in ((5, 7), (33, 47)):
        logits = 3 * torch.randn(2, 19, 5, 7, generator=generator)
        target = torch.randint(0, 19, (2, *size), generator=generator)
        target[:, 0] = 255
        results = []
        for module, move in ((fused, lambda t: t.to(device)), (loss_reference, lambda t: t.double())):
            moved = move(logits).requires_grad_()
            labels = target.to(moved.device)
            coarse = module.coarse_probability(moved.detach(), labels, (4, 5))
            total, weight = module.segmentation_loss(moved, labels)
            classes = module.upsampled_classes(moved, size)
            (grad,) = torch.autograd.grad(total, moved)
            finite = coarse.where(coarse.isfinite(), 0)
            results.append([total.detach(), weight.detach(), grad, finite, classes.double()])
        compare("loss float32", ERROR_LIMITS["float32"], *results)
    return errors


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_report.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=lambda text: Path(text).absolute(), metavar="OUT", help="output folder")
    parser.add_argument(
        "--seconds", type=float, default=480, help="time limit for all parts (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, for tests")
    inside: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "environment": lambda args: environment(args.device),
        "kernels": lambda args: kernels(args.device, args.quick),
    }
    parser.add_argument("--part", choices=inside, help="run only this part, in this process")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_report.py: PyTorch finds no GPU; run it on a machine with one, or give --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part is None:
        return make_report(args.out, args.device, args.quick, args.seconds)
    result = inside[args.part](args)
    write(args.out / f"{args.part}.json", json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
