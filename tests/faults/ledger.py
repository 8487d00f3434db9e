"""A supervisor that restarts a job until it finishes, as a scheduler would, and kills it at chosen moments.

It watches only files: samples/ grows with every step, a step_*.tmp-* directory is a save in progress, and an
evaluation follows the steps whose number is a multiple of ``eval_every_steps``.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.ranks import Ranks

TOKEN = "RATING_TRAIN_TEST_TOKEN"  # in the environment of a job: identifies all its processes, orphans too
VICTIMS = ("rank 0", "rank 1", "loader", "agent", "job")  # job: all at once, its helper processes too
MOMENTS = ("start-up", "step", "save", "evaluation")
# The first ones cover every victim and every moment at least once.
FIRST_KILLS = [
    ("rank 0", "save"),
    ("agent", "start-up"),
    ("loader", "step"),
    ("rank 1", "evaluation"),
    ("agent", "step"),
    ("job", "step"),
]
# DataLoader workers start with the first step; unmarked blocks are swept once they are a minute old.
LEFT_OUT = [("loader", "start-up"), ("job", "start-up")]
STEPS_PER_KILL = 10  # enough that a run cannot end before its last kill
END_SECONDS = 90  # longest time for a job to end once a part of it was killed
MOMENT_SECONDS = 150  # longest wait for a moment


def kill_plan(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield (victim, moment) forever: ``FIRST_KILLS``, then all pairs repeatedly in random order."""
    yield from FIRST_KILLS
    pairs = [pair for pair in itertools.product(VICTIMS, MOMENTS) if pair not in LEFT_OUT]
    while True:
        rng.shuffle(pairs)
        yield from pairs


def living(token: str) -> list[psutil.Process]:
    """Return every live process of the jobs started with this token, whatever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_none_lives(token: str, seconds: float) -> list[psutil.Process]:
    """Wait until all processes of the token have ended; return those still alive after ``seconds``."""
    deadline = time.monotonic() + seconds
    while (left := living(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@contextlib.contextmanager
def none_left(token: str) -> Iterator[None]:
    """Kill, at the end, whatever process of the token still lives."""
    try:
        yield
    finally:
        for process in living(token):
            process.kill()
        wait_until_none_lives(token, 30)


class Attempt:
    """One observed start of the job."""

    def __init__(
        self,
        ranks: Ranks,
        config: Path,
        run: Path,
        token: str,
        max_restarts: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.run, self.token = run, token
        self._samples = run / "samples" / "rank_00000.jsonl"
        self._old = len(self._samples.read_bytes()) if self._samples.exists() else 0
        self.started = time.monotonic()
        self.first_step_seconds: float | None = None
        self.process = ranks.start(
            2,
            "-m",
            "rating_train",
            "train",
            config,
            env={**(env or {}), TOKEN: token},
            max_restarts=max_restarts,
        )
        self._lines: list[str] = []
        # A full pipe would stop the job.
        self._drain = threading.Thread(target=self._read, daemon=True)
        self._drain.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines += self.process.stdout

    def join(self) -> None:
        """Read the rest of the output after the job has ended."""
        self._drain.join(timeout=10)

    @property
    def output(self) -> str:
        """Return what the job has printed so far."""
        return "".join(self._lines)

    def new_steps(self) -> list[int]:
        """Return the steps that rank 0 has completed in this attempt."""
        if not self._samples.exists():
            return []
        with open(self._samples, "rb") as f:
            f.seek(self._old)
            steps = [int(n) for n in re.findall(rb'"step": (\d+),', f.read())]
        if steps and self.first_step_seconds is None:
            self.first_step_seconds = time.monotonic() - self.started
        return steps

    def saving(self) -> bool:
        """Return whether a save is in progress (or was, when the job died)."""
        return any((self.run / "checkpoints").glob("step_*.tmp-*"))

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> bool:
        """Wait for a condition; return False if the job ended before it. A job that does neither is hung."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, (
                f"hung: {what} did not come in {seconds} s\n{self.output[-4000:]}"
            )
            time.sleep(0.005)
        return True

    def ranks(self) -> dict[str, psutil.Process]:
        """Return ``rank 0`` and ``rank 1``, as far as they have been started."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    if number := child.environ().get("RANK"):
                        found[f"rank {number}"] = child
        return found

    def loaders(self) -> list[psutil.Process]:
        """Return the DataLoader workers of all ranks."""
        found = []
        for rank in self.ranks().values():
            with contextlib.suppress(psutil.Error):
                for child in rank.children():
                    with contextlib.suppress(psutil.Error):
                        helper = "resource_tracker" in " ".join(child.cmdline())
                        if not helper and child.status() != psutil.STATUS_ZOMBIE:
                            found.append(child)
        return found

    def memory_blocks(self) -> set[str]:
        """Return the files of /dev/shm that the ranks have mapped and that still have a name."""
        found: set[str] = set()
        for rank in self.ranks().values():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{rank.pid}/maps").read_text()
                found |= set(re.findall(r"/dev/shm/\S+$", maps, re.MULTILINE))
        return found


@dataclass
class Kill:
    """One kill -9. ``step``: the last step that rank 0 had completed in that attempt; ``None`` before the first."""

    victim: str
    moment: str
    step: int | None
    save_cut: bool = False
    end_seconds: float = 0.0
    noticed: bool = True


@dataclass
class Ledger:
    """The supervisor's observations."""

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    refused: int = 0
    start_seconds: list[float] = field(default_factory=list)
    blocks: set[str] = field(default_factory=set)  # named shared memory of all jobs so far
    seconds: float = 0.0
    own_ends: list[str] = field(default_factory=list)  # of jobs that failed without a kill: their last lines

    def table(self, steps: int, steps_done: int, straight_seconds: float) -> str:
        """Render for a terminal."""
        pairs = Counter((kill.victim, kill.moment) for kill in self.kills)
        lines = ["", f"{'kill -9 of':<12}" + "".join(f"{moment:>12}" for moment in MOMENTS)]
        for victim in VICTIMS:
            lines.append(f"{victim:<12}" + "".join(f"{pairs[victim, moment]:>12}" for moment in MOMENTS))
        starting = sum(self.start_seconds) / max(1, len(self.start_seconds))
        lines += [
            f"kills {len(self.kills)}, of which {sum(k.save_cut for k in self.kills)} cut a save and "
            f"{sum(not k.noticed for k in self.kills)} were not noticed; restarts {self.starts - 1}, "
            f"of which {self.refused} were refused and {len(self.own_ends)} followed a failure without a kill",
            f"a job ended at most {max((k.end_seconds for k in self.kills), default=0):.1f} s after its kill",
            f"steps {steps}, done {steps_done}: {steps_done - steps} were repeated",
            f"seconds {self.seconds:.1f}, undisturbed {straight_seconds:.1f}: "
            f"{self.seconds - straight_seconds:.1f} lost; from a start to its first step {starting:.1f} on average",
        ]
        return "\n".join(lines)


