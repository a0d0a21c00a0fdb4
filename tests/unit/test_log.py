"""log.jsonl of a resumed run: entries continue the earlier ones, and nothing in it is lost."""

from __future__ import annotations

import json

import pytest

from engine.training.log import RunLog

ENTRIES = [
    json.dumps({"step": step, "loss": 0.5, "lr": 0.1, "samples": ["caf\u00e9"]}) + "\n"
    for step in (1, 2, 3, 4)
]


def of_step(text: str) -> bytes:
    """Return an entry whose step is `text`."""
    return b'{"step": %s, "loss": 0.5, "lr": 0.1}\n' % text.encode()


def resumed(folder, content: bytes, start: int) -> bytes:
    """Return what is left of a log with this content when a run resumes after step `start`."""
    (folder / "log.jsonl").write_bytes(content)
    RunLog(str(folder), start, 10, 2).close()
    return (folder / "log.jsonl").read_bytes()


def text(*entries: str) -> bytes:
    return "".join(entries).encode()


@pytest.mark.parametrize("start", [1, 2, 4, 9])
def test_entries_of_steps_that_are_done_again_are_dropped(tmp_path, start):
    assert resumed(tmp_path, text(*ENTRIES), start) == text(*ENTRIES[:start])
    assert not list(tmp_path.glob("damaged*"))


@pytest.mark.parametrize("length", [9, 20, 30])
def test_half_an_entry_at_the_end_is_dropped(tmp_path, length):
    assert resumed(tmp_path, text(*ENTRIES[:2], ENTRIES[2][:length]), 3) == text(*ENTRIES[:2])
    assert not list(tmp_path.glob("damaged*"))


@pytest.mark.parametrize(
    "line",
    [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xfe\n",
        b"notes of mine\n",
        b"\n",
        b"[" * 100_000 + b"\n",
        of_step("[" * 5000 + "]" * 5000),
        of_step('"2"'),
        of_step("true"),
        of_step("1e999"),
        of_step("NaN"),
        of_step("-3"),
        of_step("0"),
        of_step("2.5"),
        b'{"loss": 1, "lr": 1}\n',
        b'{"step": 2, "lr": 1}\n',
        b"[]\n",
        b"2\n",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_entry_is_kept_under_another_name(tmp_path, line, capsys):
    content = text(*ENTRIES[:2]) + line + text(*ENTRIES[2:])
    assert resumed(tmp_path, content, 3) == text(*ENTRIES[:3])
    assert (tmp_path / "damaged_log.jsonl").read_bytes() == content
    assert "log.jsonl: line 3 is not a log entry; renamed to" in capsys.readouterr().out


def test_file_of_another_kind_is_kept_under_another_name(tmp_path):
    content = bytes(range(128, 256)) * 4  # one line without an end
    assert resumed(tmp_path, content, 3) == b""
    assert (tmp_path / "damaged_log.jsonl").read_bytes() == content
