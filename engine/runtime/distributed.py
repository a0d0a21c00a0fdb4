"""Start and communication of processes. Only this file imports torch.distributed."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import inspect
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused
from engine.runtime.signals import IMPATIENCE, SIGNALS
from utils.args import count, exhausted, program
from utils.errors import InputError, RunError, UsageError
from utils.resources import shortage

#: Environment variable of the processes that `launch` starts: the process id of `launch`, which has already
#: checked the input.
LAUNCHED = "CCNET_LAUNCHED"
#: Exit status of a process of `launch` that ran out of memory or another resource.
EXHAUSTED = 71
#: Filter for the warning of cc_attention that its library is not built.
OPERATOR_MISSING = "ignore:the compiled criss-cross attention is missing"


class Statistics:
    """The processes that share batch statistics, as a networks.abn.StatisticsGroup.

    A sum of statistics does not wait for the gradients that are being summed at the same time.
    """

    def __init__(self, size: int, group: Any):
        self.size = size
        self.group = group

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)


class World:
    """Rank, device and collective operations of this process, also for a run with a single process.

    Args:
        rank: rank of this process.
        size: number of processes.
        device: device of this process.
    """

    def __init__(self, rank: int, size: int, device: torch.device):
        self.rank = rank
        self.size = size
        self.device = device
        # Python objects and flags are sent over gloo, so that no GPU waits for them.
        self._control: Any = dist.new_group(backend="gloo") if size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this process has rank 0."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def statistics(self) -> Statistics:
        """Return the processes of this run, as the group that shares batch statistics.

        Raises:
            UsageError: only some processes use the fused operators.
        """
        if self.size == 1:
            return Statistics(1, None)
        # Like the fused operators, connections of their own have not run on a GPU yet.
        own = fused.active(self.device)
        if len(set(self.gather(own))) > 1:
            raise UsageError(
                "--fused: the fused operators are built on some machines only; build them on all, or give "
                "--fused off"
            )
        return Statistics(self.size, dist.new_group() if own else dist.group.WORLD)

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of every process, in the order of the ranks, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def first(self, value: Any | None) -> Any | None:
        """Return the `value` of the lowest rank that has one, on every process; None if all values are None.

        If all values are None, only a flag is communicated.
        """
        if self.size == 1:
            return value
        flag = torch.tensor([int(value is not None)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        if not flag.item():
            return None
        return next(found for found in self.gather(value) if found is not None)

    def on_main(self, action: Callable[[], object]) -> None:
        """Call `action` on rank 0 while the other processes wait.

        Raises:
            InputError, RunError: the error that `action` raised, on every process.
        """
        failure = None
        if self.is_main:
            try:
                action()
            except (InputError, RunError) as error:
                failure = error
        if failure := self.first(failure):
            self.barrier()  # a launcher may end rank 0 as soon as another process is gone
            raise failure

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        if self.size > 1:
            dist.barrier(group=self._control)

    def data_parallel(self, model: nn.Module, all_used: bool) -> nn.Module:
        """Wrap `model` so that gradients are averaged over the processes.

        Args:
            model: network on the device of this process.
            all_used: whether the loss depends on every parameter. If not, find_unused_parameters is set.
        """
        if self.size == 1:
            return model
        # torch rebuilds the gradient buckets after the first step of a process. With three or more processes,
        # the buckets affect the order of summation, so a resumed run would round differently from an
        # uninterrupted one. find_unused_parameters keeps the initial buckets.
        exact = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        keep_buckets = exact and self.size > 2
        # Synchronized batch norm keeps the buffers equal. Newer torch warns about the older option name.
        options = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        buffers: dict[str, Any] = {name: False}
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **buffers,
            gradient_as_bucket_view=True,
            find_unused_parameters=not all_used or keep_buckets,
        )


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed because another process is gone."""
    # Gloo raises a plain RuntimeError.
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def run(
    devices: Sequence[torch.device],
    check: Callable[[], None],
    body: Callable[[World], None],
) -> int:
    """Run a command with one process per device; start the processes unless a launcher has done so.

    Args:
        devices: see `choose_devices`.
        check: checks the input; called once on each machine: before processes are started here, or by local
            rank 0 if a launcher has started them.
        body: function that does the work of each process.

    Returns:
        The exit status.
    """
    if not is_checked_elsewhere():
        check()
    if len(devices) > 1 and not is_launched():
        return launch(len(devices))
    with join_world(devices) as joined:
        body(joined)
    return 0


