"""Trains staged configurations one after the other, each up to one point, at which the last one is killed by SIGKILL.

The others are left there by an exception that nothing catches, so that one start of the processes serves several runs.

Usage: torchrun stages_worker.py POINT CONFIG.yaml...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rating_train.cli import leave
from rating_train.config.load import load_config
from rating_train.training import job, loop
from rating_train.training.saver import Saver

#: Phases of three steps each: what is called at the point, and the step of it.
POINTS: dict[str, tuple[Any, str, int]] = {
    "in phase 1": (loop, "boundary", 2),
    "before the commit": (Saver, "settle", 3),
    "after the commit": (loop, "enter_next_phase", 3),
    "while the engine is built": (job, "start_from", 3),
    "in phase 2": (loop, "boundary", 6),
}


class Cut(BaseException):
    """A run is left where it is."""


def cut_at(point: str, end: Callable[[], None]) -> Callable[[], None]:
    """Have a run end at a point; returns a function that undoes it."""
    where, name, step = POINTS[point]
    own = getattr(where, name)

    def ending(*args: Any) -> Any:
        states = [a for a in args if isinstance(a, loop.TrainState)] or [args[0]._state] if name != "start_from" else []
        if all(state.step == step for state in states):
            end()
        return own(*args)

    setattr(where, name, ending)
    return lambda: setattr(where, name, own)


def leave_it() -> None:
    raise Cut


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    point, *paths = sys.argv[1:]
    for path in paths:
        undo = cut_at(point, die if path == paths[-1] else leave_it) if point in POINTS else lambda: None
        try:
            loop.train(load_config(path, []), "auto")
        except Cut:
            pass
        undo()
    leave(0)
