"""The tests' own tools: processes forked by the zygote behave as real ones do, and what a session leaves is named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Ranks
from tests.helpers.cli import rating_train
from tests.helpers.forked import zygote
from tests.helpers.left_behind import TOKEN, Watch, other_sessions
from tests.helpers.ranks import SHARED_MEMORY, clean_environment

pytestmark = pytest.mark.timeout(200)

Program = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Writes a program to a file."""

    def write(text: str) -> Path:
        (tmp_path / "program.py").write_text(textwrap.dedent(text))
        return tmp_path / "program.py"

    return write


def children(pid: int, count: int) -> list[psutil.Process]:
    """So many children of a process, once they are there."""
    deadline = time.monotonic() + 30
    while len(found := psutil.Process(pid).children()) < count:
        assert time.monotonic() < deadline, f"{len(found)} children instead of {count}"
        time.sleep(0.01)
    return found


def ended(process: psutil.Process, seconds: float = 10) -> bool:
    """Whether a process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
    return True


def test_a_forked_process_is_as_a_new_one(program: Program, tmp_path: Path) -> None:
    """Its arguments, environment, folder, streams, session, module, random numbers and temporary folder are its own."""
    path = program(
        """
        import atexit, os, random, signal, sys, tempfile, threading
        import numpy, torch
        from rating_train.distributed import world
        print(sys.argv[1:], __name__, sys.modules["__main__"].__dict__ is globals(), os.getcwd() == sys.argv[1])
        print(sorted(os.environ), tempfile.gettempdir(), os.getsid(0) == os.getpid())
        print(sys.stdin.read() == "", torch.get_num_threads(), threading.active_count())
        print(torch.distributed.is_initialized(), world.detect().size, "RANK" in os.environ)
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, sys.path[0] == os.path.dirname(sys.argv[0]))
        print(random.random(), numpy.random.random(), file=sys.stderr)
        threading.Thread(target=lambda: print("thread")).start()
        atexit.register(lambda: print("the end"))
        raise SystemExit(7)
        """
    )
    env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    randoms = set()
    for _ in range(2):
        with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
            process = zygote().start(
                [path, tmp_path, "b c"], env, cwd=tmp_path, files=(out.fileno(), err.fileno())
            )
            assert process.wait(60) == process.poll() == 7
            lines = Path(out.name).read_text().splitlines()
            randoms |= set(Path(err.name).read_text().split())
        assert lines[0] == f"{[str(tmp_path), 'b c']} __main__ True True"
        variables, _, rest = lines[1].partition("] ")
        assert set(eval(variables + "]")) >= set(env) and rest == f"{tmp_path} True"
        assert not {"PATH", "PYTHONPATH", "RANK"} & set(eval(variables + "]"))
        assert lines[2:5] == ["True 1 1", "False 1 False", "True True"]
        assert sorted(lines[5:]) == ["the end", "thread"]
    assert len(randoms) == 4, "two processes drew the same random numbers"


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit('a reason')", 1, "a reason\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_exit_codes_are_those_of_an_interpreter(program: Program, last: str, code: int, said: str) -> None:
    path = program(f"import os\n{last}")
    process = zygote().start([path], clean_environment())
    output, _ = process.communicate(timeout=60)
    real = subprocess.run(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.returncode == real.returncode == code
    assert output.endswith(said) and real.stdout.endswith(said)


def test_a_verb_says_what_a_real_process_says() -> None:
    words = ["train", "configs/demo_cpu.yaml", "--set", "train.epoch=3"]
    done = rating_train(*words)
    real = subprocess.run(
        [sys.executable, "-m", "rating_train", *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)
    assert done.returncode == 2


RANK = """
import os, signal, sys, time
import torch.distributed as dist
dist.init_process_group("gloo")
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()}\\n".encode())  # in one piece
dist.barrier()  # all have written it
if sys.argv[1] == "fails" and dist.get_rank() == 1:
    sys.exit(3)
end = time.monotonic() + 100
while sys.argv[1] != "ends" and time.monotonic() < end:
    time.sleep(0.05)  # short: a signal that comes just before a sleep is handled after it
"""


def test_ranks_meet_and_end(ranks: Ranks, program: Program) -> None:
    output = ranks.run(3, program(RANK), "ends")
    assert sorted(output.splitlines()) == [f"rank {i} of 3" for i in range(3)]


def test_a_failed_rank_ends_the_others(ranks: Ranks, program: Program) -> None:
    assert "rank 0 of 2" in ranks.run(2, program(RANK), "fails", code=1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 1)])
def test_a_signal_to_the_launcher_reaches_the_ranks(
    ranks: Ranks, program: Program, number: signal.Signals, code: int
) -> None:
    process = ranks.start(2, program(RANK), "stays", torchrun=False)
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline().startswith("rank ")
    process.send_signal(number)
    assert process.wait(timeout=60) == code


@pytest.mark.parametrize("end", ["launcher", "job"])
def test_ranks_die_with_their_launcher(ranks: Ranks, program: Program, end: str) -> None:
    process = ranks.start(2, program(RANK), "stays", torchrun=False)
    members = children(process.pid, 2)
    assert {os.getsid(p.pid) for p in members} == {process.pid}
    if end == "launcher":
        process.kill()
    else:
        ranks.kill(process)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert all(ended(p) for p in members)


def test_what_a_session_leaves_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "")  # put back at the end: the session has its own
    watch = Watch()
    block = SHARED_MEMORY / f"left-{os.getpid()}"
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True
    )
    block.touch()
    try:
        alone = not any(other_sessions())
        found = watch.found(tmp_path, seconds=0)
        assert f"process {process.pid}: sleep 100" in found
        assert (f"mount {mount}" in found) == (mounted.returncode == 0)
        if alone == (not any(other_sessions())):  # no other came or left meanwhile
            assert (f"shared memory {block}" in found) == alone
    finally:
        block.unlink()
        process.kill()
        process.wait()
        subprocess.run(["umount", str(mount)], capture_output=True)
    left = "\n".join(watch.found(tmp_path, seconds=0))  # the shared memory of other tests, at most
    assert not any(name in left for name in (str(block), f"process {process.pid}:", str(mount)))
