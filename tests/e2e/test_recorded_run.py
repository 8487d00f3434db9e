"""A run and a dataset of version 0.1 (commit 2bc7c03): they still verify, resume, evaluate and report.

The archive holds a dataset of 32-px images, a tiny model, ``runs/uninterrupted`` (8 steps, its logs) and
``runs/interrupted``, stopped at step 4 with a checkpoint of ZeRO stage 1 in fp32, all made on one rank.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.helpers.cli import rating_train

pytestmark = pytest.mark.timeout(180)

ARCHIVE = REPO / "tests" / "recorded" / "run_before_layout.tar.xz"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run_verb(folder: Path, *words: str) -> str:
    """Run a verb in ``folder``, whose configuration names relative paths."""
    done = rating_train(*words, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def rows(run: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / name).read_text("utf-8").splitlines()]


def test_a_run_of_version_0_1_resumes_evaluates_and_reports(recorded: Path) -> None:
    interrupted, full = recorded / "runs" / "interrupted", recorded / "runs" / "uninterrupted"
    run_verb(recorded, "train", "config.yaml", "--resume", "must")
    assert [row["step"] for row in rows(interrupted, "train.jsonl")] == list(range(1, 9))
    for resumed, expected in zip(rows(interrupted, "train.jsonl"), rows(full, "train.jsonl"), strict=True):
        assert resumed["samples"] == expected["samples"]
        # fp32; other instruction sets of a CPU round otherwise
        assert resumed["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    samples = "samples/rank_00000.jsonl"
    assert rows(interrupted, samples) == rows(full, samples), "the same items in the same order"
    run_verb(recorded, "evaluate", "runs/interrupted")
    own, recorded_row = rows(interrupted, "eval.jsonl")[-1], rows(full, "eval.jsonl")[-1]
    assert own["plcc"] == pytest.approx(recorded_row["plcc"], abs=1e-4)
    run_verb(recorded, "report", "runs/interrupted")
    assert (interrupted / "report" / "summary.json").is_file()


def test_a_dataset_of_version_0_1_verifies(recorded: Path) -> None:
    splits = json.loads((recorded / "data" / "manifest.json").read_text("utf-8"))["splits"]
    items = sum(split["items"] for split in splits.values())
    assert f"{items} items" in run_verb(recorded, "verify", "data")
