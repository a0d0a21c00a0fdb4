"""A killed and resumed run ends as an uninterrupted one. tests/kill_runs.py tries more kills."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import kill_runs
import pytest
import torch


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.slow
def test_killed_runs_end_the_same(tmp_path: Path, capsys: pytest.CaptureFixture):
    # With this seed the kills come after about 0.6 and 0.5 of the time of an uninterrupted run.
    status = kill_runs.main(["--kills", "2", "--seed", "10", "--processes", "1", "--out", f"{tmp_path}/out"])
    assert status == 0, capsys.readouterr()
    assert [kill["survived"] for kill in json.loads((tmp_path / "out").read_text())["kills"]] == [True] * 2


def test_differences_are_seen(tmp_path: Path):
    runs = one, other = tmp_path / "one", tmp_path / "other"
    weights = torch.linspace(0, 1, 5)
    for run in runs:
        run.mkdir()
        for name in kill_runs.WEIGHTS:
            torch.save({"weight": weights}, run / name)
        (run / "log.jsonl").write_text(f'{{"step": 1, "loss": 0.5, "memory_mb": {len(run.name)}}}\n')
    assert kill_runs.difference(one, other) is None
    (one / "log.jsonl").write_text('{"step": 1, "loss": 0.25, "memory_mb": 3}\n')
    assert kill_runs.difference(one, other) == "log.jsonl is another"
    last = one / kill_runs.WEIGHTS[-1]
    torch.save({"weight": torch.nextafter(weights, weights + 1)}, last)
    assert kill_runs.difference(one, other) == f"{last.name} is another"
    last.unlink()
    assert kill_runs.difference(one, other) == f"{last.name} is missing"
