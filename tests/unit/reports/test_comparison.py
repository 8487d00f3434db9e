"""Runs compared on the items that all of them scored: metrics, sentences, settings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rating_train import cli, run_dir
from rating_train.config.task import Target
from rating_train.errors import UserError
from rating_train.reports.comparison import compare_runs, different_settings, render, sentence
from rating_train.scoring.bootstrap import Difference, Interval
from rating_train.scoring.predictions import Prediction, write_predictions


def make_run(path: Path, noise: float, items: range = range(300), step: int = 5, split: str = "val") -> Path:
    generator = np.random.default_rng(0)
    true, error = generator.normal(4, 0.4, 400), generator.normal(0, 1, 400)
    rows = [Prediction(f"item {i}", true[i] + noise * error[i], true[i]) for i in items]
    file = run_dir.predictions_file(path, split, step)
    file.parent.mkdir(parents=True)
    write_predictions(file, rows)
    (path / run_dir.CONFIG_FILE).write_text(
        yaml.safe_dump({"name": path.name, "runs_dir": str(path.parent), "optim": {"lr": {"head": noise}}})
    )
    return path


def test_the_better_run_is_said_to_be_better(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", 0.5), make_run(tmp_path / "b", 0.3)
    found = compare_runs([a, b], resamples=300)
    text = render(found)
    assert "b is better than a by" in text and "RMSE stars (95% interval" in text
    assert found.items == 300 and found.metrics[1]["plcc"] > found.metrics[0]["plcc"]
    assert found.settings == {"optim.lr.head": [0.5, 0.3]} and "name" not in found.settings
    assert "a is worse than b by" in render(compare_runs([b, a], resamples=300))


def test_a_run_is_no_better_than_itself(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", 0.5), make_run(tmp_path / "b", 0.5)
    text = render(compare_runs([a, b], resamples=100))
    assert text.count("no difference in ") == 6 and "no setting differs" in text


def test_only_common_items_count_and_the_others_are_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0.5), make_run(tmp_path / "b", 0.5, range(100, 350))]
    found = compare_runs(runs, resamples=20)
    assert found.items == 200 and list(found.left_out.values()) == [100, 50]
    assert "100 items of" in render(found)


def test_the_newest_predictions_of_the_split_are_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.5)
    write_predictions(
        run_dir.predictions_file(run, "val", 9), [Prediction(f"item {i}", i, i) for i in range(3)]
    )
    write_predictions(run_dir.predictions_file(run, "test", 9), [Prediction("item 0", 1.0, 1.0)])
    other = make_run(tmp_path / "b", 0.5, range(3))
    with pytest.raises(UserError, match="different ratings"):
        compare_runs([run, other], "val", resamples=20)
    write_predictions(run_dir.predictions_file(other, "test", 9), [Prediction("item 0", 1.0, 1.0)])
    with pytest.raises(UserError, match="share several splits"):
        compare_runs([run, other], resamples=20)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", 0.5), make_run(tmp_path / "b", 0.5, range(300, 301))
    with pytest.raises(UserError, match="nothing to compare"):
        compare_runs([a])
    with pytest.raises(UserError, match="not a run directory"):
        compare_runs([a, tmp_path / "none"])
    with pytest.raises(UserError, match="no item in common"):
        compare_runs([a, b])
    with pytest.raises(UserError, match="no predictions of split 'test'"):
        compare_runs([a, b], "test")


PRICE = Target(column="price", unit="USD")


def test_sentences() -> None:
    interval = Interval(0.004, 0.021, 2000)
    better = sentence("B", "A", "plcc", Difference(0.012, interval), PRICE)
    assert better == "B is better than A by 0.0120 PLCC (95% interval 0.0040 to 0.0210)"
    worse = sentence("B", "A", "rmse", Difference(0.012, interval), PRICE)
    assert worse == "B is worse than A by 0.0120 RMSE USD (95% interval 0.0040 to 0.0210)"
    assert "undefined" in sentence("B", "A", "plcc", None, PRICE)
    assert "too few items" in sentence("B", "A", "plcc", Difference(0.1, None), PRICE)


def test_settings_that_only_one_run_has_are_shown() -> None:
    assert different_settings([{"a": 1, "b": 2}, {"a": 1, "c": 3}]) == {"b": [2, None], "c": [None, 3]}


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / name, noise)) for name, noise in (("a", 0.5), ("b", 0.3))]
    assert cli.main(["compare", *runs, "--resamples", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "a" and found["differences"]["b"]["plcc"]["significant"] is True
    assert cli.main(["compare", *runs, "--split", "none"]) == 2
