"""Many parts at once: worker processes that each make one complete part after the other.

The parent only hands out part numbers and counts. A worker stops when its pipe to the parent breaks; the parent notices
the end of a worker by the same pipe. So kill -9 of any process leaves neither a process nor a half-made part behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from rating_train.errors import UserError
from rating_train.files import hold_lock
from rating_train.prepare.full_disk import SAME_COMMAND, disk_full, is_full
from rating_train.prepare.images.lookup import ImageStore
from rating_train.prepare.parts.part import PartSpec, build_part, finished_parts, read_done
from rating_train.shards.schema import Dropped
from rating_train.shards.writer import sweep

REPORT_SECONDS = 0.25  # how often a worker reports its progress, and so notices a dead parent
_PART_NAMES = r"part_\d+"
DEATH_SECONDS = 15.0  # from a broken pipe to the exit code of the worker


class Event(NamedTuple):
    """Progress of a part: items kept and dropped since the last event; the last one has ``finished``."""

    part: int
    kept: int
    dropped: list[Dropped]
    finished: bool


class _Job(NamedTuple):
    """All that a worker needs; it holds a shared lock on the file ``lock`` while it lives."""

    plan_dir: Path
    parts_dir: Path
    store: ImageStore
    spec: PartSpec
    lock: Path


def build_parts(
    plan_dir: Path,
    parts_dir: Path,
    store: ImageStore,
    spec: PartSpec,
    workers: int,
    part_range: range,
    on_event: Callable[[Event], None] = lambda _: None,
    lock: Path | None = None,
) -> None:
    """Make the parts of the range that are not in place. A failed part stops the others; a later call resumes.

    Args:
        plan_dir: the plan.
        parts_dir: where finished parts are put.
        store: reads the images.
        spec: see :class:`PartSpec`.
        workers: number of processes; 1 works in this process.
        part_range: numbers of the parts to make.
        on_event: called in this process, for new work only; if it raises, the build stops.
        lock: a file on which every worker process holds a shared lock (by default one in ``parts_dir``).

    Raises:
        UserError: the disk is full, or a worker was killed.
    """
    parts_dir.mkdir(parents=True, exist_ok=True)
    sweep(parts_dir, _PART_NAMES)
    there = set(finished_parts(parts_dir))
    missing = [part for part in part_range if part not in there]
    for part in there.intersection(part_range):
        read_done(parts_dir, part, spec.build)
    job = _Job(plan_dir, parts_dir, store, spec, lock or parts_dir / ".lock")
    try:
        if workers == 1 or len(missing) <= 1:
            for part in missing:
                _build_and_report(job, part, on_event)
        else:
            _Pool(job, min(workers, len(missing)), on_event).run(missing)
    except OSError as e:
        if not is_full(e):
            raise
        needed = _bytes_needed(parts_dir, spec, part_range)
        more = f"about {needed / 2**20:.1f} MiB more" if needed is not None else ""
        raise disk_full(parts_dir, more) from e


def _bytes_needed(parts_dir: Path, spec: PartSpec, part_range: range) -> int | None:
    """Estimate the missing bytes by the mean size of the parts in place; ``None`` if there are none."""
    done = [read_done(parts_dir, part, spec.build) for part in finished_parts(parts_dir)]
    items = sum(d["items"] for d in done)
    if not items:
        return None
    mean = sum(f["bytes"] for d in done for f in d["files"].values()) / len(done)
    return round(mean * len(set(part_range) - {d["part"] for d in done}))


def _build_and_report(job: _Job, part: int, report: Callable[[Event], None], every: float = 0.0) -> None:
    """Make a part and report its items every ``every`` seconds (0: each item)."""
    kept, dropped, reported = 0, list[Dropped](), time.monotonic()

    def on_item(problem: Dropped | None) -> None:
        nonlocal kept, dropped, reported
        if problem is None:
            kept += 1
        else:
            dropped.append(problem)
        if time.monotonic() - reported >= every:
            report(Event(part, kept, dropped, finished=False))
            kept, dropped, reported = 0, [], time.monotonic()

    build_part(job.plan_dir, part, job.parts_dir, job.store, job.spec, on_item)
    report(Event(part, kept, dropped, finished=True))


# --- the worker's side --------------------------------------------------------------------------------


def _work(job: _Job, pipe: connection.Connection) -> None:
    """Run a worker: part numbers come in, events go out, an exception is the last message."""
    # Ctrl-C in a terminal and a scheduler's SIGTERM reach all processes: the parent decides, and uses SIGKILL.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    lock = os.open(job.lock, os.O_RDWR | os.O_CREAT, 0o666)
    hold_lock(lock, shared=True, wait=True)
    try:
        while (part := pipe.recv()) is not None:
            _build_and_report(job, part, pipe.send, REPORT_SECONDS)
    except (BrokenPipeError, EOFError, ConnectionResetError):
        return  # the parent is gone: there is nobody to report to
    except Exception as e:
        if not isinstance(e, UserError | OSError):
            traceback.print_exc()  # a bug: the parent receives the exception without its traceback
        with contextlib.suppress(OSError):
            pipe.send(e)


# --- the parent's side --------------------------------------------------------------------------------


class _Pool:
    def __init__(self, job: _Job, workers: int, on_event: Callable[[Event], None]) -> None:
        self._job, self._workers, self._on_event = job, workers, on_event
        self._processes: dict[connection.Connection, BaseProcess] = {}
        self._part: dict[connection.Connection, int] = {}

    def run(self, parts: Sequence[int]) -> None:
        """Make all the parts, lowest number first."""
        todo = iter(parts)
        try:
            self._start()
            for pipe in self._processes:
                self._give(pipe, next(todo, None))
            while self._part:
                # With a time-out: the handler of a signal that comes just before the wait runs after it.
                for ready in connection.wait(list(self._part), timeout=1.0):
                    assert isinstance(ready, connection.Connection)
                    event = self._receive(ready)
                    self._on_event(event)
                    if event.finished:
                        self._give(ready, next(todo, None))
        except BaseException:
            self._stop()
            raise
        for process in self._processes.values():
            process.join()

    def _start(self) -> None:
        # Not "fork": this process may have threads (progress bars), and a fork would copy only one of them.
        context = get_context("spawn")
        for _ in range(self._workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(self._job, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of a worker is an end of file here
            self._processes[ours] = process

    def _give(self, pipe: connection.Connection, part: int | None) -> None:
        self._part.pop(pipe, None)
        try:
            pipe.send(part)
        except OSError as e:
            raise self._death(pipe) from e
        if part is not None:
            self._part[pipe] = part

    def _receive(self, pipe: connection.Connection) -> Event:
        try:
            message = pipe.recv()
        except (EOFError, OSError) as e:
            raise self._death(pipe) from e
        if isinstance(message, BaseException):
            raise message
        return message

    def _death(self, pipe: connection.Connection) -> UserError:
        process = self._processes[pipe]
        process.join(DEATH_SECONDS)
        code = process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        memory = "if it ran out of memory, use fewer --workers; " if code == -signal.SIGKILL else ""
        return UserError(
            f"a worker process died ({how}) while making part {self._part.get(pipe, '?')}",
            where=self._job.parts_dir,
            fix=memory + SAME_COMMAND,
        )

    def _stop(self) -> None:
        """Kill all workers, then sweep the temporary folders that they leave."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        sweep(self._job.parts_dir, _PART_NAMES)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; both become a :class:`UserError` that says how to resume."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if main else None
    try:
        yield
    except KeyboardInterrupt as e:
        name = signal.Signals(e.args[0]).name if e.args else "SIGINT"
        raise UserError(f"stopped by {name}; finished parts are kept", fix=SAME_COMMAND) from e
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt(signum)
