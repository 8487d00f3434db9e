"""The order of samples is a pure function of the step: nothing lost, nothing doubled, the same on any world."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rating_train.data import order as order_module
from rating_train.data.order import (
    SampleOrder,
    digest,
    epoch_of_step,
    evaluation_batches,
    first_step_of_epoch,
    interleave,
    rank_part,
    worker_part,
)

# (N, G): G divides N, does not, is 1, equals N, and is larger than N, even several times.
SHAPES = [(24, 12), (25, 12), (7, 3), (101, 12), (5, 1), (12, 12), (5, 12), (1, 4), (3, 64), (1000, 7)]


def permuted(samples: int) -> SampleOrder:
    """An order of global batches of 12."""
    return random_order(samples, 12)


def random_order(samples: int, global_items: int, seed: int = 3) -> SampleOrder:
    """An order whose epochs are different permutations."""

    def epoch_ids(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(samples).astype(np.int64)

    return SampleOrder(samples, global_items, epoch_ids)


@pytest.mark.parametrize(("samples", "global_items"), SHAPES)
def test_every_epoch_holds_every_sample_exactly_once_across_steps_and_borders(
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
        assert np.array_equal(one, order.epoch_ids(epoch)), "the epoch in its own order, none left out"
        assert np.array_equal(np.sort(one), np.arange(samples))


@pytest.mark.parametrize(("samples", "global_items"), SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_any_division_into_ranges_of_steps_gives_the_same_batches(
    samples: int, global_items: int, seed: int
) -> None:
    order = random_order(samples, global_items)
    whole = order.batches(0, 40)
    cuts = np.sort(np.random.default_rng(seed).integers(0, 41, size=5))
    bounds = [0, *cuts.tolist(), 40]
    parts = [order.batches(a, b) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(order.batches(17, 18)[0], whole[17]), "a resumed run reads the very next batch"


def test_an_empty_range_of_steps_is_an_empty_array_of_the_right_width() -> None:
    assert permuted(25).batches(7, 7).shape == (0, 12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [5, 24, 101])
def test_the_ranks_together_read_the_same_ordered_global_batch(samples: int, ranks: int) -> None:
    batches = permuted(samples).batches(0, 30)
    parts = [rank_part(batches, r, ranks) for r in range(ranks)]
    assert {p.shape for p in parts} == {(30, 12 // ranks)}
    assert np.array_equal(np.concatenate(parts, axis=1), batches)


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("steps", [1, 4, 15])
def test_batches_dealt_to_workers_in_turn_come_back_in_order(workers: int, steps: int) -> None:
    batches = permuted(101).batches(0, steps)
    parts = [worker_part(batches, w, workers) for w in range(workers)]
    assert sum(map(len, parts)) == steps
    collected = [parts[k % workers][k // workers] for k in range(steps)]
    assert np.array_equal(np.stack(collected), batches)


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


@pytest.mark.parametrize(("samples", "global_items"), [*SHAPES, (3_000_000, 64), (16_455_671, 4096)])
def test_segments_always_go_forward_and_end_where_an_epoch_begins(samples: int, global_items: int) -> None:
    order = random_order(samples, global_items)
    step = 0
    for _ in range(20):
        end = order.segment_end(step)
        assert end > step
        epoch = epoch_of_step(end, samples, global_items)
        starts = {first_step_of_epoch(e, samples, global_items) for e in (epoch, epoch + 1)}
        assert end in starts or end == step + 1
        assert (end - step - 1) * global_items <= max(samples, 2_000_000), "memory stays bounded"
        step = end


def test_a_run_made_of_segments_is_the_run_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    order = random_order(25, 12)
    monkeypatch.setattr(order_module, "_SEGMENT_SAMPLES", 60)
    step, pieces = 0, []
    while step < 50:
        end = min(50, order.segment_end(step))
        pieces.append(order.batches(step, end))
        step = end
    assert len(pieces) > 5
    assert np.array_equal(np.concatenate(pieces), order.batches(0, 50))


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
    assert digest(ids) == digest(np.repeat(ids, 2)[::2])
    assert digest(ids) != digest(swapped)
    assert digest(ids) != digest(ids[:-1])
