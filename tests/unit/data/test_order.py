"""The order of samples is a pure function of the step: nothing lost, nothing doubled, the same on any world."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest

from rating_train.data.order import (
    EpochOrders,
    FirstReads,
    Ids,
    SampleOrder,
    digest,
    epoch_of_step,
    evaluation_batches,
    rank_part,
)

# (N, G): G divides N, does not, is 1, equals N, and is larger than N, even several times.
SHAPES = [(24, 12), (25, 12), (7, 3), (101, 12), (5, 1), (12, 12), (5, 12), (1, 4), (3, 64), (1000, 7)]


def first_step_of_epoch(epoch: int, samples: int, global_items: int) -> int:
    """The first step whose batch starts within ``epoch`` or later."""
    return -(-epoch * samples // global_items)


def permuted(samples: int) -> SampleOrder:
    """An order of global batches of 12."""
    return random_order(samples, 12)


def random_order(samples: int, global_items: int, seed: int = 3) -> SampleOrder:
    """An order whose epochs are different permutations."""

    def epoch_ids(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(samples).astype(np.int64)

    return SampleOrder(samples, global_items, epoch_ids)


@pytest.mark.parametrize(("samples", "global_items"), SHAPES)
def test_every_epoch_holds_every_sample_exactly_once_across_steps_and_epochs(
    samples: int, global_items: int
) -> None:
    epochs = 4
    steps = first_step_of_epoch(epochs, samples, global_items)
    order = random_order(samples, global_items)
    batches = order.batches(0, steps)
    assert batches.shape == (steps, global_items) and batches.dtype == np.int64
    stream = batches.reshape(-1)
    for epoch in range(epochs):
        one = stream[epoch * samples : (epoch + 1) * samples]
        expected = np.random.default_rng([3, epoch]).permutation(samples)
        assert np.array_equal(one, expected), "the epoch in its own order, none left out"
        assert np.array_equal(np.sort(one), np.arange(samples))


@pytest.mark.parametrize(("samples", "global_items"), SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_any_division_into_ranges_of_steps_gives_the_same_batches(
    samples: int, global_items: int, seed: int
) -> None:
    order = random_order(samples, global_items)
    full = order.batches(0, 40)
    cuts = np.sort(np.random.default_rng(seed).integers(0, 41, size=5))
    bounds = [0, *cuts.tolist(), 40]
    parts = [order.batches(a, b) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), full)
    assert np.array_equal(order.batches(17, 18)[0], full[17]), "a resumed run reads the very next batch"


def test_an_empty_range_of_steps_is_an_empty_array_of_the_right_width() -> None:
    assert permuted(25).batches(7, 7).shape == (0, 12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [5, 24, 101])
def test_the_ranks_together_read_the_same_ordered_global_batch(samples: int, ranks: int) -> None:
    batches = permuted(samples).batches(0, 30)
    parts = [rank_part(batches, r, ranks) for r in range(ranks)]
    assert {p.shape for p in parts} == {(30, 12 // ranks)}
    assert np.array_equal(np.concatenate(parts, axis=1), batches)


@pytest.mark.parametrize(("samples", "global_items"), [*SHAPES, (3_000_000, 64), (16_455_671, 4096)])
def test_segments_follow_one_another_and_lie_within_an_epoch(samples: int, global_items: int) -> None:
    order = random_order(samples, global_items)
    segments = list(itertools.islice(order.segments(5, 10**9), 20))
    assert segments[0][0] == 5
    for (step, end), (following, _) in itertools.pairwise(segments):
        assert step < end == following
        first, last = step * global_items // samples, (end * global_items - 1) // samples
        assert first == last or end == step + 1, "only a single batch crosses epochs"
    assert list(order.segments(5, 6)) == [(5, 6)] and list(order.segments(5, 5)) == []


@pytest.mark.parametrize(("samples", "global_items"), SHAPES)
def test_a_run_made_of_segments_is_the_run_in_one_go_and_makes_each_order_once(
    samples: int, global_items: int
) -> None:
    made: list[int] = []

    def epoch_ids(epoch: int) -> Ids:
        made.append(epoch)
        return np.random.default_rng([3, epoch]).permutation(samples)

    full = random_order(samples, global_items).batches(3, 60)
    order = SampleOrder(samples, global_items, epoch_ids)
    pieces = []
    for step, end in order.segments(3, 60):
        pieces.append(order.batches(step, end))
        order.release(end)
        order.order_digest(end - 1)  # as a checkpoint asks for it
    assert np.array_equal(np.concatenate(pieces), full)
    assert made == sorted(set(made)), "none is made twice"


def test_the_order_of_an_epoch_is_free_once_it_is_released() -> None:
    references = []

    def epoch_ids(epoch: int) -> Ids:
        ids = np.random.default_rng(epoch).permutation(100)
        references.append(weakref.ref(ids))
        return ids

    orders = EpochOrders(epoch_ids, tail=12)
    expected = np.random.default_rng(0).permutation(100)
    assert np.array_equal(orders.part(0, 0, 100), expected)
    assert orders.digest(0) == digest(expected)
    orders.release(1)
    assert references[0]() is not None, "another epoch's end frees nothing"
    orders.release(0)
    gc.collect()
    assert references[0]() is None
    assert np.array_equal(orders.part(0, 88, 100), expected[88:]) and len(references) == 1
    assert orders.digest(0) == digest(expected) and len(references) == 1
    assert np.array_equal(orders.part(0, 87, 100), expected[87:]) and len(references) == 2, "made again"


@pytest.mark.parametrize("sharing", ["all nodes", "each node", "odd nodes"])
@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (1, 4), (2, 2), (4, 3)])
def test_each_shard_is_checked_once_by_those_who_share_it_before_a_step_that_reads_it_can_end(
    nodes: int, ranks_per_node: int, sharing: str
) -> None:
    rng = np.random.default_rng(7)
    shard_samples = rng.integers(1, 40, size=60)
    sizes = rng.integers(10_000, 20_000, size=60)
    samples, ranks = int(shard_samples.sum()), nodes * ranks_per_node
    batches = random_order(samples, 24).batches(0, 2 * samples // 24)
    shard_of = np.repeat(np.arange(60), shard_samples)

    def sharers(rank: int) -> list[int]:
        node = rank // ranks_per_node
        together = {"all nodes": range(nodes), "each node": [node], "odd nodes": range(node % 2, nodes, 2)}
        return [r for r in range(ranks) if r // ranks_per_node in together[sharing]]

    hashed_bytes = np.zeros(nodes, np.int64)
    checks: dict[int, list[tuple[int, int]]] = {}  # shard -> (row, rank) that checks it
    for rank in range(ranks):
        first_reads = FirstReads(shard_samples, rank, sharers(rank))
        for begin in range(0, len(batches), 17):  # as segments come
            for row, shards in first_reads.of(batches[begin : begin + 17], ranks).items():
                own = shard_of[rank_part(batches[begin + row : begin + row + 1], rank, ranks)]
                assert set(shards) <= set(own.reshape(-1).tolist()), "it reads what it checks"
                for shard in shards:
                    checks.setdefault(shard, []).append((begin + row, rank))
                    hashed_bytes[rank // ranks_per_node] += sizes[shard]
    assert set(checks) == set(range(60))
    for group in {tuple(sharers(rank)) for rank in range(ranks)}:
        columns = np.concatenate([rank_part(batches, r, ranks) for r in group], axis=1)
        reads = [(shard_of[columns] == shard).any(axis=1) for shard in range(60)]
        for shard in range(60):
            rows = [row for row, rank in checks[shard] if rank in group]
            assert rows == np.flatnonzero(reads[shard])[:1].tolist(), "once, at the first read, if it is read"
        of_group = {rank // ranks_per_node for rank in group}
        assert hashed_bytes[list(of_group)].sum() == sizes[np.any(reads, axis=1)].sum()
    if sharing == "all nodes" and nodes > 1:
        assert hashed_bytes.max() < 0.8 * sizes.sum(), "and the nodes share the work"


def test_nothing_is_checked_where_nobody_is_to_check() -> None:
    assert FirstReads(np.array([5, 5]), 0, None).of(np.arange(10).reshape(2, 5), 1) == {}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 7, 64, 101])
@pytest.mark.parametrize("rank_items", [1, 4, 64])
def test_an_evaluation_covers_all_samples_in_equal_numbers_of_equal_batches(
    samples: int, ranks: int, rank_items: int
) -> None:
    parts = [evaluation_batches(samples, r, ranks, rank_items) for r in range(ranks)]
    assert len({p.shape for p in parts}) == 1 and parts[0].shape[1] == rank_items
    every = np.concatenate([p.reshape(-1) for p in parts])
    assert np.array_equal(np.unique(every), np.arange(samples))
    values, counts = np.unique(every, return_counts=True)
    assert (counts[values < samples - 1] == 1).all(), "only the last sample is repeated"
    assert len(every) - samples < ranks * rank_items, "less than one batch of all ranks is filled up"


@pytest.mark.parametrize(("samples", "global_items"), SHAPES)
def test_epoch_of_a_step_and_first_step_of_an_epoch_agree(samples: int, global_items: int) -> None:
    for step in range(100):
        assert epoch_of_step(step, samples, global_items) == (step * global_items) // samples
    for epoch in range(50):
        first = first_step_of_epoch(epoch, samples, global_items)
        assert epoch_of_step(first, samples, global_items) >= epoch
        assert first == 0 or epoch_of_step(first - 1, samples, global_items) < epoch


def test_steps_and_epochs_are_exact_beyond_the_precision_of_floats() -> None:
    samples, global_items = 16_455_671, 4096
    epoch = 10**12
    first = first_step_of_epoch(epoch, samples, global_items)
    assert (first - 1) * global_items < epoch * samples <= first * global_items
    assert epoch_of_step(first, samples, global_items) == epoch


def test_the_digest_tells_two_orders_apart_and_ignores_memory_layout() -> None:
    ids = np.arange(20, dtype=np.int64)
    swapped = ids.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert digest(ids) == digest(np.repeat(ids, 2)[::2]) == digest(ids.astype(np.int32))
    assert digest(ids) != digest(swapped)
    assert digest(ids) != digest(ids[:-1])
