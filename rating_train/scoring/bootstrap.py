"""Bootstrap intervals of all metrics, and of the difference of two models on the same items. Pure NumPy, float64.

A resample draws product groups with replacement (an item is its own group where no groups are given), so that
variants of one product, whose errors are alike, do not make an interval too narrow. A drawn item counts as often as
its group was drawn: every metric is computed from these counts, and no resample is ever materialised.

Legend: N items, G groups, R resamples in one block, U distinct values of a vector.

Sources: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile intervals);
M. Kendall, The treatment of ties in ranking problems (1945) (tau-b); P. Fenwick (1994) (binary indexed trees).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rating_train.errors import UserError

Float64Array = npt.NDArray[np.float64]

METRICS = ("plcc", "srcc", "kendall", "rmse", "mae", "r2")
RESAMPLES = 2000
CONFIDENCE = 0.95

_BLOCK = 250  # resamples at a time: (N, R) arrays of 10,000 items then take 20 MB
_LEAST_DEFINED = 0.5  # below this share of resamples where a metric is defined, its interval is not


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
        low: lower end.
        high: upper end.
        resamples: resamples in which the metric was defined; the others are left out.
    """

    low: float
    high: float
    resamples: int


@dataclass(frozen=True)
class Difference:
    """How much better the second model is than the first, on the same resampled items.

    Attributes:
        value: the difference on the items themselves, second minus first.
        interval: of the difference; ``None`` where it is undefined.
    """

    value: float
    interval: Interval | None

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)


