"""What grows with the number of ranks: start-up, memory, descriptors, collectives, files of a checkpoint.

    python benchmarks/many_ranks.py [--ranks 8 16 4] [--steps 4] [--workers 1] [--folder F] [--json F]
    srun python benchmarks/many_ranks.py --join F --until 4     on every rank of a Slurm job, then --table F
    python benchmarks/many_ranks.py --files 8 64 512 [--latency-ms 1]     what their checkpoints ask of a disk

A chain of runs of the demo's tiny model on this machine's CPU: the first starts at step 0, each other one resumes from
the one before on another number of ranks, for --steps more. At its end the ids that all ranks read are compared, in
order, with the order computed without any rank. The chain uses no torchrun: each rank is a process started here.

Each rank times the collectives of Python objects and small integers that the package calls, by what the run was doing
(start, training, saving, evaluating). On a machine with fewer cores than ranks they mostly wait for other ranks to get
a core, so at the end each kind is timed alone, after a barrier: the median of 20, on the slowest rank.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch.distributed as dist
import yaml

from rating_train import run_dir
from rating_train.checkpoint import deepspeed_io, store
from rating_train.checkpoint.rank_files import rank_file, rank_of, unseen_files
from rating_train.cli import leave
from rating_train.config.load import load_config
from rating_train.data.loader import open_training
from rating_train.demo.model import make_demo
from rating_train.distributed import collectives, world
from rating_train.log import text_table
from rating_train.prepare.run import PrepareOptions, prepare
from rating_train.resilience.supervisor import Supervisor
from rating_train.training import loop, setup

GLOBAL_ITEMS = 48  # divided by 1, 2, 3, 4, 6, 8, 12, 16, 24 and 48 ranks
TIMED = ("broadcast", "gather", "all_gather", "max_over_ranks", "sum_over_ranks")
ALONE_ROUNDS = 20


def make_config(folder: Path, workers: int) -> Path:
    """Make the demo, its dataset and a configuration of it in ``folder``; keep what is there."""
    config = folder / "config.yaml"
    if config.is_file():
        return config
    make_demo(folder / "demo", items=600, seed=17)
    prepare(
        PrepareOptions(
            source=(str(folder / "demo" / "catalogue" / "catalogue.jsonl"),),
            images=str(folder / "demo" / "catalogue"),
            out=str(folder / "data"),
            image_size_px=64,
            val_fraction=0.2,
        )
    )
    settings = {
        "name": "run",
        "runs_dir": str(folder / "runs"),
        "data": {"path": str(folder / "data"), "image_px": 64, "text_tokens": 96, "workers": workers},
        "model": {"backbone": str(folder / "demo" / "model"), "head_hidden": 16},
        "batch": {"global_items": GLOBAL_ITEMS},
        "zero": {"stage": 1},
        "train": {
            "epochs": 100,
            "log_every_steps": 1,
            "stop_check_steps": 1,
            "save_every_steps": 2,
            "eval_every_steps": 4,
            "log_sample_ids": True,
        },
    }
    config.write_text(yaml.safe_dump(settings))
    return config


class Clock:
    """Times the package's collectives, by what the run is doing."""

    def __init__(self) -> None:
        self.phase, self.rows, self.started = "start", [], time.monotonic()
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note when something happened for the first time."""
        self.marks.setdefault(name, time.monotonic() - self.started)

    def install(self) -> None:
        """Wrap the collectives wherever they were imported, and what tells the phase."""
        for name in TIMED:
            timed = self._timed(name, getattr(collectives, name))
            for module in [m for n, m in sys.modules.items() if n.startswith("rating_train")]:
                if getattr(module, name, None) is getattr(collectives, name) and module is not collectives:
                    setattr(module, name, timed)
            setattr(collectives, name, timed)
        beat, steps = Supervisor.beat, Supervisor.first_step_done

        def on_beat(supervisor: Supervisor, phase: str, step: int, total: int) -> None:
            self.phase = phase
            self.mark("ready" if phase == "training" else phase)
            beat(supervisor, phase, step, total)

        def on_step(supervisor: Supervisor) -> None:
            self.mark("first step")
            steps(supervisor)

        Supervisor.beat, Supervisor.first_step_done = on_beat, on_step  # type: ignore[method-assign]

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(value: Any) -> Any:
            before = time.monotonic()
            try:
                return call(value)
            finally:
                sent = len(pickle.dumps(value)) if name in ("gather", "all_gather", "broadcast") else 8
                self.rows.append((self.phase, name, time.monotonic() - before, sent))

        return timed


def alone(rank: int) -> dict[str, float]:
    """Return milliseconds of each kind of collective by itself, after a barrier: the median, on the slowest rank."""
    calls: dict[str, Callable[[], Any]] = {
        "barrier": lambda: None,
        "max_over_ranks (8 B)": lambda: collectives.max_over_ranks(rank),
        "broadcast (1 KiB)": lambda: collectives.broadcast("x" * 1024),
        "all_gather (1 KiB)": lambda: collectives.all_gather("x" * 1024),
        "gather (64 KiB)": lambda: collectives.gather("x" * 65536),
    }
    found = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(ALONE_ROUNDS):
            dist.barrier()
            before = time.monotonic()
            if name == "barrier":
                dist.barrier()
            call()
            seconds.append(time.monotonic() - before)
        found[name] = 1000 * max(collectives.all_gather(statistics.median(seconds)))
    return found


def process_facts() -> dict[str, Any]:
    """Return what this rank holds now: memory in MiB, descriptors, threads."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    sizes = {name: int(size) / 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", rollup, re.MULTILINE)}
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    status = Path("/proc/self/status").read_text()
    return {
        "pss_mib": sizes["Pss"],
        "rss_mib": sizes["Rss"],
        "private_mib": sizes["Private_Dirty"] + sizes["Private_Clean"],
        "sockets": sum(link.startswith("socket:") for link in links),
        "descriptors": len(links),
        "threads": int(re.findall(r"^Threads:\s+(\d+)", status, re.MULTILINE)[0]),
    }


