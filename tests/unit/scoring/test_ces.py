"""CES against the published values, its two branches and its cap."""

from __future__ import annotations

import itertools
import math

import pytest

from rating_train.errors import UserError
from rating_train.scoring.ces import (
    CONVENTIONS,
    MAX_EFFICIENCY,
    PAPER_CONVENTION,
    ces_table,
    cost_factor,
    efficiency,
)

PAPER_PARAMS = 228.4e6


def test_published_submission() -> None:
    c = cost_factor(PAPER_PARAMS, 68e9)
    assert round(c, 3) == 0.881
    assert round(efficiency(c), 3) == 1.006


def test_published_ces_of_the_hidden_test() -> None:
    # PLCC 0.39 and CES 0.40 are both rounded to two places: some PLCC that rounds to 0.39 must give
    # a CES that rounds to 0.40.
    e = efficiency(cost_factor(PAPER_PARAMS, 68e9))
    assert 0.385 * e < 0.405
    assert 0.395 * e > 0.395


def test_counting_true_flops_leaves_about_0_62() -> None:
    (row,) = ces_table(None, 228_266_113, {"flop_attention": 161e9})
    assert row.e == pytest.approx(0.62, abs=0.005)


def test_above_one_the_other_branch() -> None:
    assert efficiency(math.e) == pytest.approx(1 / 3)
    assert efficiency(2.0) == pytest.approx(1 / (1 + 2 * math.log(2)))


def test_cap_is_reached_at_e_to_minus_2() -> None:
    assert efficiency(math.exp(-2)) == pytest.approx(MAX_EFFICIENCY)
    assert efficiency(math.exp(-1.99)) < MAX_EFFICIENCY
    assert efficiency(1e-9) == MAX_EFFICIENCY


def test_efficiency_is_continuous_and_never_rises() -> None:
    assert efficiency(1.0) == 1.0
    assert efficiency(1 - 1e-12) == pytest.approx(efficiency(1 + 1e-12))
    values = [efficiency(0.01 * i) for i in range(1, 500)]
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_rows_carry_their_convention_in_a_fixed_order() -> None:
    counts = {"flop_attention": 160e9, "mac_linear": 72e9, "mac_attention": 80e9, "flop_linear": 144e9}
    rows = ces_table(0.7, 228e6, counts)
    assert [row.convention for row in rows] == list(CONVENTIONS)
    assert all(row.label == CONVENTIONS[row.convention] for row in rows)
    assert "the paper's" in rows[0].label and rows[0].convention == PAPER_CONVENTION
    for row in rows:
        assert row.ces == pytest.approx(0.7 * row.e)
    assert rows[0].e > 1 > rows[3].e


def test_undefined_plcc_is_none_and_a_negative_one_counts_as_zero() -> None:
    assert ces_table(None, 228e6, {"mac_linear": 72e9})[0].ces is None
    negative = ces_table(-0.3, 228e6, {"mac_linear": 72e9})[0]
    assert negative.ces == 0.0 and negative.plcc == -0.3


@pytest.mark.parametrize(("params", "flops"), [(0, 1e9), (1e9, 0), (-1, 1), (math.nan, 1), (1, math.inf)])
def test_impossible_costs(params: float, flops: float) -> None:
    with pytest.raises(UserError, match="above 0"):
        cost_factor(params, flops)


def test_bad_c_plcc_and_convention() -> None:
    with pytest.raises(UserError):
        efficiency(0.0)
    for plcc in (math.nan, 1.5):
        with pytest.raises(UserError, match="PLCC"):
            ces_table(plcc, 1e9, {"mac_linear": 1e9})
    with pytest.raises(UserError, match="mac_linear"):
        ces_table(0.5, 1e9, {"gflops": 1e9})
