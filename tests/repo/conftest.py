"""Shared by the tests of this folder: a fresh checkout with a shortened quickstart in it, and a stand-in for Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.ranks import script_env

REPO = Path(__file__).resolve().parents[2]
SHORT = {
    "QUICKSTART_ITEMS": "240",
    "QUICKSTART_SET": "train.epochs=0.5 train.log_every_steps=1 batch.global_items=16",
    "QUICKSTART_CHECK": "0",
}


@dataclass(frozen=True)
class Quickstart:
    """A fresh checkout in which the (shortened) quickstart was run, and what it printed."""

    folder: Path
    output: str

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "demo_cpu"


def run_quickstart(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout's script with the short settings."""
    return subprocess.run(
        ["bash", "launch/quickstart.sh"],
        cwd=checkout,
        env=script_env(**{**SHORT, **env}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def copy_checkout(target: Path) -> None:
    """Copy what a clone would hold: tracked files as they are now, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nobody can say which files belong to it")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():  # one that was removed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The shortened quickstart, in a checkout of its own."""
    folder = tmp_path_factory.mktemp("checkout") / "rating_train"
    copy_checkout(folder)
    done = run_quickstart(folder)
    assert done.returncode == 0, done.stdout[-6000:]
    return Quickstart(folder, done.stdout)


FAKE_PYTHON = """#!/usr/bin/env bash
# Answers questions about itself truly, and writes down what it is asked to run.
case "$1" in
    -c)
        case "$2" in
            *device_count*) echo "${FAKE_GPUS:-0}" ;;
            *) exec "$REAL_PYTHON" "$@" ;;
        esac
        ;;
    *)
        printf 'OMP_NUM_THREADS=%s %s\\n' "${OMP_NUM_THREADS:-}" "$*" >>"$RECORD"
        [[ -z "${FAKE_SIGNAL:-}" ]] || kill -s "$FAKE_SIGNAL" "$PPID" # as Ctrl-C reaches the calling script too
        [[ "$*" != *"${FAKE_FAILURE:-nothing fails}"* ]]
        ;;
esac
"""


class FakePython:
    """A stand-in interpreter and what it was asked to run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "python"
        self.record = folder / "record"
        self.path.write_text(FAKE_PYTHON)
        self.path.chmod(0o755)

    def run(
        self, script: str, *arguments: str, cwd: Path = REPO, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with the stand-in; standard input is closed."""
        more = {
            "RATING_TRAIN_PYTHON": str(self.path),
            "REAL_PYTHON": sys.executable,
            "RECORD": str(self.record),
        }
        full = script_env(**more)
        full.pop("OMP_NUM_THREADS", None)
        return subprocess.run(
            ["bash", str(REPO / script), *arguments],
            env={**full, **env},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def ran(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> FakePython:
    return FakePython(tmp_path)
