"""The report of a run, from logs as a run writes them: killed and resumed, with holes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rating_train.errors import UserError
from rating_train.reports.run_report import make_report
from rating_train.run_dir import EVAL_LOG, PREDICTIONS_DIR, TRAIN_LOG
from rating_train.scoring.metrics import score

CATEGORIES = ["Books", "Home & Kitchen", "Gifts $10 to $20 \\frac{"]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _train_rows(steps: int = 60) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "epoch": step / steps,
            "loss": 0.1 + math.exp(-step / 8) + 0.02 * rng.random(),
            "lr": {"vision": 1e-5, "connector": 1e-4 * (1 - step / steps), "head": 4e-4 * (1 - step / steps)},
            "grad_norm": 0.5 + rng.random(),
            "samples_per_second": 100 + rng.random(),
            "data_wait_seconds": 0.01,
            "step_seconds": 0.1,
        }
        for step in range(1, steps + 1)
    ]


def _eval_rows() -> list[dict[str, Any]]:
    return [
        {"step": 20, "split": "val", "plcc": None, "rmse": 0.5},
        {"step": 40, "split": "val", "plcc": 0.61, "srcc": 0.58, "rmse": 0.4, "mae": 0.3},
        {"step": 60, "split": "val", "plcc": 0.60, "srcc": 0.57, "rmse": 0.39, "mae": 0.29},
        {"step": 60, "split": "test", "plcc": 0.55, "srcc": 0.50, "rmse": 0.41, "mae": 0.31},
    ]


def _prediction_rows(n: int = 90, categories: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    ratings = rng.uniform(2, 5, n)
    scores = 2 + 0.5 * ratings + rng.normal(0, 0.2, n)
    return [
        {
            "id": f"item{i}",
            "score": float(scores[i]),
            "rating": float(ratings[i]),
            "category": CATEGORIES[i % 3] if categories else None,
        }
        for i in range(n)
    ]


def _assert_is_a_picture(path: Path) -> None:
    """A PNG of a fair size, mostly background, with ink in several colours spread over its area."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert width >= 600 and height >= 250
    ink = np.any(pixels < 250, axis=-1)
    assert 0.01 < ink.mean() < 0.8
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    for half in (ink[:, : width // 2], ink[:, width // 2 :], ink[: height // 2], ink[height // 2 :]):
        assert half.any()


def _make_run(run: Path) -> Path:
    _write_lines(run / TRAIN_LOG, _train_rows())
    _write_lines(run / EVAL_LOG, _eval_rows())
    _write_lines(run / PREDICTIONS_DIR / "val_step_00000060.jsonl", _prediction_rows())
    return run


def test_full_report(tmp_path: Path) -> None:
    report = make_report(_make_run(tmp_path / "run $1 $2"))
    names = {"curves.png", "scatter.png", "error_by_category.png"}
    assert {p.name for p in report.iterdir()} == names | {"summary.json"}
    for name in names:
        _assert_is_a_picture(report / name)
    summary = json.loads((report / "summary.json").read_text())
    assert summary["training"]["last_step"] == 60
    assert summary["training"]["median_data_wait_share"] == pytest.approx(0.1)
    assert summary["evaluation"]["val"]["best_by_plcc"]["step"] == 40
    assert summary["evaluation"]["val"]["last"]["step"] == 60
    assert set(summary["predictions"]["by_category"]) == set(CATEGORIES)
    rows = _prediction_rows()
    expected = score([r["score"] for r in rows], [r["rating"] for r in rows])
    assert summary["predictions"]["scores"] == expected.as_dict()
    assert summary["figures_left_out"] == {}


def test_many_predictions_are_drawn_as_a_density(tmp_path: Path) -> None:
    _write_lines(tmp_path / PREDICTIONS_DIR / "val.jsonl", _prediction_rows(2500))
    report = make_report(tmp_path)
    _assert_is_a_picture(report / "scatter.png")
    assert "curves.png" in json.loads((report / "summary.json").read_text())["figures_left_out"]


def test_more_categories_than_fit(tmp_path: Path) -> None:
    rows = [{**row, "category": f"category {i % 40}"} for i, row in enumerate(_prediction_rows(400))]
    _write_lines(tmp_path / PREDICTIONS_DIR / "val.jsonl", rows)
    _assert_is_a_picture(make_report(tmp_path) / "error_by_category.png")


def test_steps_logged_again_after_a_kill_count_once(tmp_path: Path) -> None:
    rows = _train_rows()
    again = [{**row, "loss": 9.0} for row in rows[40:]]
    _write_lines(tmp_path / TRAIN_LOG, [*rows[:50], *again])
    with open(tmp_path / TRAIN_LOG, "a") as f:
        f.write('{"step": 61, "lo')
    summary = json.loads((make_report(tmp_path) / "summary.json").read_text())
    assert summary["training"]["rows"] == 60
    assert summary["training"]["last_loss"] == 9.0


def test_missing_and_odd_values_are_left_out(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": None}, {"step": 2, "loss": float("nan"), "lr": 1e-4}, {"event": "resumed"}]
    _write_lines(tmp_path / TRAIN_LOG, rows)
    _write_lines(tmp_path / EVAL_LOG, [{"step": 2}])
    _write_lines(tmp_path / PREDICTIONS_DIR / "all.jsonl", [{"id": "a", "score": 4.0}])
    report = make_report(tmp_path)
    summary = json.loads((report / "summary.json").read_text())
    assert summary["training"]["last_loss"] is None
    assert summary["evaluation"]["val"]["best_by_plcc"] is None
    assert summary["predictions"]["scores"] is None
    assert "no rows with a rating" in summary["figures_left_out"]["scatter.png"]
    assert (report / "curves.png").is_file()


def test_collapsed_predictions_have_no_correlation_and_still_a_picture(tmp_path: Path) -> None:
    rows = [{**row, "score": 4.2} for row in _prediction_rows()]
    _write_lines(tmp_path / PREDICTIONS_DIR / "val.jsonl", rows)
    report = make_report(tmp_path)
    scores = json.loads((report / "summary.json").read_text())["predictions"]["scores"]
    assert scores["plcc"] is None and "4.2" in scores["undefined"]["plcc"]
    _assert_is_a_picture(report / "error_by_category.png")


def test_newest_predictions_win_and_stale_figures_go(tmp_path: Path) -> None:
    run = _make_run(tmp_path)
    report = make_report(run)
    assert (report / "error_by_category.png").is_file()
    newer = run / PREDICTIONS_DIR / "a_file_without_categories.jsonl"
    _write_lines(newer, _prediction_rows(categories=False))
    later = (run / PREDICTIONS_DIR / "val_step_00000060.jsonl").stat().st_mtime + 10
    os.utime(newer, (later, later))
    make_report(run)
    summary = json.loads((report / "summary.json").read_text())
    assert summary["predictions"]["file"] == newer.name
    assert not (report / "error_by_category.png").exists()
    assert "no categories" in summary["figures_left_out"]["error_by_category.png"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="nothing to report"):
            make_report(folder)
    assert list(tmp_path.iterdir()) == []
