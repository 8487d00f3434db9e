"""Saving in one process, with a dict in place of the engine: the two halves of a save, and how each can fail."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rating_train import files
from rating_train.checkpoint import cleanup, manager, store
from rating_train.checkpoint.deepspeed_io import copy_to_memory
from rating_train.checkpoint.manager import Checkpointer, Saved, SaveFailed
from rating_train.checkpoint.state import Identity, TrainState
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.files import read_json
from tests.unit.checkpoint.test_safe_load import Hostile

pytestmark = pytest.mark.timeout(60)

IDENTITY = Identity({}, "", {}, {"ranks": 1, "zero_stage": 1})
SHARD = "engine/weights.pt"


class Gate:
    """Threads write once it is open; ``captured`` lists the checkpoints that existed at each copy of the state."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.captured: list[list[int]] = []


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, write = Gate(), manager.write_rank_files

    def capture(ds: dict[str, Any]) -> dict[str, Any]:
        gate.captured.append([step for step, _ in store.steps_present(tmp_path)])
        return copy_to_memory(ds)

    def gated(*args: Any) -> store.Files:
        assert gate.opened.wait(30)
        return write(*args)

    monkeypatch.setattr(manager, "capture_shards", capture)
    monkeypatch.setattr(manager, "write_rank_files", gated)
    yield gate
    gate.opened.set()


@pytest.fixture
def engine() -> dict[str, Any]:
    return {SHARD: {"w": torch.arange(1000.0)}}


def saver(root: Path, background: bool = True, keep_last: int = 9) -> Checkpointer:
    return Checkpointer(root, World(), keep_last, 0, background)


def save(checkpointer: Checkpointer, engine: dict[str, Any], step: int, best: bool = False) -> Saved | None:
    mark = {"metric": "plcc", "value": 0.5} if best else None
    return checkpointer.save(engine, TrainState(step=step), IDENTITY, 100, mark)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_foreground_save_returns_its_checkpoint(tmp_path: Path, gate: Gate, engine: dict[str, Any]) -> None:
    gate.opened.set()
    saved = save(saver(tmp_path, background=False), engine, 5, best=True)
    assert saved is not None and saved.path == tmp_path / "step_00000005"
    files = store.verify(saved.path)["files"]
    assert set(files) == {SHARD, "rank_00000.pt", "state.json"}
    assert saved.bytes == sum(entry["bytes"] for entry in files.values())
    assert 0 < saved.blocked_seconds <= saved.seconds
    assert store.pointed_step(tmp_path, store.LATEST) == store.pointed_step(tmp_path, store.BEST) == 5
    assert read_json(saved.path / "state.json")["train_state"]["step"] == 5


def test_a_background_save_holds_the_state_of_its_step(
    tmp_path: Path, gate: Gate, engine: dict[str, Any]
) -> None:
    checkpointer = saver(tmp_path)
    assert save(checkpointer, engine, 5) is None
    engine[SHARD]["w"].zero_()
    assert store.steps_present(tmp_path) == [], "not committed before it is finalized"
    gate.opened.set()
    saved = checkpointer.finalize()
    assert saved is not None
    assert torch.load(saved.path / SHARD)["w"].equal(torch.arange(1000.0))
    assert checkpointer.finalize() is None


def test_finalize_if_done_does_not_wait(tmp_path: Path, gate: Gate, engine: dict[str, Any]) -> None:
    checkpointer = saver(tmp_path)
    assert checkpointer.finalize_if_done() is None
    save(checkpointer, engine, 5)
    assert checkpointer.finalize_if_done() is None and store.steps_present(tmp_path) == []
    gate.opened.set()
    assert checkpointer._pending is not None
    checkpointer._pending.written.result(timeout=30)
    saved = checkpointer.finalize_if_done()
    assert saved is not None and saved.path.name == "step_00000005"
    assert checkpointer.finalize_if_done() is None


def test_at_most_one_save_is_pending(tmp_path: Path, gate: Gate, engine: dict[str, Any]) -> None:
    checkpointer = saver(tmp_path)
    save(checkpointer, engine, 5)
    opener = threading.Timer(0.3, gate.opened.set)
    opener.start()
    save(checkpointer, engine, 10)  # waits for the first
    assert gate.captured == [[], [5]], "the first is committed before the second's state is copied"
    opener.join()
    assert checkpointer.finalize() is not None
    assert [step for step, _ in store.steps_present(tmp_path)] == [10, 5]


