"""Lines of finished parts to the file that was asked for, in input order and constant memory. Imports no torch."""

from __future__ import annotations

import csv
import io
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rating_train.errors import UserError
from rating_train.prediction.work_dir import WorkDir
from rating_train.scoring.predictions import Prediction, write_submission

COLUMNS = ("id", "score", "reason")
_SHOWN = 5


class Summary(NamedTuple):
    """What was written.

    Attributes:
        rows: of the input, all of them in the output.
        without_score: those that could not be scored.
        first_reasons: "ID: reason" of the first of them.
    """

    rows: int
    without_score: int
    first_reasons: tuple[str, ...]


def part_text(ids: Iterable[str], scores: Iterable[float | None], reasons: Iterable[str]) -> str:
    """Return the lines of a part. Scores are written so that they read back bit-equal."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for item_id, score, reason in zip(ids, scores, reasons, strict=True):
        writer.writerow((item_id, "" if score is None else repr(score), " ".join(reason.split())))
    return text.getvalue()


def merge(work: WorkDir, parts: int, rows: int) -> Summary:
    """Write the output from all parts, as CSV or Parquet by its name, and give it its name at the end.

    Raises:
        UserError: the parts do not have as many lines as the input has rows.
    """
    temporary = _temporary(work.out)
    try:
        summary = _concatenate(work, parts, rows, temporary)
        if work.out.suffix.lower() == ".parquet":
            _to_parquet(temporary, converted := _temporary(work.out))
            converted.replace(temporary)
        work.publish(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    return summary


def merge_submission(
    work: WorkDir, parts: int, rows: int, params: int, operations: float, fill: float | None
) -> Summary:
    """Write the challenge's file; all ids are held in memory, to refuse repeated ones.

    Raises:
        UserError: rows without a score and no ``fill``, repeated or missing ids.
    """
    table, out = _temporary(work.out), _temporary(work.out)
    try:
        summary = _concatenate(work, parts, rows, table)
        if summary.without_score and fill is None:
            raise UserError(
                f"{summary.without_score} of {summary.rows} rows have no score: {'; '.join(summary.first_reasons)}",
                where=work.out,
                expected="a score for each item of a submission",
                fix="fix their records or images, or give --fill SCORE, with the same options otherwise",
            )
        filled = (
            Prediction(row.id, fill if row.score is None else row.score)  # type: ignore[arg-type]
            for row in read_output(table)
        )
        write_submission(out, filled, params, operations)
        work.publish(out)
    finally:
        table.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
    return summary


class OutputRow(NamedTuple):
    """One row of the output; ``score`` is ``None`` where there is a ``reason``."""

    id: str
    score: float | None
    reason: str


def read_output(path: Path) -> Iterator[OutputRow]:
    """Yield the rows of a CSV output."""
    with open(path, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            yield OutputRow(row["id"], float(row["score"]) if row["score"] else None, row["reason"])


def _concatenate(work: WorkDir, parts: int, rows: int, to: Path) -> Summary:
    lines = bad = 0
    first: list[str] = []
    with open(to, "w", encoding="utf-8", newline="") as out:
        out.write(",".join(COLUMNS) + "\n")
        for number in range(parts):
            text = work.part(number).read_text("utf-8")
            out.write(text)
            for item_id, score, reason in csv.reader(io.StringIO(text, newline="")):
                lines += 1
                if not score:
                    bad += 1
                    first += [f"{item_id or '(no id)'}: {reason}"] if len(first) < _SHOWN else []
    if lines != rows:
        raise UserError(
            f"the parts have {lines} lines, the input {rows} rows",
            where=work.path,
            fix=f"remove {work.path} and run again",
        )
    return Summary(rows, bad, tuple(first))


def _to_parquet(table: Path, to: Path) -> None:
    import duckdb  # late: a CSV output does not need it

    columns = "{'id': 'VARCHAR', 'score': 'DOUBLE', 'reason': 'VARCHAR'}"
    try:
        with duckdb.connect(":memory:") as db:  # its default keeps the order of the lines
            db.execute(
                f"COPY (SELECT * FROM read_csv(?, header = true, delim = ',', quote = '\"', escape = '\"', "
                f"columns = {columns}, max_line_size = 16777216)) TO '{_quoted(to)}' (FORMAT PARQUET)",
                [str(table)],
            )
    except duckdb.Error as e:
        raise UserError(f"the Parquet file could not be written ({e})", where=to.parent) from e


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _temporary(out: Path) -> Path:
    """Return a name beside the output that no other command uses."""
    return out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
