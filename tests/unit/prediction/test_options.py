"""The options of `predict`: all problems in one error, before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rating_train.errors import UserError
from rating_train.prediction.options import PredictOptions, check_options


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.csv").write_text("id,title,image\n")
    return str(tmp_path / "a.csv")


def options(path: str, **changes: Any) -> PredictOptions:
    good = {"model": "run", "out": "out.csv", "source": (path,), "images": str(Path(path).parent)}
    return PredictOptions(**{**good, **changes})


def test_good_options(source: str) -> None:
    check_options(options(source))
    check_options(options(source, out="out.parquet", images="", fetch=True, fetch_set=("per_host=2",)))
    check_options(options(source, source=(), images="", data="data", split="val"))
    check_options(options(source, submission=True, fill=3.5, convention="flop_attention"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"source": ()}, "give --source or --data"),
        ({"data": "data"}, "give --source or --data"),
        ({"images": "no/such/folder"}, "--images no/such/folder does not exist"),
        ({"split": "val"}, "--split goes with --data"),
        ({"fetch_set": ("per_host=2",)}, "--fetch-set goes with --fetch"),
        ({"fetch": True, "fetch_set": ("speed=2",)}, "unknown key `speed`"),
        ({"batch_items": 0}, "`batch_items` is 0, expected at least 1"),
        ({"part_rows": 0}, "`part_rows` is 0, expected at least 1"),
        ({"workers": -1}, "`workers` is -1, expected at least 0"),
        ({"convention": "flops"}, "--convention flops is not one of mac_linear"),
        ({"fill": 3.0}, "--fill goes with --submission"),
        ({"fill": 0.5, "submission": True}, "`fill` is 0.5, expected between 1 and 5"),
        ({"out": "out.txt"}, "--out out.txt does not end in .csv or .parquet"),
        ({"out": "out.parquet", "submission": True}, "--out out.parquet does not end in .csv"),
        ({"source": ("nowhere.csv",)}, r"source file not found \(nowhere.csv\)"),
    ],
)
def test_each_problem_is_named(source: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check_options(options(source, **changes))


def test_all_problems_are_in_one_error(source: str) -> None:
    with pytest.raises(UserError, match=r"3 problems: .*`batch_items`.*`workers`.*source file not found"):
        check_options(options(source, batch_items=0, workers=-1, source=("nowhere.csv",)))
