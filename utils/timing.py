"""Measurements for the benchmarks: times, memory and peak rates, on a CPU or a CUDA GPU."""

from __future__ import annotations

import contextlib
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch

Run = Callable[[], object]
Mark = float | torch.cuda.Event

SLICE = {"cpu": 0.2, "cuda": 0.05}  # seconds of a contender's turn
LONG = 10.0  # seconds; a longer run is measured once after its warm-up, and takes no turns


def mark(device: str) -> Mark:
    """Record a time stamp in the stream of work of the device."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Mark, end: Mark) -> float:
    """Return the seconds from one mark to a later one."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def samples(run: Run, device: str, count: int) -> list[float]:
    """Return the seconds of each of `count` runs.

    On a GPU, the runs are queued without waiting, after one run that is not counted. So the time of the host
    is hidden if the device is slower than the host.
    """
    if device == "cuda":
        run()
    marks = [mark(device)]
    for _ in range(count):
        run()
        marks.append(mark(device))
    return [seconds(start, end) for start, end in pairwise(marks)]


def interleaved(
    runs: Mapping[str, Run], device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measure several contenders in turns, so that a slow phase of the machine affects all of them.

    A turn lasts about SLICE seconds and has at least one run (but see LONG). A contender that raises is
    skipped from then on.

    Args:
        runs: contenders by name.
        device: "cpu" or "cuda".
        rounds: number of turns of each contender.

    Returns:
        The seconds of every run of each contender, and the error of each contender that failed.
    """
    times: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, turn: Callable[[str], None]) -> None:
        try:
            turn(name)
        except Exception as error:  # for example out of memory; the others continue
            failures[name] = reason(error)
            times.pop(name, None)
            if device == "cuda":
                torch.cuda.empty_cache()

    def warm_up(name: str) -> None:
        runs[name]()
        once = samples(runs[name], device, 1)[0]
        counts[name] = min(max(int(SLICE[device] / once), 1), 50) if once < LONG else 0
        times[name] = [] if counts[name] else [once]

    def timed(name: str) -> None:
        if counts[name]:
            times[name] += samples(runs[name], device, counts[name])

    for name in runs:
        attempt(name, warm_up)
    for _ in range(rounds):
        for name in list(times):
            attempt(name, timed)
    return times, failures


def captured(run: Run) -> Run:
    """Capture the run in a CUDA graph and return its replay, which has no overhead of Python and launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def quartiles(times: list[float]) -> dict[str, float]:
    """Return the median and the quartiles, in the unit of the times."""
    if len(times) == 1:
        times = times * 2
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def reason(error: BaseException) -> str:
    """Describe an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def copy_bandwidth(device: str) -> float:
    """Measure the bytes read plus bytes written per second, for a copy too large for the caches."""
    source = torch.empty(2**27 if device == "cuda" else 2**25, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Measure the FLOP/s of a large matrix product, with the current setting of float32 precision."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def _best(run: Run, device: str) -> float:
    """Return the median seconds of a few runs after a warm-up."""
    run()
    return statistics.median(samples(run, device, 5))


def resident_peak() -> int:
    """Return the peak resident memory of this process so far, in bytes.

    It is read from /proc, since getrusage starts with the size of the parent process.
    """
    return _status("VmHWM")


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return _status("VmRSS")


def reset_resident_peak() -> None:
    """Let `resident_peak` start again from the present memory, if the system permits this."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(
            f"/proc/self/status has no {name}, a size of the resident memory; this needs Linux"
        )
    return int(found[1]) * 1024


def limit_memory() -> None:
    """Limit this process and its children to half of the free memory.

    Further allocations then fail, instead of the system killing some process. Other systems than Linux have
    no limit.
    """
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return
    if found is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(found[1]) * 1024 // 2, hard))
