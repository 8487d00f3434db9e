"""The options of ``rating-train predict``: data, checked once with all problems in one error. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.errors import UserError, one_error
from rating_train.prepare.images.fetch_options import read_fetch_options
from rating_train.prepare.options import stamps
from rating_train.prepare.records.sources import source_kind
from rating_train.scoring.ces import CONVENTIONS, PAPER_CONVENTION
from rating_train.shards.schema import RATING_MAX, RATING_MIN

DEVICES = ("auto", "cuda", "cpu")
OUT_KINDS = (".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What to score, with which model, and where to write.

    Attributes:
        model: run directory, or folder made by ``rating-train export``.
        out: file to write; ``OUT.parts`` beside it holds the work.
        checkpoint: of a run: best, latest or a step.
        settings: ``section.key=value``, what is to differ from the run's configuration.
        source: catalogue files, scored in this order.
        images: folder or archive of the images; "" with ``fetch`` if all of them are URLs.
        fetch: fetch images that are URLs, the next part's while one is scored.
        fetch_set: ``NAME=VALUE``, settings of the fetching.
        data: prepared dataset to score instead of catalogue files.
        split: its split; "" takes the one that the run evaluates on.
        batch_items: items of a forward pass.
        part_rows: rows of a part, the unit of work that is either finished or done again.
        workers: processes of each rank that read and decode images; 0 does it between the forward passes.
        device: auto (a GPU if there is one), cuda or cpu.
        submission: write the file of the challenge.
        convention: how its operations are counted.
        fill: score of rows that cannot be scored, in a submission; ``None`` refuses to write one with such rows.
    """

    model: str
    out: str
    checkpoint: str = "best"
    settings: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    images: str = ""
    fetch: bool = False
    fetch_set: tuple[str, ...] = ()
    data: str = ""
    split: str = ""
    batch_items: int = 64
    part_rows: int = 1024
    workers: int = 2
    device: str = "auto"
    submission: bool = False
    convention: str = PAPER_CONVENTION
    fill: float | None = None

    def input_identity(self) -> dict[str, Any]:
        """Return what the rows and their order depend on, for comparison with that of an unfinished run."""
        if self.data:
            return {"data": self.data, "split": self.split}
        return {"source": stamps(self.source), "images": self.images, "fetch": self.fetch}


def check_options(options: PredictOptions) -> None:
    """Check the options before any model is loaded.

    Raises:
        UserError: all problems in one error.
    """
    o = options
    checks = [
        (bool(o.source) != bool(o.data), "give --source or --data, and not both"),
        (len(set(o.source)) == len(o.source), "a source is given twice"),
        (not o.source or bool(o.images) or o.fetch, "neither --images nor --fetch is given"),
        (not o.images or Path(o.images).exists(), f"--images {o.images} does not exist"),
        (not o.data or not (o.images or o.fetch), "a prepared dataset has its own images: leave out --images, --fetch"),
        (not o.split or bool(o.data), "--split goes with --data"),
        (not o.fetch_set or o.fetch, "--fetch-set goes with --fetch"),
        (o.batch_items >= 1, f"--batch-items {o.batch_items} is not positive"),
        (o.part_rows >= 1, f"--part-rows {o.part_rows} is not positive"),
        (o.workers >= 0, f"--workers {o.workers} is negative"),
        (o.convention in CONVENTIONS, f"--convention {o.convention} is not one of {', '.join(CONVENTIONS)}"),
        (o.fill is None or o.submission, "--fill goes with --submission"),
        (
            o.fill is None or RATING_MIN <= o.fill <= RATING_MAX,
            f"--fill {o.fill} is not a rating from {RATING_MIN:g} to {RATING_MAX:g}",
        ),
        (
            Path(o.out).suffix.lower() in (OUT_KINDS[:1] if o.submission else OUT_KINDS),
            f"--out {o.out} does not end in {'.csv' if o.submission else ' or '.join(OUT_KINDS)}",
        ),
    ]  # fmt: skip
    problems = [problem for good, problem in checks if not good]
    problems += read_fetch_options(o.fetch_set)[1]
    for path in o.source:
        try:
            source_kind(path)
        except UserError as e:
            problems.append(f"{e.what} ({e.where})" if e.where else e.what)
    if problems:
        raise one_error(problems, where="predict options")
