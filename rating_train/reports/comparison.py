"""Which of several runs is better, on the same items: paired bootstrap of each metric, and what was configured apart.

Reads ``predictions/`` and ``config.yaml`` of the runs; needs no GPU, no shards and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rating_train import run_dir
from rating_train.config.task import Target
from rating_train.errors import UserError, one_error
from rating_train.log import text_table
from rating_train.reports.runs.data import split_and_step, target_of
from rating_train.scoring import bootstrap
from rating_train.scoring.analysis import item_groups
from rating_train.scoring.bootstrap import Difference
from rating_train.scoring.metrics import IN_UNIT, LARGER_IS_BETTER
from rating_train.scoring.predictions import Prediction, deduplicate, read_predictions
from rating_train.training.provenance import flat

#: Settings in which two runs differ without training differently.
_PLACES = ("name", "runs_dir")


@dataclass(frozen=True)
class ComparedRun:
    """One run's newest predictions of the split.

    Attributes:
        path: run directory.
        step: step of the evaluation.
        rows: id -> prediction, of the items that have a rating.
    """

    path: Path
    step: int
    rows: Mapping[str, Prediction]


@dataclass(frozen=True)
class Comparison:
    """Several runs on the items that all of them scored.

    Attributes:
        split: the split that was scored.
        runs: the compared runs; the first is the baseline.
        items: number of items that all runs scored.
        left_out: run -> its items that some other run did not score.
        metrics: for each run, metric -> value; ``None`` where it is undefined.
        differences: for each run but the first, metric -> its difference from the first.
        settings: key -> value in each run, of the settings that are not the same everywhere.
        target: what the runs predict.
    """

    split: str
    runs: Sequence[ComparedRun]
    items: int
    left_out: Mapping[str, int]
    metrics: Sequence[Mapping[str, float | None]]
    differences: Sequence[Mapping[str, Difference | None]]
    settings: Mapping[str, Sequence[Any]]
    target: Target


def compare_runs(paths: Sequence[Path], split: str = "", resamples: int = bootstrap.RESAMPLES) -> Comparison:
    """Compare runs by their newest predictions of one split.

    Args:
        paths: two or more run directories; the first is the baseline of all differences.
        split: split to compare; ``""`` takes the only split that all runs have predictions of.
        resamples: of the bootstrap.

    Raises:
        UserError: fewer than two runs, no predictions of the split, different ratings of one item, no common item.
    """
    if len(paths) < 2:
        raise UserError("one run is nothing to compare", expected="two or more run directories")
    split = split or _common_split(paths)
    runs = [_read_run(path, split) for path in paths]
    common = [i for i in runs[0].rows if all(i in run.rows for run in runs[1:])]
    if not common:
        raise UserError(
            "the runs have no item in common",
            where=", ".join(map(str, paths)),
            expected=f"predictions of the same dataset's split {split!r}",
            fix="`rating-train evaluate RUN --split SPLIT` on one dataset for all runs",
        )
    _check_ratings(runs, common)
    true = np.array([runs[0].rows[i].rating for i in common], np.float64)
    predicted = [np.array([run.rows[i].score for i in common], np.float64) for run in runs]
    groups = item_groups([runs[0].rows[i] for i in common])
    differences = [bootstrap.compare(predicted[0], p, true, groups, resamples) for p in predicted[1:]]
    settings = [_settings(path) for path in paths]
    return Comparison(
        split=split,
        runs=runs,
        items=len(common),
        left_out={str(run.path): len(run.rows) - len(common) for run in runs},
        metrics=[bootstrap.point_metrics(p, true) for p in predicted],
        differences=differences,
        settings=different_settings(settings),
        target=target_of(settings[0]),
    )


def _common_split(paths: Sequence[Path]) -> str:
    found = [{split_and_step(file)[0] for file in _prediction_files(path)} for path in paths]
    common = sorted(set.intersection(*found))
    if len(common) == 1:
        return common[0]
    listed = "; ".join(f"{path}: {', '.join(sorted(splits)) or 'none'}" for path, splits in zip(paths, found))
    raise UserError(
        "the runs share several splits" if common else "the runs share no split that was evaluated",
        where=listed,
        fix="name one with --split" if common else "`rating-train evaluate RUN --split SPLIT` for each run",
    )


def _prediction_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(
            "not a run directory", where=path, fix="give the folders that `rating-train train` made"
        )
    return sorted((path / run_dir.PREDICTIONS_DIR).glob("*_step_*.jsonl"))


def _read_run(path: Path, split: str) -> ComparedRun:
    files = [file for file in _prediction_files(path) if split_and_step(file)[0] == split]
    if not files:
        raise UserError(
            f"no predictions of split {split!r}",
            where=path / run_dir.PREDICTIONS_DIR,
            fix=f"`rating-train evaluate {path} --split {split}`",
        )
    newest = max(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
    rows = {row.id: row for row in deduplicate(read_predictions(newest)) if row.rating is not None}
    return ComparedRun(path, split_and_step(newest)[1], rows)


def _check_ratings(runs: Sequence[ComparedRun], common: Sequence[str]) -> None:
    wrong = [i for i in common if len({run.rows[i].rating for run in runs}) > 1]
    if wrong:
        raise UserError(
            f"{len(wrong)} items have different ratings in these runs, the first: {wrong[0]}",
            where=", ".join(str(run.path) for run in runs),
            expected="runs that were evaluated on the same dataset",
            fix="`rating-train evaluate RUN --set data.path=DATA` for each run",
        )


def _settings(path: Path) -> dict[str, Any]:
    """The run's resolved configuration as flat keys; empty where there is none."""
    try:
        content = yaml.safe_load((path / run_dir.CONFIG_FILE).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise one_error([f"not valid YAML ({e})"], where=path / run_dir.CONFIG_FILE) from e
    return flat(content) if isinstance(content, dict) else {}


def different_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """key -> its value in each configuration (``None`` where it is absent), of the keys that differ."""
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys if key not in _PLACES}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found[1:])}


