"""A thread that ends a process without progress, after writing the stacks of all its threads to a file.

A collective whose peer is gone, a DataLoader that waits for a dead disk, a deadlock: the main thread cannot notice
them, and only an exit lets the launcher restart the job. So each rank has a thread that expects a heartbeat
(:meth:`Watchdog.beat`) every ``limit_seconds``. The first rank that gives up leaves a file for the others, so that
their stacks are written too before the launcher ends them.

The thread also reads signals through Python's wake-up descriptor, which works while the main thread is stuck in C
code: a second SIGTERM or SIGINT, some seconds after the first, ends the process at once; while there is nothing to save
(:attr:`Watchdog.leave_early`), the first one does, unless the main thread ends it sooner. If the thread itself cannot
run (something holds the interpreter lock), ``faulthandler``'s own timer, which needs no lock, ends the process.

The run directory may be on a file system that fails or hangs. Nothing that it does ends the thread, which would end a
healthy process by that timer, or keeps a process that gives up from its exit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

from rating_train.errors import EXIT_DONE, EXIT_HUNG
from rating_train.files import MarkerFile, retry

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0  # time for the other ranks to write their stacks
LEAVE_SECONDS = 4.0  # for the main thread to notice a first signal by itself, where there is nothing to save
AGAIN_SECONDS = 5.0  # a scheduler and a launcher may both forward the same first signal
_LOCK_HELD_SECONDS = 60.0  # from the limit to faulthandler's timer
_HUNG_DISK_SECONDS = 30.0  # for writing the stacks, beyond the grace period


class Watchdog:
    """Watches this process from ``__enter__`` to ``__exit__``.

    Args:
        limit_seconds: longest time between two beats; 0 watches for signals only.
        stacks: file that the stacks of this rank are appended to.
        hung: file that the first rank to give up creates. One that is there at the start, removed by rank 0 but
            still in the cache of this host, does not count.
    """

    def __init__(self, limit_seconds: float, stacks: Path, hung: Path) -> None:
        self.limit_seconds = limit_seconds
        self._stacks_path = stacks
        self._hung = MarkerFile(hung)
        self._old_hung: tuple[int, int] | None = None
        self._doing = "starting"
        self._last = time.monotonic()
        self._first_signal: tuple[float, str] | None = None
        #: What to do, with the signal as its argument, before this process ends with exit code 0 on a first signal;
        #: ``None`` where there is something to save, which only the main thread can do.
        self.leave_early: Callable[[str], None] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Report progress, and what the main thread does next. Cheap enough for every step."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._stacks = self._open_stacks()  # now: the disk may be full later
        self._old_hung = self._hung.identity()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._reader.setblocking(False)
        self._signals = (
            select.poll()
        )  # select.select refuses descriptors from 1,024 on, which a rank may reach
        self._signals.register(self._reader, select.POLLIN)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        signal.set_wakeup_fd(self._previous)
        self._writer.close()  # wakes the thread
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._reader.close()
        with contextlib.suppress(OSError):
            self._stacks.close()

    def _open_stacks(self) -> IO[str]:
        try:
            return retry(lambda: open(self._stacks_path, "a", encoding="utf-8"), self._stacks_path)
        except OSError as e:
            log.warning("%s cannot be written (%s): stacks would go to stderr alone", self._stacks_path, e)
            return open(os.devnull, "a", encoding="utf-8")

    def _watch(self) -> None:
        failed = False
        while not self._ended.is_set():
            try:
                self._look()
            except Exception:  # whatever it is, a watchdog that died would end a healthy process
                if not failed:
                    log.exception("the watchdog failed, and keeps watching")
                failed = True
                time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        """Wait for a signal for ``POLL_SECONDS``, then look at the clock and at the other ranks."""
        if self.limit_seconds:
            faulthandler.dump_traceback_later(
                self.limit_seconds + _LOCK_HELD_SECONDS, exit=True, file=self._stacks
            )
        ready = self._signals.poll(1000 * POLL_SECONDS)
        if self._ended.is_set():
            return
        if ready:
            self._on_signals(self._reader.recv(4096))
        self._leave_early()
        idle = time.monotonic() - self._last
        if self.limit_seconds and idle > self.limit_seconds:
            self._give_up(f"no progress for {idle:.0f} s while {self._doing}")
        if self._hung.identity() not in (None, self._old_hung):
            self._give_up(f"another rank gave up (this one was {self._doing})")

    def _on_signals(self, numbers: bytes) -> None:
        urgent = [number for number in numbers if number in (signal.SIGTERM, signal.SIGINT)]
        if not urgent:
            return
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now, f"signal {signal.Signals(urgent[0]).name}"
        elif now - self._first_signal[0] > AGAIN_SECONDS:
            self._give_up(f"asked to stop again while {self._doing}", wait=False)

    def _leave_early(self) -> None:
        leave = self.leave_early
        if leave is None or self._first_signal is None:
            return
        since, reason = self._first_signal
        if time.monotonic() - since < LEAVE_SECONDS:
            return
        log.warning("%s while %s: there is nothing to save, ending this process", reason, self._doing)
        self._exit_at_last(_HUNG_DISK_SECONDS)
        code = EXIT_HUNG  # unless what the launcher needs to know could be written
        try:
            leave(reason)
            code = EXIT_DONE
            logging.shutdown()
        finally:
            os._exit(code)

    def _give_up(self, why: str, wait: bool = True) -> NoReturn:
        """Write the stacks, notify the other ranks, and exit: also if the disk fails, or never answers."""
        self._exit_at_last(_HUNG_DISK_SECONDS + wait * GRACE_SECONDS)
        try:
            self._write_stacks(why)
            if wait:
                self._notify()
                time.sleep(GRACE_SECONDS)
            logging.shutdown()
        finally:
            os._exit(EXIT_HUNG)

    def _exit_at_last(self, seconds: float) -> None:
        """Exit after so long, whatever a disk does until then."""
        last_resort = threading.Timer(seconds, os._exit, (EXIT_HUNG,))
        last_resort.daemon = True
        last_resort.start()

    def _write_stacks(self, why: str) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        log.error("%s: ending this process; stacks of all its threads in %s", why, self._stacks_path)
        try:
            self._stacks.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}: {why}\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        except OSError as e:
            log.error("%s cannot be written (%s): the stacks are on stderr", self._stacks_path, e)

    def _notify(self) -> None:
        try:
            self._hung.path.touch()
        except OSError as e:
            log.error("the other ranks cannot be notified (%s): their own watchdogs will end them", e)
