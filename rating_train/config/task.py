"""The task of a dataset: which number is predicted, from which texts and images, and how the prompt asks for it.

Given to ``prepare`` as a YAML file, kept in the manifest and in every run. The default is the paper's task: stars from
1 to 5, four text fields and one image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rating_train.config.fields import Rule, broken_rules, read, section, setting
from rating_train.config.yaml_reader import parse_yaml
from rating_train.errors import UserError, one_error

Float64Array = npt.NDArray[np.float64]

#: Names that stored samples use for themselves.
RESERVED = ("id", "image", "rating", "rating_count", "split")

#: The paper's prompt: the question, and the fields with the words that introduce them.
PAPER_QUESTION = (
    "The average user rating of this product, from 1 to 5 stars, given its image and its metadata."
)
PAPER_FIELDS = (
    ("title", "Title:"),
    ("description", "Description:"),
    ("features", "Features:"),
    ("main_category", "Category:"),
)


@dataclass(frozen=True)
class Target:
    """The number that is predicted."""

    column: str = setting("rating", "Source column of the number.")
    name: str = setting("rating", "What the number is called, in tables and plots.")
    unit: str = setting("stars", "Its unit; empty for a number without one.")
    lower: float | None = setting(1.0, "Smallest possible value; null if there is none.")
    upper: float | None = setting(5.0, "Largest possible value; null if there is none.")
    transform: Literal["none", "log", "log1p"] = setting(
        "none",
        "The model learns this function of the number, and the loss is computed on its scale: `log` suits prices, "
        "whose errors are relative. Scores, RMSE and MAE are in the unit all the same.",
    )
    center: float | None = setting(
        None, "Mean of the (transformed) training targets; filled in by `rating-train prepare`."
    )
    spread: float | None = setting(
        None, "Their standard deviation; filled in by `rating-train prepare`.", low=0.0
    )

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both bounds; ``None`` where there are not two."""
        return None if self.lower is None or self.upper is None else (float(self.lower), float(self.upper))

    @property
    def bounded(self) -> bool:
        """Whether scores lie between two bounds, by a sigmoid; otherwise they are standardised and unbounded."""
        return self.bounds is not None

    @property
    def label(self) -> str:
        """The unit for a table or an axis: `` (stars)`` with a space before it, or nothing."""
        return f" ({self.unit})" if self.unit else ""

    @property
    def range_text(self) -> str:
        """The bounds, as ``[1, 5]``."""
        return f"[{_shown(self.lower, '-inf')}, {_shown(self.upper, 'inf')}]"

    @property
    def suffix(self) -> str:
        """The unit after a number: `` stars`` with a space before it, or nothing."""
        return f" {self.unit}" if self.unit else ""

    def forward(self, value: float) -> float:
        """Return the transformed value: what the model learns."""
        if self.transform == "none":
            return value
        return math.log(value) if self.transform == "log" else math.log1p(value)

    def transformed(self, values: Float64Array) -> Float64Array:
        """Return the transforms of (N,) values."""
        if self.transform == "none":
            return values
        return np.log(values) if self.transform == "log" else np.log1p(values)

    def restored(self, values: Float64Array) -> Float64Array:
        """Return (N,) values in the unit from their transforms."""
        if self.transform == "none":
            return values
        return np.exp(values) if self.transform == "log" else np.expm1(values)

    def problem(self, value: float) -> str:
        """Return what is wrong with a value of the number, or ""."""
        low, high = self.lower, self.upper
        if not ((low is None or low <= value) and (high is None or value <= high)):  # refuses NaN as well
            return f"outside {self.range_text}"
        if not abs(value) < 3e38:
            return "not a number that float32 holds"
        if (self.transform == "log" and value <= 0) or (self.transform == "log1p" and value <= -1):
            return f"without a {self.transform}"
        return ""


@dataclass(frozen=True)
class TextField:
    """One text that the model reads."""

    name: str = setting("", "Name of the field, in shards and for `predict`.")
    columns: list[str] = setting([], "Source columns, joined by spaces; empty takes the column of that name.")
    words: str = setting("", "Words that introduce it in the prompt, such as `Title:`.")

    @property
    def sources(self) -> list[str]:
        """The source columns."""
        return self.columns or [self.name]


def _paper_fields() -> list[TextField]:
    return [TextField(name, [], words) for name, words in PAPER_FIELDS]


