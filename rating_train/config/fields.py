"""Settings as dataclass fields: each declares its documentation and its bounds, and one reader checks values by them.

The configuration, the options of ``prepare`` and those of fetching images are declared this way; their ``--help``,
their pages and their checks come from the declaration.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_SHOWN_CHARS = 80  # of a value in a message


class Rule(NamedTuple):
    """What several settings must fulfil together; checked only where each of them is valid by itself.

    Attributes:
        keys: the settings concerned, dotted, with spaces between.
        holds: takes the configuration or options and tells whether it is fulfilled.
        problem: the sentence to show where it is not; ``{c.a.b}`` in it shows a value.
    """

    keys: str
    holds: Callable[[Any], Any]
    problem: str


def setting(
    default: Any = dataclasses.MISSING, doc: str = "", *, low: float = -math.inf, high: float = math.inf
) -> Any:
    """Declare a field with its documentation and inclusive bounds. Mutable defaults are copied for every instance."""
    metadata = {"doc": doc, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, doc: str) -> Any:
    """Declare a documented sub-section."""
    return field(default_factory=cls, metadata={"doc": doc})


def read(cls: type[T], values: Any, problems: dict[str, str], where: str = "") -> T:
    """Return an instance of ``cls`` from a mapping as YAML gives it.

    Args:
        cls: a dataclass of :func:`setting` and :func:`section` fields that all have defaults.
        values: the mapping; what it leaves out takes its default.
        problems: receives key -> sentence of everything that is wrong; those settings keep their defaults.
        where: prefix of the keys, for example ``optim.lr.``.
    """
    if not isinstance(values, Mapping):
        key = where.rstrip(".")
        problems[key] = f"`{key}` is a section, not {_show(values)}"
        return cls()
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}{name}"
        if name not in known:
            problems[key] = f"unknown key `{_cut(key)}`{_nearest(where, str(name), known)}"
            continue
        found = _typed(hints[name], value, key, problems)
        if key not in problems and (problem := _bound_problem(known[name], key, found)):
            problems[key] = problem
        if not any(k == key or k.startswith(f"{key}[") for k in problems):
            given[name] = found
    return cls(**given)


def bound_problems(options: Any) -> dict[str, str]:
    """Return key -> sentence of every number of an options object that is outside its declared bounds."""
    found = (
        (f.name, _bound_problem(f, f.name, getattr(options, f.name))) for f in dataclasses.fields(options)
    )
    return {name: problem for name, problem in found if problem}


def broken_rules(options: Any, rules: Iterable[Rule], invalid: Iterable[str] = ()) -> list[str]:
    """Return the sentences of the rules that are not fulfilled, but for those that concern an ``invalid`` key."""
    wrong = [re.sub(r"\[.*", "", key) for key in invalid]
    usable = (
        r for r in rules if not any(f"{key}.".startswith(f"{w}.") for key in r.keys.split() for w in wrong)
    )
    return [rule.problem.format(c=options) for rule in usable if not rule.holds(options)]


def _typed(kind: Any, value: Any, key: str, problems: dict[str, str]) -> Any:
    """Return ``value`` as the annotation says; PyYAML reads `1e-4` as text, so a number may come as text."""
    if dataclasses.is_dataclass(kind):
        return read(typing.cast(type, kind), value, problems, f"{key}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    expected = ""
    if origin is types.UnionType:  # of one type and None
        (kind,) = (k for k in arguments if k is not type(None))
        if value is None:
            return None
        return _typed(kind, value, key, problems)
    if origin is typing.Literal:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in arguments:
            expected = f"one of {', '.join(map(str, arguments))}"
    elif origin is list:
        if isinstance(value, list):
            return [_typed(arguments[0], v, f"{key}[{i}]", problems) for i, v in enumerate(value)]
        expected = "a list"
    elif origin is dict:
        expected = "" if isinstance(value, dict) else "a mapping"
    else:
        value, given = _scalar(kind, value), value
        if value is None:
            value, expected = given, _KIND_NAMES[kind]
    if expected:
        problems[key] = f"`{key}` is {_show(value)}, expected {expected}"
    return value


def _scalar(kind: type, value: Any) -> Any:
    if kind in (bool, str) or isinstance(value, bool):
        return value if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) else None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


def _bound_problem(declared: dataclasses.Field[Any], key: str, value: Any) -> str:
    low, high = (declared.metadata.get(name) for name in ("low", "high"))
    if low is None or high is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if low <= value <= high:
        return ""
    found, least, most = (repr(number).removesuffix(".0") for number in (value, low, high))
    return f"`{key}` is {found}, expected " + (
        f"at least {least}" if math.isinf(high) else f"between {least} and {most}"
    )


def _nearest(where: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:_SHOWN_CHARS], known, n=1)
    return f" (did you mean `{where}{close[0]}`?)" if close else f" (known: {', '.join(sorted(known))})"


def _show(value: Any) -> str:
    return "empty" if value is None else f"{_cut(repr(value))} ({type(value).__name__})"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