def shared_memory_mib() -> float:
    """Return the blocks that this rank and its DataLoader workers have mapped, in MiB."""
    blocks: dict[str, int] = {}
    for pid in [os.getpid(), *(child.pid for child in psutil.Process().children())]:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                place, _, _, device, inode, *path = line.split()
                if path and path[0].startswith("/memfd:rating_train"):
                    first, _, last = place.partition("-")
                    blocks[f"{device} {inode}"] = int(last, 16) - int(first, 16)
    return sum(blocks.values()) / 2**20


def join(folder: Path, until: int, launched: float) -> int:
    """Train as one rank until a step, and write down what was measured."""
    clock = Clock()
    clock.started -= time.time() - launched  # the start of the interpreter counts
    clock.mark("imported")
    clock.install()
    facts: dict[str, Any] = {}

    class Watch:
        """Looks at the process while batches are prefetched: at the last step."""

        def __init__(self, after: Callable[..., str]) -> None:
            self.after = after

        def __call__(self, batch: Any, job: Any, state: Any, *rest: Any) -> str:
            outcome = self.after(batch, job, state, *rest)
            if state.step == job.total_steps - 1:
                facts.update(process_facts(), shared_memory_mib=shared_memory_mib())
            return outcome

    loop.take_step = Watch(loop.take_step)  # type: ignore[assignment]
    world.find_meeting_place()
    config = load_config(folder / "config.yaml", [f"train.max_steps={until}"])
    loop.train(config, "auto")
    own = world.detect()
    row = {
        "rank": own.rank, "ranks": own.size, "node": own.node, "facts": facts, "marks": clock.marks,
        "seconds": time.monotonic() - clock.started, "calls": list(clock.rows), "alone": alone(own.rank),
    }  # fmt: skip
    out = folder / f"{own.size:03d}_ranks"
    out.mkdir(exist_ok=True)
    (out / f"{own.rank:05d}.json").write_text(json.dumps(row))
    return leave(0)


