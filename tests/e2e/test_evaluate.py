"""`rating-train evaluate` on a trained run and on its export: intervals, baselines, other datasets, and the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rating_train.errors import EXIT_REQUIREMENT
from rating_train.scoring.metrics import METRICS, score
from rating_train.scoring.predictions import read_predictions
from tests.helpers.cli import rating_train
from tests.helpers.runs import rows

pytestmark = pytest.mark.timeout(300)

STEP = "step_00000006"


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that evaluations may write into."""
    return Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("evaluated") / "trained"))


def evaluate(*words: object, code: int = 0) -> str:
    done = rating_train("evaluate", *words, "--resamples", 50)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


def judgement(folder: Path, label: str) -> dict[str, Any]:
    return json.loads((folder / "evaluations" / f"{label}_{STEP}.json").read_text())


def test_a_run_is_judged_with_intervals_baselines_and_ces_at_both_lengths(run: Path) -> None:
    text = evaluate(run, "--slices", "--require", "rmse<=2", "--require", "plcc.low>=-1")
    found = judgement(run, "val")
    items = read_predictions(run / "predictions" / f"val_{STEP}.jsonl")
    expected = score([r.score for r in items], [r.rating or 0 for r in items])
    for name in METRICS:
        assert found["metrics"][name]["value"] == getattr(expected, name)
    assert found["groups"] and {"category", "rating", "rating_count", "text_chars"} == set(found["slices"])
    last = rows(run / "eval.jsonl")[-1]
    assert last["source"] == "evaluate" and last["split"] == "val"
    assert last["intervals_95"]["plcc"] == found["metrics"]["plcc"]["interval_95"]
    tokens = [r.tokens for r in items]
    assert last["true_tokens"] == pytest.approx(np.mean(tokens)) and last["padded_tokens"] >= max(tokens)
    assert last["ces_mac_linear_true_length"] >= last["ces_mac_linear"]
    names = [b["name"].split(" (")[0] for b in found["baselines"]["scores"]]
    assert names == ["training mean", "category mean", "ridge on TF-IDF"]
    for words in (
        "Kendall tau-b",
        "95% interval",
        "against ridge",
        "calibration:",
        "true rating",
        "met     rmse<=2",
    ):
        assert words in text
    assert text.count("CES:") == 1 and found["seen"]["warning"] == "" and "warning" not in text


def test_a_requirement_that_is_not_met_has_an_exit_code_of_its_own(run: Path) -> None:
    text = evaluate(
        run, "--no-ridge", "--require", "plcc>=0.9999", "--require", "rmse<9", code=EXIT_REQUIREMENT
    )
    assert "NOT MET plcc>=0.9999: it is " in text and "met     rmse<9" in text
    done = rating_train("evaluate", run, "--require", "plcc>>1")
    assert done.returncode == 2 and "is no condition" in done.stderr and done.stderr.count("\n") == 1


def test_another_dataset_has_a_name_of_its_own_and_a_warning_of_what_was_trained_on(
    run: Path, few_items: Path
) -> None:
    text = evaluate(run, "--no-ridge", "--data", few_items, "--split", "train")
    label = f"train@{few_items.name}"
    found = judgement(run, label)
    assert found["seen"]["by_id"] > 0 and "were trained on" in text
    assert f"({found['seen']['by_id']} by their id" in text
    assert rows(run / "eval.jsonl")[-1]["split"] == label
    own = evaluate(run, "--no-ridge", "--split", "train")
    assert (
        "(100.0 %) were trained on" in own and "no baselines: they would be fitted on the very items" in own
    )
