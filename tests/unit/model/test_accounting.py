"""The cost of an item: padded and true length, both conventions, and what a budget affords."""

from __future__ import annotations

import pytest

from rating_train.model.accounting import (
    ces_line,
    image_sizes,
    item_cost,
    longest_affordable,
    plcc_needed,
)
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.cost import count_forward, count_parameters
from rating_train.scoring.ces import CONVENTIONS, ces_table, cost_factor

ARCH = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]


def test_padded_and_true_length_are_the_closed_form_at_each_items_own_length() -> None:
    cost = item_cost(ARCH, 384, 212, [100, 100, 212])
    assert cost.true is not None and cost.true_tokens == pytest.approx(412 / 3)
    for name in CONVENTIONS:
        at = {length: count_forward(ARCH, 384, length).total(name) for length in (100, 212)}
        assert cost.padded[name] == at[212]
        assert cost.true[name] == pytest.approx((2 * at[100] + at[212]) / 3)
    same = item_cost(ARCH, 384, 212, [212] * 5)
    assert same.true == pytest.approx(same.padded)
    none = item_cost(ARCH, 384, 212)
    assert none.true is None and none.rows(0.5, true_length=True) == []


def test_a_row_names_the_convention_and_the_length_of_every_ces() -> None:
    row = item_cost(ARCH, 384, 212, [120]).as_row(0.6)
    total = count_parameters(ARCH)["total"]
    for r in ces_table(0.6, total, count_forward(ARCH, 384, 212).totals()):
        assert row[f"ces_{r.convention}"] == r.ces
    assert row["ces_mac_linear_true_length"] > row["ces_mac_linear"], "shorter is cheaper"
    line = ces_line(row)
    assert "\n" not in line and "paper's [mac_linear]" in line and "strict [flop_attention]" in line
    assert "padded (212 tokens)" in line and "true length (120 tokens)" in line
    undefined = ces_line(item_cost(ARCH, 384, 212).as_row(None))
    assert "undefined padded" in undefined and "true length" not in undefined
    assert "undefined padded" in ces_line({}), "a row of an older version"


def test_plcc_that_a_ces_needs_is_the_inverse_of_ces() -> None:
    total, operations = 228e6, 160e9
    needed = plcc_needed(0.4, total, operations)
    assert needed is not None
    (row,) = ces_table(needed, total, {"flop_attention": operations})
    assert row.ces == pytest.approx(0.4)
    assert plcc_needed(0.9, total, operations) is None


def test_the_longest_affordable_sequence_is_the_last_with_c_of_at_most_one() -> None:
    total = count_parameters(ARCH)["total"]

    def c(tokens: int) -> float:
        return cost_factor(total, count_forward(ARCH, 384, tokens).total("mac_linear"))

    longest = longest_affordable(ARCH, 384, "mac_linear", 50)
    assert longest is not None and c(longest) <= 1 < c(longest + 1)
    assert longest_affordable(ARCH, 384, "flop_attention", 37) is None
    sizes = list(image_sizes(ARCH, 400))
    assert sizes == [64, 128, 192, 256, 320, 384]