def test_an_error_of_the_thread_is_raised_by_finalize_and_the_next_save_works(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real full disk: the file to be written is a link to /dev/full."""
    begin = store.begin

    def begin_full(root: Path, step: int) -> Path:
        temporary = begin(root, step)
        (temporary / "engine").mkdir()
        (temporary / SHARD).symlink_to("/dev/full")
        return temporary

    checkpointer = saver(tmp_path)
    gate.opened.set()
    save(checkpointer, engine, 5)
    with monkeypatch.context() as m:
        m.setattr(store, "begin", begin_full)
        assert save(checkpointer, engine, 10) is None
    assert checkpointer._pending is not None
    assert checkpointer._pending.written.exception(timeout=30) is not None
    assert not (checkpointer._pending.temporary / SHARD).is_symlink(), "removed by the thread, at once"
    open_files = [os.readlink(f.path) for f in os.scandir("/proc/self/fd") if os.path.islink(f.path)]
    assert "/dev/full" not in open_files, "an open file would keep its disk space"
    with pytest.raises(SaveFailed, match=rf"step 10 could not be written \(rank 0: {SHARD}: ") as caught:
        checkpointer.finalize_if_done()
    assert f"where: {tmp_path}" in str(caught.value) and "bytes of free space" in str(caught.value)
    assert caught.value.on_all_ranks, "one line for the job"
    assert names(tmp_path) == ["latest.json", "step_00000005"]
    assert checkpointer.finalize() is None, "reported once"
    save(checkpointer, engine, 15)
    assert checkpointer.finalize() is not None and store.pointed_step(tmp_path, store.LATEST) == 15


def test_the_error_of_a_save_is_also_raised_by_the_next_one(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    checkpointer = saver(tmp_path)
    unpicklable = {SHARD: {"w": torch.zeros(3), "f": lambda: None}}
    save(checkpointer, unpicklable, 5)
    with pytest.raises(SaveFailed, match=r"checkpoint of step 5 .*lambda"):
        save(checkpointer, unpicklable, 10)
    assert names(tmp_path) == [] and gate.captured == [[]], "the second one was not begun"


def test_too_little_space_is_reported_before_anything_is_written(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    checkpointer = saver(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(manager, "tensor_bytes", lambda _state: 10**17)
        with pytest.raises(SaveFailed, match="needs 100,000,000,000,000,000 bytes") as caught:
            save(checkpointer, engine, 5)
    assert str(tmp_path) in str(caught.value) and names(tmp_path) == []
    assert checkpointer.finalize() is None
    save(checkpointer, engine, 5)
    assert checkpointer.finalize() is not None


@pytest.mark.parametrize("error", [OSError(errno.EIO, "bad"), store.InvalidCheckpoint("bad")])
def test_a_failed_commit_leaves_nothing_behind(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def commit(*_: object) -> Path:
        raise error

    gate.opened.set()
    monkeypatch.setattr(store, "commit", commit)
    with pytest.raises(SaveFailed, match=r"\(rank 0: (OSError|InvalidCheckpoint): .*bad"):
        save(saver(tmp_path, background=False), engine, 5)
    assert names(tmp_path) == []


def test_a_pointer_that_cannot_be_written_fails_the_save_but_keeps_the_checkpoint(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def point(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    gate.opened.set()
    checkpointer = saver(tmp_path, background=False)
    with monkeypatch.context() as m:
        m.setattr(store, "point", point)
        with pytest.raises(
            SaveFailed, match=r"rank 0: it is complete, but latest\.json or best\.json is not updated"
        ):
            save(checkpointer, engine, 5)
    assert store.newest_valid(tmp_path) == (store.Found(5, tmp_path / "step_00000005"), [])
    assert save(checkpointer, engine, 10) is not None
    assert store.pointed_step(tmp_path, store.LATEST) == 10


def test_the_thread_prunes_old_checkpoints_and_logs_an_error(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    gate.opened.set()
    caplog.set_level(logging.INFO)
    checkpointer = saver(tmp_path, background=False, keep_last=1)
    save(checkpointer, engine, 5, best=True)
    for step in (10, 15):
        save(checkpointer, engine, step)

    def prune(*_: object) -> list[int]:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as m:
        m.setattr(cleanup, "prune", prune)
        save(checkpointer, engine, 20)
        checkpointer.close()
    assert "pruned the checkpoints of steps 10" in caplog.text
    assert "old checkpoints could not be removed" in caplog.text and "busy" in caplog.text
    assert names(tmp_path) == ["best.json", "latest.json", "step_00000005", "step_00000015", "step_00000020"]


def test_outdated_pointers_after_a_crash_are_repaired_by_the_next_start(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    checkpointer = saver(tmp_path, background=False, keep_last=1)
    save(checkpointer, engine, 5, best=True)
    state = TrainState(step=10, best_value=0.7, best_step=10)
    checkpointer.save(engine, state, IDENTITY, 100, {"metric": "plcc", "value": 0.7})
    checkpointer.close()
    for name in (store.LATEST, store.BEST):  # as if it had died right after the rename
        store.point(tmp_path, name, 5)
    monkeypatch.setattr(manager, "read_shards", lambda *_: None)
    again = saver(tmp_path, background=False, keep_last=1)
    path = again.find("must")
    assert path is not None and path.name == store.step_name(10)
    assert again.restore(None, path, again.read_state(path), IDENTITY) == state
    assert [store.pointed_step(tmp_path, name) for name in (store.LATEST, store.BEST)] == [10, 10]
    assert read_json(tmp_path / store.BEST)["value"] == 0.7


def test_a_file_that_could_not_be_flushed_is_written_anew(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the error of the disk is the one that counts, not the one that ``torch.save`` makes of it."""
    gate.opened.set()
    monkeypatch.setattr(files, "RETRY_PAUSES", (0.0,))
    fsync, save_file, written, errors = os.fsync, torch.save, [], [errno.EIO]

    def counting(content: Any, file: Any) -> None:
        written.append(Path(file.name).name)
        save_file(content, file)

    def failing(fd: int) -> None:
        if errors and os.readlink(f"/proc/self/fd/{fd}").endswith("weights.pt"):
            raise OSError(errors.pop(), "injected")
        fsync(fd)

    monkeypatch.setattr(torch, "save", counting)
    monkeypatch.setattr(os, "fsync", failing)
    saved = save(saver(tmp_path, background=False), engine, 5)
    assert saved is not None and store.verify(saved.path)
    assert written == ["weights.pt", "weights.pt", "rank_00000.pt"]


def test_a_host_that_does_not_see_the_checkpoint_is_named(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    checkpointer = saver(tmp_path, background=False)
    saved = save(checkpointer, engine, 5)
    assert saved is not None
    content = checkpointer.read_state(saved.path)
    (saved.path / SHARD).unlink()
    monkeypatch.setattr(store, "VISIBLE_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"rank 0: engine/weights\.pt is missing.*preflight") as caught:
        checkpointer.restore(None, saved.path, content, IDENTITY)
    assert caught.value.on_all_ranks


def test_code_in_the_file_of_a_rank_is_refused_and_not_run(
    tmp_path: Path, gate: Gate, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.opened.set()
    checkpointer = saver(tmp_path / "checkpoints", background=False)
    saved = save(checkpointer, engine, 5)
    assert saved is not None
    torch.save(Hostile(tmp_path / "made by the checkpoint"), saved.path / "rank_00000.pt")
    marker = read_json(saved.path / store.COMPLETE)
    marker["files"] |= store.seal(saved.path, ["rank_00000.pt"])
    files.atomic_write_json(saved.path / store.COMPLETE, marker)
    monkeypatch.setattr(manager, "read_shards", lambda *_: None)
    path = checkpointer.find("must")
    assert path is not None, "checksums do not tell who wrote it"
    with pytest.raises(UserError, match="without running code"):
        checkpointer.restore(None, path, checkpointer.read_state(path), IDENTITY)
    assert not (tmp_path / "made by the checkpoint").exists()
