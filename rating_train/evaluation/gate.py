"""``evaluate --require 'plcc>=0.6'``: whether an evaluation is good enough to deploy what was trained."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rating_train.errors import one_error
from rating_train.scoring.ces import CONVENTIONS
from rating_train.scoring.metrics import METRICS

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_ENDS = {"low": 0, "high": 1}
_GRAMMAR = re.compile(r"\s*([a-z0-9_]+)(?:\.(low|high))?\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")
_EXAMPLE = "for example 'plcc>=0.6', or 'plcc.low>=0.55' for the lower end of its interval"


@dataclass(frozen=True)
class Requirement:
    """One condition.

    Attributes:
        text: as it was given.
        name: a metric, or ``ces_`` and a convention.
        end: ``low`` or ``high`` end of the metric's 95 % interval; ``""`` is the value itself.
        compare: one of ``>= <= > <``.
        bound: what it is compared with.
    """

    text: str
    name: str
    end: str
    compare: str
    bound: float

    def failure(self, judgement: Mapping[str, Any]) -> str:
        """Return why the requirement is not met, or "" if it is. What is undefined does not meet it."""
        metric = judgement["metrics"].get(self.name)
        if metric is None:
            value, why = judgement["row"].get(self.name), "PLCC is undefined"
        elif self.end:
            interval = metric["interval_95"]
            value = None if interval is None else interval[_ENDS[self.end]]
            why = metric.get("undefined", "there is no interval")
        else:
            value, why = metric["value"], metric.get("undefined", "")
        if value is None:
            return f"{self.text}: undefined ({why})"
        if _COMPARE[self.compare](value, self.bound):
            return ""
        return f"{self.text}: it is {value:.4f}"


def parse_requirements(texts: Sequence[str]) -> list[Requirement]:
    """Read the conditions.

    Raises:
        UserError: a condition that cannot be read, or an unknown metric; all of them in one error.
    """
    names = (*METRICS, *(f"ces_{convention}" for convention in CONVENTIONS))
    found, problems = [], []
    for text in texts:
        match = _GRAMMAR.fullmatch(text)
        try:
            bound = float(match[4]) if match else None
        except ValueError:
            bound = None
        if match is None or bound is None:
            problems.append(f"{text!r} is no condition ({_EXAMPLE})")
        elif match[1] not in names:
            problems.append(f"{text!r}: unknown metric (one of {', '.join(names)})")
        elif match[2] and match[1] not in METRICS:
            problems.append(f"{text!r}: CES has no interval")
        else:
            found.append(Requirement(text.strip(), match[1], match[2] or "", match[3], bound))
    if problems:
        raise one_error(problems, where="--require")
    return found
