"""What a scored split says about a model: intervals, slices, calibration, and where it errs. Pure NumPy and SciPy.

Everything is returned as plain values for JSON. What is undefined is ``None``, with its reason under ``undefined``.

Sources: Video Quality Experts Group, Final report (2000) (the 4-parameter logistic fit before a correlation);
K.-Y. Liang and S. Zeger, Longitudinal data analysis using generalized linear models (1986) (a variance
that is robust to groups).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rating_train.errors import UserError
from rating_train.scoring import bootstrap
from rating_train.scoring.bootstrap import Interval
from rating_train.scoring.metrics import METRICS, score
from rating_train.scoring.predictions import Prediction
from rating_train.scoring.slices import slices

Float64Array = npt.NDArray[np.float64]

SLICE_METRICS = ("plcc", "srcc", "rmse", "mae")
SLICE_RESAMPLES = 500
CALIBRATION_BINS = 10
TAIL = 0.05
_SHOWN_ITEMS = 12
_LEAST_FOR_FIT = 10  # items; four parameters through fewer points fit anything
_NORMAL_95 = 1.959964


def analyse(
    rows: Sequence[Prediction], resamples: int = bootstrap.RESAMPLES, seed: int = 0, unit: str = "stars"
) -> dict[str, Any]:
    """Describe the agreement of predictions with true ratings.

    Args:
        rows: predictions, each with a rating; resampled by their ``group`` where all have one.
        resamples: of the bootstrap; slices take at most :data:`SLICE_RESAMPLES`.
        seed: of the bootstrap.
        unit: of the ratings; it names their slices.

    Returns:
        ``n``, ``groups``, ``resamples``, ``seed``, ``metrics``, ``slices``, ``calibration``, ``logistic``, ``bias``
        and ``items`` (ids of the best and the worst).

    Raises:
        UserError: a row without a rating.
    """
    predicted, true = _vectors(rows)
    groups = item_groups(rows)
    scores = score(predicted, true)
    found = bootstrap.intervals(predicted, true, groups, resamples, seed) if len(rows) else {}
    metrics = {
        name: {
            "value": getattr(scores, name),
            "interval_95": ends(found.get(name)),
            **({"undefined": scores.undefined[name]} if name in scores.undefined else {}),
        }
        for name in METRICS
    }
    return {
        "n": len(rows),
        "groups": len(set(groups)) if groups is not None else None,
        "resamples": resamples,
        "seed": seed,
        "metrics": metrics,
        "slices": _sliced(rows, predicted, true, groups, min(resamples, SLICE_RESAMPLES), seed, unit),
        "calibration": calibration(predicted, true, groups),
        "logistic": logistic_plcc(predicted, true),
        "bias": bias(rows, predicted, true),
        "items": _extremes(rows, predicted, true),
    }


def item_groups(rows: Sequence[Prediction]) -> list[str] | None:
    """Return the product group of each row; ``None`` where one of them has none."""
    groups = [row.group for row in rows]
    return None if None in groups else groups  # type: ignore[return-value]


def ends(interval: Interval | None) -> list[float] | None:
    """Return [low, high]."""
    return None if interval is None else [interval.low, interval.high]


def _vectors(rows: Sequence[Prediction]) -> tuple[Float64Array, Float64Array]:
    without = next((row.id for row in rows if row.rating is None), None)
    if without is not None:
        raise UserError("a prediction has no rating to compare it with", where=f"item {without}")
    return (
        np.array([row.score for row in rows], np.float64),
        np.array([row.rating for row in rows], np.float64),
    )


def _sliced(
    rows: Sequence[Prediction],
    predicted: Float64Array,
    true: Float64Array,
    groups: list[str] | None,
    resamples: int,
    seed: int,
    unit: str,
) -> dict[str, list[dict[str, Any]]]:
    """Score each slice, with intervals of :data:`SLICE_METRICS`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for what, parts in slices(rows, unit).items():
        for part in parts:
            x, y = predicted[part.members], true[part.members]
            own = [groups[i] for i in part.members] if groups is not None else None
            scores = score(x, y)
            enough = len(set(own)) >= 2 if own is not None else len(x) >= 2
            (values,) = (
                bootstrap.resample_metrics([x], y, own, resamples, seed, SLICE_METRICS) if enough else [{}]
            )
            intervals = {name: ends(bootstrap.percentile(column)) for name, column in values.items()}
            found.setdefault(what, []).append(
                {
                    "name": part.name,
                    **scores.as_dict(),
                    "mean_true": float(y.mean()),
                    "mean_error": float((x - y).mean()),
                    "interval_95": {name: intervals.get(name) for name in SLICE_METRICS},
                }
            )
    return found


def calibration(
    predicted: Float64Array, true: Float64Array, groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """Compare the mean rating with the mean prediction, in bins of equally many predictions.

    Returns:
        ``bins``: of each, ``n``, ``mean_predicted``, ``mean_true`` and its 95 % interval (normal, robust to groups);
        ``mean_gap``: the mean over items of their bin's |mean true - mean predicted|, in stars;
        ``slope`` and ``intercept`` of the least-squares line true = slope x predicted + intercept: 1 and 0 are
        perfect, a slope below 1 means that predictions are too extreme.
    """
    empty: dict[str, Any] = {"bins": [], "mean_gap": None, "slope": None, "intercept": None}
    if not len(predicted):
        return {**empty, "undefined": "no items"}
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, CALIBRATION_BINS + 1)))
    place = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, max(0, len(edges) - 2))
    bins, gap = [], 0.0
    for i in np.unique(place):
        members = np.flatnonzero(place == i)
        mean, x = float(true[members].mean()), float(predicted[members].mean())
        half = _half_width(true[members], [groups[j] for j in members] if groups is not None else None)
        interval = None if half is None else [mean - half, mean + half]
        bins.append({"n": len(members), "mean_predicted": x, "mean_true": mean, "interval_95": interval})
        gap += len(members) * abs(mean - x)
    centred = predicted - predicted.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (true - true.mean())) / spread if len(bins) > 1 and spread > 0 else None
    return {
        "bins": bins,
        "mean_gap": gap / len(predicted),
        "slope": slope,
        "intercept": None if slope is None else float(true.mean() - slope * predicted.mean()),
        **({} if slope is not None else {"undefined": f"all predictions are {predicted[0]:g}"}),
    }


