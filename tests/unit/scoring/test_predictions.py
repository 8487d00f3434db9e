"""Predictions: duplicates, coverage, files."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.scoring.predictions import (
    DUPLICATE_TOLERANCE_STARS,
    Prediction,
    check_coverage,
    deduplicate,
    read_predictions,
    write_predictions,
    write_submission,
)

ROWS = [
    Prediction("B0001", 4.123456789012345, 4.5, "Books"),
    Prediction('odd, "id"\nü', 1 / 3, 1.0, 'Home, "Kitchen"'),
    Prediction("B0003", 2.0),
]


def test_duplicates_keep_the_first_in_order() -> None:
    near = Prediction("B0001", ROWS[0].score + 0.5 * DUPLICATE_TOLERANCE_STARS, 4.5, "Books")
    assert deduplicate([ROWS[0], ROWS[2], near, ROWS[2]]) == [ROWS[0], ROWS[2]]


@pytest.mark.parametrize(
    "other",
    [
        Prediction("B0001", ROWS[0].score + 2 * DUPLICATE_TOLERANCE_STARS, 4.5, "Books"),
        Prediction("B0001", math.nan, 4.5, "Books"),
        Prediction("B0001", ROWS[0].score, 4.4, "Books"),
        Prediction("B0001", ROWS[0].score, None, "Books"),
        Prediction("B0001", ROWS[0].score, 4.5, "Music"),
    ],
)
def test_duplicates_that_disagree(other: Prediction) -> None:
    with pytest.raises(UserError, match="B0001"):
        deduplicate([ROWS[0], other])


def test_coverage() -> None:
    check_coverage(ROWS, expected_count=3)
    check_coverage(ROWS)


def test_repeated_ids_are_counted_and_the_first_five_named() -> None:
    seven = [replace(ROWS[0], id=f"B{i}") for i in range(7)]
    with pytest.raises(UserError) as error:
        check_coverage([*seven, *seven])
    text = str(error.value)
    assert "7 repeated (B0, B1, B2, B3, B4, ...)" in text
    assert "B5" not in text


def test_repeated_and_wrong_count() -> None:
    with pytest.raises(UserError, match=r"1 repeated \(B0001\)"):
        check_coverage([*ROWS, ROWS[0]])
    with pytest.raises(UserError, match="3 distinct items, expected 4"):
        check_coverage(ROWS, expected_count=4)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_files_read_back_bit_equal(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"predictions{suffix}"
    write_predictions(path, ROWS)
    assert read_predictions(path) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(UserError, match="row 2"):
        write_predictions(path, [ROWS[0], Prediction("bad", math.nan)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"id": "x", "score": NaN}\n', "score is nan"),
        ("a.jsonl", '{"id": "x"}\n', "no score"),
        ("a.jsonl", '{"id": 7, "score": 1}\n', "id is 7"),
        ("a.jsonl", '{"id": "ok", "score": 1}\n[1]\n', "row 2"),
        ("a.csv", "id,score\nx,high\n", "'high'"),
        ("a.csv", "item,score\nx,1\n", "no column id"),
        ("a.txt", "", "suffix"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_predictions(tmp_path / name)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        read_predictions(tmp_path / "none.csv")


def test_submission(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, ROWS, params=228_266_113, flops=72.025e9)
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["item_id", "score", "params", "flops"]
    assert [row["item_id"] for row in rows] == [row.id for row in ROWS]
    assert [row["score"] for row in rows] == ["4.12", "1.00", "2.00"]
    assert {(float(r["params"]), float(r["flops"])) for r in rows} == {(228.266113, 72.025)}


def test_a_submitted_score_is_a_rating(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(
        path, [Prediction("low", 0.4), Prediction("high", 5.004), Prediction("mid", 3.456)], 1, 1
    )
    assert [line.split(",")[1] for line in path.read_text().splitlines()[1:]] == ["1.00", "5.00", "3.46"]


def test_bad_submissions(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    with pytest.raises(UserError, match="no predictions"):
        write_submission(path, [], 1, 1)
    with pytest.raises(UserError, match="repeated"):
        write_submission(path, [ROWS[0], ROWS[0]], 1, 1)
    with pytest.raises(UserError, match="flops"):
        write_submission(path, ROWS, 1, 0)
    assert not path.exists()
