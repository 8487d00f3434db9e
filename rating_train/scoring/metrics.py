"""Agreement of predictions with targets: correlations and errors, all computed in float64.

An undefined metric is ``None`` with a reason: a constant prediction has no correlation, and reporting it as
0.0 (or NaN) would make a collapsed model look like a merely bad one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rating_train.errors import UserError

METRICS = ("plcc", "srcc", "kendall", "rmse", "mae", "r2")

#: Name -> how tables and charts call it; with its unit: :func:`metric_label`.
LABELS = {
    "plcc": "PLCC",
    "srcc": "SRCC",
    "kendall": "Kendall tau-b",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R2",
}

#: Metrics in the unit of the target.
IN_UNIT = ("rmse", "mae")

#: Of every metric that a run selects by or a comparison reports.
LARGER_IS_BETTER = {"plcc": True, "srcc": True, "kendall": True, "rmse": False, "mae": False, "r2": True}

Float64Array = npt.NDArray[np.float64]

#: Further metrics: name -> function of (n,) float64 predictions and targets, n > 0, that returns ``None`` where it is
#: undefined. An extension adds to it (docs/extending.md).
EXTRA_METRICS: dict[str, Callable[[Float64Array, Float64Array], float | None]] = {}


def metric_label(name: str, unit: str) -> str:
    """Return how tables and charts call a metric of a target in ``unit``: ``RMSE (stars)``, ``PLCC``."""
    return f"{LABELS[name]} ({unit})" if unit and name in IN_UNIT else LABELS[name]


@dataclass(frozen=True)
class Scores:
    """Scores of ``n`` predictions.

    Attributes:
        n: number of (prediction, target) pairs.
        plcc: Pearson's linear correlation coefficient, in [-1, 1].
        srcc: Spearman's rank correlation coefficient (ties get their average rank), in [-1, 1].
        kendall: Kendall's tau-b (corrected for ties), in [-1, 1].
        rmse: root mean squared error, in the unit of the targets (stars).
        mae: mean absolute error, in the unit of the targets (stars).
        r2: 1 - squared error / squared deviation of the targets from their mean; at most 1, negative for predictions
            that are worse than that mean.
        undefined: for every metric that is ``None``, the reason.
        extra: those of :data:`EXTRA_METRICS`.
    """

    n: int
    plcc: float | None
    srcc: float | None
    rmse: float | None
    mae: float | None
    undefined: dict[str, str] = field(default_factory=dict)
    kendall: float | None = None
    r2: float | None = None
    extra: dict[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``undefined`` is left out if every metric is defined."""
        row: dict[str, Any] = {"n": self.n, **{name: getattr(self, name) for name in METRICS}, **self.extra}
        if self.undefined:
            row["undefined"] = dict(self.undefined)
        return row


def score(predictions: Iterable[float], targets: Iterable[float]) -> Scores:
    """Score ``predictions`` against ``targets``.

    Args:
        predictions: (n,) numbers of any real dtype, or any iterable of numbers; read once.
        targets: (n,) numbers, in the same order.

    Returns:
        The scores. With n = 0 every metric is undefined; with n = 1, or if either side is constant, the
        correlations are.

    Raises:
        UserError: unequal lengths, more than one dimension, values that are not numbers, or a value that is
            NaN or infinite (the first index is named).

    Sources: ``scipy.stats.pearsonr``, ``scipy.stats.spearmanr`` and ``scipy.stats.kendalltau`` (variant b).
    """
    predicted = _vector(predictions, "predictions")
    true = _vector(targets, "targets")
    if predicted.shape != true.shape:
        raise UserError(
            f"{predicted.size} predictions for {true.size} targets",
            where="score",
            expected="one prediction for each target, in the same order",
        )
    return _score_vectors(predicted, true)


def per_group(
    predictions: Iterable[float], targets: Iterable[float], groups: Iterable[str]
) -> dict[str, Scores]:
    """Score each group (for example each category) separately.

    Returns:
        Group name -> :class:`Scores`, the largest group first, ties by name.

    Raises:
        UserError: as for :func:`score` (indices refer to the complete input), or inputs of unequal length.
    """
    predicted, true = _vector(predictions, "predictions"), _vector(targets, "targets")
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    sizes = (predicted.size, true.size, sum(map(len, members.values())))
    if len(set(sizes)) > 1:
        raise UserError(
            "predictions, targets and groups have unequal lengths ({}, {} and {})".format(*sizes),
            where="per_group",
            expected="one prediction, one target and one group for each item",
        )
    largest_first = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {group: _score_vectors(predicted[own], true[own]) for group, own in largest_first}


