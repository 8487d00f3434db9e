"""Graceful shutdown: a signal, a file or the clock sets a flag; nothing else happens until the loop checks it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rating_train.resilience.graceful_stop import REQUEUE_REASONS, SIGNALS, StopFlag


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_its_reason(tmp_path: Path, number: signal.Signals) -> None:
    with StopFlag(tmp_path / "STOP", None, is_main=False) as stop:
        assert stop.poll() == "" and not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.poll() == f"signal {number.name}"
        assert stop.agreed() == stop.reason


def test_the_signals_are_usr1_term_and_int() -> None:
    assert set(SIGNALS) == {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}


@pytest.mark.parametrize(
    ("number", "requeue"), [(signal.SIGUSR1, True), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_signals_of_a_scheduler_request_a_requeue_and_ctrl_c_does_not(
    tmp_path: Path, number: signal.Signals, requeue: bool
) -> None:
    with StopFlag(tmp_path / "STOP", None, is_main=True) as stop:
        os.kill(os.getpid(), number)
        assert (stop.agreed() in REQUEUE_REASONS) == requeue


def test_a_time_limit_requests_a_requeue_and_a_stop_file_does_not(tmp_path: Path) -> None:
    assert StopFlag(tmp_path / "STOP", time.monotonic() - 1, is_main=False).agreed() in REQUEUE_REASONS
    (tmp_path / "STOP").touch()
    assert StopFlag(tmp_path / "STOP", None, is_main=True).agreed() not in ("", *REQUEUE_REASONS)


def test_handlers_are_restored_even_after_an_error(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopFlag(tmp_path / "STOP", None, is_main=True):
        assert [signal.getsignal(n) for n in SIGNALS] != before
        _ = 1 / 0
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_the_stop_file_is_seen_by_rank_0_only(tmp_path: Path) -> None:
    file = tmp_path / "STOP"
    main, other = StopFlag(file, None, is_main=True), StopFlag(file, None, is_main=False)
    assert (main.poll(), other.poll()) == ("", "")
    file.touch()
    assert str(file) in main.poll()
    assert other.poll() == "" and not other.agreed() and main.agreed()


def test_a_deadline_is_seen_when_it_has_passed(tmp_path: Path) -> None:
    stop = StopFlag(tmp_path / "STOP", time.monotonic() + 0.2, is_main=False)
    assert stop.poll() == ""
    time.sleep(0.25)
    assert stop.poll() == "the time limit"
    assert StopFlag(tmp_path / "STOP", time.monotonic() - 1, is_main=True).agreed()


def test_without_a_deadline_the_clock_never_stops_a_run(tmp_path: Path) -> None:
    assert StopFlag(tmp_path / "STOP", None, is_main=True).poll() == ""


def test_the_first_reason_is_kept(tmp_path: Path) -> None:
    with StopFlag(tmp_path / "STOP", time.monotonic() - 1, is_main=True) as stop:
        assert stop.poll() == "the time limit"
        (tmp_path / "STOP").touch()
        assert stop.poll() == "the time limit"


LOOP = """
import sys, time
from pathlib import Path
from rating_train.resilience.graceful_stop import StopFlag
with StopFlag(Path(sys.argv[1]), None, True) as stop:
    print("ready", flush=True)
    boundary = 0
    while not stop.agreed():
        for _ in range(100):
            time.sleep(0.002)
        boundary += 1
    print(stop.reason, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_real_process_ends_at_a_step_boundary_with_exit_code_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", LOOP, str(tmp_path / "STOP")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(3):  # also when it is asked more than once
            process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output) == (0, f"signal {number.name}\n")