def sentence(name: str, baseline: str, metric: str, difference: Difference | None, target: Target) -> str:
    """Say a difference in words, for example ``B is better than A by 0.0120 PLCC (95% interval 0.0040 to 0.0210)``."""
    if difference is None:
        return f"{metric.upper()} is undefined for {name} or {baseline}"
    interval = difference.interval
    ends = (interval.low, interval.high) if interval else None
    return difference_in_words(name, baseline, metric, difference.value, ends, target.suffix)[1]


def difference_in_words(
    name: str, other: str, metric: str, value: float, ends: Sequence[float] | None, suffix: str
) -> tuple[str, str]:
    """Say whether ``name``, whose metric is larger by ``value`` (with the ``ends`` of its 95% interval), is better.

    Returns:
        ``good``, ``bad``, or "" where no difference can be told; and the sentence without a full stop.
    """
    label, unit = metric.upper(), suffix if metric in IN_UNIT else ""
    if ends is None:
        return "", f"{name} and {other}: no interval of the difference in {label} (too few items)"
    sign = 1 if LARGER_IS_BETTER[metric] else -1
    value, (low, high) = sign * value, sorted(sign * end for end in ends)
    if low <= 0 <= high:
        shown = f"{value:+.4f}{unit}, 95% interval {low:+.4f} to {high:+.4f}"
        return "", f"no difference in {label} between {name} and {other} can be told: {shown}"
    kind, word = ("good", "better") if value > 0 else ("bad", "worse")
    low, high = (low, high) if value > 0 else (-high, -low)
    told = f"by {abs(value):.4f} {label}{unit} (95% interval {low:.4f} to {high:.4f})"
    return kind, f"{name} is {word} than {other} {told}"


def render(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    names = run_names([run.path for run in comparison.runs])
    header = ["run", "step", *(metric.upper() for metric in bootstrap.METRICS)]
    rows = [
        [name, str(run.step), *("-" if values[m] is None else f"{values[m]:.4f}" for m in bootstrap.METRICS)]
        for name, run, values in zip(names, comparison.runs, comparison.metrics)
    ]
    lines = [f"split {comparison.split}, {comparison.items:,} items that all runs scored", ""]
    lines += [*text_table(header, rows), ""]
    for path, count in comparison.left_out.items():
        if count:
            lines.append(f"{count:,} items of {path} are left out: another run did not score them")
    for name, found in zip(names[1:], comparison.differences):
        lines += [
            sentence(name, names[0], metric, found[metric], comparison.target) for metric in bootstrap.METRICS
        ]
        lines.append("")
    if comparison.settings:
        table = [[key, *(_shown(value) for value in values)] for key, values in comparison.settings.items()]
        lines += ["settings that differ:", *text_table(["setting", *names], table)]
    else:
        lines.append("no setting differs")
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values for JSON."""
    names = run_names([run.path for run in comparison.runs])

    def plain(difference: Difference | None) -> dict[str, Any] | None:
        if difference is None:
            return None
        interval = difference.interval
        ends = [interval.low, interval.high] if interval else None
        return {"value": difference.value, "interval_95": ends, "significant": difference.significant}

    return {
        "split": comparison.split,
        "items": comparison.items,
        "left_out": dict(comparison.left_out),
        "runs": [
            {"run": str(run.path), "step": run.step, **values}
            for run, values in zip(comparison.runs, comparison.metrics)
        ],
        "baseline": names[0],
        "differences": {
            name: {metric: plain(found[metric]) for metric in bootstrap.METRICS}
            for name, found in zip(names[1:], comparison.differences)
        },
        "settings": {key: list(values) for key, values in comparison.settings.items()},
    }


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names, or the paths where two share one."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