@dataclass(frozen=True)
class Task:
    """What is predicted from what. Each field documents itself; docs/tasks.md shows examples."""

    question: str = setting(
        PAPER_QUESTION,
        "The sentence of the prompt that asks for the number, after the image and before the fields.",
    )
    target: Target = section(Target, "The number that is predicted.")
    fields: list[TextField] = dataclasses.field(
        default_factory=_paper_fields,
        metadata={
            "doc": "Text fields, in the order of the prompt: `name`, `columns` of the source (the one of that name), "
            "and the `words` that introduce it. [] if there is no text.",
            "low": -math.inf,
            "high": math.inf,
        },
    )
    id: str = setting("id", "Source column that names the item.")
    group: str = setting(
        "group_id",
        "Source column that is the same for variants of one item, which belong to one split; may lack.",
    )
    category: str = setting(
        "main_category", "Source column of the category, for slices and windows; may lack. Empty: none."
    )
    weight: str = setting(
        "rating_count",
        "Source column of the number of ratings behind a target, or of any other weight; empty: none.",
    )
    weight_kind: Literal["ratings", "any"] = setting(
        "ratings",
        "Whether `weight` is a number of ratings (an integer, which `--min-rating-count` looks at), or any number of "
        "0 or more.",
    )
    images: list[str] = setting(
        ["image", "image_paths"],
        "Source columns that name an item's images (paths or URLs), in the order in which they are tried. [] if there "
        "are no images.",
    )
    missing_image: Literal["drop", "grey"] = setting(
        "drop",
        "What becomes of an item without a usable image: it is left out, or gets a grey square, counted.",
    )

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the text fields, in order."""
        return tuple(field.name for field in self.fields)

    @property
    def counted(self) -> bool:
        """Whether items have a number of ratings."""
        return bool(self.weight) and self.weight_kind == "ratings"

    @property
    def inputs(self) -> list[str]:
        """What a model can read: ``image``, ``text``."""
        return [*(["image"] if self.images else []), *(["text"] if self.fields else [])]

    def model_part(self) -> dict[str, Any]:
        """Return what a model's meaning depends on: not from which columns it was read, nor the statistics."""
        target = {
            k: v
            for k, v in dataclasses.asdict(self.target).items()
            if k not in ("column", "center", "spread")
        }
        fields = [[field.name, field.words] for field in self.fields]
        return {"question": self.question, "target": target, "fields": fields, "images": bool(self.images)}

    @property
    def is_default(self) -> bool:
        """Whether a model of this task is one of the paper's: stars, with its fields, prompt and image."""
        return self.model_part() == PAPER.model_part()

    def difference(self, other: Task) -> str:
        """Return what differs between two tasks for a model, in words; "" if nothing does."""
        mine, theirs = self.model_part(), other.model_part()
        mine, theirs = mine | mine.pop("target"), theirs | theirs.pop("target")
        return "; ".join(
            f"{key}: {mine[key]!r} against {theirs[key]!r}" for key in mine if mine[key] != theirs[key]
        )


PAPER = Task()

_RULES = (
    Rule("target.column", lambda t: t.target.column, "`target.column` is empty"),
    Rule("id", lambda t: t.id, "`id` is empty"),
    Rule(
        "fields images",
        lambda t: t.fields or t.images,
        "neither `fields` nor `images`: there is nothing to read",
    ),
    Rule(
        "target",
        lambda t: not t.target.bounded or t.target.lower < t.target.upper,
        "`target.lower` is {c.target.lower:g} and `target.upper` {c.target.upper:g}, expected the smaller one first",
    ),
    Rule(
        "target",
        lambda t: (
            not t.target.bounded
            or t.target.lower >= t.target.upper
            or not any(t.target.problem(v) for v in (t.target.lower, t.target.upper))
        ),
        "`target.transform` is {c.target.transform}, which its bounds do not have (a price from 0: give a bound above "
        "0, or log1p)",
    ),
    Rule(
        "fields",
        lambda t: all(f.name.isidentifier() and f.name not in RESERVED for f in t.fields),
        f"`fields`: a name is not a word, or is one of {', '.join(RESERVED)}",
    ),
    Rule(
        "fields",
        lambda t: len(set(t.field_names)) == len(t.fields),
        "`fields`: a field is given twice",
    ),
)


def task_from_dict(values: Mapping[str, Any], where: str | Path = "task") -> Task:
    """Return the task of a mapping as YAML or a manifest gives it.

    Raises:
        UserError: all that is wrong with it, in one error.
    """
    problems: dict[str, str] = {}
    task = read(Task, values, problems)
    found = [*problems.values(), *broken_rules(task, _RULES, problems)]
    if found:
        raise one_error(found, where=where, fix="see docs/tasks.md: every key and its default")
    return task


def task_problems(task: Task) -> list[str]:
    """Return the sentences of the rules that a task breaks."""
    return broken_rules(task, _RULES)


def load_task(path: str | Path) -> Task:
    """Read a task file.

    Raises:
        UserError: it is missing, no YAML, or no task.
    """
    try:
        values = parse_yaml(Path(path).read_text("utf-8"))
    except OSError as e:
        raise UserError(
            f"the task file cannot be read ({e.strerror or e})", where=path, fix="check --task"
        ) from e
    except ValueError as e:
        raise UserError(f"not valid YAML ({e})", where=path) from e
    return task_from_dict({} if values is None else values, path)


def task_of(manifest: Mapping[str, Any]) -> Task:
    """Return the task of a dataset: the one in its manifest, else the paper's."""
    return task_from_dict(manifest["task"], "task of the manifest") if manifest.get("task") else PAPER


def _shown(bound: float | None, absent: str) -> str:
    return absent if bound is None else f"{bound:g}"
