"""What a run directory says of its datasets: one, or several that were mixed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rating_train.reports.runs.data import read_run


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
