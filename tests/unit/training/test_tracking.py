"""Metrics: append-only lines where every step stands once, also after a run went back to an older checkpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rating_train import run_dir
from rating_train.files import read_json_lines
from rating_train.training import tracking
from rating_train.training.provenance import provenance
from rating_train.training.tracking import Tracker


def steps(run: Path, name: str = run_dir.TRAIN_LOG) -> list[int]:
    return [row["step"] for row in read_json_lines(run / name)]


def track(run: Path, first: int, last: int, enabled: bool = True) -> None:
    """Rows of the steps first + 1 to last, and an evaluation at the end."""
    tracker = Tracker(run, first, enabled)
    for step in range(first + 1, last + 1):
        tracker.train({"step": step, "loss": 1 / step, "from": first})
    tracker.evaluation({"step": last, "split": "val", "plcc": last / 100, "srcc": None})
    tracker.close()


def test_rows_are_written_with_their_time_and_read_back(tmp_path: Path) -> None:
    track(tmp_path, 0, 3)
    rows = list(read_json_lines(tmp_path / run_dir.TRAIN_LOG))
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert all(1.6e9 < r["time"] < 1e11 for r in rows)
    (evaluation,) = read_json_lines(tmp_path / run_dir.EVAL_LOG)
    assert evaluation["plcc"] == 0.03 and evaluation["srcc"] is None


def test_rows_after_the_resumed_step_are_dropped_and_each_step_stands_once(tmp_path: Path) -> None:
    track(tmp_path, 0, 8)
    track(tmp_path, 5, 7)
    rows = list(read_json_lines(tmp_path / run_dir.TRAIN_LOG))
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["from"] for r in rows] == [0, 0, 0, 0, 0, 5, 5]
    assert steps(tmp_path, run_dir.EVAL_LOG) == [7], "the evaluation at step 8 went with the steps"


def test_a_run_that_resumes_where_it_stopped_keeps_the_file_as_it_is(tmp_path: Path) -> None:
    track(tmp_path, 0, 4)
    before = (tmp_path / run_dir.TRAIN_LOG).read_bytes()
    Tracker(tmp_path, 4, enabled=True).close()
    assert (tmp_path / run_dir.TRAIN_LOG).read_bytes() == before


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b'{"step": 4}', b"\n\n", b"null\n", b'{"loss": 1}\n', b"[]\n"]
)
def test_a_torn_last_line_goes_and_the_rows_before_it_stay(tmp_path: Path, torn: bytes) -> None:
    track(tmp_path, 0, 3)
    with open(tmp_path / run_dir.TRAIN_LOG, "ab") as f:
        f.write(torn)
    track(tmp_path, 3, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_line_torn_inside_a_character_goes_too(tmp_path: Path) -> None:
    track(tmp_path, 0, 3)
    with open(tmp_path / run_dir.TRAIN_LOG, "ab") as f:
        f.write('{"step": 4, "note": "é'.encode()[:-1])
    track(tmp_path, 3, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_row_with_a_unicode_line_separator_in_a_text_is_kept(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, enabled=True)
    tracker.evaluation({"step": 1, "split": "val", "note": "one\u2028two"})
    tracker.evaluation({"step": 2, "split": "val", "note": "three\x85four"})
    tracker.close()
    Tracker(tmp_path, 2, enabled=True).close()
    assert steps(tmp_path, run_dir.EVAL_LOG) == [1, 2]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    track(tmp_path, 0, 3, enabled=False)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_leave_rows_alone(tmp_path: Path) -> None:
    track(tmp_path, 0, 3)
    Tracker(tmp_path, 1, enabled=False).close()
    assert steps(tmp_path) == [1, 2, 3]


def test_tensorboard_gets_the_same_numbers_and_only_numbers(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, enabled=True)
    tracker.train({"step": 1, "loss": 0.5, "grad_norm": None, "flag": True, "note": "x"})
    tracker.train({"step": 2, "loss": 0.25, "grad_norm": 3})
    tracker.evaluation({"step": 2, "split": "val", "plcc": 0.75})
    tracker.close()
    events = EventAccumulator(str(tmp_path / run_dir.TENSORBOARD_DIR)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval_val/plcc", "train/grad_norm", "train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("eval_val/plcc")] == [(2, 0.75)]


def test_nan_is_refused_instead_of_written(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, enabled=True)
    with pytest.raises(ValueError):
        tracker.train({"step": 1, "loss": float("nan")})
    tracker.close()
    assert not (tmp_path / run_dir.TRAIN_LOG).exists() or steps(tmp_path) == []


def test_provenance_tells_versions_and_holds_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET_TOKEN", "hf_do_not_log_me")
    facts: dict[str, Any] = provenance(ranks=2)
    text = json.dumps(facts)
    assert "hf_do_not_log_me" not in text and not any(k in text for k in ("SOME_SECRET", "SOME_SECRET_TOKEN"))
    assert facts["versions"]["torch"][0].isdigit() and facts["ranks"] == 2
    assert facts["command"] == sys.argv and facts["cpus"] == os.cpu_count()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, 0, enabled=True)
    log = tmp_path / run_dir.TRAIN_LOG
    tracker.train({"step": 1, "loss": 1.0})
    kept = log.rename(tmp_path / "kept")
    log.symlink_to("/dev/full")  # every write to it fails as on a full disk
    tracker.train({"step": 2, "loss": 0.5})
    tracker.train({"step": 3, "loss": 0.4})
    assert caplog.text.count("rows wait in memory") == 1 and "No space left" in caplog.text
    log.unlink()
    kept.rename(log)
    tracker.train({"step": 4, "loss": 0.3})
    tracker.close()
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_rows_that_never_find_room_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, 0, enabled=True)
    (tmp_path / run_dir.TRAIN_LOG).symlink_to("/dev/full")
    for step in (1, 2):
        tracker.train({"step": step, "loss": 1.0})
    tracker.close()
    assert "2 rows are lost" in caplog.text


def test_a_listener_gets_every_row_and_one_that_fails_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[tuple[str, object]] = []

    class Good:
        def train(self, row: dict[str, object]) -> None:
            heard.append(("train", row["step"]))

        def evaluation(self, row: dict[str, object]) -> None:
            heard.append(("evaluation", row["step"]))

        def close(self) -> None:
            heard.append(("close", None))

    class Bad(Good):
        def train(self, row: dict[str, object]) -> None:
            raise RuntimeError("no network")

    monkeypatch.setattr(tracking, "LISTENERS", [lambda run: Bad(), lambda run: Good()])
    tracker = tracking.Tracker(tmp_path, 0, enabled=True)
    tracker.train({"step": 1})
    tracker.train({"step": 2})
    tracker.evaluation({"step": 2, "split": "val"})
    tracker.close()
    assert heard == [("train", 1), ("train", 2), ("evaluation", 2), ("close", None)]
    assert caplog.text.count("Bad failed and is told nothing more") == 1


def test_a_run_does_without_tensorboard_where_its_file_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And tries again with the next row."""
    (tmp_path / run_dir.TENSORBOARD_DIR).touch()
    tracker = Tracker(tmp_path, 0, enabled=True)
    tracker.train({"step": 1, "loss": 1.0})
    (tmp_path / run_dir.TENSORBOARD_DIR).unlink()
    tracker.train({"step": 2, "loss": 0.5})
    tracker.close()
    assert "TensorBoard lacks some events" in caplog.text and steps(tmp_path) == [1, 2]
    events = EventAccumulator(str(tmp_path / run_dir.TENSORBOARD_DIR)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 0.5)]
