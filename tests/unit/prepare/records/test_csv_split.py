"""Rows of CSV text: each line is in exactly one row, whatever its quotes are."""

from __future__ import annotations

import csv
import io
import random
import time

import pytest

from rating_train.prepare.records import csv_split
from rating_train.prepare.records.csv_split import Row, split_rows


def split(text: str) -> list[Row]:
    return list(split_rows(io.StringIO(text, newline="\n"), ",", "a.csv"))


def test_rows_in_quotes_may_span_lines() -> None:
    text = 'a,"b\nc"\n1,"2\n\n, ""3"""\n4,5\r\n\n6,""\n'
    cells = [["a", "b\nc"], ["1", '2\n\n, "3"'], ["4", "5"], ["6", ""]]
    assert split(text) == [Row(line, row) for line, row in zip((1, 3, 6, 8), cells)]


def test_random_tables_are_read_as_they_were_written() -> None:
    rng = random.Random(0)
    table = [["".join(rng.choices('ab,"\n ', k=rng.randrange(6))) for _ in range(3)] for _ in range(300)]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(table)
    assert [row.cells for row in split(out.getvalue())] == table


@pytest.mark.parametrize(
    ("line", "cells"),
    [('"A" pan,1', ["A pan", "1"]), ('1,"A "big" pan', ["1", 'A big" pan']), ('a "b",1', ['a "b"', "1"])],
)
def test_quotes_within_a_line_are_read_as_before(line: str, cells: list[str]) -> None:
    assert split(f"h,i\n{line}\n3,4\n") == [Row(1, ["h", "i"]), Row(2, cells), Row(3, ["3", "4"])]


@pytest.mark.parametrize("again", [1 << 20, 0], ids=["read again", "given up"])
def test_no_line_is_lost_whatever_the_quotes(again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_split, "_AGAIN_CHARS", again)
    monkeypatch.setattr(csv_split, "_AGAIN_TIMES", min(again, 4))
    rng = random.Random(1)
    for _ in range(300):
        lines = ["".join(rng.choices('a,"', weights=(3, 2, 2), k=5)) for _ in range(12)]
        rows = split("h,i\n" + "\n".join(lines) + "\n")[1:]
        spans = [row.cells and sum(cell.count("\n") for cell in row.cells) for row in rows]
        following = [row.line + 1 + (span or 0) for row, span in zip(rows, spans)]
        assert [2, *following] == [*(row.line for row in rows), 14]
        assert all(row.problem or not span or len(row.cells) == 2 for row, span in zip(rows, spans))


def test_a_stray_quote_in_every_line_does_not_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_split, "_AGAIN_CHARS", 1 << 16)
    text = "h,i\n" + 'x","y""z\n' * 20_000
    begin = time.process_time()
    rows = split(text)
    assert len(rows) == 20_001 and all(row.problem for row in rows[1:])
    assert time.process_time() - begin < 5
