"""A process killed before, during or after any file operation of a save leaves the old checkpoint or the new one.

Every operation on files that ``store`` makes is counted, and a process of its own is killed at the first, the second,
... until one gets through. One chain of real runs dies at three of these points.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rating_train import files as package_files
from rating_train.checkpoint import cleanup, store
from rating_train.checkpoint.store import BEST, COMPLETE, LATEST
from tests.conftest import Ranks
from tests.helpers.runs import losses

WORKER = Path(__file__).with_name("checkpoint_worker.py")
OPERATIONS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")
SHARDS = ("state.json", "engine/a.pt", "engine/b.pt")


def save(root: Path, step: int, content: str, best: bool = False) -> None:
    """Do what all ranks do to save a checkpoint that holds ``content``; keep the newest, best and latest."""
    temporary = store.begin(root, step)
    (temporary / "engine").mkdir()
    for name in SHARDS:
        with package_files.open(temporary / name, "wb") as f:
            f.write(content.encode() * 100)
    store.commit(temporary, step, store.seal(temporary, SHARDS))
    store.point(root, LATEST, step)
    if best:
        store.point(root, BEST, step)
    cleanup.prune(root, keep_last=1, keep_every=0)


def held(path: Path) -> str:
    """Return what :func:`save` wrote to a checkpoint, the same in all of its files."""
    contents = {(path / name).read_text() for name in SHARDS}
    assert len(contents) == 1, "files of two checkpoints in one"
    (content,) = contents
    return content[: len(content) // 100]


class Killer:
    """Kills this process at the ``at``-th point; every operation has one before and one after it."""

    def __init__(self, at: int, tell: int) -> None:
        self.at, self.tell, self.passed = at, tell, 0

    def point(self, label: str) -> None:
        self.passed += 1
        if self.passed == self.at:
            os.write(self.tell, label.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            self.point(f"before {name}")
            result = None if name == "fsync" else action(*args, **more)  # see `no_sync`
            self.point(f"after {name}")
            return result

        return wrapped

    def open(self, path: Any, mode: str = "r", **more: Any) -> Any:
        if not mode.startswith("w"):
            return builtins.open(path, mode, **more)
        self.point("before open")
        file = builtins.open(path, mode, **more)  # noqa: SIM115 - the caller closes it
        self.point("after open")
        write = file.write

        def torn(content: bytes) -> None:
            write(content[: len(content) // 2])
            file.flush()
            self.point("in write")
            write(content[len(content) // 2 :])

        file.write = torn  # type: ignore[method-assign]
        return file


def die_at(at: int, action: Callable[[], None]) -> str:
    """Run ``action`` in a process that is killed at the ``at``-th point; return its label, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            killer = Killer(at, writer)
            for name in OPERATIONS:
                setattr(os, name, killer.around(name, getattr(os, name)))
            package_files.open = killer.open  # type: ignore[attr-defined]
            action()
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as f:
        label = f.read().decode()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed == bool(label) and (killed or status == 0), f"point {at}: it failed on its own ({status})"
    return label


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process wrote outlives it without any flush; the order of flushes has its own test."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    monkeypatch.setattr(package_files, "open", builtins.open, raising=False)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("step", "best"), [(6, False), (6, True), (4, False), (4, True)])
def test_death_at_every_point_of_a_save(tmp_path: Path, no_sync: None, step: int, best: bool) -> None:
    """Steps 2 (the best) and 4 exist. Step 6 is saved and step 2 or 4 pruned after it; or step 4 is saved again."""
    start = tmp_path / "start"
    save(start, 2, "second", best=True)
    save(start, 4, "old")
    outcomes, places, at = [], set(), 0
    while True:
        at += 1
        root = tmp_path / "checkpoints"
        shutil.copytree(start, root)
        label = die_at(at, lambda root=root: save(root, step, "new", best))  # type: ignore[misc]
        if not label:
            break
        where = f"point {at}, {label}"
        places.add(label)

        cleanup.sweep(root)
        found, skipped = store.newest_valid(root)
        assert found is not None and not skipped, f"{where}: {skipped}"
        assert (found.step, held(found.path)) in ((4, "old"), (step, "new")), where
        outcomes.append(held(found.path))
        for name in (LATEST, BEST):
            pointed = store.pointed_step(root, name)
            assert pointed in (2, 4, step), f"{where}: {name}"
            store.verify(root / store.step_name(pointed))
        names = {p.name for p in root.iterdir()}
        allowed = {LATEST, BEST, *(store.step_name(s) for s in (2, 4, step))}
        assert names <= allowed, f"{where}: {names - allowed} left after the sweep"

        save(root, 8, "next", best=True)
        found, skipped = store.newest_valid(root)
        assert found is not None and (found.step, held(found.path), skipped) == (8, "next", []), where
        assert {p.name for p in root.iterdir()} == {LATEST, BEST, store.step_name(8)}, where
        shutil.rmtree(root)
    found, _ = store.newest_valid(root)
    assert found is not None and (found.step, held(found.path)) == (step, "new"), (
        "the last one was not killed"
    )
    if step != 4:  # while a checkpoint of the same step is replaced, either may be found
        assert outcomes == sorted(outcomes, reverse=True), "a committed checkpoint disappeared"
    assert {"old", "new"} == set(outcomes)
    expected = {f"{when} {name}" for when in ("before", "after") for name in (*OPERATIONS, "open")}
    assert places == expected | {"in write"}
    print(
        f"{len(outcomes)} points: {outcomes.count('old')} give the old one, {outcomes.count('new')} the new"
    )