@contextlib.contextmanager
def started(folder: Path, ranks: int, until: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start all ranks as processes of this machine; end what is left."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--join", str(folder), "--until", str(until)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = open(folder / f"{ranks:03d}_ranks_{rank:05d}.log", "wb")  # noqa: SIM115
        with log:
            words = [*command, "--launched", repr(time.time())]
            processes.append(subprocess.Popen(words, env={**env, **place}, stdout=log, stderr=log))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def expected_ids(config_file: Path, steps: int) -> list[list[str]]:
    """Return the ids of every global batch in order, computed without any rank."""
    config = load_config(config_file)
    prompt = setup.read_model_inputs(config).prompt
    data = open_training(config.data, prompt, world.World(), GLOBAL_ITEMS, GLOBAL_ITEMS)
    batches = data.order.batches(0, steps)
    return [[data.split.dataset[int(i)]["id"] for i in batch] for batch in batches]


def read_ids(run: Path, steps: int) -> list[list[str]]:
    """Return the ids of every global batch as the ranks read them, in order of ranks."""
    found: dict[int, dict[int, list[str]]] = {}
    for path in sorted((run / run_dir.SAMPLES_DIR).iterdir()):
        rank = int(path.stem.rpartition("_")[2])
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], {})[rank] = row["ids"]
    return [[i for rank in sorted(found[step]) for i in found[step][rank]] for step in range(1, steps + 1)]


