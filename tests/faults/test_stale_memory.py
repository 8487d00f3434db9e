"""What a killed job leaves in /dev/shm and TMPDIR is removed; what a living one uses stays. And jobs side by side."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rating_train.data import stale_memory
from rating_train.data.stale_memory import BLOCKS, sweep_stale
from tests.conftest import Ranks, full
from tests.helpers.ranks import SHARED_MEMORY

MARK = b"\0rating_train"
# Constant rates, so that the losses do not depend on how long the run was meant to be.
LONG = {"optim": {"schedule": "constant", "warmup_fraction": 0.0}, "train": {"epochs": 400}}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    log = run / "train.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"step {step} was not reached in 120 s"
        time.sleep(0.05)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "train.jsonl").read_text().splitlines()]


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    launcher = psutil.Process(process.pid)
    return [launcher, *launcher.children(recursive=True)]


def blocks_of(process: subprocess.Popen[str]) -> set[str]:
    """Numbers of the blocks that a job's processes have mapped."""
    found = set()
    for member in family(process):
        maps = Path(f"/proc/{member.pid}/maps").read_text()
        found |= set(re.findall(r"/dev/shm/(\d{6})_locals", maps))
    return found


def kill_at_once(process: subprocess.Popen[str]) -> None:
    """kill -9 of the whole job as a scheduler does it: its helpers have no time to tidy up after it."""
    members = family(process)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for member in members:
            member.send_signal(number)
    psutil.wait_procs(members, timeout=30)
    process.wait(timeout=30)


@pytest.mark.timeout(300)
def test_a_killed_job_is_swept_and_its_neighbour_goes_on(
    ranks: Ranks, tiny_config: Callable[..., Path], demo: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary)}
    cache = {"workers": 1, "remote": str(demo / "data"), "path": str(tmp_path / "cache")}
    killed_run, live_run = tmp_path / "runs/killed", tmp_path / "runs/live"
    killed = ranks.start(2, "-m", "rating_train", "train", tiny_config("killed", **LONG, data=cache), env=env)
    config = tiny_config("live", **LONG, data={"workers": 1})
    live = ranks.start(2, "-m", "rating_train", "train", config, env=env)
    wait_for_step(killed_run, 2, killed)
    wait_for_step(live_run, 2, live)
    dead, alive = blocks_of(killed), blocks_of(live)
    assert len(dead) == len(alive) == 2 and not dead & alive  # the training and the evaluation split
    kill_at_once(killed)

    left = {str(p) for p in SHARED_MEMORY.iterdir() if p.name[:6] in dead}
    assert len(left) == 12, left
    files = {str(temporary / f"{n}_{name}") for n in dead for name in ("cache_filelock", "rating_train")}
    assert all(Path(f).exists() for f in files)
    before = {p.name for p in SHARED_MEMORY.iterdir() if p.name[:6] in alive}
    removed = sweep_stale(temporary)
    assert {p for p in removed if Path(p).name[:6] in dead | alive} == left | files
    assert {p.name for p in SHARED_MEMORY.iterdir() if p.name[:6] in dead | alive} == before

    done = len(losses(live_run))
    wait_for_step(live_run, max(done + 5, 8), live)
    (live_run / "STOP").touch()
    output, _ = live.communicate(timeout=60)
    assert live.returncode == 0, output[-4000:]
    assert not [p for p in SHARED_MEMORY.iterdir() if p.name[:6] in alive]

    # The dead job's cache is free again: streaming would have taken it for one in use.
    again = tiny_config("killed", **{**LONG, "train": {"max_steps": 8}}, data=cache)
    ranks.train(2, again, env=env)
    assert losses(killed_run)[:8] == losses(live_run)[:8]