@pytest.mark.timeout(60)
def test_files_are_flushed_before_the_rename_and_the_rename_before_the_pointer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure keeps only what was flushed: all files and folders, then the new name, then latest.json."""
    synced: dict[Path, int] = {}
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def sync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)
        synced[path] = path.stat().st_mtime_ns
        events.append(f"fsync {path.name}")
        time.sleep(0.02)  # so that a later change has a different time

    def name(a: Any, b: Any, *args: Any, **more: Any) -> None:
        if Path(b).name == "step_00000006":
            for path in (Path(a), *Path(a).rglob("*")):
                made = synced.get(path) or synced.get(path.with_name(f".{path.name}"))
                if path.name != COMPLETE:  # flushed under its temporary name
                    assert made == path.stat().st_mtime_ns, (
                        f"{path.name} is not flushed, or was changed after"
                    )
            events.append("commit")
        rename(a, b, *args, **more)

    def pointer(a: Any, b: Any, *args: Any, **more: Any) -> None:
        assert Path(a) in synced, f"{Path(b).name} is replaced by what is not flushed"
        events.append(f"replace {Path(b).name}")
        replace(a, b, *args, **more)

    monkeypatch.setattr(package_files, "open", builtins.open, raising=False)
    save(tmp_path, 4, "old")
    for attribute, value in (("fsync", sync), ("rename", name), ("replace", pointer)):
        monkeypatch.setattr(os, attribute, value)
    save(tmp_path, 6, "new")
    after = events[events.index("commit") :]
    assert f"replace {COMPLETE}" in events[: events.index("commit")]
    assert after.index(f"fsync {tmp_path.name}") < after.index(f"replace {LATEST}")


@pytest.mark.timeout(300)
def test_a_run_killed_while_saving_resumes_from_the_newest_committed_checkpoint(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"max_steps": 6, "save_every_steps": 2, "stop_check_steps": 1, "log_sample_ids": False}
    straight, broken = (tiny_config(name, train=settings) for name in ("straight", "broken"))
    run, root = tmp_path / "runs" / "broken", tmp_path / "runs" / "broken" / "checkpoints"
    ranks.train(2, straight)
    for moment, resumes_from, newest in (("begun", 0, 2), ("written", 2, 2), ("renamed", 2, 4)):
        output = ranks.run(2, WORKER, "die", f"{moment}@4", "train", broken, code=1)
        assert ("starting at step 0" if not resumes_from else f"resuming from step {resumes_from} ") in output
        assert "finished at" not in output and "error:" not in output, "killed, not ended by its own error"
        left = list(root.glob("*.tmp-*"))
        assert len(left) == (moment != "renamed"), f"{moment}: {left}"
        assert sorted(s for s, _ in store.steps_present(root)) == [2, 4][: newest // 2]
        assert json.loads((root / LATEST).read_text())["step"] == 2
    output = ranks.train(2, broken, "--resume", "must")
    assert "resuming from step 4 of 6" in output and "skipped" not in output
    assert losses(run) == losses(tmp_path / "runs" / "straight")
    assert sorted(s for s, _ in store.steps_present(root)) == [4, 6] and not list(root.glob("*.tmp-*"))
    store.verify(root / "step_00000006")
