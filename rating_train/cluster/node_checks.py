"""Checks of a job's nodes before training: every rank runs them, and rank 0 prints PASS or FAIL lines."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import rating_train
from rating_train.config.schema import Config
from rating_train.data.workers.memory_need import shared_memory_need
from rating_train.distributed import world as worlds
from rating_train.distributed.collectives import all_gather, broadcast
from rating_train.errors import UserError
from rating_train.log import process_rank
from rating_train.processes import available_memory
from rating_train.training.checks import missing_cores

PACKAGE = Path(rating_train.__file__).resolve().parent
CONNECT_MINUTES = 3.0
SHARED_FILE_SECONDS = 60.0  # network file systems show a new file late: attribute caches live up to a minute
NCCL_SHARED_MEMORY_GIB = 1.0  # what its user guide gives a container
MOST_SKEW_SECONDS = 1.0
PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "transformers", "numpy", "pillow")


class Report:
    """PASS and FAIL lines, printed by rank 0; every rank counts the failures alike."""

    def __init__(self, is_main: bool) -> None:
        self.is_main = is_main
        self.failures = 0

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def check(self, name: str, problems: list[str], passed: str, fix: str) -> None:
        """Print one line. ``problems`` is the same list on every rank; an empty one is PASS."""
        if not problems:
            self.say(f"PASS  {name}: {passed}")
            return
        self.failures += 1
        self.say(f"FAIL  {name}: {'; '.join(problems)} | fix: {fix}")


def check_world(report: Report, world: worlds.World, device: torch.device) -> None:
    """Print the table of ranks, and check that all ranks of a node, and no others, are on one machine."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = all_gather(
        (world.rank, world.node, worlds.node_name(), world.local_rank, f"{device} {kind}".strip())
    )
    report.say("rank  node  name                  local rank  device")
    for rank, node, name, local, what in rows:
        report.say(f"{rank:>4}  {node:>4}  {name:<20}  {local:>10}  {what}")
    places = {(node, name) for _, node, name, _, _ in rows}
    problems = []
    if len(places) != world.nodes or len({name for _, name in places}) != world.nodes:
        problems.append(f"the ranks of {world.nodes} nodes are on {sorted(name for _, name in places)}")
    kinds = sorted({what.partition(" ")[2] for *_, what in rows})
    if len(kinds) > 1:
        problems.append(f"different devices: {', '.join(kinds)}")
    report.check(
        "world",
        problems,
        f"{world.size} ranks on {world.nodes} nodes",
        "--ntasks-per-node, --distribution=block",
    )


def check_all_reduce(report: Report, world: worlds.World, device: torch.device) -> None:
    """Check that sums over all ranks are right, and measure them (bus bandwidth as nccl-tests define it)."""
    mib, rounds = (256, 10) if device.type == "cuda" else (16, 3)
    tensor = torch.full((mib << 18,), float(world.rank + 1), device=device)
    dist.all_reduce(tensor)
    expected = world.size * (world.size + 1) / 2
    wrong = int((tensor != expected).sum())
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    started = time.monotonic()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / rounds
    bus = 2 * (world.size - 1) / world.size * (mib / 1024) / seconds
    problems = [f"rank {rank} has {n} wrong sums" for rank, n in enumerate(all_gather(wrong)) if n]
    report.check(
        "all-reduce", problems, f"{mib} MiB in {1000 * seconds:.1f} ms, bus bandwidth {bus:.2f} GiB/s",
        "leave out that rank's node; NCCL_DEBUG=INFO shows the paths that are used",
    )  # fmt: skip


