"""The watchdog in real stuck processes: it ends them, records where they were stuck, and leaves others alone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rating_train.errors import EXIT_HUNG
from rating_train.resilience.watchdog import Watchdog

pytestmark = pytest.mark.timeout(60)

# Shorter waits than a cluster needs; everything else is as it is in a job.
HEAD = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from rating_train.resilience import watchdog
watchdog.POLL_SECONDS, watchdog.GRACE_SECONDS, watchdog._LOCK_HELD_SECONDS = 0.05, 0.3, 0.5
watchdog.AGAIN_SECONDS = 1.0
folder = Path(sys.argv[1])
def make(limit, rank=0):
    return watchdog.Watchdog(limit, folder / f"stacks_{rank}.txt", folder / "HUNG")
signal.signal(signal.SIGTERM, lambda *_: None)
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a program and waits until it says ``ready``."""
    started = []

    def begin(body: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + body, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def end(process: subprocess.Popen[str], seconds: float = 30) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def test_without_a_beat_it_writes_stacks_notifies_the_others_and_exits(start: Start, tmp_path: Path) -> None:
    process = start("""
def forward_of_the_backbone():
    print("ready", flush=True)
    time.sleep(50)
with make(0.5) as w:
    w.beat("training, step 7")
    forward_of_the_backbone()
""")
    code, _, errors = end(process)
    stacks = (tmp_path / "stacks_0.txt").read_text()
    assert code == EXIT_HUNG
    assert "while training, step 7" in stacks and f"pid {process.pid}" in stacks
    assert "forward_of_the_backbone" in stacks and "forward_of_the_backbone" in errors
    assert (tmp_path / "HUNG").is_file()


def test_beats_keep_it_quiet_and_leaving_the_context_ends_it(start: Start, tmp_path: Path) -> None:
    process = start("""
print("ready", flush=True)
with make(0.6) as w:
    for step in range(15):
        time.sleep(0.1)
        w.beat(f"step {step}")
time.sleep(1.5)
print(threading.active_count(), flush=True)
""")
    code, output, errors = end(process)
    assert (code, output) == (0, "1\n"), errors
    assert (tmp_path / "stacks_0.txt").read_text() == "" and not (tmp_path / "HUNG").exists()


def test_a_rank_that_gave_up_makes_the_others_write_their_stacks(start: Start, tmp_path: Path) -> None:
    process = start("""
with make(300, rank=1) as w:
    w.beat("evaluating, step 3")
    print("ready", flush=True)
    time.sleep(50)
""")
    time.sleep(0.3)
    assert process.poll() is None
    (tmp_path / "HUNG").touch()
    assert end(process)[0] == EXIT_HUNG
    assert "another rank gave up (this one was evaluating, step 3)" in (tmp_path / "stacks_1.txt").read_text()


def test_a_process_that_holds_the_interpreter_lock_is_ended_too(start: Start, tmp_path: Path) -> None:
    process = start("""
with make(0.5):
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(50)
""")
    code, _, _ = end(process)
    assert code != 0
    assert "Timeout" in (tmp_path / "stacks_0.txt").read_text()


STUCK = """
with make(LIMIT):
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(50)  # one call into C: Python's own handlers cannot run
    ctypes.CDLL(None).sleep(50)  # a signal ends the first
    ctypes.CDLL(None).sleep(50)
"""


@pytest.mark.parametrize("limit", ["0", "300"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_some_time_after_the_first_ends_the_process(
    start: Start, tmp_path: Path, number: signal.Signals, limit: str
) -> None:
    process = start("signal.signal(signal.SIGINT, lambda *_: None)\n" + STUCK.replace("LIMIT", limit))
    process.send_signal(number)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    code, _, _ = end(process)
    assert code == EXIT_HUNG
    assert "asked to stop again" in (tmp_path / "stacks_0.txt").read_text()
    assert not (tmp_path / "HUNG").exists()


NOTHING_TO_SAVE = """
watchdog.LEAVE_SECONDS = 0.5
watch = make(300)
watch.leave_early = lambda reason: (folder / "left").write_text(reason)
"""


def test_where_there_is_nothing_to_save_one_signal_ends_a_process_that_is_stuck(
    start: Start, tmp_path: Path
) -> None:
    process = start(NOTHING_TO_SAVE + STUCK.replace("make(LIMIT)", "watch"))
    process.send_signal(signal.SIGTERM)
    assert end(process, 20)[0] == 0
    assert (tmp_path / "left").read_text() == "signal SIGTERM"
    assert (tmp_path / "stacks_0.txt").read_text() == "" and not (tmp_path / "HUNG").exists()


@pytest.mark.parametrize(
    "then", ["watch.leave_early = None", "signal.signal(signal.SIGUSR1, lambda *_: None)"]
)
def test_with_something_to_save_or_on_another_signal_the_main_thread_decides(
    start: Start, tmp_path: Path, then: str
) -> None:
    process = start(f"""{NOTHING_TO_SAVE}
{then}
with watch:
    print("ready", flush=True)
    time.sleep(2.5)
""")
    process.send_signal(signal.SIGTERM if then.startswith("watch") else signal.SIGUSR1)
    assert end(process)[0] == 0
    assert not (tmp_path / "left").exists()


def test_a_signal_forwarded_twice_counts_once_and_other_signals_do_not_count(
    start: Start, tmp_path: Path
) -> None:
    process = start("""
watchdog.AGAIN_SECONDS = 5.0
signal.signal(signal.SIGUSR1, lambda *_: None)
with make(300):
    print("ready", flush=True)
    time.sleep(2.5)
""")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    for _ in range(2):
        time.sleep(0.6)
        process.send_signal(signal.SIGUSR1)
    assert end(process)[0] == 0
    assert (tmp_path / "stacks_0.txt").read_text() == ""


def test_the_wake_up_descriptor_is_restored(tmp_path: Path) -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        for number in range(2):  # one after the other in one process
            with Watchdog(0, tmp_path / f"stacks_{number}.txt", tmp_path / "HUNG"):
                own = signal.set_wakeup_fd(-1)
                assert own not in (-1, writer.fileno())
                signal.set_wakeup_fd(own)
            assert signal.set_wakeup_fd(writer.fileno()) == writer.fileno()
        with pytest.raises(ZeroDivisionError), Watchdog(0, tmp_path / "stacks.txt", tmp_path / "HUNG"):
            _ = 1 / 0
        assert signal.set_wakeup_fd(writer.fileno()) == writer.fileno()
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def test_stacks_are_appended_to(start: Start, tmp_path: Path) -> None:
    body = """
with make(0.3):
    print("ready", flush=True)
    time.sleep(50)
"""
    for _ in range(2):
        end(start(body))
        (tmp_path / "HUNG").unlink()
    assert (tmp_path / "stacks_0.txt").read_text().count("no progress for") == 2


# --- a run directory whose file system fails ----------------------------------------------------------

FAILING_STAT = """
import errno
stat = os.stat
def failing(path, *args, **more):
    if str(path).endswith("HUNG"):
        raise OSError(getattr(errno, number), "injected", str(path))
    return stat(path, *args, **more)
"""


@pytest.mark.parametrize("number", ["ESTALE", "EIO", "ESHUTDOWN", "EACCES"])
def test_an_error_of_the_file_system_does_not_end_a_healthy_process(
    start: Start, tmp_path: Path, number: str
) -> None:
    """The thread looks for HUNG twenty times a second, and faulthandler's timer would fire after one."""
    process = start(f"""
number = {number!r}
{FAILING_STAT}
with make(0.5) as w:
    os.stat = failing
    print("ready", flush=True)
    for step in range(25):
        time.sleep(0.1)
        w.beat(f"step {{step}}")
    os.stat = stat
    (folder / "HUNG").touch()
    time.sleep(20)
""")
    code, _, errors = end(process)
    assert code == EXIT_HUNG, errors
    assert errors.count("cannot be looked up") == 1, "logged once"
    assert "another rank gave up" in (tmp_path / "stacks_0.txt").read_text(), "it still watches afterwards"


def test_no_error_ends_the_thread(start: Start, tmp_path: Path) -> None:
    process = start("""
class Broken:
    def identity(self):
        raise ValueError("a bug")
with make(1.0) as w:
    w._hung, hung = Broken(), w._hung
    print("ready", flush=True)
    for step in range(20):
        time.sleep(0.1)
        w.beat(f"step {step}")
    w._hung = hung
    time.sleep(20)
""")
    code, _, errors = end(process)
    assert code == EXIT_HUNG and errors.count("ValueError: a bug") == 1
    assert "no progress for" in (tmp_path / "stacks_0.txt").read_text()


def test_stacks_that_cannot_be_written_are_on_stderr_and_the_process_ends(start: Start) -> None:
    process = start("""
(folder / "stacks_0.txt").symlink_to("/dev/full")
(folder / "HUNG").symlink_to("/proc/none/HUNG")
def forward_of_the_backbone():
    print("ready", flush=True)
    time.sleep(50)
with make(0.5):
    forward_of_the_backbone()
""")
    code, _, errors = end(process)
    assert code == EXIT_HUNG
    assert "forward_of_the_backbone" in errors and "the stacks are on stderr" in errors
    assert "the other ranks cannot be notified" in errors


def test_a_disk_that_never_answers_does_not_keep_the_process(start: Start) -> None:
    """Writing the stacks blocks for ever, as on a dead NFS server: here a pipe that nobody reads."""
    process = start("""
watchdog._HUNG_DISK_SECONDS, watchdog._LOCK_HELD_SECONDS = 0.5, 30
reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while True:
        os.write(writer, bytes(65536))
except BlockingIOError:
    os.set_blocking(writer, True)
with make(0.5) as w:
    w._stacks = os.fdopen(writer, "w")
    print("ready", flush=True)
    time.sleep(50)
""")
    assert end(process)[0] == EXIT_HUNG


def test_a_marker_of_the_attempt_before_that_this_host_still_sees_does_not_count(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "HUNG").touch()
    process = start("""
with make(300) as w:
    print("ready", flush=True)
    time.sleep(1)
    print("alive", flush=True)
    (folder / "HUNG").unlink()
    time.sleep(0.5)
    (folder / "HUNG").touch()
    time.sleep(20)
""")
    code, output, _ = end(process)
    assert (code, output) == (EXIT_HUNG, "alive\n")