def supervise(
    ranks: Ranks,
    config: Path,
    run: Path,
    kills: int,
    rng: random.Random,
    eval_every: int,
    token: str,
    env: Callable[[int], Mapping[str, str]] = lambda start: {},
    own_ends: int = 0,
) -> Ledger:
    """Start the job until it ends with 0, killing it so many times on the way.

    Fails where a job hangs, leaves a process, or ends by itself with anything but 0.

    Args:
        env: the environment of a start, by its number.
        own_ends: jobs that may end by themselves: on a file system that fails for longer than they wait.
    """
    ledger, plan = Ledger(), kill_plan(rng)
    began = time.monotonic()
    while True:
        job = Attempt(ranks, config, run, token, env=env(ledger.starts))
        ledger.starts += 1
        before = len(ledger.kills)
        while len(ledger.kills) < kills and _kill_once(job, ledger, *next(plan), rng, eval_every):
            pass  # a DataLoader worker that had nothing left to do: the job continues
        job.wait(lambda: False, END_SECONDS + 3 * MOMENT_SECONDS, "the end")
        left = wait_until_none_lives(token, 10)
        assert not left, f"left running after {ledger.kills[-1:]}: {left}\n{job.output[-3000:]}"
        if job.first_step_seconds is not None:
            ledger.start_seconds.append(job.first_step_seconds)
        if job.process.returncode == 0:
            ledger.seconds = time.monotonic() - began
            return ledger
        ledger.refused += "another job is using this run" in job.output
        if len(ledger.kills) == before:
            ledger.own_ends.append(job.output[-6000:])
            ended = f"ended by itself: {job.process.returncode}\n{job.output[-6000:]}"
            assert len(ledger.own_ends) <= own_ends, ended


def _kill_once(
    job: Attempt, ledger: Ledger, victim: str, moment: str, rng: random.Random, eval_every: int
) -> bool:
    """Wait for the moment and kill; return whether the job continues regardless."""
    done = len(job.new_steps())
    steps, pause = done + rng.randint(1, 6), rng.uniform(0, 0.15)
    if moment == "start-up":
        # From half a second on: before that, Python has not reached the ranks' first line.
        up = lambda: len(job.ranks()) == 2  # noqa: E731
        job.wait(up, MOMENT_SECONDS, "the ranks")
        pause = rng.uniform(0.5, 6.0)
    elif moment == "step":
        job.wait(lambda: len(job.new_steps()) >= steps, MOMENT_SECONDS, "a step")
    elif moment == "save":
        job.wait(lambda: len(job.new_steps()) > done and job.saving(), MOMENT_SECONDS, "a save")
    else:
        new = lambda: job.new_steps()[done:]  # noqa: E731
        job.wait(lambda: any(s % eval_every == 0 for s in new()), MOMENT_SECONDS, "an evaluation")
    time.sleep(pause)
    if victim == "loader":
        job.wait(lambda: bool(job.loaders()), MOMENT_SECONDS, "a loader")
    if job.process.poll() is not None and job.process.returncode != 0:
        return False  # it failed by itself
    ledger.blocks |= job.memory_blocks()
    _kill(job, victim, rng)
    kill = Kill(victim, moment, next(iter(job.new_steps()[-1:]), None), job.saving())
    ledger.kills.append(kill)
    killed, seen = time.monotonic(), len(job.new_steps())
    unnoticed = lambda: victim == "loader" and len(job.new_steps()) > seen + 4  # noqa: E731
    kill.noticed = not job.wait(unnoticed, END_SECONDS, f"the end after {kill}")
    kill.end_seconds = time.monotonic() - killed if kill.noticed else 0.0
    return not kill.noticed


def _kill(job: Attempt, victim: str, rng: random.Random) -> None:
    """Send SIGKILL to the victim."""
    if victim == "job":
        targets = living(job.token)
    elif victim == "loader":
        targets = job.loaders()
        targets = [rng.choice(targets)] if targets else []
    elif victim == "agent":
        targets = [p for p in living(job.token) if p.pid == job.process.pid]
    else:
        targets = [rank for name, rank in job.ranks().items() if name == victim]
    assert targets, f"the run ended before its {victim} could be killed\n{job.output[-3000:]}"
    for number in (signal.SIGSTOP, signal.SIGKILL) if victim == "job" else (signal.SIGKILL,):
        for target in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                target.send_signal(number)


def stop_process(process: psutil.Process) -> None:
    """Send SIGSTOP and wait until the kernel has stopped the process."""
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, f"{process} does not stop"
        time.sleep(0.01)
