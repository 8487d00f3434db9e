"""The order of an epoch: a permutation, the same on every machine and with every version of streaming."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from streaming.base.shuffle import get_shuffle

from rating_train.data import shuffle as shuffle_module
from rating_train.data.order import digest
from rating_train.data.shuffle import interleave, shuffled_epoch

SHARDS = np.array([40, 41, 7, 100, 1, 53], dtype=np.int64)
DEFAULTS: dict[str, Any] = {"seed": 9, "epoch": 0, "block_samples": 64, "canonical_nodes": 1, "shuffle": True}


def epoch(shards: np.ndarray = SHARDS, **changes: Any) -> np.ndarray:
    return shuffled_epoch(shards, **{**DEFAULTS, **changes})


@pytest.mark.parametrize("shards", [[1], [3], [40, 41, 7], [5] * 30, [1000, 1]])
@pytest.mark.parametrize("canonical_nodes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("block_samples", [1, 16, 262_144])
def test_a_shuffled_epoch_is_a_permutation(
    shards: list[int], canonical_nodes: int, block_samples: int
) -> None:
    ids = epoch(np.array(shards), canonical_nodes=canonical_nodes, block_samples=block_samples)
    assert ids.dtype == np.int32
    assert np.array_equal(np.sort(ids), np.arange(sum(shards)))


#: (shards, seed, epoch, block, canonical nodes) -> digest, recorded when the order was made by streaming 0.13.
RECORDED = {
    ("six", 9, 0, 64, 1): "7f2f18810e295df1738d473538c5f6b5",
    ("six", 9, 3, 64, 2): "d76d9874b6a46a33e15af25f9c6cf766",
    ("six", 9176, 1, 5000, 3): "2554aea72abf3933add73d21de52f0d4",
    ("six", 9176, 0, 262144, 8): "1522e54606deb99975431f5488ae173b",
    ("six", 1, 2, 1, 1): "cf1ebda54d2e9732e14f6aa192206a1e",
    ("equal", 9, 0, 64, 1): "8b7a84d38dd78d3f9c31c524415e269d",
    ("equal", 9, 3, 64, 2): "3addecf3707d81d8bfd877cd630d97b5",
    ("equal", 9176, 1, 5000, 3): "89bf79eee4755098f5665461b4ebcb77",
    ("equal", 9176, 0, 262144, 8): "1a08a77d8910e8f87f8a3793de39cc95",
    ("equal", 1, 2, 1, 1): "1443a4ee0aa02d0395897edcd4ca0496",
}


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_the_order_is_the_one_that_was_recorded(case: tuple[str, int, int, int, int]) -> None:
    shards, seed, number, block, nodes = case
    ids = epoch(
        SHARDS if shards == "six" else np.full(77, 1000),
        seed=seed,
        epoch=number,
        block_samples=block,
        canonical_nodes=nodes,
    )
    assert digest(ids) == RECORDED[case], (
        "a resumed run would read other samples than before it was interrupted"
    )


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("seed", range(8))
def test_the_order_is_that_of_streaming_whatever_is_sorted_at_a_time(
    chunk: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle_module, "_CHUNK", chunk)
    rng = np.random.default_rng(seed)
    shards = rng.integers(1, rng.integers(2, 400), size=rng.integers(1, 60)).astype(np.int64)
    nodes = min(int(rng.integers(1, 12)), int(shards.sum()))
    for block in (2, 64, 500, 5000, 262_144):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Shuffle block size")
            theirs = get_shuffle("py1e", shards.copy(), nodes, seed, 3, block)
        ours = epoch(shards, seed=seed, epoch=3, block_samples=block, canonical_nodes=nodes)
        assert np.array_equal(ours, interleave(theirs, nodes)), block


def test_an_unshuffled_epoch_is_in_stored_order_in_every_epoch() -> None:
    for number in (0, 1, 7):
        assert np.array_equal(epoch(shuffle=False, epoch=number), np.arange(SHARDS.sum()))


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = {tuple(epoch(epoch=e, seed=s)) for e in range(5) for s in (0, 9, 10)}
    assert len(orders) == 15


def test_the_order_depends_on_nothing_but_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    first = epoch(epoch=3)
    np.random.seed(4)
    np.random.rand(10)
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    before = np.random.get_state()[1].copy()
    assert np.array_equal(epoch(epoch=3), first), "neither the global generator nor the world size matters"
    assert np.array_equal(np.random.get_state()[1], before), "and the global generator is left alone"


def test_samples_are_mixed_across_shards_within_a_block() -> None:
    shards = np.array([100] * 10)
    ids = epoch(shards, block_samples=1000)
    runs = np.flatnonzero(np.diff(ids // 100)).size
    assert runs > 500, "neighbours come from different shards"
    assert np.abs(np.corrcoef(ids, np.arange(1000))[0, 1]) < 0.2


@pytest.mark.parametrize("parts", [0, 1, 2, 3, 7, 16, 101, 200])
@pytest.mark.parametrize("samples", [1, 2, 16, 101])
def test_interleaving_is_a_permutation(samples: int, parts: int) -> None:
    ids = np.random.default_rng(samples).permutation(samples).astype(np.int64)
    mixed = interleave(ids, parts)
    assert mixed.dtype == np.int64
    assert np.array_equal(np.sort(mixed), np.arange(samples))


def test_interleaving_takes_one_item_of_each_run_in_turn() -> None:
    assert interleave(np.arange(7), 3).tolist() == [0, 3, 5, 1, 4, 6, 2]
    assert interleave(np.arange(6), 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert interleave(np.arange(6), 1).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_order_beyond_int32_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        epoch(np.array([2**30, 2**30]), shuffle=False)
