"""Standard streams and error lines of commands, in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

#: Two processes, one of which has the error that its first argument names.
PROCESSES = """
import sys, torch
from engine.runtime import distributed
from utils import args
def body(world):
    if world.rank == 1:
        if sys.argv[1] == "memory":
            raise MemoryError("Unable to allocate 3.00 GiB")
        raise ZeroDivisionError("a bug")
    world.barrier()
def main():
    args.Parser().parse_known_args()
    return distributed.run([torch.device("cpu")] * 2, lambda: None, body)
sys.exit(args.exit_status(main))
"""


@pytest.mark.parametrize("what", ["memory", "bug"])
def test_a_shortage_of_one_process_is_the_last_line_of_the_command(tmp_path: Path, what: str) -> None:
    (tmp_path / "command.py").write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, tmp_path / "command.py", what],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and ("Traceback" in done.stderr) == (what == "bug")
    if what == "memory":
        assert "process 1 of 2: out of memory (for another 3.00 GiB)" in done.stderr
        assert done.stderr.splitlines()[-1].startswith(
            "command.py: error: the machine has too little for all"
        )


# Standard streams

#: A command that prints, writes a file, starts a process that prints, and ends with an error.
COMMAND = """
CHILD = '''
import os
with open("child", "wb", buffering=0) as file:
    file.write(b"x")
    try:
        os.write(1, b"child" + bytes([10]))
    except OSError as error:
        if error.errno == 9:  # no such stream
            raise
'''
import subprocess, sys
from utils.args import exit_status
from utils.errors import UsageError
def main():
    print("output \\u9053 \\udcff" * 1000)
    subprocess.run([sys.executable, "-c", CHILD])
    with open("result", "w") as file:
        file.write("result")
        file.flush()
    print("more", flush=True)
    if len(sys.argv) > 1:
        raise UsageError("--flag: \\u9053 \\udcff is wrong")
sys.exit(exit_status(main))
"""


def shell(
    folder: Path, redirections: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess:
    command = f'exec "$@" {redirections}'
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        timeout=100,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize(
    "redirections",
    [">/dev/full", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "> >(true)"],
)
@pytest.mark.parametrize("arguments", [(), ("fail",)])
def test_streams_that_take_nothing_change_nothing(tmp_path: Path, redirections: str, arguments) -> None:
    done = shell(tmp_path, redirections, *arguments)
    assert done.returncode == (2 if arguments else 0)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    # Printed text must not go to a file that was opened later and got the number of a closed stream.
    assert (tmp_path / "result").read_bytes() == b"result" and (tmp_path / "child").read_bytes() == b"x"
    if arguments and "2>" not in redirections:
        assert done.stderr.endswith(b"is wrong\n")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "gbk"])
def test_letters_that_an_encoding_lacks(tmp_path: Path, encoding: str) -> None:
    done = shell(tmp_path, "", "fail", PYTHONIOENCODING=encoding)
    letter = "道" if encoding in ("utf-8", "gbk") else "\\u9053"
    assert done.returncode == 2
    assert done.stdout.decode(encoding).startswith(f"output {letter} \\udcff")
    assert done.stderr.decode(encoding).endswith(f"error: --flag: {letter} \\udcff is wrong\n")


def test_order_of_output_and_errors_on_one_file(tmp_path: Path) -> None:
    done = shell(tmp_path, "2>&1", "fail")
    ends = [line[-8:] for line in done.stdout.decode().splitlines()]
    assert ends == ["道 \\udcff", "child", "more", "is wrong"]
