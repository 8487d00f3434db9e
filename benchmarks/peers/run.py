"""Side by side: this project, a plain DDP loop, Lightning, the Hugging Face Trainer (alone, with DeepSpeed), in turn.

    python benchmarks/peers/run.py CONFIG [--ranks 2] [--rounds 5] [--steps 10] [--warmup 3] [--set A.B=V]...
                                          [--stages 0,1,2] [--only NAME,...] [--json FILE]

All of them train the same model on the same shards with the same batch and precision. Rounds alternate, so that a
machine whose speed drifts does not favour one of them; what is compared is the ratio within a round, whose median is
printed. Every item of a peer is padded to the full length, as a fixed `max_length` does. This project runs twice:
padded alike, and as it trains by default (micro-batches cut to their longest item). The first --warmup steps do
not count. The Trainer needs accelerate, and Lightning runs where it is installed (both: extra `bench`). On a GPU,
choose steps and warm-up equal: a row of the log waits for it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
_TRIES = 2  # a rank of the Trainer aborted once at its end, when its peer had closed the connection


def launch(args: argparse.Namespace, command: list[str], extra: dict[str, str] | None = None) -> str:
    """Run one peer on all ranks; its standard output."""
    cores = os.cpu_count() or 1
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // args.ranks)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **(extra or {}),
    }
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={args.ranks}",
    ]
    for _ in range(_TRIES):
        done = subprocess.run(
            [*torchrun, *command], env=env, capture_output=True, text=True, timeout=args.timeout
        )
        if not done.returncode:
            return done.stdout
        said = f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        print(said, file=sys.stderr, flush=True)
    raise SystemExit(said)


def peer(args: argparse.Namespace, script: str, *words: str) -> float:
    """Items per second of a peer."""
    shared = [args.config, *words, f"--warmup={args.warmup}", f"--steps={args.steps}"]
    overrides = [f"--set={s}" for s in args.set]
    printed = launch(args, [str(HERE / script), *shared, *overrides])
    lines = [line for line in printed.splitlines() if line.startswith('{"items_per_second"')]
    return float(json.loads(lines[-1])["items_per_second"])


def ours(args: argparse.Namespace, stage: int, padded: bool) -> float:
    """Items per second of `rating-train train`, from the rows of train.jsonl after the warm-up.

    Args:
        args: the command line.
        stage: of ZeRO.
        padded: whether every item is padded to its full length, as the peers' items are.
    """
    every = math.gcd(args.warmup, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "name": "bench",
            "runs_dir": folder,
            "zero.stage": stage,
            "train.max_steps": args.warmup + args.steps,
            "train.epochs": 1000,
            "train.log_every_steps": every,
            "model.head_dropout": 0,
            **({"batch.length_multiple_tokens": 0} if padded else {}),
            "train.eval_every_steps": 0,
            "train.save_every_steps": 0,
            "eval.max_items": args.ranks,
        }
        overrides = [f"--set={s}" for s in [*args.set, *(f"{k}={v}" for k, v in settings.items())]]
        launch(args, ["-m", "rating_train", "train", args.config, *overrides])
        rows = [
            json.loads(line) for line in (Path(folder) / "bench" / "train.jsonl").read_text().splitlines()
        ]
    before = [row for row in rows if row["step"] <= args.warmup]
    counted = rows[len(before) :]
    items = counted[-1]["samples"] - before[-1]["samples"]
    return items / sum(row["step_seconds"] * every for row in counted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--stages", default="0,1,2")
    parser.add_argument("--only", default="", help="names of the rows to run, divided by commas")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    stages = [int(s) for s in args.stages.split(",") if s]
    runs: dict[str, Callable[[], float]] = {}
    for padded, name in ((False, ""), (True, " padded")):
        for stage in stages:
            runs[f"rating_train stage {stage}{name}"] = functools.partial(ours, args, stage, padded)
    runs["DDP"] = functools.partial(peer, args, "ddp.py")
    runs["Trainer"] = functools.partial(peer, args, "hf_trainer.py")
    runs["Trainer + DeepSpeed"] = functools.partial(peer, args, "hf_trainer.py", "--deepspeed")
    if importlib.util.find_spec("lightning") is not None:
        runs["Lightning"] = functools.partial(peer, args, "lightning_fit.py")
    wanted = [name.strip() for name in args.only.split(",") if name.strip()] or list(runs)
    if unknown := [name for name in wanted if name not in runs]:
        parser.error(
            f"--only: not known, or not installed: {', '.join(unknown)} | expected some of: {', '.join(runs)}"
        )
    rates: dict[str, list[float]] = {name: [] for name in wanted}
    for turn in range(args.rounds):
        for name in wanted if turn % 2 == 0 else reversed(wanted):
            rates[name].append(runs[name]())
            print(f"round {turn + 1}: {name}: {rates[name][-1]:.3f} items/s", file=sys.stderr, flush=True)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.ranks} ranks")
    for name, values in rates.items():
        spread = f"{statistics.median(values):9.3f}  [{min(values):.3f}, {max(values):.3f}]"
        ratios = [
            f"{statistics.median(a / b for a, b in zip(values, rates[other])):.3f} x {other}"
            for other in ("DDP", "Trainer", "Trainer + DeepSpeed", "Lightning")
            if other in rates and other != name and name.startswith("rating_train")
        ]
        print(f"{name:<24} {spread}  {', '.join(ratios)}")
    if args.json:
        args.json.write_text(json.dumps(rates, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
