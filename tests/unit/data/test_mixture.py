"""The order of several datasets: shares, evenly spread; nothing lost or doubled; a function of the epoch alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from rating_train.config.resolve import source_shares
from rating_train.config.schema import SourceConfig
from rating_train.data import mixture as mixtures
from rating_train.data.mixture import Mixture, PassIds, mixed_epoch, source_seed, spread
from rating_train.data.order import Ids, SampleOrder
from rating_train.errors import UserError

# (sizes, weights): the small one drawn more often than it has items, or the large one; three; one alone.
MIXTURES = [
    ((700, 300), (0.7, 0.3)),
    ((1000, 50), (0.7, 0.3)),
    ((50, 1000), (0.7, 0.3)),
    ((101, 97, 5), (1, 1, 0.1)),
    ((333, 333), (0.1, 0.2)),
    ((2000, 3), (0.99, 0.01)),
    ((40,), (3,)),
]


def shares_of(weights: tuple[float, ...]) -> list[Fraction]:
    return source_shares([SourceConfig(str(n), weight) for n, weight in enumerate(weights)])


def permutations(size: int, seed: int) -> PassIds:
    return lambda number: np.random.default_rng([seed, number]).permutation(size).astype(np.int32)


def epochs_of(sizes: tuple[int, ...], weights: tuple[float, ...], count: int) -> tuple[Mixture, list[Ids]]:
    mixture = Mixture(sizes, shares_of(weights))
    passes = [permutations(size, seed) for seed, size in enumerate(sizes)]
    return mixture, [mixed_epoch(mixture, passes, epoch) for epoch in range(count)]


def source_of(mixture: Mixture, ids: Ids) -> Ids:
    return np.searchsorted(np.cumsum(mixture.sizes), ids, side="right")


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES)
def test_each_epoch_has_each_sources_share_to_within_an_item(
    sizes: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    mixture, epochs = epochs_of(sizes, weights, 7)
    total = np.zeros(len(sizes))
    for ids in epochs:
        assert len(ids) == sum(sizes) and ids.dtype == np.int32
        counts = np.bincount(source_of(mixture, ids), minlength=len(sizes))
        expected = np.array([float(share) for share in mixture.shares]) * len(ids)
        assert np.abs(counts - expected).max() < 2
        total += counts
    assert np.abs(total - 7 * expected).max() <= 1, (
        "what is rounded off in one epoch is made up for in the next"
    )


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES)
def test_each_source_is_read_in_its_own_passes_of_which_nothing_is_lost(
    sizes: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    mixture, epochs = epochs_of(sizes, weights, 9)
    stream = np.concatenate(epochs)
    for source, (size, offset) in enumerate(zip(sizes, mixture.offsets)):
        own = stream[source_of(mixture, stream) == source] - offset
        passes = [permutations(size, source)(number) for number in range(len(own) // size + 1)]
        assert np.array_equal(own, np.concatenate(passes)[: len(own)])


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES)
@pytest.mark.parametrize("length", [12, 100])
def test_any_ids_in_a_row_have_each_sources_share(
    sizes: tuple[int, ...], weights: tuple[float, ...], length: int
) -> None:
    """At either end of the row a source is at most half an item off its way, and all together S halves."""
    mixture, epochs = epochs_of(sizes, weights, 2)
    length = min(length, mixture.samples)
    for ids in epochs:
        sources = source_of(mixture, ids)
        counts = np.bincount(sources, minlength=len(sizes))
        for source, count in enumerate(counts):
            share = count / len(ids)
            found = np.convolve(sources == source, np.ones(length), "valid")
            assert np.abs(found - length * share).max() <= 1 + share * len(sizes) + 1e-9


def test_in_chunks_or_at_once_the_order_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        np.arange(70_000, dtype=np.int32),
        np.arange(100_000, 130_001, dtype=np.int32),
        np.arange(0, dtype=np.int32),
    ]
    expected = spread(parts)
    assert np.array_equal(np.sort(expected), np.sort(np.concatenate(parts)))
    for chunk in (1, 7, 999):
        small = [part[:200] for part in parts]
        monkeypatch.setattr(mixtures, "_CHUNK", 1 << 20)
        once = spread(small)
        monkeypatch.setattr(mixtures, "_CHUNK", chunk)
        assert np.array_equal(spread(small), once)
    monkeypatch.setattr(mixtures, "_CHUNK", 4096)
    assert np.array_equal(spread(parts), expected)


def test_a_later_step_needs_no_earlier_one() -> None:
    """Global batches of the mixture from the middle on, as a resumed run reads them: over an epoch boundary."""
    mixture = Mixture((100, 41), shares_of((0.6, 0.4)))
    passes = [permutations(100, 0), permutations(41, 1)]

    def order() -> SampleOrder:
        return SampleOrder(mixture.samples, 12, lambda epoch: mixed_epoch(mixture, passes, epoch))

    complete = order().batches(0, 40)
    assert np.array_equal(order().batches(17, 40), complete[17:])
    assert order().order_digest(17) == order().order_digest(12) != order().order_digest(0)


def test_shares_are_exact() -> None:
    assert shares_of((0.7, 0.3)) == shares_of((7, 3)) == [Fraction(7, 10), Fraction(3, 10)]
    assert sum(shares_of((0.1, 0.2, 0.3))) == 1


def test_sources_have_unrelated_seeds_and_the_first_one_the_runs_own() -> None:
    seeds = {source_seed(seed, number) for seed in (0, 1, 9176) for number in range(4)}
    assert len(seeds) == 12 and source_seed(9176, 0) == 9176


def test_a_source_of_less_than_two_items_is_refused() -> None:
    Mixture((1000, 10), shares_of((0.99, 0.01))).refuse_tiny_shares(("a", "b"))
    with pytest.raises(UserError, match=r"has 1\.01 of the 1,010 items of an epoch.*where: data\.sources: b"):
        Mixture((1000, 10), shares_of((0.999, 0.001))).refuse_tiny_shares(("a", "b"))