def resample_metrics(
    predictions: Sequence[Float64Array],
    targets: Float64Array,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> list[dict[str, Float64Array]]:
    """Compute every metric of every model on the same resamples.

    Args:
        predictions: (N,) float64 predictions of each model.
        targets: (N,) float64.
        groups: N names; items of one group are drawn together. ``None``: each item is a group.
        resamples: how many resamples are drawn.
        seed: the same seed draws the same resamples.
        metrics: which to compute, of :data:`METRICS`; Kendall's tau-b takes most of the time.

    Returns:
        For each model, metric -> (resamples,) float64; NaN where a resample leaves the metric undefined.

    Raises:
        UserError: vectors of unequal length, values that are not finite, or fewer than one resample.
    """
    vectors = [np.asarray(v, dtype=np.float64) for v in (*predictions, targets)]
    if len({v.shape for v in vectors}) > 1 or vectors[0].ndim != 1:
        raise UserError(
            f"shapes {[v.shape for v in vectors]} differ",
            where="bootstrap",
            expected="one prediction of each model for each target, shape (N,)",
        )
    if not all(np.isfinite(v).all() for v in vectors):
        raise UserError("a prediction or target is not finite", where="bootstrap", expected="finite numbers")
    if resamples < 1:
        raise UserError(f"{resamples} resamples", where="bootstrap", expected="1 or more")
    models = [_Model(v, vectors[-1]) for v in vectors[:-1]]
    found: list[dict[str, list[Float64Array]]] = [{name: [] for name in metrics} for _ in models]
    for counts in _counts(len(targets), groups, resamples, seed):
        for model, values in zip(models, found):
            for name, column in model.metrics(counts, metrics).items():
                values[name].append(column)
    return [{name: np.concatenate(columns) for name, columns in values.items()} for values in found]


def intervals(
    predictions: Float64Array,
    targets: Float64Array,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Percentile interval of every metric of :data:`METRICS`; ``None`` where it is undefined.

    Arguments and errors: as :func:`resample_metrics`. Fewer than two groups give no interval: a single group says
    nothing about another.
    """
    if _group_count(len(targets), groups) < 2:
        return dict.fromkeys(METRICS)
    (values,) = resample_metrics([predictions], targets, groups, resamples, seed)
    return {name: percentile(column) for name, column in values.items()}


def compare(
    first: Float64Array,
    second: Float64Array,
    targets: Float64Array,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> dict[str, Difference | None]:
    """Paired bootstrap of ``metric(second) - metric(first)``: both models are scored on the same resamples.

    Arguments and errors: as :func:`resample_metrics`.

    Returns:
        metric -> :class:`Difference`; ``None`` where either model's metric is undefined on the items themselves.
    """
    own = [point_metrics(p, targets) for p in (first, second)]
    differences: dict[str, Difference | None] = {}
    enough = _group_count(len(targets), groups) >= 2
    values = resample_metrics([first, second], targets, groups, resamples, seed, metrics) if enough else None
    for name in metrics:
        a, b = own[0][name], own[1][name]
        interval = percentile(values[1][name] - values[0][name]) if values else None
        differences[name] = Difference(b - a, interval) if a is not None and b is not None else None
    return differences


def point_metrics(predictions: Float64Array, targets: Float64Array) -> dict[str, float | None]:
    """Every metric on the items themselves; ``None`` where it is undefined."""
    values = _Model(predictions, targets).metrics(np.ones((len(targets), 1)))
    return {name: float(v[0]) if np.isfinite(v[0]) else None for name, v in values.items()}


def percentile(values: Float64Array) -> Interval | None:
    """The central share :data:`CONFIDENCE` of resampled values; ``None`` where most of them are undefined (NaN)."""
    defined = values[np.isfinite(values)]
    if len(defined) < _LEAST_DEFINED * len(values):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(low), float(high), len(defined))


def _group_count(items: int, groups: Sequence[str] | None) -> int:
    return items if groups is None else len(set(groups))


def _counts(items: int, groups: Sequence[str] | None, resamples: int, seed: int) -> Iterator[Float64Array]:
    """(N, R) how often each item is drawn, in blocks of resamples."""
    if groups is None:
        member, count = np.arange(items), items
    else:
        names, member = np.unique(np.asarray(groups), return_inverse=True)
        count = len(names)
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn = np.stack(
            [np.bincount(generator.integers(0, count, count), minlength=count) for _ in range(block)]
        )
        yield drawn.T[member].astype(np.float64)


class _Model:
    """One model's predictions: all that does not depend on the resample is computed once.

    Args:
        predicted: (N,) float64.
        true: (N,) float64.
    """

    def __init__(self, predicted: Float64Array, true: Float64Array) -> None:
        # Correlations do not change by a shift; centred values keep the sums of squares exact.
        self._predicted, self._true = predicted - _mean(predicted), true - _mean(true)
        self._error = predicted - true
        self._ties = [_Ties(self._predicted), _Ties(self._true)]

    def metrics(self, counts: Float64Array, wanted: Sequence[str] = METRICS) -> dict[str, Float64Array]:
        """metric -> (R,) values for item counts (N, R)."""
        with np.errstate(all="ignore"):
            total = counts.sum(0)
            x, y, error = self._predicted, self._true, self._error
            squared = (error * error) @ counts
            _, y_var, _ = _moments(y, y, counts, total)
            rank_x, rank_y = (ties.ranks(counts) for ties in self._ties)
            found = {
                "plcc": _pearson(*_moments(x, y, counts, total)),
                "srcc": _pearson(*_rank_moments(rank_x, rank_y, counts, total)),
                "rmse": np.sqrt(squared / total),
                "mae": np.abs(error) @ counts / total,
                "r2": np.where(y_var > 0, 1 - squared / y_var, np.nan),
            }
            if "kendall" in wanted:
                found["kendall"] = self._kendall(counts, total)
            return {name: found[name] for name in wanted}

    def _kendall(self, counts: Float64Array, total: Float64Array) -> Float64Array:
        """tau-b = (concordant - discordant) / sqrt((pairs - ties in x) (pairs - ties in y))."""
        pairs = total * (total - 1) / 2
        tied_x, tied_y = (ties.tied_pairs(counts) for ties in self._ties)
        balance = _balance(self._ties[0], self._ties[1], counts)
        return _ratio(balance, np.sqrt(pairs - tied_x) * np.sqrt(pairs - tied_y))


class _Ties:
    """The order of a vector with its ties: (N,) rank of each item among the U distinct values."""

    def __init__(self, values: Float64Array) -> None:
        distinct, self.rank = np.unique(values, return_inverse=True)
        self.distinct = len(distinct)
        self.order = np.argsort(self.rank, kind="stable")
        self.starts = np.searchsorted(self.rank[self.order], np.arange(self.distinct))

    def weights(self, counts: Float64Array) -> Float64Array:
        """(U, R) counts of each distinct value."""
        if not len(counts):
            return np.zeros((0, counts.shape[1]))
        return np.add.reduceat(counts[self.order], self.starts, axis=0)

    def ranks(self, counts: Float64Array) -> Float64Array:
        """(N, R) average rank of each item in each resample; items that were not drawn get some rank, with weight 0."""
        weights = self.weights(counts)
        return (np.cumsum(weights, axis=0) - (weights - 1) / 2)[self.rank]

    def tied_pairs(self, counts: Float64Array) -> Float64Array:
        """(R,) pairs with equal values, copies of one item included."""
        weights = self.weights(counts)
        return (weights * (weights - 1) / 2).sum(0)


def _balance(x: _Ties, y: _Ties, counts: Float64Array) -> Float64Array:
    """(R,) concordant minus discordant pairs.

    Items come in the order of x. A binary indexed tree over the ranks of y holds, for all resamples at once, how many
    of the items with a smaller x have at most a given y; items of equal x are asked for first and added after.
    """
    tree = np.zeros((y.distinct + 1, counts.shape[1]))
    seen = np.zeros(counts.shape[1])
    balance = np.zeros(counts.shape[1])
    below, above = _tree_paths(y.distinct)
    bounds = [*x.starts.tolist(), len(counts)]
    for first, last in itertools.pairwise(bounds):
        members = x.order[first:last]
        for item in members.tolist():
            rank = int(y.rank[item])
            smaller = tree[below[rank]].sum(0)
            not_larger = tree[below[rank + 1]].sum(0)
            balance += counts[item] * (smaller - (seen - not_larger))
        for item in members.tolist():
            tree[above[int(y.rank[item])]] += counts[item]
        seen += counts[members].sum(0)
    return balance


def _tree_paths(size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Nodes to sum for the first ``i`` ranks (i = 0 to size), and nodes to update for rank ``i``."""
    below: list[list[int]] = [[]]
    for i in range(1, size + 1):
        below.append([i, *below[i & (i - 1)]])
    above = []
    for rank in range(size):
        nodes, node = [], rank + 1
        while node <= size:
            nodes.append(node)
            node += node & -node
        above.append(nodes)
    return below, above


def _mean(values: Float64Array) -> float:
    return float(values.mean()) if len(values) else 0.0


def _moments(
    x: Float64Array, y: Float64Array, counts: Float64Array, total: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Centred sums of xy, xx and yy: (R,) each."""
    mean_x, mean_y = x @ counts / total, y @ counts / total
    return (
        (x * y) @ counts - total * mean_x * mean_y,
        _positive((x * x) @ counts, total * mean_x**2),
        _positive((y * y) @ counts, total * mean_y**2),
    )


def _rank_moments(
    x: Float64Array, y: Float64Array, counts: Float64Array, total: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """As :func:`_moments`, for (N, R) ranks, whose mean is (total + 1) / 2 in every resample."""
    x, y = x - (total + 1) / 2, y - (total + 1) / 2
    weighted = x * counts
    return (weighted * y).sum(0), (weighted * x).sum(0), (y * counts * y).sum(0)


def _positive(squares: Float64Array, mean_part: Float64Array) -> Float64Array:
    """squares - mean_part, and 0 where only rounding is left: a resample of equal values has no variance."""
    left = squares - mean_part
    return np.where(left > 1e-12 * squares, left, 0.0)


def _pearson(xy: Float64Array, xx: Float64Array, yy: Float64Array) -> Float64Array:
    return np.clip(_ratio(xy, np.sqrt(xx) * np.sqrt(yy)), -1.0, 1.0)


def _ratio(top: Float64Array, bottom: Float64Array) -> Float64Array:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)
