"""torchrun for launch/: signals reach the ranks, and an end is one line instead of torchrun's traceback.

torchrun itself answers SIGINT and SIGTERM by killing what has not ended after 30 s, shows a traceback and exits with 1,
even if every rank has saved and exited with 0; it does not forward SIGUSR1. Here the first signal is forwarded to the
ranks, which shut down gracefully in their own time; a second one is torchrun's again.

Usage::

    python -m rating_train.distributed.launcher RUN TORCHRUN-ARGUMENTS...

The exit code is that of the rank that failed first (128 + N if signal N killed it), 0 if none did.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil
from torch.distributed import DistNetworkError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from rating_train.distributed.world import is_address_in_use
from rating_train.errors import EXIT_HUNG, EXIT_USER_ERROR

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_RESTART_POLL_SECONDS = 0.5


class Forwarder:
    """Forwards the first signal to the ranks, once each; raises torchrun's own exception for a second one.

    Attributes:
        received: the first signal; ``None`` while there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Take the place of torchrun's handlers, which it installs whenever it starts the ranks."""
        for number in FORWARDED:
            signal.signal(number, self.on_signal)
        api._terminate_process_handler = self.on_signal  # type: ignore[assignment]

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            SignalException: a second signal, one that ranks do not understand, or no rank has started yet.
        """
        name, ranks = signal.Signals(number), rank_processes()
        repeated = self.received is not None and name != signal.SIGUSR1
        self.received = self.received or name
        if repeated or not ranks or name not in FORWARDED:
            raise SignalException(f"launcher got signal {name.name}", sigval=name)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                rank.send_signal(name)
        known = {rank.pid for rank in ranks}
        threading.Thread(target=end_restarted_ranks, args=(known,), daemon=True).start()


def rank_processes() -> list[psutil.Process]:
    """Return the ranks: the processes that torchrun has started on this machine."""
    return psutil.Process().children()


def end_restarted_ranks(known: set[int]) -> None:
    """Watch for ranks other than ``known``, and end them.

    A rank that the signal killed before it could handle it counts as failed, and torchrun restarts failed ranks.
    """
    while {rank.pid for rank in rank_processes()} <= known:
        time.sleep(_RESTART_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Return rank and failure of the rank that failed first, not of one that torchrun ended because of it."""
    own = {r: f for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM} or error.failures
    return min(own.items(), key=lambda item: (item[1].timestamp, item[1].exitcode < 0, item[0]))


def explain(rank: int, failure: ProcessFailure, run: str) -> str:
    """Return one line on how a rank failed and where to look."""
    log = f"{run}/logs/rank_{rank:05d}.log"
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = "out of memory? see dmesg, and " if name == "SIGKILL" else ""
        return f"rank {rank} was killed by {name} ({hint}{log})"
    if failure.exitcode == EXIT_HUNG:
        return f"rank {rank} made no progress (exit code {EXIT_HUNG}): stacks in {run}/logs; start it again"
    return f"rank {rank} ended with exit code {failure.exitcode}; its message is above ({log})"


def own_address(arguments: list[str]) -> str:
    """Return the option of torchrun that says where its own store listens, with its value, for messages."""
    for option in ("--rdzv-endpoint", "--master-port"):
        if option in arguments[:-1]:
            return f"{option} {arguments[arguments.index(option) + 1]}"
    return "port 29500, torchrun's default"


def main(run: str, arguments: list[str]) -> int:
    """Run torchrun with ``arguments``; return the exit code of the job."""
    forwarder = Forwarder()
    forwarder.install()
    if "--max-restarts" not in arguments:
        # What torchrun says about a rank that failed is said below. (Where ranks are restarted, its lines say why.)
        logging.getLogger(api.__name__).setLevel(logging.CRITICAL)
    try:
        torchrun.main(arguments)
    except ChildFailedError as e:
        rank, failure = first_failure(e)
        stopped = f" after {forwarder.received.name}" if forwarder.received else ""
        say(f"error: {explain(rank, failure, run)}{stopped}")
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except (DistNetworkError, RendezvousConnectionError) as e:
        if not is_address_in_use(e):
            raise
        say(
            "error: another process of this machine listens at the job's address | where: "
            f"{own_address(arguments)} | fix: give another port on all machines (launch/multi_node.sh --head HOST:PORT)"
        )
        return EXIT_USER_ERROR
    except SignalException as e:
        say(f"ended by {e.sigval.name}: ranks that were still running were killed")
        return 128 + e.sigval
    if forwarder.received:
        say(f"stopped by {forwarder.received.name}: all ranks exited with code 0; the same command resumes")
    return 0


def say(line: str) -> None:
    """Print a line on stderr, after whatever the ranks have printed."""
    print(f"launcher: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
