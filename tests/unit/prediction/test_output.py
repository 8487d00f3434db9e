"""From the lines of parts to the output: order, formats, exact numbers, and nothing half written."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.prediction.output import merge, merge_submission, part_text, read_output
from rating_train.prediction.work_dir import WorkDir

SCORES = [4.123456478118896, None, 1 / 3, 5.0, 2.345, 3.0]
REASONS = ["", 'image_missing: a, "b"\nc', "", "", "", ""]
IDS = ["B1", 'odd, "id"', "B3", "", "ü", "B6"]


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    work = WorkDir(tmp_path / "out.csv")
    with work.locked():
        work.commit(0, part_text(IDS[:4], SCORES[:4], REASONS[:4]))
        work.commit(1, part_text(IDS[4:], SCORES[4:], REASONS[4:]))
    return work


def test_csv_has_every_row_in_order_with_exact_scores(work: WorkDir) -> None:
    summary = merge(work, parts=2, rows=6)
    rows = list(read_output(work.out))
    assert [row.id for row in rows] == IDS and [row.score for row in rows] == SCORES
    assert rows[1].reason == 'image_missing: a, "b" c', "a reason is one line"
    assert summary == (6, 1, ('odd, "id": image_missing: a, "b" c',))
    assert sorted(p.name for p in work.out.parent.iterdir()) == ["out.csv", "out.csv.parts"]


def test_parquet_has_the_same_rows(work: WorkDir) -> None:
    import duckdb

    work.out = work.out.with_suffix(".parquet")
    merge(work, parts=2, rows=6)
    rows = duckdb.sql(f"SELECT id, score, reason FROM '{work.out}'").fetchall()
    assert [(r[0] or "", r[1]) for r in rows] == list(zip(IDS, SCORES))
    assert rows[1][2] == 'image_missing: a, "b" c'


def test_lines_that_are_not_the_inputs_rows_are_refused(work: WorkDir) -> None:
    with pytest.raises(UserError, match=r"have 6 lines, the input 7 rows.*out\.csv\.parts"):
        merge(work, parts=2, rows=7)
    assert not work.out.exists() and len(list(work.out.parent.iterdir())) == 1


def test_a_submission_needs_a_score_for_each_item(work: WorkDir) -> None:
    work.commit(0, part_text(["B1", "B2", "B3", "B4"], SCORES[:4], REASONS[:4]))
    with pytest.raises(UserError, match=r"1 of 6 rows have no score: B2: image_missing.*--fill SCORE"):
        merge_submission(work, 2, 6, params=1_000_000, operations=2e9, fill=None)
    assert not work.out.exists()
    merge_submission(work, 2, 6, params=1_500_000, operations=2e9, fill=3.25)
    with open(work.out, newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["score"] for row in rows][:4] == ["4.12", "3.25", "1.00", "5.00"]
    assert [row["item_id"] for row in rows] == ["B1", "B2", "B3", "B4", "ü", "B6"]
    assert {(float(row["params"]), float(row["flops"])) for row in rows} == {(1.5, 2.0)}
    assert all(1 <= float(row["score"]) <= 5 and len(row["score"]) == 4 for row in rows)


def test_a_submission_without_an_id_is_refused(work: WorkDir) -> None:
    with pytest.raises(UserError, match="id is ''"):
        merge_submission(work, 2, 6, params=1, operations=1, fill=3.0)
    assert not work.out.exists()
