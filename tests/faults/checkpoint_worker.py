"""``rating-train`` with a fault in its saving, for tests.

Usage: checkpoint_worker.py FAULT ARGUMENT COMMAND...

    die MOMENT@STEP        rank 0 ends by SIGKILL while it saves this step: MOMENT is begun (the temporary directory
                           is made), written (all files are, COMPLETE.json is not) or renamed (latest.json is not yet)
    disk CASE,CASE,...     what each save in turn finds: ok, space (too little before it begins) or write (enough when
                           it begins, half of it when it writes); after the last one ok
    blocked STEP,STEP,...  rank 1 cannot write its file into the checkpoints of these steps
    full STEP              no byte is left on the disk from this step on
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rating_train.checkpoint import store
from rating_train.cli import main


def fill(folder: Path, leave_bytes: int) -> None:
    """Create a file that takes all free space except this."""
    with open(folder / "filler", "wb") as f:
        size = shutil.disk_usage(folder).free - leave_bytes
        if size > 0:
            os.posix_fallocate(f.fileno(), 0, size)


def die(argument: str) -> None:
    moment, at_step = argument.split("@")

    def kill_if(step: int) -> None:
        if step == int(at_step):
            os.kill(os.getpid(), signal.SIGKILL)

    begin, commit, point = store.begin, store.commit, store.point

    def dying_begin(root: Path, step: int) -> Path:
        temporary = begin(root, step)
        kill_if(step)
        return temporary

    def dying_commit(temporary: Path, step: int, files: store.Files) -> Path:
        kill_if(step)
        return commit(temporary, step, files)

    def dying_point(root: Path, name: str, step: int, **more: Any) -> None:
        kill_if(step)
        point(root, name, step, **more)

    if moment == "begun":
        store.begin = dying_begin
    elif moment == "written":
        store.commit = dying_commit
    else:
        store.point = dying_point


def disk(argument: str) -> None:
    cases = iter(argument.split(","))
    check_free_space = store.check_free_space

    def check(root: Path, needed_bytes: int) -> None:
        runs, case = root.parent.parent, next(cases, "ok")
        (runs / "filler").unlink(missing_ok=True)
        if case != "ok":
            time.sleep(0.5)  # an older checkpoint may still be pruned, in the background
        if case == "space":
            fill(runs, needed_bytes - 1)
        check_free_space(root, needed_bytes)
        if case == "write":
            fill(runs, needed_bytes // 2)

    store.check_free_space = check


def blocked(argument: str) -> None:
    steps = {int(step) for step in argument.split(",")}
    begin = store.begin

    def begin_blocked(root: Path, step: int) -> Path:
        temporary = begin(root, step)
        if step in steps:
            (temporary / "rank_00001.pt").mkdir()  # works for root too, whom permissions do not stop
        return temporary

    store.begin = begin_blocked


def full(argument: str) -> None:
    from rating_train.checkpoint.state import TrainState

    record_step = TrainState.record_step

    def record(state: TrainState, items: int) -> None:
        record_step(state, items)
        if state.step == int(argument) and os.environ["RANK"] == "0":
            fill(Path(os.environ["FULL_FOLDER"]), 0)

    TrainState.record_step = record  # type: ignore[method-assign]


if __name__ == "__main__":
    {"die": die, "disk": disk, "blocked": blocked, "full": full}[sys.argv[1]](sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    raise SystemExit(main())
