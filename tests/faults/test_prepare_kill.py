"""``prepare`` and what can happen to it: kill -9 of any of its processes at any moment, signals, a full disk.

``RATING_TRAIN_KILLS`` sets how many times it is killed, ``RATING_TRAIN_KILL_ITEMS`` how many items it builds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from rating_train.prepare.parts.part import DONE_NAME, finished_parts
from rating_train.shards.manifest import check_split
from rating_train.shards.schema import MANIFEST_NAME
from tests.conftest import REPO, small_file_system

KILLS = int(os.environ.get("RATING_TRAIN_KILLS", "6"))
ITEMS = int(os.environ.get("RATING_TRAIN_KILL_ITEMS", "20000" if KILLS >= 20 else "6000"))
PART_ITEMS = ITEMS // 20
PICTURES = 64


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Listings with some bad ones among them, and small pictures that several of them share."""
    folder = tmp_path_factory.mktemp("kill")
    rng = np.random.default_rng(5)
    for i in range(PICTURES):
        pixels = rng.integers(0, 256, (rng.integers(32, 65), rng.integers(32, 65), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    with open(folder / "catalogue.jsonl", "w") as f:
        for i in range(ITEMS):
            line = {
                "parent_asin": f"K{i:06d}",
                "title": f"thing {i}",
                "features": ["small"],
                "description": [],
                "main_category": "Things",
                "average_rating": 1 + i % 41 / 10,
                "rating_number": 2 if i % 97 == 0 else 10 + i,
                "image_path": "gone.jpg" if i % 101 == 0 else f"{i % PICTURES}.jpg",
            }
            f.write(json.dumps(line) + "\n")
    return folder


class Prepare:
    """Starts the command on one output; whatever it left running is killed at the end."""

    def __init__(self, catalogue: Path, out: Path) -> None:
        self.catalogue, self.out = catalogue, out
        self.started: list[psutil.Process] = []

    def start(self, *more: str) -> subprocess.Popen[str]:
        """In a session of its own, with 2 workers."""
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "rating_train", "prepare", "--workers", "2"),
                *("--source", str(self.catalogue / "catalogue.jsonl"), "--images", str(self.catalogue)),
                *("--out", str(self.out), "--image-size-px", "32", "--part-items", str(PART_ITEMS)),
                *("--shard-size-mb", "1", "--max-text-chars", "200", *more),
            ],
            cwd=REPO,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(psutil.Process(process.pid))
        return process

    def finish(self, *more: str, code: int = 0) -> str:
        """Run to the end; what it said on stderr."""
        process = self.start(*more)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said[-4000:]
        return said

    def family(self, process: subprocess.Popen[str]) -> list[psutil.Process]:
        """The command and its workers, as far as they live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            self.started += (children := parent.children(recursive=True))
            return [parent, *(c for c in children if "resource_tracker" not in "".join(c.cmdline()))]
        return []

    def wait_for_parts(self, process: subprocess.Popen[str], count: int) -> None:
        """Until so many parts are in place."""
        deadline = time.monotonic() + 60
        while len(finished_parts(self.build / "parts")) < count:
            assert process.poll() is None and time.monotonic() < deadline, "it ended too early, or hangs"
            time.sleep(0.005)

    @property
    def build(self) -> Path:
        return self.out.with_name(f"{self.out.name}.build")

    def temporary_parts(self) -> list[str]:
        return [p.name for p in (self.build / "parts").glob("*.tmp-*")]


@pytest.fixture
def command(catalogue: Path, tmp_path: Path) -> Iterator[Prepare]:
    prepare = Prepare(catalogue, tmp_path / "data")
    yield prepare
    for process in prepare.started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def reference(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted build makes, every item once."""
    from streaming import LocalDataset

    prepare = Prepare(catalogue, tmp_path_factory.mktemp("reference") / "data")
    prepare.finish()
    ids: list[str] = []
    for split in ("train", "val"):
        dataset = LocalDataset(local=str(prepare.out / split))
        ids += [dataset[i]["id"] for i in range(len(dataset))]
    left_out = {i for i in range(ITEMS) if i % 97 == 0 or i % 101 == 0}
    assert sorted(ids) == [f"K{i:06d}" for i in range(ITEMS) if i not in left_out]
    return prepare.out


def content(out: Path) -> dict[str, bytes]:
    """All files but the manifest, which names ``out``."""
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name != MANIFEST_NAME}


def same(out: Path, reference: Path) -> bool:
    """Whether two datasets open, and are equal byte for byte."""
    ours, theirs = check_split(out, "train"), check_split(reference, "train")
    assert check_split(out, "val")["fingerprint"] == theirs["fingerprint"]
    keys = ("read", "kept", "dropped", "splits", "fingerprint", "groups")
    return content(out) == content(reference) and all(ours[k] == theirs[k] for k in keys)