def from_environment(name: str, default: int) -> int:
    """Return the integer in an environment variable of a launcher.

    Args:
        name: name of the variable.
        default: value if the variable is not set.

    Raises:
        UsageError: the variable is not a non-negative integer.
    """
    try:
        return int(count(os.environ.get(name, str(default))))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"environment variable {name}: {error}, or unset it") from error


def is_launched() -> bool:
    """Return whether `launch`, torchrun or a scheduler has started the processes of the run."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_restarted() -> bool:
    """Return whether torchrun or Slurm has restarted this run after a failure or a requeue."""
    return any(
        from_environment(name, 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def is_checked_elsewhere() -> bool:
    """Return whether another process of this machine checks the input: the parent, or local rank 0."""
    return LAUNCHED in os.environ or from_environment("LOCAL_RANK", 0) > 0


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Let one process per machine print an InputError that all processes of the machine raise."""
    try:
        yield
    except InputError as error:
        error.silent = is_checked_elsewhere()
        raise


def processes(devices: Sequence[torch.device]) -> int:
    """Return the number of processes of the run, also before `launch` has started them."""
    return from_environment("WORLD_SIZE", 1) if is_launched() else len(devices)


def choose_devices(gpu: str | None, nproc: int | None) -> list[torch.device]:
    """Return the device of each process on this machine.

    Args:
        gpu: comma-separated GPU ids, "cpu", or None for all visible GPUs (the CPU if there are none).
        nproc: number of CPU processes; implies the CPU.

    Raises:
        UsageError: a flag is invalid. The message names the flag.
    """
    visible = torch.cuda.device_count()
    if nproc is not None:
        if gpu not in (None, "cpu"):
            raise UsageError(
                f"--nproc {nproc}: is for CPU processes, but --gpu {gpu} asks for GPUs; give one of them"
            )
        return [torch.device("cpu")] * nproc
    if gpu == "cpu" or (gpu is None and visible == 0):
        return [torch.device("cpu")]
    if gpu is None:
        return [torch.device("cuda", index) for index in range(visible)]
    try:
        ids = [int(count(part)) for part in gpu.split(",")]
    except argparse.ArgumentTypeError:
        raise UsageError(f"--gpu {gpu}: not a list of ids; give ids such as 0,1,2,3, or cpu") from None
    for index in ids:
        if not 0 <= index < visible:
            there = (
                f"give ids from 0 to {visible - 1}" if visible else "no GPU is visible here; give --gpu cpu"
            )
            raise UsageError(f"--gpu {gpu}: there is no GPU {index}; {there}")
    started = from_environment("LOCAL_WORLD_SIZE", len(ids)) if is_launched() else len(ids)
    if started != len(ids):
        raise UsageError(
            f"--gpu {gpu}: names {len(ids)} GPUs, but the launcher started {started} processes on this "
            "machine; give one id per process, or run without a launcher (unset RANK and WORLD_SIZE)"
        )
    if len(set(ids)) < len(ids):
        raise UsageError(f"--gpu {gpu}: an id is given twice; give each GPU once")
    return [torch.device("cuda", index) for index in ids]


