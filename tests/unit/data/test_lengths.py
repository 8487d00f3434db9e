"""Lengths of micro-batches: enough for every item, few different ones, known before the run."""

from __future__ import annotations

import random

import pytest

from rating_train.data.lengths import cut_length, cut_lengths, longest_first, possible_lengths


@pytest.mark.parametrize("multiple", [1, 8, 16, 64, 300])
def test_a_length_holds_every_item_and_is_one_of_the_possible(multiple: int) -> None:
    draw, seen = random.Random(5), set()
    for _ in range(300):
        used = [draw.randint(80, 212) for _ in range(draw.randint(1, 8))]
        length = cut_length(used, 212, multiple)
        assert max(used) <= length <= 212 and (length == 212 or length - max(used) < multiple)
        seen.add(length)
    assert seen <= set(possible_lengths(80, 212, multiple))


def test_the_default_gives_ten_lengths_at_the_reference_setting() -> None:
    assert possible_lengths(70, 212, 16) == [80, 96, 112, 128, 144, 160, 176, 192, 208, 212]


def test_nothing_is_cut_without_a_multiple_or_without_lengths() -> None:
    assert cut_length([3, 5], 212, 0) == 212 and cut_length([], 212, 16) == 212
    assert possible_lengths(70, 212, 0) == [212]


def test_order_and_lengths_of_micro_batches() -> None:
    used = [90, 120, 90, 200]
    assert longest_first(used) == [3, 1, 0, 2]
    assert cut_lengths(used, 2, 212, 16) == [128, 128, 208, 208]
    assert cut_lengths([used[i] for i in longest_first(used)], 2, 212, 16) == [208, 208, 96, 96]
    assert cut_lengths(used, 3, 212, 0) == [212] * 4
