"""Two datasets mixed 70 to 30: one order on every number of ranks and workers, resumed and moved, near or far."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ranks
from tests.helpers.runs import evaluations, global_batches, losses
from tests.helpers.small_shards import reshard

WORKER = Path(__file__).with_name("data_worker.py")


@pytest.fixture(scope="module")
def second(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's items again, three times, under other ids, in shards of 64 KB."""
    return reshard(demo / "data", tmp_path_factory.mktemp("second") / "data", 64_000, copies=3)


def items(path: Path) -> int:
    return int(json.loads((path / "manifest.json").read_text())["splits"]["train"]["items"])


def mixed(demo: Path, second: Path) -> list[dict[str, Any]]:
    return [{"path": str(demo / "data"), "weight": 0.7}, {"path": str(second), "weight": 0.3}]


@pytest.fixture(scope="module")
def orders(demo: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("order")
    sources = json.dumps(mixed(demo, second))
    with contextlib.closing(Ranks()) as launcher:
        for ranks in (1, 2, 4):
            launcher.run(ranks, WORKER, folder / f"{ranks}.json", sources, demo / "model", "order", timeout=240)
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2, 4)}


@pytest.mark.timeout(700)
def test_one_order_on_1_2_4_ranks_and_0_1_3_workers_from_any_step(orders: dict[int, dict[str, Any]]) -> None:
    expected = orders[1]["orders"]["workers 0 from 0"]
    assert len(expected) == 45
    for ranks, found in orders.items():
        for workers in (0, 1, 3):
            assert found["orders"][f"workers {workers} from 0"] == expected, (ranks, workers)
            assert found["orders"][f"workers {workers} from 17"] == expected[17:], (ranks, workers)


def test_an_epoch_has_the_shares_to_within_one_percent(
    orders: dict[int, dict[str, Any]], demo: Path, second: Path
) -> None:
    """The stream is 45 batches of 12; each of them has 8 or 9 items of the first source (12 x 0.7 = 8.4) or nearly so."""
    assert orders[1]["samples"] == items(demo / "data") + items(second)
    batches = orders[1]["orders"]["workers 0 from 0"]
    firsts = [sum("-" not in i[-2:] for i in batch) for batch in batches]
    assert abs(sum(firsts) / (45 * 12) - 0.7) < 0.01
    assert set(firsts) <= {7, 8, 9, 10}


@pytest.mark.timeout(400)
def test_a_mixture_resumes_on_other_ranks_and_from_a_remote_as_if_nothing_had_changed(
    ranks: Ranks, tiny_config: Callable[..., Path], demo: Path, second: Path, tmp_path: Path
) -> None:
    """4 steps on 2 ranks, 4 on 4 with the second source behind a cache, 4 on 1; against 12 on 2, and its evaluation."""
    near = mixed(demo, second)
    far = [near[0], {**near[1], "remote": str(second), "path": str(tmp_path / "cache"), "cache_limit_mb": 1}]

    def leg(name: str, last_step: int, sources: list[dict[str, Any]], **more: object) -> Path:
        data = {"path": "", "sources": sources, "shuffle_block_samples": 100, "workers": 1}
        train = {"epochs": 9, "keep_last": 9, "precision": "fp32", "max_steps": last_step}
        constant = {"schedule": "constant", "warmup_fraction": 0.0}
        path = tiny_config(name, data=data, train=train, optim=constant, batch={"global_items": 12}, **more)
        return path.rename(path.with_name(f"{name}_{last_step}.yaml"))

    ranks.train(2, leg("whole", 12, near))
    for size, last_step, sources in ((2, 4, near), (4, 8, far), (1, 12, near)):
        ranks.train(size, leg("moved", last_step, sources))
    whole, moved = tmp_path / "runs/whole", tmp_path / "runs/moved"
    assert global_batches(whole) == global_batches(moved)
    assert losses(whole) == pytest.approx(losses(moved), rel=1e-5)
    assert evaluations(whole)[-1]["n"] == json.loads((demo / "data/manifest.json").read_text())["splits"]["val"]["items"]
    facts = json.loads((whole / "provenance.json").read_text())["data_sources"]
    assert [(s["share"], s["items"]) for s in facts] == [("7/10", items(demo / "data")), ("3/10", items(second))]
    state = json.loads((whole / "checkpoints/step_00000012/state.json").read_text())["identity"]["order"]
    assert state["weights"] == ["7/10", "3/10"] and state["data_fingerprint"] == [s["fingerprint"] for s in facts]

    ranks.run(1, "-m", "rating_train", "evaluate", whole, "--checkpoint", "latest", "--resamples", "50")
    judged = json.loads(next((whole / "evaluations").glob("val_step_00000012*.json")).read_text())
    assert judged["data"] == str(demo / "data") and judged["seen"]["warning"] == "", judged["seen"]

    other = [near[0], {**near[1], "weight": 0.4}]
    output = ranks.train(1, leg("moved", 13, other), code=1)
    assert "weights was ['7/10', '3/10'] and is now ['7/11', '4/11']" in output
