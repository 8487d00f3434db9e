"""What a run directory holds, read for its report: logs, settings, provenance, and the newest evaluation.

Everything may be missing or torn: a run that is training, was killed, or is of an older version has a report too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.config.schema import Config, to_dict
from rating_train.config.task import PAPER, Target
from rating_train.errors import UserError
from rating_train.files import read_json_lines
from rating_train.reports.rows import mapping_in
from rating_train.scoring.analysis import analyse
from rating_train.scoring.predictions import Prediction, deduplicate, read_predictions
from rating_train.training.provenance import flat

Rows = Sequence[Mapping[str, Any]]

#: Resamples where the report has to compute intervals itself, because `evaluate` was not run.
RESAMPLES = 500


@dataclass(frozen=True)
class RunData:
    """A run, as its report needs it.

    Attributes:
        path: the run directory.
        train: rows of train.jsonl, one for each step.
        evaluations: split -> rows of eval.jsonl, one for each step.
        curves: the same of the evaluations while training, without those of `evaluate`.
        config: flat settings; empty where there are none.
        provenance: provenance.json; empty where there is none.
        predictions: the newest file of predictions, or ``None``.
        rows: its rows with a rating.
        judgement: what `evaluate` wrote of it, or else the same analysis without baselines; ``None`` without rows.
    """

    path: Path
    train: Rows
    evaluations: Mapping[str, Rows]
    curves: Mapping[str, Rows]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    predictions: Path | None
    rows: Sequence[Prediction]
    judgement: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """The run's name: of its folder."""
        return self.path.resolve().name

    @property
    def target(self) -> Target:
        """What the run predicts."""
        return target_of(self.config)

    @property
    def row(self) -> Mapping[str, Any]:
        """The row of eval.jsonl of the newest predictions; empty where there is none."""
        if self.judgement and "row" in self.judgement:
            found: Mapping[str, Any] = self.judgement["row"]
            return found
        split, step = split_and_step(self.predictions) if self.predictions else ("", -1)
        return next((r for r in self.evaluations.get(split, ()) if r["step"] == step), {})

    @property
    def data(self) -> Path | None:
        """The dataset of the newest predictions."""
        sources = self._sources
        told = (
            (self.judgement or {}).get("data")
            or self.config.get("data.eval_path")
            or self.config.get("data.path")
            or (sources[0].get("path") if sources else None)
        )
        return Path(told) if isinstance(told, str) and told else None

    @property
    def trained_on(self) -> str:
        """The dataset of the training, or those of a mixture with their weights; "" where it is not known."""
        sources = (f"{s.get('path')} (weight {s.get('weight')})" for s in self._sources)
        return ", ".join(sources) or str(self.config.get("data.path") or "")

    @property
    def _sources(self) -> list[dict[str, Any]]:
        found = self.config.get("data.sources")
        return [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        defaults = flat(to_dict(Config()))
        return {k: v for k, v in self.config.items() if k in defaults and defaults[k] != v}


def read_run(path: Path) -> RunData:
    """Read a run directory.

    Raises:
        UserError: nothing to report, or a log that is not JSON lines.
    """
    train, evaluations, newest = read_results(path)
    curves = {
        split or "val": rows for split, rows in rows_by_step(path / run_dir.EVAL_LOG, ("evaluate",)).items()
    }
    rows = [r for r in deduplicate(read_predictions(newest)) if r.rating is not None] if newest else []
    settings = read_settings(path)
    return RunData(
        path,
        train,
        evaluations,
        curves,
        settings,
        mapping_in(path / run_dir.PROVENANCE_FILE),
        newest,
        rows,
        _judgement(path, newest, rows, target_of(settings).unit),
    )


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's configuration as flat keys; empty where there is none."""
    return flat(mapping_in(path / run_dir.CONFIG_FILE))


def target_of(settings: Mapping[str, Any]) -> Target:
    """Return what is predicted, from flat settings; runs of older versions predict stars."""
    names = ("name", "unit", "lower", "upper")
    given = {name: settings[key] for name in names if (key := f"task.target.{name}") in settings}
    return dataclasses.replace(PAPER.target, **given)


def read_results(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]], Path | None]:
    """Read what a run has to report.

    Returns:
        Rows of training; split -> rows of evaluation; the newest file of predictions, or ``None``.

    Raises:
        UserError: nothing at all, or a log that is not JSON lines.
    """
    train = rows_by_step(path / run_dir.TRAIN_LOG).get("", [])
    evaluations = {split or "val": rows for split, rows in rows_by_step(path / run_dir.EVAL_LOG).items()}
    newest = newest_predictions(path / run_dir.PREDICTIONS_DIR)
    if not (train or evaluations or newest):
        raise UserError(
            "nothing to report: no rows of training, evaluation or predictions",
            where=path,
            expected=f"a run directory with {run_dir.TRAIN_LOG}, {run_dir.EVAL_LOG} or "
            f"{run_dir.PREDICTIONS_DIR}/*.jsonl",
            fix="name the directory that `rating-train train` wrote",
        )
    return train, evaluations, newest


def rows_by_step(path: Path, without: Sequence[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Return split -> the rows that have a step, sorted by step; a row without a split is under "".

    A killed run resumes from its last checkpoint and logs some steps again: the last row of a step is the one
    that led to the final weights. Rows of the sources ``without`` are left out.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_json_lines(path) if path.is_file() else ():
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and row.get("source") not in without:
            rows.setdefault(str(row.get("split") or ""), {})[step] = row
    return {split: [found[step] for step in sorted(found)] for split, found in rows.items()}


def newest_predictions(folder: Path) -> Path | None:
    """Return the file written last; of files written at the same instant, the last by name."""
    found = [(path.stat().st_mtime_ns, path.name, path) for path in folder.glob("*.jsonl")]
    return max(found)[2] if found else None


def split_and_step(file: Path) -> tuple[str, int]:
    """Return what the name of a file of predictions says; step -1 where it says none."""
    split, _, step = file.stem.rpartition("_step_")
    return (split, int(step)) if split and step.isdigit() else (file.stem, -1)


def _judgement(
    path: Path, newest: Path | None, rows: Sequence[Prediction], unit: str
) -> Mapping[str, Any] | None:
    """Return what `evaluate` wrote of these very predictions, else the analysis alone, in the target's ``unit``."""
    if newest is None or not rows:
        return None
    written = path / run_dir.EVALUATIONS_DIR / f"{newest.stem}.json"
    # Older than the predictions: training has evaluated the same step again since.
    if written.is_file() and written.stat().st_mtime_ns >= newest.stat().st_mtime_ns:
        found = mapping_in(written)
        if found.get("n") == len(rows) and "metrics" in found:
            return found
    return analyse(rows, RESAMPLES, unit=unit)