def check_shared_folder(report: Report, world: worlds.World, folder: Path) -> None:
    """Check that all ranks see what rank 0 writes, and the reverse."""
    nonce = broadcast(secrets.token_hex(8))
    problem = ""

    def name(rank: int) -> Path:
        return folder / f".preflight-{nonce}-{rank}"

    try:
        folder.mkdir(parents=True, exist_ok=True)
        name(world.rank).write_text(nonce)
    except OSError as e:
        problem = f"rank {world.rank} ({worlds.node_name()}) cannot write {name(world.rank)} ({e})"
    all_gather(None)
    awaited = range(world.size) if world.is_main else (0,)
    deadline = time.monotonic() + SHARED_FILE_SECONDS
    missing = [] if problem else [rank for rank in awaited if not seen(name(rank), nonce, deadline)]
    if missing:
        here = f"rank {world.rank} ({worlds.node_name()})"
        problem = f"{here} does not see the files of ranks {missing} in {folder.resolve()}"
    problems = [text for text in all_gather(problem) if text]
    with contextlib.suppress(OSError):  # where it could not be written, which is said below
        name(world.rank).unlink(missing_ok=True)
    report.check(
        "shared folder", problems, f"{folder} is the same on all ranks",
        "put runs_dir on a file system that all nodes mount at the same path",
    )  # fmt: skip


def seen(path: Path, content: str, deadline: float) -> bool:
    """Return whether the file appears, complete, before the deadline (of ``time.monotonic()``)."""
    while True:
        try:
            if path.read_text() == content:
                return True
        except FileNotFoundError:
            pass  # not there yet
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)


def _shared_memory_need(config: Config, world: worlds.World) -> int:
    try:
        return shared_memory_need(config, world.size, world.local_size)
    except UserError:  # features that cannot be read, which training says: counted as images
        images = dataclasses.replace(config, data=dataclasses.replace(config.data, features=""))
        return shared_memory_need(images, world.size, world.local_size)


def check_memory(report: Report, world: worlds.World, config: Config) -> None:
    """Check that every node has memory for the batches that DataLoader workers keep ready."""
    needed = _shared_memory_need(config, world) / 2**30
    why = (
        f"for data.workers={config.data.workers} and data.prefetch_batches={config.data.prefetch_batches} "
        f"of {world.local_size} ranks"
    )
    nodes = _of_nodes(world, available_memory)
    report.check(
        "memory", [f"{name}: {free:.2f} GiB available, expected {needed:.2f} GiB ({why})" for name, free in nodes
                   if free < needed],
        f"at least {min(free for _, free in nodes):.2f} GiB available, {needed:.2f} GiB needed for batches ({why})",
        "lower data.workers or data.prefetch_batches, or ask for more memory (--mem)",
    )  # fmt: skip


def check_shared_memory(report: Report, world: worlds.World, device: torch.device) -> None:
    """Check that /dev/shm of every node has room for NCCL, which hands data over there between GPUs of a node."""
    if device.type != "cuda" or world.local_size == 1:
        return
    nodes = _of_nodes(world, lambda: shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0)
    problems = [
        f"{name}: {free:.2f} GiB free, expected {NCCL_SHARED_MEMORY_GIB:.2f} GiB for NCCL"
        for name, free in nodes
        if free < NCCL_SHARED_MEMORY_GIB
    ]
    report.check(
        "/dev/shm", problems, f"at least {min(free for _, free in nodes):.2f} GiB free",
        "remove what dead jobs left there, or give the container more (--shm-size=1g)",
    )  # fmt: skip


def _of_nodes(world: worlds.World, measure: Callable[[], int]) -> list[tuple[str, float]]:
    """Return each node's name and what it measures, in GiB. A collective."""
    own = (worlds.node_name(), measure() / 2**30) if world.local_rank == 0 else None
    return [row for row in all_gather(own) if row]


def check_cores(report: Report, world: worlds.World, config: Config) -> None:
    """Check that every rank may use a core for itself and one for each of its DataLoader workers."""
    workers = config.data.workers
    report.check(
        "cores", missing_cores(world, workers), f"at least {workers + 1} for each rank (data.workers={workers})",
        f"give sbatch --cpus-per-task={workers + 1} (CLUSTER_CPUS_PER_TASK), or lower data.workers",
    )  # fmt: skip


