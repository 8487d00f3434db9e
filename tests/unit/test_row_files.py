"""Rows in files of JSON lines: torn ones, rows of several processes, disks that fail."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rating_train import files, row_files
from rating_train.files import read_json_lines
from rating_train.row_files import RowFiles, append_json_line


def test_appended_lines_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": i, "text": "größer 🫖\nnext line\u2028\x85end", "none": None} for i in range(5)]
    for row in rows:
        append_json_line(path, row)
    assert list(read_json_lines(path)) == rows
    assert path.read_bytes().count(b"\n") == 5


def test_a_torn_last_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"step": 1})
    append_json_line(path, {"step": 2, "loss": 0.123})
    original = path.read_bytes()
    for length in range(len('{"step": 1}\n'), len(original) - 2):
        path.write_bytes(original[:length])
        assert list(read_json_lines(path)) == [{"step": 1}]


def test_a_line_torn_inside_a_character_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"step": 1})
    original = path.read_bytes()
    path.write_bytes(original + '{"title": "🫖'.encode()[:-2])
    assert list(read_json_lines(path)) == [{"step": 1}]


def test_a_line_appended_after_a_torn_one_is_separate(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"step": 1})
    with open(path, "ab") as f:
        f.write(b'{"step": 2, "lo')
    append_json_line(path, {"step": 3})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1} and json.loads(lines[-1]) == {"step": 3}
    assert len(lines) == 2, "the torn line is removed, not extended"
    assert list(read_json_lines(path)) == [{"step": 1}, {"step": 3}]


def test_nan_is_refused_and_nothing_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_json_line(path, {"loss": 1.0})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        append_json_line(path, {"loss": float("nan")})
    assert path.read_bytes() == before


def test_lines_of_several_processes_stay_complete(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from rating_train.row_files import append_json_line\n"
        "for i in range(100): append_json_line(sys.argv[1], {'who': sys.argv[2], 'i': i, 'x': 'y' * 500})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), w]) for w in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    rows = list(read_json_lines(path))
    for who in "ab":
        assert [r["i"] for r in rows if r["who"] == who] == list(range(100))


def test_a_row_is_appended_once_although_opening_failed_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.0,))
    errors = [errno.ESTALE]

    def failing(*arguments: Any) -> Any:
        if errors:
            raise OSError(errors.pop(), "injected")
        return open(*arguments)

    monkeypatch.setattr(row_files, "open", failing, raising=False)
    append_json_line(tmp_path / "rows.jsonl", {"step": 1})
    monkeypatch.undo()
    assert [row["step"] for row in read_json_lines(tmp_path / "rows.jsonl")] == [1]


def test_a_row_whose_write_reported_an_error_after_the_fact_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system reports a failed write as late as ``close``, and the row may be there all the same."""
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.0,))
    errors = [errno.EIO, errno.EIO]  # more than are waited for: the row is tried again with the next one

    class LateError(io.BufferedRandom):
        def close(self) -> None:
            super().close()
            if errors:
                raise OSError(errors.pop(), "injected")

    monkeypatch.setattr(
        row_files, "open", lambda path, mode: LateError(io.FileIO(path, "ab+")), raising=False
    )
    rows = RowFiles()
    for step in (1, 2, 3):
        rows.append(tmp_path / "rows.jsonl", {"step": step})
    monkeypatch.undo()
    assert not errors
    assert [row["step"] for row in read_json_lines(tmp_path / "rows.jsonl")] == [1, 2, 3]