@full
@pytest.mark.timeout(300)
def test_two_jobs_side_by_side_train_as_they_do_alone(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    sections = {"data": {"workers": 1}, "train": {"max_steps": 6, "eval_every_steps": 3}}
    both = [
        ranks.start(2, "-m", "rating_train", "train", tiny_config(name, **sections)) for name in ("a", "b")
    ]
    for process in both:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output[-4000:]
    ranks.train(2, tiny_config("alone", **sections))
    runs = tmp_path / "runs"
    assert losses(runs / "a") == losses(runs / "b") == losses(runs / "alone")
    assert len(losses(runs / "alone")) == 6
    scores = [json.loads((runs / n / "eval.jsonl").read_text().splitlines()[-1])["rmse"] for n in ("a", "b")]
    assert scores[0] == scores[1]


HOLDER = """
import fcntl, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] == "locked":
    fcntl.flock(fd, fcntl.LOCK_SH)
if sys.argv[2] == "mapped":
    memory = mmap.mmap(fd, 4)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holders() -> Iterator[Callable[[Path, str], subprocess.Popen[str]]]:
    """Starts processes that hold a block: locked, mapped, or just open."""
    started = []

    def start(path: Path, how: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm."""
    path = tmp_path / "shm"
    path.mkdir()
    monkeypatch.setattr(stale_memory, "FOLDER", path)
    monkeypatch.setattr(stale_memory, "_sees_all_processes", lambda: True)
    return path


def make_blocks(folder: Path, number: str, mark: bytes = b"") -> list[str]:
    for name in BLOCKS:
        (folder / f"{number}_{name}").write_bytes(b"\4\0\0\0" + (mark if name == "locals" else b""))
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(number))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.timeout(60)
def test_a_marked_block_lives_as_long_as_its_lock_even_if_its_process_cannot_be_seen(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holders: Callable[[Path, str], subprocess.Popen[str]],
) -> None:
    monkeypatch.setattr(stale_memory, "_PROC", tmp_path / "no processes")
    every = make_blocks(folder, "971001", MARK)
    holder = holders(folder / "971001_locals", "locked")
    assert sweep_stale(tmp_path, young_seconds=0) == [] and names(folder) == every
    holder.kill()
    holder.wait(timeout=30)
    assert sorted(Path(p).name for p in sweep_stale(tmp_path)) == every  # at once: a mark needs no age
    assert names(folder) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["mapped", "open"])
def test_an_unmarked_number_stays_while_any_of_it_is_in_use(
    how: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holders: Callable[[Path, str], subprocess.Popen[str]],
) -> None:
    used, unused = make_blocks(folder, "971002"), make_blocks(folder, "971003")
    (folder / "something else").touch()
    holder = holders(folder / "971002_barrier", how)
    # A machine of two processes: this test must not depend on whether all others can be looked into.
    (tmp_path / "proc").mkdir()
    for pid in (os.getpid(), holder.pid):
        (tmp_path / "proc" / str(pid)).symlink_to(f"/proc/{pid}")
    monkeypatch.setattr(stale_memory, "_PROC", tmp_path / "proc")
    assert sweep_stale(tmp_path, young_seconds=60) == []  # all of it is young
    assert sorted(Path(p).name for p in sweep_stale(tmp_path, young_seconds=0)) == unused
    assert names(folder) == [*used, "something else"]
    holder.kill()
    holder.wait(timeout=30)
    sweep_stale(tmp_path, young_seconds=0)
    assert names(folder) == ["something else"]


@pytest.mark.timeout(60)
def test_an_unmarked_block_stays_where_processes_may_be_hidden(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = make_blocks(folder, "971004")
    with monkeypatch.context() as patch:
        patch.setattr(stale_memory, "_sees_all_processes", lambda: False)  # in a container
        assert sweep_stale(tmp_path, young_seconds=0) == []
    process = tmp_path / "proc" / "17"
    process.mkdir(parents=True)
    (process / "status").write_text(f"Name:\tx\nUid:\t{os.geteuid()}\t{os.geteuid()}\t0\t0\n")

    def refuse(self: Path, *_: object) -> str:
        if self == process / "maps":
            raise PermissionError
        return read(self, *_)

    read = Path.read_text
    monkeypatch.setattr(stale_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert sweep_stale(tmp_path, young_seconds=0) == [] and names(folder) == every


@pytest.mark.timeout(60)
def test_lock_files_go_with_their_claim_alone(
    folder: Path, tmp_path: Path, holders: Callable[[Path, str], subprocess.Popen[str]]
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    for number in ("971005", "971006", "971007", "971008"):
        (temporary / f"{number}_cache_filelock").touch()
    inode = {n: (temporary / f"{n}_cache_filelock").stat().st_ino for n in ("971005", "971006")}
    (temporary / "971005_rating_train").write_bytes(str(inode["971005"]).encode() + MARK)
    (temporary / "971006_rating_train").write_bytes(str(inode["971006"]).encode() + MARK)
    (temporary / "971007_rating_train").write_bytes(b"1" + MARK)  # of a file that somebody replaced
    holders(temporary / "971006_rating_train", "locked")
    old, new = temporary / "rating_train-hashed-abcdefg1", temporary / "rating_train-abcdefg2"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    removed = {Path(p).name for p in sweep_stale(temporary)}
    assert removed == {
        "971005_rating_train",
        "971005_cache_filelock",
        "971007_rating_train",
        "rating_train-hashed-abcdefg1",
    }
    assert new.exists() and (temporary / "971008_cache_filelock").exists()
