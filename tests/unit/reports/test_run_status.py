"""The status of a real small run, intact and damaged in every way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rating_train import cli
from rating_train.checkpoint import store
from rating_train.log import duration
from rating_train.processes import this_process
from rating_train.reports.run_status import read_status
from rating_train.resilience.run_lock import RunLock
from tests.conftest import Ranks, tiny_settings

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def trained(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, saved after each, evaluated at the end."""
    folder = tmp_path_factory.mktemp("trained")
    config = {
        **tiny_settings("run", folder, demo),
        "train": {"max_steps": 2, "log_every_steps": 1, "save_every_steps": 1},
        "eval": {"max_items": 12},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with contextlib.closing(Ranks()) as ranks:
        ranks.train(1, folder / "run.yaml")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage. Its lock and heartbeat are each test's own."""
    shutil.copytree(trained, tmp_path / "run")
    for name in ("LOCK", "heartbeat.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    return tmp_path / "run"


def status_of(
    run: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0
) -> tuple[dict, str]:
    """The verb's JSON, and its text."""
    assert cli.main(["status", str(run), "--json", *options]) == code
    value = json.loads(capsys.readouterr().out)
    assert cli.main(["status", str(run), *options]) == code
    return value, capsys.readouterr().out


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.rglob("*.pt"))


@pytest.mark.parametrize("options", [(), ("--quick",)])
def test_a_run_that_ended(run: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    value, text = status_of(run, capsys, *options)
    last = json.loads((run / "train.jsonl").read_text().splitlines()[-1])
    progress = value["progress"]
    assert (progress["step"], progress["total_steps"], progress["loss"]) == (2, 2, last["loss"])
    assert progress["eta_seconds"] == 0 and progress["samples_per_second"] == last["samples_per_second"]
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert value["best"] == {"metric": "plcc", "value": best["value"], "step": 2}
    assert [(c["name"], c["valid"]) for c in value["checkpoints"]] == [
        ("step_00000002", True),
        ("step_00000001", True),
    ]
    size = sum(p.stat().st_size for p in (run / "checkpoints/step_00000002").rglob("*") if p.is_file())
    assert value["checkpoints"][0]["bytes"] == size
    assert [(p["name"], p["step"], p["problem"]) for p in value["pointers"]] == [
        ("latest.json", 2, ""),
        ("best.json", 2, ""),
    ]
    assert value["markers"] == value["temporary"] == value["abandoned"] == []
    assert value["owner"]["state"] == "none" and value["free_bytes"] > 0
    assert sorted(value["undefined"]) == [
        "owner.heartbeat_age_seconds",
        "progress.idle_seconds",
        "progress.mfu",  # of a CPU
    ]
    assert progress["tokens_per_second"] > 0 and 0 <= progress["padding_share"] < 1
    assert "tokens/s" in text and "padding" in text
    assert "step 2 of 2" in text and "step_00000002" in text and "INVALID" not in text
    assert ("sizes and SHA-256" in text) == (not options)


def test_damaged_checkpoints_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run / "checkpoints/step_00000001", run / "checkpoints/step_00000002"
    shard = shards(two)[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)  # same size
    value, text = status_of(run, capsys)
    assert "SHA-256 differs" in value["checkpoints"][0]["problem"] and value["checkpoints"][1]["valid"]
    assert value["pointers"][0]["problem"] == "that checkpoint is INVALID"
    assert f"INVALID ({shard.relative_to(two)} does not have the bytes" in text
    assert value["progress"]["total_steps"] == 2  # by the older one
    assert status_of(run, capsys, "--quick")[0]["checkpoints"][0]["valid"]  # that is what it does not see

    shard.write_bytes(content[:-1])
    value, _ = status_of(run, capsys, "--quick")
    assert f"has {len(content) - 1} bytes instead of {len(content)}" in value["checkpoints"][0]["problem"]
    shard.unlink()
    assert "is missing" in status_of(run, capsys, "--quick")[0]["checkpoints"][0]["problem"]

    (one / store.COMPLETE).write_text('{"version": 1, "st')
    for options in ((), ("--quick",)):
        value, text = status_of(run, capsys, *options, code=1)
        assert "COMPLETE.json cannot be read" in value["checkpoints"][1]["problem"]
        assert text.count("INVALID (") == 2
    (one / store.COMPLETE).unlink()
    for options in ((), ("--quick",)):
        value, _ = status_of(run, capsys, *options, code=1)
        assert "it was never committed" in value["checkpoints"][1]["problem"]
    assert value["undefined"]["progress.total_steps"]


def test_a_marker_of_another_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(run / "checkpoints/step_00000002", run / "checkpoints/step_00000007")
    for options in ((), ("--quick",)):
        value, _ = status_of(run, capsys, *options)
        assert [c["valid"] for c in value["checkpoints"]] == [False, True]
        assert value["pointers"][0]["problem"] == "there is no such"


def test_what_lies_about_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    (root / "step_00000003.tmp-0a1b").mkdir()
    os.rename(root / "step_00000002", root / "abandoned-0a1b2c_step_00000002")
    (root / "latest.json").write_text("{")
    (root / "best.json").unlink()
    for name in ("STOP", "REQUEUE"):
        (run / name).touch()
    value, text = status_of(run, capsys)
    assert value["temporary"] == ["step_00000003.tmp-0a1b"]
    assert value["abandoned"] == ["abandoned-0a1b2c_step_00000002"]
    assert value["markers"] == ["STOP", "REQUEUE"]
    assert [p["problem"] for p in value["pointers"]] == ["it cannot be read", "there is none"]
    assert value["best"]["value"] is None and "best plcc    none yet" in text
    for part in ("STOP, REQUEUE", "step_00000003.tmp-0a1b", "abandoned-0a1b2c"):
        assert part in text


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: run\n")
    value, text = status_of(tmp_path, capsys)
    assert value["checkpoints"] == [] and value["progress"]["step"] is None
    assert set(value["undefined"]) == {
        "best",
        "owner.heartbeat_age_seconds",
        *(f"progress.{k}" for k in value["progress"] if k != "stalled"),
    }
    assert "checkpoint   none" in text and "progress     no step yet" in text
    assert "undefined" not in text, "what is not known yet is left out"


@pytest.mark.parametrize(
    "rubbish", ["", "config.yaml", "LOCK", "heartbeat.json", "train.jsonl", "checkpoints"]
)
@pytest.mark.parametrize("kind", [b"", b"\x00\xff rubbish {", "folder"])
def test_no_run_directory(
    rubbish: str, kind: bytes | str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an empty folder nor one that holds something else under a run's names."""
    if rubbish and isinstance(kind, bytes):
        (tmp_path / rubbish).write_bytes(kind)
    elif rubbish:
        (tmp_path / rubbish).mkdir()
    assert cli.main(["status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "not a run directory" in error and error.count("\n") == 1


def test_no_folder_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name, reason in (("none", "there is no such folder"), ("file", "it is a file")):
        assert cli.main(["status", str(tmp_path / name)]) == 2
        assert f"not a run directory: {reason}" in capsys.readouterr().err


def test_the_last_complete_row_counts_and_a_loss_may_be_undefined(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = json.loads((run / "train.jsonl").read_text().splitlines()[-1])
    with open(run / "train.jsonl", "a") as f:
        f.write(json.dumps({**last, "step": 3, "loss": None}) + "\n" + '{"step": 4, "lo')
    value, _ = status_of(run, capsys)
    assert value["progress"]["step"] == 3 and value["progress"]["loss"] is None
    assert value["undefined"]["progress.loss"] == "the last row has none (not finite)"


def test_the_phase_is_that_of_the_last_row(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("stages: null", "stages: [{steps: 1}, {steps: 1}]"))
    rows = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    told = "".join(json.dumps({**row, "phase": number}) + "\n" for number, row in enumerate(rows, 1))
    (run / "train.jsonl").write_text(told)
    value, text = status_of(run, capsys)
    assert (value["progress"]["phase"], value["progress"]["phases"]) == (2, 2)
    assert "step 2 of 2, phase 2 of 2, epoch" in text


def test_a_living_owner_and_how_far_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(run, job="77", beat_seconds=0.1, stale_seconds=1)
    lock.update(step=5, total_steps=20, phase="saving")
    with lock:
        value, text = status_of(run, capsys)
        seconds = json.loads((run / "train.jsonl").read_text().splitlines()[-1])["step_seconds"]
        assert value["progress"]["step"] == 5 and value["progress"]["total_steps"] == 20
        assert value["progress"]["eta_seconds"] == pytest.approx(15 * seconds)
        assert value["owner"]["state"] == "alive" and value["owner"]["heartbeat"]["phase"] == "saving"
        assert f"alive: process {os.getpid()} on {socket.gethostname()}, job 77" in text
    value, text = status_of(run, capsys)
    assert value["owner"]["state"] == "none" and "ended: done" in text


def test_a_run_that_beats_but_does_not_move_is_stalled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The heartbeat comes from another thread, so it continues while a rank is stopped."""
    lock = RunLock(run, beat_seconds=0.1, stale_seconds=1)
    lock.update(step=5, total_steps=20, phase="training", progress_unix_time=time.time())
    with lock:
        value, text = status_of(run, capsys)
        assert value["progress"]["stalled"] is False and 0 <= value["progress"]["idle_seconds"] < 15
        assert "STALLED" not in text and "last progress" in text and " left" in text
        lock.update(progress_unix_time=time.time() - 95)
        lock._beat()
        value, text = status_of(run, capsys)
        assert value["progress"]["stalled"] is True and 95 <= value["progress"]["idle_seconds"] < 110
        assert value["progress"]["eta_seconds"] is None
        usual = duration(value["progress"]["step_seconds"])
        assert "STALLED      no step for 1 min 3" in text and f"(usually {usual})" in text
        assert " left" not in text, "there is no time left to tell of a run that does not move"
        lock.update(phase="evaluating")
        lock._beat()
        assert status_of(run, capsys)[0]["progress"]["stalled"] is False
    assert status_of(run, capsys)[0]["progress"]["stalled"] is False, "it has ended"


def test_owners_that_are_dead_elsewhere_or_beating(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=30)
    (run / "LOCK").write_text(json.dumps({"nonce": "a", **this_process(), "pid": process.pid}))
    assert status_of(run, capsys)[0]["owner"]["state"] == "dead"
    (run / "LOCK").write_text(json.dumps({"nonce": "a", **this_process(), "host": "elsewhere"}))
    (run / "heartbeat.json").write_text('{"beat_seconds": 0.3, "unix_time": 0}')
    value, text = status_of(run, capsys)
    assert (
        value["owner"]["state"] == "unknown"
        and "owner.state" in value["undefined"]
        and "on elsewhere" in text
    )
    (run / "LOCK").unlink()
    lock = RunLock(run, beat_seconds=0.1, stale_seconds=1)
    lock._owner["host"] = "elsewhere"
    with lock:
        assert status_of(run, capsys)[0]["owner"]["state"] == "alive"


def test_the_status_writes_nothing(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    read_status(run)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
