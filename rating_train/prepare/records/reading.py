"""How the records of a source are read: the task's columns, found in whatever names and nesting the source has."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rating_train.config.task import PAPER, Task
from rating_train.errors import UserError, one_error
from rating_train.prepare.records.numbers import NotANumber, is_absent, read_number

log = logging.getLogger(__name__)

#: Names that mean the same, where a task has the first one.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "id": ("id", "parent_asin"),
    "rating": ("rating", "average_rating"),
    "rating_count": ("rating_count", "rating_number"),
    "image": ("image", "image_path"),
}

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True)
class Reading:
    """What is read of a source, and how.

    Attributes:
        task: names the columns.
        rated: whether targets and weights are looked at; if not, every record is an item to score.
        needs_text: whether a source must have columns of the task's fields.
        unrated: what becomes of a record without a target: it is dropped, or kept for the split ``predict``.
        delimiter, decimal, encoding: of CSV files; "" is found out.
        shown: whether what is found out, and the columns that are not read, are logged.
    """

    task: Task = PAPER
    rated: bool = True
    needs_text: bool = True
    unrated: Literal["drop", "predict"] = "drop"
    delimiter: str = ""
    decimal: str = ""
    encoding: str = ""
    shown: bool = False

    def __post_init__(self) -> None:
        """Refuse what no CSV file can be written with.

        Raises:
            UserError: the delimiter is not one character, or the encoding is not known.
        """
        problems = []
        if self.separator in ('"', "\r", "\n") or len(self.separator) > 1:
            problems.append(f"--delimiter {self.delimiter!r} is neither one character nor `tab`")
        if self.encoding and not _is_encoding(self.encoding):
            problems.append(f"--encoding {self.encoding!r} is not known (such as latin-1, cp1252, utf-16)")
        if problems:
            raise one_error(problems, where="how CSV files are read")

    @property
    def separator(self) -> str:
        """The character between the columns of a CSV file; "" is found out."""
        return {"tab": "\t", "\\t": "\t"}.get(self.delimiter, self.delimiter)

    @property
    def is_native(self) -> bool:
        """Whether the columns are the paper's: those of Amazon Reviews 2023, or of a CSV with its names."""
        return columns_of(self.task) == columns_of(PAPER) and self.unrated == "drop"

    def recorded(self) -> dict[str, Any]:
        """Return what decides the result; nothing of the default, so that older builds keep their fingerprint."""
        if self == Reading():
            return {}
        return {"reading": {k: v for k, v in dataclasses.asdict(self).items() if k != "needs_text"}}

    def missing(self, header: Sequence[str]) -> list[str]:
        """Return what a source with these columns lacks, each with the nearest name."""
        task = self.task
        wanted = [("id", task.id)]
        if self.rated:
            wanted += [("target.column", task.target.column)] + (
                [("weight", task.weight)] if task.weight else []
            )
        fields = task.fields if self.needs_text else []
        for field in fields:
            wanted += [(f"field {field.name}", column) for column in field.columns]
        problems = [
            f"{what}: {name!r}{_near(name, header)}" for what, name in wanted if not _find(header, name)
        ]
        own = [f.name for f in fields if not f.columns]
        if own and not any(_find(header, name) for name in own) and not any(f.columns for f in fields):
            problems.append(f"fields: none of {', '.join(map(repr, own))}{_near(own[0], header)}")
        return problems

    def check(self, header: Sequence[str], source: str, what: str) -> None:
        """Refuse a source that lacks columns.

        Raises:
            UserError: names all of them, with the nearest names.
        """
        if problems := self.missing(header):
            raise UserError(
                f"{what} {'; '.join(problems)}",
                where=source,
                expected=f"columns among {', '.join(header[:40])}",
                fix="name the columns with --map NAME=COLUMN, or in the task",
            )

    def unread(self, header: Sequence[str]) -> list[str]:
        """Return the columns of a source that the task does not read."""
        read = {_find(header, path) for path in _paths(self.task)}
        return [name for name in header if name not in read]

    def show_unread(self, header: Sequence[str], source: str) -> None:
        """Log the columns that are not read, where that is wanted."""
        if self.shown and (names := self.unread(header)):
            log.info("%s: columns that are not read: %s", source, ", ".join(names[:20]))

    def image_columns(self, header: Sequence[str]) -> set[str]:
        """Return the columns of a source that are read as images."""
        found = {_find(header, path) for path in self.task.images}
        return found | ({"images"} if self.of_amazon else set())

    @property
    def of_amazon(self) -> bool:
        """Whether images are also looked for where Amazon Reviews 2023 has them: in a nested column ``images``."""
        return self.task.images == PAPER.images

    def record(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record in the field names of Amazon Reviews 2023 and of the task, from one in the source's."""
        task = self.task
        found: dict[str, Any] = {
            "parent_asin": pick(raw, task.id),
            "group_id": pick(raw, task.group),
            "average_rating": self._number(pick(raw, task.target.column)) if self.rated else None,
            "rating_number": self._number(pick(raw, task.weight)) if self.rated and task.weight else None,
            "image_paths": [image for column in task.images for image in _texts(pick(raw, column), column)],
        }
        if isinstance(found["parent_asin"], float) and found["parent_asin"].is_integer():
            found["parent_asin"] = int(found["parent_asin"])
        if self.of_amazon and _is_nested(raw.get("images")):
            found["images"] = raw["images"]
        if task.category:
            found["main_category"] = _as_text(pick(raw, task.category))
        for field in task.fields:
            parts = [_as_text(pick(raw, column)) for column in field.sources]
            found[field.name] = parts[0] if len(parts) == 1 else _joined(parts)
        return found

    def _number(self, value: Any) -> Any:
        """Return a text's number, ``None`` if there is none; what is none stays, and is refused where it is checked."""
        if is_absent(value):
            return None
        if not isinstance(value, str):
            return value
        try:
            return read_number(value, self.decimal)
        except NotANumber as e:
            return e


def _is_encoding(name: str) -> bool:
    try:
        "a".encode(name)
    # ValueError: a name with a zero byte, or an encoding that refuses any text.
    except (LookupError, ValueError):
        return False
    return True


def columns_of(task: Task) -> dict[str, Any]:
    """Return from which columns a task is read."""
    fields = [[field.name, field.sources] for field in task.fields]
    names = ("id", "group", "category", "weight", "weight_kind", "images", "missing_image")
    return {"target": task.target.column, "fields": fields, **{name: getattr(task, name) for name in names}}


def with_map(task: Task, pairs: Iterable[str]) -> Task:
    """Return a task that reads other columns: ``--map rating=score title=film_title image=poster``.

    Raises:
        UserError: a pair that is none, or a name that the task does not have, with the nearest one.
    """
    given, problems = {}, []
    known = [task.target.name, "rating", "id", "group", "category", "weight", "rating_count", "image"]
    known = list(dict.fromkeys([*known, *task.field_names]))
    for pair in (part for text in pairs for part in text.split(",")):
        name, equals, column = (part.strip() for part in pair.partition("="))
        key = next((k for k in known if k.casefold() == name.casefold()), None)
        if not equals or key is None:
            close = difflib.get_close_matches(name.casefold(), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close and equals else f" (known: {', '.join(known)})"
            problems.append(f"--map {pair!r} is not NAME=COLUMN of the task{hint}")
        elif key in given:
            problems.append(f"--map names {key!r} twice")
        else:
            given[key] = column
    if problems:
        raise one_error(problems, where="--map")
    fields = [
        dataclasses.replace(f, columns=[given[f.name]] if f.name in given else f.columns) for f in task.fields
    ]
    target = given.get(task.target.name, given.get("rating", task.target.column))
    changed: dict[str, Any] = {name: given[name] for name in ("id", "group", "category") if name in given}
    if "main_category" in given:
        changed.setdefault("category", given["main_category"])
    weight = given.get("weight", given.get("rating_count"))
    changed |= {} if weight is None else {"weight": weight}
    changed |= {"weight_kind": "any"} if given.get("weight") else {}
    changed |= {"images": [given["image"]] if given["image"] else []} if "image" in given else {}
    return dataclasses.replace(
        task, target=dataclasses.replace(task.target, column=target), fields=fields, **changed
    )


def with_scale(task: Task, scale: str) -> Task:
    """Return a task with other bounds, ``LOWER:UPPER``; the paper's question then names them.

    Raises:
        UserError: they are not two numbers, the smaller one first.
    """
    try:
        lower, upper = map(float, scale.split(":"))
    except ValueError:
        lower = upper = math.nan
    if not lower < upper or math.isinf(upper - lower):
        raise UserError(
            f"--scale {scale!r} is not LOWER:UPPER",
            expected="two numbers, the smaller one first, such as 1:10",
        )
    target = dataclasses.replace(task.target, lower=lower, upper=upper)
    question = task.question.replace("from 1 to 5 stars", f"from {lower:g} to {upper:g}")
    if task.target == PAPER.target or question != task.question:
        target = dataclasses.replace(target, unit="points" if (lower, upper) != (1, 5) else "stars")
    return dataclasses.replace(
        task, target=target, question=question if (lower, upper) != (1, 5) else task.question
    )


def pick(record: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path such as ``images.large[0]``; ``None`` where there is none."""
    if not path:
        return None
    if name := _column(record, path):
        return record[name]
    value: Any = record
    for key, index in _STEP.findall(path):
        if index:
            value = (
                value[int(index)] if isinstance(value, (list, tuple)) and int(index) < len(value) else None
            )
        elif isinstance(value, Mapping):
            value = value.get(_find(value, key) or key)
        else:
            return None
    return value


def _find(header: Iterable[str], path: str) -> str:
    """Return the column that a name or the beginning of a path means, whatever its case; "" if there is none."""
    return _column(header, path) or _column(header, path.partition(".")[0].partition("[")[0])


def _column(header: Iterable[str], path: str) -> str:
    names = list(header)
    for wanted in SYNONYMS.get(path, (path,)):
        if wanted in names:
            return wanted
        folded = [name for name in names if name.casefold() == wanted.casefold()]
        if folded:
            return folded[0]
    return ""


def _near(name: str, header: Sequence[str]) -> str:
    folded = {column.casefold(): column for column in header}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def _paths(task: Task) -> Iterator[str]:
    yield from (
        path for path in (task.id, task.group, task.category, task.weight, task.target.column) if path
    )
    yield from task.images
    yield from (column for field in task.fields for column in field.sources)


def _is_nested(images: Any) -> bool:
    """Whether these are Amazon's images, or a list of images in the rows of a file, which are texts here."""
    if not isinstance(images, list):
        return isinstance(images, dict)
    return all(isinstance(one, dict) for one in images) or all(
        one is None or isinstance(one, str) for one in images
    )


def _as_text(value: Any) -> Any:
    """Return numbers as text, with all their digits; what is neither text, list nor number is refused later."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int):
        try:
            return str(value)
        except ValueError:  # of thousands of digits, which Python does not write
            return value
    if math.isnan(value):
        return None
    if value.is_integer() and abs(value) < 1e16:  # a column of integers with gaps comes as floats
        return str(int(value))
    # A column of float32 has its own shortest text: 4.1, not 4.099999904632568.
    single = np.float32(value) if abs(value) < 3e38 else None
    return repr(value) if single is None or float(single) != value else str(single)


def _joined(parts: list[Any]) -> list[Any]:
    flat: list[Any] = []
    for part in parts:
        flat += part if isinstance(part, list) else [part]
    return flat


def _texts(value: Any, column: str) -> list[Any]:
    """Return the images that a cell names: text, several in ``image_paths``, a list of texts, or dicts with a path."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return value.split(";") if column == "image_paths" else [value]
    if isinstance(value, Mapping):  # as `datasets` stores an image
        return [value["path"]] if isinstance(value.get("path"), str) else []
    if isinstance(value, (list, tuple)):
        return [image for one in value for image in _texts(one, "")]
    return [value]
