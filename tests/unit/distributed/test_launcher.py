"""What the launcher says of a failure: the rank that failed first, in one line."""

from __future__ import annotations

import signal
import socket

import pytest
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from rating_train.distributed import launcher
from rating_train.distributed.launcher import Forwarder, explain, first_failure

pytestmark = pytest.mark.timeout(60)


def failure(exitcode: int, timestamp: int) -> ProcessFailure:
    found = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="none")
    found.timestamp = timestamp
    return found


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        ({0: failure(2, 10), 1: failure(2, 10)}, 0),
        ({0: failure(1, 11), 1: failure(2, 10)}, 1),
        ({0: failure(-15, 10), 1: failure(2, 11)}, 1),  # rank 0 was ended because of rank 1
        ({0: failure(-9, 10), 1: failure(-6, 11)}, 0),
        (
            {0: failure(-6, 10), 1: failure(2, 10)},
            1,
        ),  # an exit code says more than a signal of the same second
        ({0: failure(-15, 10), 1: failure(-15, 9)}, 1),
    ],
)
def test_the_first_failure_is_a_ranks_own(failures: dict[int, ProcessFailure], rank: int) -> None:
    assert first_failure(ChildFailedError("x", failures))[0] == rank


def test_each_kind_of_end_says_where_to_look() -> None:
    assert explain(1, failure(2, 0), "runs/a") == (
        "rank 1 ended with exit code 2; its message is above (runs/a/logs/rank_00001.log)"
    )
    assert "killed by SIGKILL (out of memory?" in explain(0, failure(-9, 0), "runs/a")
    assert "killed by SIGSEGV (runs/a/logs/rank_00003.log)" in explain(3, failure(-11, 0), "runs/a")
    assert "no progress (exit code 75): stacks in runs/a/logs" in explain(0, failure(75, 0), "runs/a")


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_an_address_of_torchrun_that_is_in_use_is_one_line(
    rendezvous: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forwarder, "install", lambda _: None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        shared = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"localhost:{port}",
            "--rdzv-conf",
            "is_host=1",
        ]
        words = shared if rendezvous == "c10d" else ["--master-port", str(port)]
        code = launcher.main("run", ["--nproc-per-node", "1", *words, "-m", "rating_train", "--version"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and last.startswith("launcher: error: another process of this machine listens")
    assert f"localhost:{port} | " in last or f"--master-port {port} | " in last


def test_torchrun_installs_the_forwarders_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun looks its handler up by that name when it starts the ranks; no other version may go unnoticed."""
    assert "_terminate_process_handler" in api.PContext.start.__code__.co_names
    # Not this process's own children: a server that forks ranks for other tests would get the signal, and a child of a
    # later test would count as a restarted rank, which ends this process.
    monkeypatch.setattr(launcher, "rank_processes", list)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(
        api, "_terminate_process_handler", api._terminate_process_handler
    )  # put back at the end
    try:
        forwarder = Forwarder()
        forwarder.install()
        assert api._terminate_process_handler == forwarder.on_signal
        with pytest.raises(SignalException):  # this process has started no rank
            signal.raise_signal(signal.SIGUSR1)
        assert forwarder.received == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
