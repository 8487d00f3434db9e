"""Weights & Biases and MLflow themselves, offline: a run and its resumed attempt are one run with all rows."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rating_train import run_dir
from rating_train.config.schema import Config
from rating_train.files import read_json
from rating_train.training.trackers.base import TrackedRun
from rating_train.training.tracking import Tracker

pytestmark = pytest.mark.timeout(240)


def train_and_resume(run: Path, tracker: str, checkpoint: int) -> str:
    """Steps 1 to 3 and an evaluation; then, from ``checkpoint`` (0: there is none), up to step 4. Returns the id."""
    ids = []
    for first, last in ((0, 3), (checkpoint, 4)):
        config = dataclasses.replace(Config(), name="demo", tracking=[tracker])
        rows = Tracker(run, first, enabled=True, config=config)
        for step in range(first + 1, last + 1):
            rows.train({"step": step, "loss": 1 / step, "grad_norm": None, "note": "text"})
        rows.evaluation({"step": last, "split": "val", "plcc": last / 10})
        rows.close()
        ids.append(read_json(run / run_dir.TRACKERS_FILE)[tracker])
        time.sleep(1.1)  # wandb names the folder of an attempt by the second in which it started
    assert ids[0] == ids[1], "the same run"
    return str(ids[0])


def test_wandb_keeps_one_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra `tracking`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        run_id = train_and_resume(tmp_path, "wandb", checkpoint=2)
    finally:
        wandb.teardown()  # its service process
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    records = [record for file in files for record in records_of(file)]
    assert {(r.run.run_id, r.run.display_name) for r in records if r.HasField("run")} == {(run_id, "demo")}
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 1 / 3), (4, 0.25)]
    assert [(row["step"], row["eval_val/plcc"]) for row in rows if "eval_val/plcc" in row] == [
        (3, 0.3),
        (4, 0.4),
    ]
    assert not any("note" in key or "grad_norm" in key for row in rows for key in row)
    settings = {item.key for r in records if r.HasField("run") for item in r.run.config.update}
    assert {"optim", "data", "zero"} <= settings


def records_of(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file, which is LevelDB's log after a header; wandb has no reader in Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, block, record = file.read_bytes(), 7, 32768, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield Record.FromString(record)
            record = b""


def test_mlflow_keeps_one_run_in_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `tracking`)")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run_id = train_and_resume(tmp_path, "mlflow", checkpoint=0)
    client = MlflowClient(f"sqlite:///{tmp_path / run_dir.MLFLOW_FILE}")
    (kept,) = client.search_runs([client.get_experiment_by_name("rating_train").experiment_id])
    assert (kept.info.run_id, kept.info.run_name, kept.info.status) == (run_id, "demo", "FINISHED")
    losses = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]
    assert sorted(losses) == [*[(s, 1 / s) for s in (1, 2, 3) for _ in "12"], (4, 0.25)], "each attempt's"
    assert [m.value for m in client.get_metric_history(run_id, "eval_val/plcc")] == [0.3, 0.4]
    assert set(kept.data.metrics) == {"train/loss", "eval_val/plcc"}
    assert kept.data.params["optim.lr.head"] == "0.0004" and kept.data.params["name"] == "demo"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("mlruns")] == []

    # Killed after its run was made, before it had told its settings; then started anew with the same, and with others.
    from rating_train.training.trackers.mlflow_run import MlflowRun

    killed = client.create_run(kept.info.experiment_id).info.run_id
    tracked = TrackedRun(tmp_path, settings={"optim": {"lr": 0.5}})
    tracked.remember_id("mlflow", killed)
    MlflowRun(tracked).close()
    assert client.get_run(killed).data.params == {"optim.lr": "0.5"}
    MlflowRun(dataclasses.replace(tracked, first_step=3, settings={"optim": {"lr": 0.25}})).close()
    assert tracked.id_of("mlflow") == killed
    MlflowRun(dataclasses.replace(tracked, settings={"optim": {"lr": 0.25}})).close()
    assert tracked.id_of("mlflow") != killed and client.get_run(killed).data.params == {"optim.lr": "0.5"}


def test_a_tracker_that_is_not_named_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from rating_train.training.tracking import Tracker; from rating_train.config.schema import Config\n"
        f"t = Tracker(Path({str(tmp_path)!r}), 0, True, replace(Config(), tracking=['jsonl']))\n"
        "t.train({'step': 1, 'loss': 1.0}); t.close()\n"
        "print(sorted({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
    assert [p.name for p in tmp_path.iterdir()] == [run_dir.TRAIN_LOG]