def check_clocks(report: Report) -> None:
    """Compare the ranks' clocks, read right after a barrier; the best of five, for a barrier is not exact."""
    spreads = []
    for _ in range(5):
        dist.barrier()
        times = all_gather(time.time())
        spreads.append(max(times) - min(times))
    skew = broadcast(min(spreads))
    problems = [f"{skew:.3f} s apart"] if skew > MOST_SKEW_SECONDS else []
    report.check(
        "clocks",
        problems,
        f"at most {1000 * skew:.1f} ms apart",
        "start time synchronisation (chrony or ntpd)",
    )


def check_versions(report: Report) -> None:
    """Check that Python, packages and code are the same everywhere."""
    own = {"python": platform.python_version(), "code": code_digest()}
    for package in PACKAGES:
        try:
            own[package] = version(package)
        except PackageNotFoundError:
            own[package] = "not installed"
    rows = all_gather(own)
    problems = [
        f"{key}: {', '.join(sorted({row[key] for row in rows}))}"
        for key in own
        if len({row[key] for row in rows}) > 1 or own[key] == "not installed"
    ]
    report.check(
        "versions", problems, ", ".join(f"{k} {v}" for k, v in own.items()),
        "use one environment and one checkout on a shared file system (RATING_TRAIN_PYTHON)",
    )  # fmt: skip


def code_digest() -> str:
    """Return the first digits of the SHA-256 of the package's source."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_gpus(report: Report, world: worlds.World, device: torch.device) -> None:
    """Check the GPUs for uncorrected memory errors. That every rank has its own was checked when they connected."""
    problem = ""
    if device.type == "cuda" and world.local_rank == 0:
        problem = gpu_problem()
    problems = [text for text in all_gather(problem) if text]
    passed = (
        "none; gloo on CPU" if device.type == "cpu" else f"{world.local_size} on each node, no memory errors"
    )
    report.check("GPUs", problems, passed, "leave out that node (sbatch --exclude=NODE) and report it")


def gpu_problem() -> str:
    """Return what is wrong with this node's GPUs, or ""."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return f"{worlds.node_name()}: nvidia-smi fails ({done.stdout.strip()[-200:]})"
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    bad = [f"GPU {row[0]}: {row[1]}" for row in rows if row[1].isdigit() and int(row[1])]
    return f"{worlds.node_name()}: uncorrected memory errors, {', '.join(bad)}" if bad else ""


def checks(
    report: Report, world: worlds.World, device: torch.device, folder: Path, config: Config | None
) -> None:
    """Run all checks, in the order of what the next one needs."""
    check_world(report, world, device)
    check_gpus(report, world, device)
    check_versions(report)
    check_clocks(report)
    check_all_reduce(report, world, device)
    check_shared_folder(report, world, folder)
    check_shared_memory(report, world, device)
    if config is not None:
        check_memory(report, world, config)
        check_cores(report, world, config)


def preflight(folder: Path, config: Config | None = None, wanted: str = "auto") -> bool:
    """Connect the ranks, run all checks and print a line for each. A collective.

    Args:
        folder: a folder that all nodes must share.
        config: the job's configuration; without it, cores and memory are not checked.
        wanted: kind of device, as ``train.device``.

    Returns:
        whether all checks passed.
    """
    try:
        world = worlds.detect()
        worlds.find_meeting_place()
        device = worlds.connect(world, CONNECT_MINUTES, wanted)
    except UserError as e:
        if process_rank() == 0 or not e.on_all_ranks:
            print(f"FAIL  start-up: {e}", flush=True)
        return False
    except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
        reason = " ".join(str(e).split())[:500]
        fix = "check that every node reaches that address (firewall, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        print(f"FAIL  meeting at {worlds.meeting_place()}: {reason} | fix: {fix}", flush=True)
        return False
    report = Report(world.is_main)
    checks(report, world, device, folder, config)
    failed = f"{report.failures} checks failed" if report.failures else "all checks passed"
    report.say(f"preflight: {failed} ({world.size} ranks, {world.nodes} nodes)")
    return not report.failures