def _half_width(values: Float64Array, groups: Sequence[str] | None) -> float | None:
    """Return half of the 95 % interval of a mean; ``None`` for fewer than two groups."""
    residuals = values - values.mean()
    if groups is not None:
        _, member = np.unique(np.asarray(groups), return_inverse=True)
        residuals = np.bincount(member, weights=residuals)
    count = len(residuals)
    if count < 2:
        return None
    return _NORMAL_95 * math.sqrt(float(residuals @ residuals) * count / (count - 1)) / len(values)


def logistic_plcc(predicted: Float64Array, true: Float64Array) -> dict[str, Any]:
    """Correlate after a monotonic fit of four parameters, as is usual for quality scores; an extra, never selected by.

    f(x) = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)), fitted to the true ratings by least squares.

    Returns:
        ``plcc`` and ``rmse`` after the fit, and ``parameters`` b1 to b4. The asymptotes b1 and b2 lie within twice the
        range of the true ratings beyond it.
    """
    from scipy.optimize import curve_fit

    plain = score(predicted, true)
    empty: dict[str, Any] = {"plcc": None, "rmse": None, "parameters": None}
    if plain.plcc is None:
        return {**empty, "undefined": plain.undefined["plcc"]}
    if len(true) < _LEAST_FOR_FIT:
        return {**empty, "undefined": f"needs at least {_LEAST_FOR_FIT} items, has {len(true)}"}

    def logistic(x: Float64Array, b1: float, b2: float, b3: float, b4: float) -> Float64Array:
        return b2 + (b1 - b2) / (1 + np.exp(-(x - b3) / max(abs(b4), 1e-12)))

    low, high = float(true.min()), float(true.max())
    middle, width, spread = (low + high) / 2, high - low, float(predicted.std())
    start = (high, low, float(predicted.mean()), spread)
    # Where the data show only one bend of the curve, the far asymptote has no best value: without bounds it runs away.
    far, centre = 2 * width, 10 * spread
    bounds = (
        (middle, low - far, start[2] - centre, spread / 100),
        (high + far, middle, start[2] + centre, 100 * spread),
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the covariance, which is not used, may not exist
        try:
            parameters, _ = curve_fit(logistic, predicted, true, p0=start, bounds=bounds, max_nfev=4000)
            fitted = logistic(predicted, *parameters)
            after = score(fitted, true)
        except (RuntimeError, UserError) as e:
            return {**empty, "undefined": f"the fit does not converge ({e})"}
    if after.plcc is None:
        return {**empty, "undefined": after.undefined["plcc"]}
    return {"plcc": after.plcc, "rmse": after.rmse, "parameters": [float(p) for p in parameters]}


def bias(rows: Sequence[Prediction], predicted: Float64Array, true: Float64Array) -> dict[str, Any]:
    """Describe which items are over- and underestimated.

    Returns:
        ``mean`` and ``median`` of error = predicted - true, in stars; ``correlation_with_true`` (negative where high
        ratings are underestimated and low ones overestimated, as a shrinking regressor does); and ``over`` and
        ``under``: the :data:`TAIL` share of the items with the largest error of that sign.
    """
    if not len(rows):
        return {"undefined": "no items"}
    error = predicted - true
    count = max(1, round(TAIL * len(rows)))
    order = np.argsort(error, kind="stable")
    return {
        "mean": float(error.mean()),
        "median": float(np.median(error)),
        "correlation_with_true": score(error, true).plcc,
        "over": _tail(rows, predicted, true, order[::-1][:count]),
        "under": _tail(rows, predicted, true, order[:count]),
    }


def _tail(
    rows: Sequence[Prediction],
    predicted: Float64Array,
    true: Float64Array,
    members: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """Describe one tail: its size, its errors, and the categories that it has more of than the split."""
    everywhere = Counter(row.category for row in rows if row.category)
    here = Counter(c for i in members if (c := rows[i].category))
    expected = {name: everywhere[name] * len(members) / len(rows) for name in here}
    often = sorted(here, key=lambda name: (-(here[name] - expected[name]), name))
    counts = [rows[i].rating_count for i in members]
    known = [c for c in counts if c is not None]
    error = predicted[members] - true[members]
    return {
        "n": len(members),
        "least_error": float(error[-1]),
        "mean_error": float(error.mean()),
        "mean_true": float(true[members].mean()),
        "mean_predicted": float(predicted[members].mean()),
        "median_rating_count": float(np.median(known)) if known else None,
        "categories": [
            {"name": name, "n": here[name], "expected": round(expected[name], 2)}
            for name in often[:5]
            if here[name] > expected[name]
        ],
    }


def _extremes(
    rows: Sequence[Prediction], predicted: Float64Array, true: Float64Array
) -> dict[str, list[str]]:
    """Return the ids of the items with the smallest and the largest error, the most extreme first."""
    order = np.argsort(np.abs(predicted - true), kind="stable")
    return {
        "best": [rows[i].id for i in order[:_SHOWN_ITEMS]],
        "worst": [rows[i].id for i in order[::-1][:_SHOWN_ITEMS]],
    }
