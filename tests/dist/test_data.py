"""Every number of ranks and workers reads the same ordered global batches, and scores every item once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.conftest import Ranks

WORKER = Path(__file__).with_name("data_worker.py")


@pytest.fixture(scope="module")
def orders(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("order")
    with contextlib.closing(Ranks()) as launcher:
        for ranks in (1, 2, 4):
            out = folder / f"{ranks}.json"
            launcher.run(ranks, WORKER, out, demo / "data", demo / "model", "order", timeout=240)
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2, 4)}


@pytest.mark.timeout(700)
def test_same_ordered_global_batches_on_1_2_4_ranks_and_0_1_3_workers(orders: dict) -> None:
    expected = orders[1]["orders"]["workers 0 from 0"]
    assert len(expected) == 45
    for ranks, found in orders.items():
        for workers in (0, 1, 3):
            assert found["orders"][f"workers {workers} from 0"] == expected, (ranks, workers)


def test_a_later_start_reads_exactly_the_rest(orders: dict) -> None:
    expected = orders[1]["orders"]["workers 0 from 0"][17:]
    for ranks, found in orders.items():
        for workers in (0, 1, 3):
            assert found["orders"][f"workers {workers} from 17"] == expected, (ranks, workers)


def test_every_epoch_holds_every_sample_once(orders: dict) -> None:
    n = orders[1]["samples"]
    stream = [i for batch in orders[1]["orders"]["workers 0 from 0"] for i in batch]
    first, second = stream[:n], stream[n : 2 * n]
    assert len(set(first)) == n and set(first) == set(second)
    assert first != second, "the second epoch is shuffled anew"


@pytest.mark.timeout(700)
def test_evaluation_gives_each_id_once_and_scipys_numbers_on_1_2_3_ranks(demo: Path, tmp_path: Path) -> None:
    scores_of: dict[int, dict[str, np.ndarray]] = {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.json"
        with contextlib.closing(Ranks()) as launcher:
            launcher.run(ranks, WORKER, out, demo / "data", demo / "model", "evaluate", timeout=240)
        reported = json.loads(out.read_text())
        for items in (7, 64, 101):
            rows = [json.loads(line) for line in out.with_suffix(f".{items}.jsonl").read_text().splitlines()]
            assert len(rows) == len({r["id"] for r in rows}) == items
            x = np.array([r["score"] for r in rows], dtype=np.float64)
            y = np.array([r["rating"] for r in rows], dtype=np.float64)
            found = reported[str(items)]
            assert found["n"] == items
            assert abs(found["plcc"] - stats.pearsonr(x, y).statistic) < 1e-9
            assert abs(found["srcc"] - stats.spearmanr(x, y).statistic) < 1e-9
            assert abs(found["rmse"] - np.sqrt(np.mean((x - y) ** 2))) < 1e-9
            assert abs(found["mae"] - np.mean(np.abs(x - y))) < 1e-9
            by_id = {r["id"]: r["score"] for r in rows}
            before = scores_of.setdefault(items, by_id)
            assert before.keys() == by_id.keys()
            assert max(abs(before[i] - by_id[i]) for i in by_id) < 1e-5, "scores do not depend on the ranks"