def launch(processes: int) -> int:
    """Start this command once for each rank on this machine, and wait for the processes.

    If one process fails, the others are terminated.

    Args:
        processes: number of processes.

    Returns:
        0 if all processes succeeded, 2 if the first failure was wrong input, 1 for other failures.

    Raises:
        RunError: a process was killed or ran out of memory.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        LAUNCHED: os.getpid(),
        # This process has already shown the warning.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), OPERATOR_MISSING])),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = max(1, torch.get_num_threads() // processes)
    children: list[subprocess.Popen] = []
    try:
        for rank in range(processes):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            children.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(children: Sequence[subprocess.Popen], grace: float = 30.0) -> int:
    """Wait for all processes and return the exit status (see `launch`).

    After a failure, the other processes have `grace` seconds to end by themselves, or 3 seconds if the
    failed process was killed. Then the remaining processes get SIGTERM. SIGTERM and SIGINT are forwarded to
    all processes. A later SIGINT (see IMPATIENCE) kills all processes.
    """
    asked = float("inf")

    def alive() -> list[subprocess.Popen]:
        return [child for child in children if child.poll() is None]

    def send(number: int) -> None:
        for child in alive():
            child.send_signal(number)

    def forward(number: int, _frame: object) -> None:
        nonlocal asked
        impatient = number == signal.SIGINT and time.monotonic() - asked > IMPATIENCE
        asked = min(asked, time.monotonic())
        send(signal.SIGKILL if impatient else number)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        deadline = float("inf")
        failed: list[subprocess.Popen] = []
        while alive() and time.monotonic() < deadline:
            if not failed and (failed := [child for child in children if child.returncode]):
                # After an error that all processes agree on (a damaged picture), they end by themselves.
                deadline = time.monotonic() + (3.0 if failed[0].returncode < 0 else grace)
            time.sleep(0.05)
        send(signal.SIGTERM)
        end = time.monotonic() + 5.0
        while alive() and time.monotonic() < end:
            time.sleep(0.05)
        failed = failed or [child for child in children if child.returncode]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # If one process is killed, its peers fail as a consequence.
    killed = [child for child in failed if child.returncode < 0]
    if killed and asked < float("inf"):
        raise RunError("ended by a signal during startup; run the command again")
    if killed:
        raise RunError(
            f"process {children.index(killed[0])} of {len(children)} was killed by "
            f"{signal.Signals(-killed[0].returncode).name} (perhaps out of memory), which ended the others; "
            "complete files are kept: run the command again (train.py with --resume)"
        )
    if any(child.returncode == EXHAUSTED for child in children):
        raise exhausted("the machine has too little for all processes (see above)")
    return 0 if not failed else 2 if failed[0].returncode == 2 else 1


def _end_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM if `launch` is killed."""
    with contextlib.suppress(OSError, AttributeError):  # prctl exists on Linux only
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHED]):
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def join_world(devices: Sequence[torch.device]) -> Iterator[World]:
    """Join the processes of this run, which `launch` or another launcher started.

    A run with a single process may use this function too. If the body of the context raises an InputError or
    RunError, all processes must raise it, because only local rank 0 prints the message.

    Args:
        devices: device of each local rank.

    Raises:
        UsageError: this machine has more processes than GPUs.
    """
    if LAUNCHED in os.environ:
        _end_with_parent()
    rank, size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    local_rank = from_environment("LOCAL_RANK", rank)
    device = devices[0]
    if device.type == "cuda":
        if local_rank >= len(devices):
            raise UsageError(
                f"--gpu: no GPU for process {local_rank} of this machine, which has {len(devices)}; start "
                "one process per GPU"
            )
        device = devices[local_rank]
        torch.cuda.set_device(device)
    if size == 1:
        yield World(rank, size, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield World(rank, size, device)
    except BaseException as error:
        if isinstance(error, (InputError, RunError)):
            error.silent = local_rank > 0  # see utils.args.exit_status
            dist.destroy_process_group()
            raise
        # Exit without cleanup: the others wait for this process in a collective, and cleanup would wait for
        # them.
        if what := shortage(error):
            what = f"process {rank} of {size}: {what}"
            if LAUNCHED in os.environ:  # `launch` prints the last line
                print(what, file=sys.stderr, flush=True)
                os._exit(EXHAUSTED)
            print(f"{program()}: error: {exhausted(what)}", file=sys.stderr, flush=True)
            os._exit(1)
        if _is_lost_connection(error):
            reason = [line[:200] for line in str(error).strip().splitlines()[:1]]
            print(
                f"process {rank} of {size}: lost the connection to another process",
                *reason,
                sep=": ",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
