"""The options of ``rating-train predict``: data, checked once with all problems in one error. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rating_train.config.fields import Rule, bound_problems, broken_rules, setting
from rating_train.config.task import Task
from rating_train.errors import UserError, one_error
from rating_train.prepare.images.fetch_options import read_fetch_options
from rating_train.prepare.options import stamps
from rating_train.prepare.records.reading import Reading, with_map
from rating_train.prepare.records.sources import source_kind
from rating_train.scoring.ces import CONVENTIONS, PAPER_CONVENTION


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to score, with which model, where to. ``settings``: ``section.key=value`` that differ from the run's."""

    model: str = setting(doc="run directory, or folder made by `rating-train export`")
    out: str = setting(doc="file to write, .csv or .parquet; OUT.parts beside it holds the work")
    checkpoint: str = setting("best", "of a run: best, latest or a step")
    settings: tuple[str, ...] = ()
    source: tuple[str, ...] = setting(
        (),
        "catalogues, in this order: JSON lines, CSV (also .gz, .zst), Parquet, Arrow; folders and patterns of them",
    )
    map: tuple[str, ...] = setting(
        (),
        "NAME=COLUMN, for sources whose columns have other names than those of the training: title=film_title",
    )
    delimiter: str = setting("", "of CSV files: one character, or tab (default: found out and shown)")
    encoding: str = setting("", "of CSV files, such as latin-1 (default: found out and shown)")
    images: str = setting("", "folder or archive with the images; not needed with --fetch if all are URLs")
    fetch: bool = setting(False, "fetch images that are URLs, the next part's while one is scored")
    fetch_set: tuple[str, ...] = setting((), "with --fetch: per_host=16 and so on")
    data: str = setting("", "prepared dataset to score instead of --source")
    split: str = setting("", "its split; by default that of the run's evaluations")
    batch_items: int = setting(64, "items of a forward pass", low=1)
    part_rows: int = setting(
        1024, "rows of a part: what a killed command does again, at most, for each rank", low=1
    )
    workers: int = setting(2, "processes of each rank that read and decode images", low=0)
    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto is a GPU if there is one")
    submission: bool = setting(False, "write the challenge's file: item_id, score, params, flops")
    convention: str = setting(
        PAPER_CONVENTION, f"how a submission counts its operations, of: {', '.join(CONVENTIONS)}"
    )
    fill: float | None = setting(
        None, "in a submission, the score of rows that cannot be scored: stars", low=1, high=5
    )

    @property
    def endings(self) -> str:
        """What the name of ``out`` may end in."""
        return ".csv" if self.submission else ".csv or .parquet"

    def reading(self, task: Task, inputs: Collection[str] = ("image", "text")) -> Reading:
        """How the sources are read for a model of this task and these inputs: targets are not looked at.

        Raises:
            UserError: ``map`` names something that the task does not have; the delimiter or encoding is none.
        """
        own = with_map(task, self.map) if self.map else task
        needs_text = "text" in inputs
        return Reading(own, False, needs_text, delimiter=self.delimiter, encoding=self.encoding)

    def input_identity(self) -> dict[str, Any]:
        """Return what the rows and their order depend on, for comparison with that of an unfinished run."""
        if self.data:
            return {"data": self.data, "split": self.split}
        return {"source": stamps(self.source), "images": self.images, "fetch": self.fetch} | (
            {"map": list(self.map)} if self.map else {}
        )


_RULES = (
    Rule("source data", lambda o: bool(o.source) != bool(o.data), "give --source or --data, and not both"),
    Rule("source", lambda o: len(set(o.source)) == len(o.source), "a source is given twice"),
    Rule("images", lambda o: not o.images or Path(o.images).exists(), "--images {c.images} does not exist"),
    Rule(
        "data images",
        lambda o: not o.data or not (o.images or o.fetch),
        "a prepared dataset has its own images: leave out --images, --fetch",
    ),
    Rule("split data", lambda o: not o.split or o.data, "--split goes with --data"),
    Rule("fetch_set", lambda o: not o.fetch_set or o.fetch, "--fetch-set goes with --fetch"),
    Rule(
        "convention",
        lambda o: o.convention in CONVENTIONS,
        f"--convention {{c.convention}} is not one of {', '.join(CONVENTIONS)}",
    ),
    Rule("fill", lambda o: o.fill is None or o.submission, "--fill goes with --submission"),
    Rule(
        "out",
        lambda o: Path(o.out).suffix.lower() in o.endings.split(" or "),
        "--out {c.out} does not end in {c.endings}",
    ),
)


def check_options(options: PredictOptions) -> None:
    """Check the options before any model is loaded.

    Raises:
        UserError: all problems in one error.
    """
    invalid = bound_problems(options)
    problems = [*invalid.values(), *broken_rules(options, _RULES, invalid)]
    problems += read_fetch_options(options.fetch_set)[1]
    for path in options.source:
        try:
            source_kind(path)
        except UserError as e:
            problems.append(f"{e.what} ({e.where})" if e.where else e.what)
    if problems:
        raise one_error(problems, where="predict options")
