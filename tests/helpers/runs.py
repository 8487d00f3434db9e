"""What a run directory holds after training: logged steps, ids of samples, evaluations; and whether two are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# What differs between two equal runs.
TIMING = {
    "time",
    "seconds",
    "items_per_second",
    "samples_per_second",
    "step_seconds",
    "data_wait_seconds",
    "data_wait_fraction",
    "peak_memory_gib",
    "tokens_per_second",
    "tflops_per_rank",
    "tflops_per_rank_padded",
    "mfu",
    "mfu_padded",
}


def rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _untimed(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows(path)]


def read_log(run: Path) -> list[dict[str, Any]]:
    """train.jsonl without times."""
    return _untimed(run / "train.jsonl")


def evaluations(run: Path) -> list[dict[str, Any]]:
    """eval.jsonl without times."""
    return _untimed(run / "eval.jsonl")


def losses(run: Path) -> list[float]:
    """The loss of every step; each step must be there once."""
    logged = rows(run / "train.jsonl")
    assert [row["step"] for row in logged] == list(range(1, len(logged) + 1))
    return [row["loss"] for row in logged]


def read_ids(run: Path, rank: int) -> dict[int, list[str]]:
    """Ids of every step; where a step was done twice (before and after a kill), what was read last."""
    return {row["step"]: row["ids"] for row in rows(run / "samples" / f"rank_{rank:05d}.jsonl")}


def global_batches(run: Path) -> list[list[str]]:
    """Ids of every step over all ranks, in order; each rank's file holds the steps that it took part in."""
    steps: dict[int, dict[int, list[str]]] = {}
    for path in sorted((run / "samples").iterdir()):
        rank = int(path.stem.rpartition("_")[2])
        for step, ids in read_ids(run, rank).items():
            steps.setdefault(step, {})[rank] = ids
    return [[i for rank in sorted(steps[step]) for i in steps[step][rank]] for step in sorted(steps)]


def assert_same(a: object, b: object, where: str, padding: int = 0) -> None:
    """Bit-equal, but for the last ``padding`` elements of flat fp32 partitions."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        keep = len(a) - padding if padding and a.ndim == 1 and "fp32_flat_groups" in where else None
        assert torch.equal(a[:keep], b[:keep]) if a.ndim else torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", padding)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where  # type: ignore[arg-type]
        for i, (x, y) in enumerate(zip(a, b, strict=True)):  # type: ignore[arg-type]
            assert_same(x, y, f"{where}/{i}", padding)
    else:
        assert type(a) is type(b), where
        if isinstance(a, (int, float, str, bool, type(None))):
            assert a == b, where
