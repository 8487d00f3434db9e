"""Render a page: jinja2 templates, one style, everything inside one file."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from rating_train.log import duration

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by a click on its head.

    Attributes:
        head: names of the columns.
        rows: cells as they are shown: text is shown as it is, numbers with ``digits``.
        digits: decimals of numbers that are not whole.
        note: a line below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int = 4
    note: str = ""


def render(template: str, **values: Any) -> str:
    """Return the HTML text of a page; ``template`` is a file of ``templates/``."""
    return _environment().get_template(template).render(**values)


def data_uri(content: bytes, kind: str = "image/jpeg") -> str:
    """Return a picture as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "sort_key": sort_key, "duration": duration}
    return environment


def cell(value: Any, digits: int = 4) -> str:
    """Return a cell as people read it: a missing value as a dash, whole numbers with commas."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{digits}f}" if math.isfinite(value) else "–"
    return str(value)


def sort_key(value: Any) -> str:
    """Return what a cell is sorted by: a number as such, text in lower case, a missing value as nothing."""
    if value is None:
        return ""
    return repr(float(value)) if isinstance(value, (int, float)) else str(value).lower()
