"""What trackers share: which numbers of a row they show, and the ids under which they resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from rating_train import run_dir
from rating_train.training.trackers.base import TrackedRun, numbers


def test_only_numbers_are_shown() -> None:
    row = {
        "step": 3,
        "loss": 0.5,
        "skipped_steps": 0,
        "flag": True,
        "grad_norm": None,
        "split": "val",
        "ces": {"a": 1},
    }
    assert numbers("train", row) == {"train/loss": 0.5, "train/skipped_steps": 0}


def test_ids_of_several_trackers_are_kept_beside_each_other(tmp_path: Path) -> None:
    first = TrackedRun(tmp_path)
    assert first.id_of("wandb") is None
    first.remember_id("wandb", "a1")
    first.remember_id("mlflow", "b2")
    resumed = TrackedRun(tmp_path, first_step=7)
    assert (resumed.id_of("wandb"), resumed.id_of("mlflow"), resumed.id_of("other")) == ("a1", "b2", None)


def test_a_run_killed_before_its_first_checkpoint_is_the_same_for_trackers(tmp_path: Path) -> None:
    TrackedRun(tmp_path).remember_id("wandb", "a1")
    assert TrackedRun(tmp_path, first_step=0).id_of("wandb") == "a1"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"wandb": 3}'])
def test_a_damaged_file_of_ids_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / run_dir.TRACKERS_FILE).write_text(content)
    tracked = TrackedRun(tmp_path, first_step=5)
    assert tracked.id_of("wandb") is None
    tracked.remember_id("mlflow", "b2")
    assert tracked.id_of("mlflow") == "b2"