def _vector(values: Iterable[float], name: str) -> Float64Array:
    """Return the values as (n,) float64, all finite, or raise a UserError that names the first bad index."""
    listed = values if isinstance(values, np.ndarray) else list(values)
    try:
        vector = np.asarray(listed, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"{name} are not all numbers ({e})", where=name, expected="real numbers") from e
    if vector.ndim != 1:
        raise UserError(
            f"{name} have {vector.ndim} dimensions", where=name, expected="one dimension, shape (n,)"
        )
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise UserError(
            f"{name} hold {bad.size} values that are not finite, the first is {vector[bad[0]]}",
            where=f"{name}[{bad[0]}]",
            expected="finite numbers",
        )
    return vector


def _score_vectors(predicted: Float64Array, true: Float64Array) -> Scores:
    """Score two finite float64 vectors of equal length."""
    # Imported here: scipy.stats takes about a second to import, and `--help` does not need it.
    from scipy import stats

    n = int(true.size)
    undefined: dict[str, str] = {}
    if n == 0:
        undefined = dict.fromkeys((*METRICS, *EXTRA_METRICS), "no items")
        return Scores(0, None, None, None, None, undefined, extra=dict.fromkeys(EXTRA_METRICS))
    reason = _why_no_correlation(predicted, true)
    values: dict[str, float | None] = {}
    correlations = {"plcc": stats.pearsonr, "srcc": stats.spearmanr, "kendall": stats.kendalltau}
    for name, correlate in correlations.items():
        if reason:
            undefined[name] = reason
        else:
            values[name] = _defined(partial(_statistic, correlate, predicted, true), name, undefined)
    with np.errstate(all="ignore"):
        error = predicted - true
        spread = true - true.mean()
        values["rmse"] = _defined(lambda: np.sqrt(np.mean(error * error)), "rmse", undefined)
        values["mae"] = _defined(lambda: np.mean(np.abs(error)), "mae", undefined)
        if why := _why_constant("targets", true):
            undefined["r2"] = why
        else:
            values["r2"] = _defined(lambda: 1 - (error @ error) / (spread @ spread), "r2", undefined)
    extra = {name: _extra(name, predicted, true, undefined) for name in EXTRA_METRICS}
    return Scores(n=n, undefined=undefined, extra=extra, **{name: values.get(name) for name in METRICS})


def _statistic(correlate: Callable[..., Any], predicted: Float64Array, true: Float64Array) -> Any:
    return correlate(predicted, true).statistic


def _why_no_correlation(predicted: Float64Array, true: Float64Array) -> str:
    """Return why there is no correlation, or "" if there is one."""
    return next(filter(None, (_why_constant("predictions", predicted), _why_constant("targets", true))), "")


def _why_constant(name: str, values: Float64Array) -> str:
    """Return why the values have no spread, or "" if they have one."""
    if values.size < 2:
        return f"needs at least 2 items, has {values.size}"
    if np.all(values == values[0]):
        return f"all {name} are {values[0]:g}"
    # SciPy's own limit: below it the centred values are rounding noise, not a signal.
    spread = np.linalg.norm(values - values.mean())
    if spread < 1e-13 * abs(values.mean()):
        return f"all {name} are {values[0]:g} up to float64 rounding"
    return ""


def _extra(name: str, predicted: Float64Array, true: Float64Array, undefined: dict[str, str]) -> float | None:
    value = EXTRA_METRICS[name](predicted, true)
    if value is None:
        undefined[name] = "its function returns None"
        return None
    return _defined(lambda: value, name, undefined)


def _defined(compute: Callable[[], Any], name: str, undefined: dict[str, str]) -> float | None:
    """Return the number, or ``None`` with its reason noted if float64 cannot hold it."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        value = float(compute())
    if np.isfinite(value):
        return value
    undefined[name] = "the values are too large for float64 arithmetic"
    return None
