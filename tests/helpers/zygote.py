"""A server that has imported everything once, and forks the processes of tests: a start in 0.1 s instead of 6 s of CPU.

``python -m tests.helpers.zygote FD`` imports torch, DeepSpeed, streaming, transformers and the package, and starts no
thread, no process group and no accelerator. Each message on the socket FD asks for one job; its process leads a new
session, has the standard streams, the environment and the folder that were sent with the message, and runs what
``python ARGUMENTS`` would. With ``ranks``, that process is a launcher, and each rank is a child of it.

Three things differ from a real start, so tests that are about these take real processes:

- modules are there already, and what they read from the environment while they were imported stays as it was;
- ``/proc/PID/environ`` and ``/proc/PID/cmdline`` are those of the server;
- all ranks have one hash seed (``PYTHONHASHSEED``), where real ones each draw their own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import glob
import importlib
import json
import math
import os
import runpy
import select
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

MESSAGE_BYTES = 1 << 17  # an environment and the arguments
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# From the first failure to SIGKILL of the other ranks.
KILL_SECONDS = 10.0

MODULES = (
    "torch",
    "numpy",
    "rating_train.cli",
    "rating_train.training.loop",
    "rating_train.evaluation.run",
    "torch.utils.tensorboard",
    "torch.utils.serialization.config",
    "transformers.models.llama.modeling_llama",
    "scipy.stats",
    "PIL.JpegImagePlugin",
)
# The second imports torch's compiler (for a function that nobody calls): more than the rest of DeepSpeed.
DEEPSPEED_MODULES = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage3",
)


@dataclass(frozen=True)
class Job:
    """What one message asks for: ``python ARGUMENTS``, once without ``ranks``, else on so many ranks."""

    arguments: list[str]
    ranks: int
    env: dict[str, str]
    cwd: str


def import_everything() -> dict[str, str]:
    """Import what jobs need; returns the variables that importing has set."""
    os.environ.setdefault(
        "TORCHINDUCTOR_COMPILE_THREADS", "1"
    )  # torch 2.8 would start a thread and processes
    before = dict(os.environ)
    # As distributed/world.py sets it before DeepSpeed is imported. With a GPU here, each rank imports it itself.
    gc.disable()
    sys.modules["pyarrow"] = None  # type: ignore[assignment]  # MLflow would import it, and it starts threads
    for name in MODULES:
        importlib.import_module(name)
    if not glob.glob("/dev/nvidia[0-9]*"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        for name in DEEPSPEED_MODULES:
            importlib.import_module(name)
        _ = sys.modules["deepspeed"].ops.__compatible_ops__  # looks for compilers, once
        os.environ.pop("DS_ACCELERATOR")
    del sys.modules["pyarrow"]
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports: their locks would be held for ever"
    assert not sys.modules["torch"].distributed.is_initialized()
    assert not sys.modules["torch"].cuda.is_initialized()
    gc.freeze()  # the collector of a child leaves these objects, and so their pages, alone
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def serve(control: socket.socket) -> Job | None:
    """Fork a process for each message until the other side closes the socket.

    Returns:
        In a forked process, the job that it is for; in the server, ``None`` at the end.
    """
    running: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in running:
                    selector.unregister(key.fd)
                    report_end(key.fd, *running.pop(key.fd))
                    continue
                message, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 4)
                if not message:
                    return None
                pid = os.fork()
                if pid == 0:
                    for fd, (_, answer) in running.items():
                        os.close(fd)
                        answer.close()
                    selector.close()
                    control.close()
                    return become(fds, json.loads(message))
                answer = socket.socket(fileno=fds[0])
                for fd in fds[1:]:
                    os.close(fd)
                send(answer, {"pid": pid})
                watch = os.pidfd_open(pid)
                running[watch] = (pid, answer)
                selector.register(watch, selectors.EVENT_READ)


def send(answer: socket.socket, fact: dict[str, int]) -> None:
    """Tell the one who asked, if it is still there."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        answer.send(json.dumps(fact).encode())


def report_end(watch: int, pid: int, answer: socket.socket) -> None:
    """Collect a process that has ended and tell its exit code (negative: the signal)."""
    _, status = os.waitpid(pid, 0)
    os.close(watch)
    send(answer, {"code": os.waitstatus_to_exitcode(status)})
    answer.close()


def become(fds: list[int], message: dict[str, Any]) -> Job:
    """Make this forked process what a new interpreter would find itself to be."""
    from rating_train.processes import die_with_parent

    job = Job(**message)
    die_with_parent()
    os.setsid()
    os.close(fds[0])
    null = os.open(os.devnull, os.O_RDONLY)
    for target, fd in enumerate((null, *fds[1:3])):
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(job.cwd)
    os.environ.clear()
    os.environ.update(job.env)
    tempfile.tempdir = None  # read TMPDIR again
    return job


def launch(job: Job) -> dict[str, str]:
    """Start the ranks as Slurm's srun does, one process each. Returns in each rank; the launcher ends here.

    The first rank that fails ends the others, and signals are passed on. Exit code 0 or 1, as torchrun has it.

    Returns:
        The variables that tell a rank its place.
    """
    from rating_train.processes import die_with_parent

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, launcher = [], os.getpid()
    for rank in range(job.ranks):
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            if os.getppid() != launcher:  # it was killed before
                os._exit(1)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
            return {
                **{name: str(value) for name, value in place.items()},
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        ranks.append(pid)
    return wait_for(ranks)


def wait_for(ranks: list[int]) -> NoReturn:
    """Wait for all ranks, pass signals on to them, and leave this process."""
    watches = {os.pidfd_open(pid): pid for pid in ranks}

    def pass_on(number: int, _frame: object = None) -> None:
        for watch in watches:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch, number)

    for number in FORWARDED:
        signal.signal(number, pass_on)
    failed_at: float | None = None
    poller = select.poll()
    for watch in watches:
        poller.register(watch, select.POLLIN)
    while watches:
        left = math.inf if failed_at is None else max(0.0, failed_at + KILL_SECONDS - time.monotonic())
        # At most a second: a signal that comes just before the call is handled after it.
        ready = poller.poll(1000 * min(left, 1.0))
        for watch, _ in ready:
            _, status = os.waitpid(watches.pop(watch), 0)
            poller.unregister(watch)
            os.close(watch)
            if status and failed_at is None:
                failed_at = time.monotonic()
                pass_on(signal.SIGTERM)
        if not ready and not left:
            pass_on(signal.SIGKILL)
    os._exit(int(failed_at is not None))


def run(arguments: list[str], imported: dict[str, str]) -> None:
    """What ``python ARGUMENTS`` does: ``-m MODULE ...`` or ``FILE ...``."""
    for name, value in imported.items():
        os.environ.setdefault(name, value)
    sys.modules["numpy"].random.seed()  # Python's own generator sees to this itself
    gc.enable()
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def exit_code(error: BaseException | None) -> int:
    """What an interpreter does with an exception that nobody caught."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def main() -> NoReturn:
    """Serve; a forked process runs its job here."""
    control = socket.socket(fileno=int(sys.argv[1]))
    imported = import_everything()
    control.send(b"ready")
    job = serve(control)
    if job is None:
        os._exit(0)
    if job.ranks:
        os.environ.update(launch(job))
    error: BaseException | None = None
    try:
        run(job.arguments, imported)
    except BaseException as e:
        error = e
    code = exit_code(error)
    # An interpreter's end without its teardown, which would touch every page that the server shares with this process.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
