"""`--require`: what is met, what is not, and what cannot be read."""

from __future__ import annotations

from typing import Any

import pytest

from rating_train.errors import UserError
from rating_train.evaluation.gate import parse_requirements

JUDGEMENT: dict[str, Any] = {
    "metrics": {
        "plcc": {"value": 0.62, "interval_95": [0.55, 0.68]},
        "srcc": {"value": None, "interval_95": None, "undefined": "all predictions are 4.2"},
        "rmse": {"value": 0.3, "interval_95": None},
    },
    "row": {"ces_mac_linear": 0.61, "ces_flop_attention": None},
}


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("plcc>=0.6", ""),
        ("plcc >= 0.62", ""),
        ("plcc>0.62", "plcc>0.62: it is 0.6200"),
        ("plcc.low>=0.55", ""),
        ("plcc.low>=.56", "plcc.low>=.56: it is 0.5500"),
        ("plcc.high<0.7", ""),
        ("rmse<=3e-1", ""),
        ("rmse<0.3", "rmse<0.3: it is 0.3000"),
        ("rmse.high<1", "rmse.high<1: undefined (there is no interval)"),
        ("srcc>=-1", "srcc>=-1: undefined (all predictions are 4.2)"),
        ("ces_mac_linear>=0.6", ""),
        ("ces_flop_attention>=0", "ces_flop_attention>=0: undefined (PLCC is undefined)"),
    ],
)
def test_a_requirement_is_met_or_says_why_not(text: str, failure: str) -> None:
    (requirement,) = parse_requirements([text])
    assert requirement.failure(JUDGEMENT) == failure


def test_all_mistakes_are_one_error() -> None:
    with pytest.raises(UserError) as error:
        parse_requirements(
            ["plcc>=0.6", "plcc=0.6", "pearson>=1", "rmse<", "ces_mac_linear.low>0", "mae<1.2.3"]
        )
    text = str(error.value)
    assert text.startswith("5 problems") and "--require" in text
    for words in (
        "'plcc=0.6' is no condition",
        "'pearson>=1': unknown metric",
        "'rmse<'",
        "CES has no interval",
        "1.2.3",
    ):
        assert words in text