def summarize(folder: Path) -> list[dict[str, Any]]:
    """Return one row of figures for each number of ranks that was run."""
    result = []
    for out in sorted(folder.glob("*_ranks")):
        rows = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
        ranks, first = rows[0]["ranks"], rows[0]
        calls: dict[str, list[float]] = {}
        for phase, _, seconds, _ in first["calls"]:
            calls.setdefault(phase, []).append(seconds)
        sent = max((size for row in rows for *_, size in row["calls"]), default=0)

        def mean(name: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.mean(row["facts"][name] for row in rows)

        result.append(
            {
                "ranks": ranks,
                "imported s": max(r["marks"]["imported"] for r in rows),
                "ready s": max(r["marks"]["ready"] for r in rows),
                "first step s": max(r["marks"]["first step"] for r in rows),
                "PSS MiB": mean("pss_mib"),
                "private MiB": mean("private_mib"),
                "shared memory MiB": mean("shared_memory_mib"),
                "sockets": mean("sockets"),
                "descriptors": mean("descriptors"),
                "threads": mean("threads"),
                "largest object B": float(sent),
                **{f"{phase}: calls": float(len(times)) for phase, times in sorted(calls.items())},
                **{f"{phase}: s": sum(times) for phase, times in sorted(calls.items())},
                **{f"{name} ms": value for name, value in first["alone"].items()},
            }
        )
    return result


def files_of_newest(run: Path) -> int:
    """Return the number of files of the newest checkpoint."""
    newest = sorted((run / run_dir.CHECKPOINTS_DIR).glob("step_*"))[-1]
    return sum(path.is_file() for path in newest.rglob("*"))


def show(rows: list[dict[str, Any]]) -> None:
    """Print one column for each number of ranks."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[name, *(f"{row[name]:.1f}" if name in row else "-" for row in rows)] for name in names]
    print("\n".join(text_table(["per rank", *(f"{row['ranks']} ranks" for row in rows)], cells)))


def chain(folder: Path, ranks: list[int], steps: int, workers: int) -> list[int]:
    """Run the chain and check its ids; return the files of the checkpoint that each link left."""
    config, until, files = make_config(folder, workers), 0, []
    for count in ranks:
        until += steps
        began = time.monotonic()
        with started(folder, count, until) as processes:
            codes = [process.wait(timeout=1800) for process in processes]
        log = (folder / f"{count:03d}_ranks_00000.log").read_text(errors="replace")
        if any(codes):
            raise SystemExit(f"{count} ranks ended with {codes}\n{log[-4000:]}")
        files.append(files_of_newest(folder / "runs" / "run"))
        print(f"{count} ranks to step {until}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    if read_ids(folder / "runs" / "run", until) != expected_ids(config, until):
        raise SystemExit("the ranks read other samples, or in another order")
    print(
        f"{until} steps on {' -> '.join(map(str, ranks))} ranks: the same ids in the same order", flush=True
    )
    return files


class SlowDisk:
    """Counts what is asked of the file system by the calls below, and makes each wait."""

    CALLS = ("stat", "open", "scandir", "rename", "replace", "mkdir", "fsync")

    def __init__(self, latency_ms: float) -> None:
        self.latency, self.calls, self.seconds = latency_ms / 1000, 0, 0.0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Count and slow down the calls of a block, from zero."""
        with contextlib.ExitStack() as stack:
            for module, names in ((os, self.CALLS), (builtins, ("open",))):
                for name in names:
                    stack.enter_context(mock.patch.object(module, name, self._slow(getattr(module, name))))
            self.calls, began = 0, time.monotonic()
            yield
            self.seconds = time.monotonic() - began

    def _slow(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **more: Any) -> Any:
            self.calls += 1
            time.sleep(self.latency)
            return call(*args, **more)

        return slow


def show_files(ranks: list[int], latency_ms: float) -> None:
    """Print what committing and finding a checkpoint of so many ranks costs, with files of 1 KiB, on nodes of 8."""
    disk, rows = SlowDisk(latency_ms), []
    for count in ranks:
        with tempfile.TemporaryDirectory(prefix="rt-files-") as folder:
            temporary = store.begin(Path(folder), 1)
            (temporary / deepspeed_io.ENGINE_DIR).mkdir()
            names = [rank_file(rank) for rank in range(count)] + [
                "state.json",
                "engine/mp_rank_00_model_states.pt",
            ]
            names += [f"engine/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(count)]
            for name in names:
                (temporary / name).write_bytes(os.urandom(1024))
            described = store.seal(temporary, names)
            cells = []
            with disk():
                path = store.commit(temporary, 1, described)
            cells += [disk.calls, disk.seconds]
            with disk():
                store.newest_valid(Path(folder))
            cells += [disk.calls, disk.seconds]
            with disk():
                unseen_files(path, lambda name: rank_of(name) in (None, *range(8)))
            cells += [disk.calls, disk.seconds]
            shown = [f"{c:.2f}" if isinstance(c, float) else f"{c:,}" for c in cells]
            rows.append([str(count), f"{len(names) + 1:,}", *shown])
    header = [
        "ranks",
        "files",
        "commit: calls",
        "s",
        "start, rank 0: calls",
        "s",
        "start, a node: calls",
        "s",
    ]
    print("\n".join(text_table(header, rows)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 16, 4],
        help="ranks of each link of the chain, all different",
    )
    add("--steps", type=int, default=4, help="steps of each link")
    add("--workers", type=int, default=1, help="DataLoader workers of each rank")
    add("--folder", type=Path, help="where to work (default: a temporary folder, removed at the end)")
    add("--json", type=Path, help="write the figures here too")
    add("--join", type=Path, help="be one rank of a run in this folder")
    add("--until", type=int, default=0, help="with --join: the step to end at")
    add("--launched", type=float, default=time.time(), help="with --join: when this process was started")
    add("--table", type=Path, help="print the figures of runs in this folder")
    add(
        "--files",
        type=int,
        nargs="+",
        help="count and time what a checkpoint of so many ranks asks of a disk",
    )
    add(
        "--latency-ms",
        type=float,
        default=0.0,
        help="with --files: time of each call, beside that of this disk",
    )
    args = parser.parse_args()
    if args.files:
        show_files(args.files, args.latency_ms)
        return 0
    if args.join:
        return join(args.join, args.until, args.launched)
    if args.table:
        show(summarize(args.table))
        return 0
    folder = args.folder or Path(tempfile.mkdtemp(prefix="rt-many-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = chain(folder.resolve(), args.ranks, args.steps, args.workers)
        rows = summarize(folder)
        by_ranks = dict(zip(args.ranks, files, strict=True))
        rows = [{**row, "files of a checkpoint": float(by_ranks[row["ranks"]])} for row in rows]
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