@pytest.mark.timeout(120 + 15 * KILLS)
def test_kill_9_at_random_moments(command: Prepare, reference: Path) -> None:
    dice = random.Random(20)
    out, kills, builds, full_seconds = command.out, 0, 0, 0.0
    began = time.monotonic()
    command.finish()
    full_seconds = time.monotonic() - began
    where: list[str] = []
    while True:
        if out.exists() and not command.build.exists():
            assert same(out, reference)
            builds += 1
            if kills >= KILLS:
                break
            shutil.rmtree(out)
        process = command.start()
        if kills >= KILLS:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said[-4000:]
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            left = max(0.2, 1 - len(finished_parts(command.build / "parts")) * PART_ITEMS / ITEMS)
            process.wait(dice.uniform(0, left * full_seconds))
        family = command.family(process)
        victims = dice.choice((family, family[:1], family[-1:]))  # all, the command, or a worker
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        _, said = process.communicate(timeout=60)
        assert process.returncode in (0, 2, -9), said[-4000:]
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "workers outlive their command"
        if process.returncode == 0:  # it was faster
            continue
        assert process.returncode == -9 or ("worker process died" in said and "same command" in said), said
        kills += 1
        parts = finished_parts(command.build / "parts")
        where.append("merged" if out.exists() else f"{len(parts)} parts")
        print(
            f"kill {kills} after {time.monotonic() - began:.0f} s, {len(victims)} processes: {where[-1]}",
            flush=True,
        )
        if out.exists():  # it was clearing up
            assert same(out, reference), "a partial dataset opens"
        else:
            assert all((command.build / "parts" / f"part_{p:05d}" / DONE_NAME).is_file() for p in parts)
    assert [p.name for p in out.parent.iterdir()] == [out.name], "nothing is left beside the dataset"
    seconds = time.monotonic() - began
    print(
        f"{kills} kills at {where}; {builds} builds, {ITEMS} items, {full_seconds:.1f} s each, {seconds:.0f} s"
    )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_what_the_same_command_continues(
    command: Prepare, reference: Path, number: signal.Signals
) -> None:
    process = command.start()
    command.wait_for_parts(process, 2)
    family = command.family(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2, said
    assert f"stopped by {number.name}" in said and "same command" in said and "Traceback" not in said
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert not command.out.exists() and not command.temporary_parts()
    finished = finished_parts(command.build / "parts")  # any: part 2 may be ready before part 1
    assert len(finished) >= 2
    made = {p: os.stat(command.build / "parts" / f"part_{p:05d}" / DONE_NAME).st_mtime_ns for p in finished}
    command.finish("--keep-build")
    again = {p: os.stat(command.build / "parts" / f"part_{p:05d}" / DONE_NAME).st_mtime_ns for p in finished}
    assert again == made, "finished parts are not made again"
    assert same(command.out, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", megabytes=256) as folder:
        yield folder


@pytest.mark.timeout(180)
def test_a_full_disk_stops_clearly_and_the_same_command_continues(
    catalogue: Path, small_disk: Path, reference: Path
) -> None:
    command = Prepare(catalogue, small_disk / "data")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True, timeout=30)

    command.finish("--stage", "plan")
    used = shutil.disk_usage(small_disk).used
    needed = sum(len(data) for data in content(reference).values())
    resize(used + needed // 2)
    for _ in range(2):  # running the command again on the full disk says the same
        said = command.finish(code=2)
        assert "disk is full" in said and "MiB more" in said and "same command" in said, said
        assert str(command.build / "parts") in said and "Traceback" not in said
        assert not command.out.exists() and not command.temporary_parts()
    assert finished_parts(command.build / "parts"), "what was finished is kept"
    resize(256 << 20)
    command.finish()
    assert same(command.out, reference)


@pytest.mark.timeout(180)
def test_a_disk_that_fills_while_planning_stops_clearly_and_the_same_command_plans(
    catalogue: Path, small_disk: Path, tmp_path: Path
) -> None:
    """Full in pass 1, in DuckDB, and when the parts of the plan are written."""
    command, stage = Prepare(catalogue, small_disk / "data"), ("--stage", "plan")
    elsewhere = Prepare(catalogue, tmp_path / "data")
    elsewhere.finish(*stage)
    plan = content(elsewhere.build / "plan")
    kept = sum(len(data) for data in plan.values())

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True, timeout=30)

    for size in (64 << 10, 512 << 10, 1536 << 10, kept, kept + (512 << 10)):
        resize(size)
        said = command.finish(*stage, code=2)
        assert "disk is full" in said and "free disk space" in said and "same command again" in said, said
        assert f"where: {command.build / 'plan'}" in said and "Traceback" not in said
        assert re.search(r"more than the [\d.]+ MiB that were free", said), said
        assert not list(small_disk.iterdir()), "an unfinished plan leaves its space to the next attempt"
    resize(256 << 20)
    command.finish(*stage)
    assert content(command.build / "plan") == plan
