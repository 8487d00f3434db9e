"""What a run directory says of its datasets: one, or several that were mixed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from rating_train.reports.runs.data import RunData, read_run
from rating_train.reports.runs.quality import quality_section
from rating_train.run_dir import CONFIG_FILE, PREDICTIONS_DIR


def test_the_datasets_of_a_mixture_are_named(trained_run: Path, demo: Path) -> None:
    run = dataclasses.replace(read_run(trained_run), judgement=None)
    assert run.trained_on == str(run.data) == str(demo / "data")
    sources = [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}]
    mixed = dataclasses.replace(run, config={"data.path": "", "data.sources": sources})
    assert mixed.trained_on == "a (weight 0.7), b (weight 0.3)" and mixed.data == Path("a")
    other = dataclasses.replace(mixed, config={**mixed.config, "data.eval_path": "c"})
    assert other.data == Path("c")
    nothing = dataclasses.replace(run, config={})
    assert nothing.trained_on == "" and nothing.data is None


def run_of_prices(folder: Path, rows: list[tuple[float, float]]) -> RunData:
    """A run that was not evaluated, of a target without bounds; rows are (score, price)."""
    target = {"name": "price", "unit": "kr", "lower": None, "upper": None}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump({"task": {"target": target}}))
    (folder / PREDICTIONS_DIR).mkdir()
    lines = [json.dumps({"id": f"{n}", "score": s, "rating": p}) for n, (s, p) in enumerate(rows)]
    (folder / PREDICTIONS_DIR / "val_step_00000001.jsonl").write_text("\n".join(lines))
    return read_run(folder)


def test_slices_of_a_run_that_was_not_evaluated_have_its_unit(tmp_path: Path) -> None:
    run = run_of_prices(tmp_path, [(100.0 + n, 110.0 + n) for n in range(20)])
    assert run.judgement is not None
    names = [part["name"] for part in run.judgement["slices"]["rating"]]
    assert names and all(name.endswith(" kr") for name in names)


@pytest.mark.parametrize("price", [0.0, 250.0, 1e20])
def test_equal_predictions_of_equal_prices_have_a_page(tmp_path: Path, price: float) -> None:
    drawn = quality_section(run_of_prices(tmp_path, [(price, price)] * 3))
    assert "3 items" in str(drawn)
