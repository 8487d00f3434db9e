"""The lines that people read: no long numbers, no printed dicts, the best so far, and the time left."""

from __future__ import annotations

import re
from typing import Any

from rating_train.training.lines import evaluation_lines, step_line

LONG = re.compile(r"\d\.\d{5,}|\d{7,}")


def row(step: int, plcc: float | None, **more: Any) -> dict[str, Any]:
    rest = {"srcc": 0.5, "kendall": 0.4, "rmse": 0.31234567890123, "mae": 0.2, "r2": 0.1}
    return {"step": step, "split": "val", "n": 12_345, "plcc": plcc, **rest, **more}


def test_a_step_is_one_line_of_short_numbers() -> None:
    text = step_line(
        {"step": 40, "loss": 0.12345678901, "grad_norm": 1.2345678901234567, "lr": 3.3333333e-05,
         "samples_per_second": 12345.678, "data_wait_fraction": 0.0213, "step_seconds": 1.5}, 100
    )  # fmt: skip
    assert text == (
        "step 40/100: loss 0.1235, grad norm 1.235, lr 3.333e-05, 12,346 items/s, waiting for data 2%, 1 min 30 s left"
    )
    undefined = step_line(
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.0, "samples_per_second": 1.0,
         "data_wait_fraction": None, "step_seconds": 0.1}, 1
    )  # fmt: skip
    assert "loss undefined, grad norm undefined, lr 0" in undefined


def test_an_evaluation_is_a_table_with_the_best_so_far_and_the_time_left() -> None:
    earlier = [row(10, 0.61), row(20, 0.58)]
    text = evaluation_lines(
        row(30, 0.595, ces_mac_linear=0.6, padded_tokens=212), earlier, "plcc", 12.0, 330.0
    )
    lines = text.splitlines()
    assert lines[0] == "evaluation at step 30 (12 s): 12,345 items; best PLCC so far 0.61 at step 10"
    assert lines[1].split("  ")[-1] == "best (step 10)" and "before" in lines[1]
    plcc = next(line for line in lines if "PLCC *" in line)
    assert plcc.split()[2:] == ["0.5950", "0.5800", "0.6100"]
    assert (
        "paper's [mac_linear] 0.6000 padded (212 tokens)" in text
        and lines[-1].strip() == "5 min 30 s of training left"
    )
    assert not LONG.search(text) and "{" not in text
    assert all(line.startswith("  ") for line in lines[1:])


def test_the_first_evaluation_is_the_best_and_a_smaller_error_is_better() -> None:
    assert "the best PLCC so far" in evaluation_lines(row(10, 0.61), [], "plcc", 1.0, None)
    text = evaluation_lines(row(20, 0.9), [row(10, 0.1, rmse=0.2)], "rmse", 1.0, None)
    assert "best RMSE so far 0.2 at step 10" in text and "RMSE *" in text and "left" not in text
    again = evaluation_lines(row(20, 0.61), [row(10, 0.61)], "plcc", 1.0, None)
    assert "best PLCC so far 0.61 at step 10" in again, "an equal value is no better one"


def test_what_is_undefined_has_its_reason() -> None:
    told = {"plcc": "all predictions are 4.2", "srcc": "all predictions are 4.2"}
    text = evaluation_lines(row(10, None, srcc=None, undefined=told), [], "plcc", 1.0, 5.0)
    assert "no PLCC so far" in text and "undefined: all predictions are 4.2 (PLCC, SRCC)" in text
