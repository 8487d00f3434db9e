"""Numbers as people write them: with a currency, never with a multiplier, a unit or a word before them."""

from __future__ import annotations

import pytest

from rating_train.prepare.records.numbers import NotANumber, read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("-1.5e3", -1500),
        ("$12.99", 12.99),
        ("12.99 $", 12.99),
        ("US$ 12.99", 12.99),
        ("R$5", 5),
        ("€ 5", 5),
        ("EUR 5", 5),
        ("5 eur", 5),
        ("Rs. 1,250.50", 1250.5),
        ("12 990 kr", 12990),
        ("12 990 kr.", 12990),
        ("15 Kč", 15),
        ("15zł", 15),
        ("CHF 1'250.50", 1250.5),
        ("₹ 99", 99),
    ],
)
def test_a_currency_may_stand_before_or_after(text: str, number: float) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["12K", "1.5k", "3M", "2 bn", "from 12.99", "max 5", "over 12", "abc 5", "90 min",
     "5 %", "12¢", "$", "kr", "5 kr kr"],
)  # fmt: skip
def test_a_multiplier_a_unit_or_a_word_is_not_guessed(text: str) -> None:
    with pytest.raises(NotANumber):
        read_number(text)
