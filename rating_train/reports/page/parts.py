"""The parts of a page: sections with cards, sentences, figures, tables and items; and the page of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rating_train import __version__
from rating_train.reports.comparison import difference_in_words
from rating_train.reports.page.charts import Line
from rating_train.reports.page.render import Table, render

Section = dict[str, Any]


def page(
    title: str,
    lead: str,
    top: Sequence[Mapping[str, str]],
    sections: Sequence[Section],
    warnings: Sequence[str] = (),
    refresh: int = 0,
) -> str:
    """Return the HTML text of a page.

    Args:
        title: its name.
        lead: a line below it.
        top: cards that a reader looks for first.
        sections: of :func:`section`.
        warnings: what a reader must know before the numbers.
        refresh: seconds after which a browser reads the page again; 0 never.
    """
    return render(
        "page.html.j2",
        title=title,
        lead=lead,
        top=top,
        sections=sections,
        warnings=warnings,
        refresh=refresh,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )


def section(identity: str, title: str, intro: str = "", columns: int = 2, **parts: Any) -> Section:
    """Return a section with all the parts that the template asks for; figures stand in ``columns`` columns."""
    empty: dict[str, Any] = {"cards": [], "says": [], "figures": [], "tables": [], "items": []}
    return {"id": identity, "title": title, "intro": intro, "columns": columns, **empty, **parts}


def figure(title: str, drawing: Any, note: str = "", key: Sequence[Line] = ()) -> dict[str, Any]:
    """Return a figure; ``key`` are the lines to name above it."""
    named = [{"label": k.label, "colour": k.colour, "dashed": k.dashed} for k in key if k.label and k.points]
    return {"title": title, "drawing": drawing, "note": note, "key": named}


def table(t: Table, title: str = "") -> dict[str, Any]:
    """Return a table with its title."""
    return {"table": t, "title": title}


def card(what: str, value: str, more: str = "") -> dict[str, str]:
    """Return a large number with what it is."""
    return {"what": what, "value": value, "more": more}


def say(text: str, kind: str = "") -> dict[str, str]:
    """Return a sentence; ``kind`` is good, bad or ""."""
    return {"kind": kind, "text": text}


def say_difference(
    name: str, other: str, metric: str, difference: Mapping[str, Any], unit: str = " stars"
) -> dict[str, str]:
    """Say a difference (``value``, ``interval_95``) with its interval, and whether it is good news."""
    value, ends = difference["value"], difference["interval_95"]
    kind, told = difference_in_words(name, other, metric, value, ends, unit)
    return say(f"{told}.", kind)
