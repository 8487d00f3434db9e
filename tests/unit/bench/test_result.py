"""Results of a benchmark: ratios to their limits, a round trip through JSON, and what counts as slower."""

from __future__ import annotations

from pathlib import Path

import pytest

from rating_train.bench.result import Row, as_json, compare, is_slower, read_result, render, render_comparison
from rating_train.errors import UserError
from rating_train.files import atomic_write_json

ROWS = [
    Row("step", "step", 100.0, "items/s", (90.0, 110.0), 400.0, "the limit"),
    Row("step", "forward", 20.0, "ms/step", larger_is_better=False),
    Row("step", "padding", 5.0, "%", larger_is_better=None),
]


def test_a_table_has_the_share_of_the_limit() -> None:
    text = render(ROWS)
    line = next(line for line in text.splitlines() if line.startswith("step: step"))
    assert "25.0%" in line and "400 the limit" in line and "90 to 110" in line


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", as_json({"device": "cpu"}, ROWS))
    found = read_result(tmp_path / "a.json")
    assert [found[row.key].value for row in ROWS] == [100.0, 20.0, 5.0]
    assert found[ROWS[0].key].ratio == 0.25


@pytest.mark.parametrize(
    ("rate", "ms", "slower"), [(100, 20, 0), (91, 21, 0), (89, 20, 1), (89, 23, 2), (200, 5, 0)]
)
def test_slower_is_a_lower_rate_or_a_longer_time(rate: float, ms: float, slower: int) -> None:
    now = [
        Row("step", "step", rate, "items/s"),
        Row("step", "forward", ms, "ms/step", larger_is_better=False),
    ]
    found = compare(
        {row.key: row for row in ROWS}, [*now, Row("step", "padding", 50.0, "%", larger_is_better=None)]
    )
    assert len(found) == 2, "padding is no speed"
    assert sum(is_slower(d, 0.1) for d in found) == slower
    assert render_comparison(found, 0.1).count("SLOWER") == slower


def test_figures_of_only_one_run_are_left_out() -> None:
    assert compare({}, ROWS) == []


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"part": 1}]}', '{"rows": 3}'])
def test_another_file_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(UserError, match="rating-train bench"):
        read_result(tmp_path / "b.json")
