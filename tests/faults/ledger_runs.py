"""The run that the ledger kills: its settings, and the comparison with one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rating_train.checkpoint import store
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from tests.helpers.runs import assert_same, evaluations, global_batches, read_ids, read_log

EVAL_EVERY = 7


def sections(stage: int, steps: int) -> dict[str, dict]:
    """Return what differs from the tiny configuration."""
    return {
        "data": {"workers": 1},
        "model": {"head_dropout": 0.1},  # the random number generators affect the weights
        "zero": {"stage": stage},
        "train": {
            "epochs": 999,  # of about 20 steps
            "max_steps": steps,
            "save_every_steps": 3,
            "eval_every_steps": EVAL_EVERY,
            "background_save": True,
        },
    }


def assert_same_run(straight: Path, broken: Path, steps: int, stage: int) -> None:
    """Compare ordered ids, losses, evaluations, pointers, and every bit of the last checkpoint."""
    assert [row["step"] for row in read_log(broken)] == list(range(1, steps + 1))
    assert read_ids(broken, 0).keys() == read_ids(broken, 1).keys()
    assert global_batches(straight) == global_batches(broken)
    assert read_log(straight) == read_log(broken)
    assert evaluations(straight) == evaluations(broken)
    for pointer in (store.LATEST, store.BEST):
        one, other = (json.loads((run / "checkpoints" / pointer).read_text()) for run in (straight, broken))
        assert one == other, pointer
    last = Path("checkpoints") / store.step_name(steps)
    assert store.verify(broken / last)["step"] == steps
    names = sorted(p.relative_to(straight / last) for p in (straight / last).rglob("*.pt"))
    assert len(names) >= 5 and names == sorted(
        p.relative_to(broken / last) for p in (broken / last).rglob("*.pt")
    )
    for name in names:
        one, other = (torch.load(run / last / name, weights_only=False) for run in (straight, broken))
        assert_same(one, other, str(name))
    weights = [consolidated_weights(run / last, stage) for run in (straight, broken)]
    assert_same(weights[0], weights[1], "weights")
    assert {p.name for p in (straight / "checkpoints").iterdir()} == {
        p.name for p in (broken / "checkpoints").iterdir()
    }, "temporary directories remain, or other checkpoints were kept"
