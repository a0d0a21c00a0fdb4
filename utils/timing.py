"""Time, memory and the ceilings of a machine, on the CPU and on CUDA: what the benchmarks share."""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Run = Callable[[], object]
Mark = float | torch.cuda.Event

SLICE = {"cpu": 0.2, "cuda": 0.05}  # seconds that a contender runs for in a turn
LONG = 10.0  # seconds; a run that takes longer is done once after its warm-up, and has no turns


def mark(device: str) -> Mark:
    """This moment, in the order of the device's work."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Mark, end: Mark) -> float:
    """Seconds from one mark to a later one."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def samples(run: Run, device: str, count: int) -> list[float]:
    """Seconds of each of `count` runs.

    On a GPU they are queued without waiting for any, behind one that is not counted, so that the host's part
    is hidden wherever the device is the slower of the two.
    """
    if device == "cuda":
        run()
    marks = [mark(device)]
    for _ in range(count):
        run()
        marks.append(mark(device))
    return [seconds(start, end) for start, end in zip(marks, marks[1:], strict=False)]


def interleaved(
    runs: Mapping[str, Run], device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every run of each contender, and why a contender has none.

    The contenders take turns, `rounds` times, so that a slow phase of the machine hits all of them. A turn
    lasts about SLICE seconds, one run at least (but see LONG). One that raises is left out from then on.
    """
    times: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, turn: Callable[[str], None]) -> None:
        try:
            turn(name)
        except Exception as error:  # out of memory, no compiler, a kernel that fails: the others go on
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
    """The run as a CUDA graph: its replay, without Python and launches one by one."""
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
    """Median and quartiles, in the unit of the times."""
    if len(times) == 1:
        times = times * 2
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written per second, by a copy that no cache holds."""
    source = torch.empty(2**27 if device == "cuda" else 2**25, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP per second of a large matrix product of random numbers, in the current float32 precision."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def _best(run: Run, device: str) -> float:
    """The median of a few runs after a warm-up."""
    run()
    return statistics.median(samples(run, device, 5))


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes.

    Read from /proc: what getrusage says begins with the size of the process that this one was started from.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this system does not tell the largest resident size of a process (VmHWM)")
    return int(found[1]) * 1024


def limit_memory() -> None:
    """Refuses this process and its children more than half of the memory that is free now: an allocation
    fails, where otherwise the system may end some process of its choice. Linux only, nothing elsewhere."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return
    if found is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(found[1]) * 1024 // 2, hard))
