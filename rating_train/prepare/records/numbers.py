"""Numbers as people write them, read by one rule or refused; nothing is guessed.

The rule: a sign, digits and at most one decimal sign; digits may be grouped in threes by spaces, apostrophes, or
whichever of point and comma is not the decimal sign; a currency may stand before or after, but no other word: "12K"
and "from 12" are refused. The decimal sign is the file's (a point unless found or said otherwise). "1,234" is a
thousand only where the point is known to be the decimal sign, so without ``--decimal`` it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_SPACES = " \u00a0\u202f\u2009"
_CURRENCIES = (
    r"(?:us|ca?|au?|nz|hk|sg?|mx|nt|r)?\$|[€£¥₹₩₽₺₫₪฿₱₦₴₸]|rs\.?|kr\.?|fr\.?|kč|zł|ft|lei|лв\.?|руб\.?|tl|"
    "aed|ars|aud|bgn|brl|cad|chf|clp|cny|cop|czk|dkk|egp|eur|gbp|hkd|huf|idr|ils|inr|isk|jpy|krw|mxn|myr|nok|nzd|"
    "php|pkr|pln|ron|rmb|rub|sar|sek|sgd|thb|try|twd|uah|usd|vnd|zar"
)
_AROUND = re.compile(rf"^(?:{_CURRENCIES})?\s*(.*?)\s*(?:{_CURRENCIES})?$", re.IGNORECASE)
_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


#: What stands where a number is not known, besides nothing; in lower case.
_ABSENT = ("", "none", "null", "nan", "n/a", "na")


class NotANumber(ValueError):
    """A text that the rule does not read. The message says why."""


def is_absent(value: object) -> bool:
    """Whether a value says that there is no number: ``None``, NaN, a blank text, or a word such as ``n/a``."""
    if isinstance(value, str):
        return value.strip().casefold() in _ABSENT
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_number(text: str, decimal: str = "") -> float:
    """Return the number that a text says.

    Args:
        text: as it stands in a cell.
        decimal: the decimal sign, ``.`` or ``,``; "" for a point where a comma is ambiguous.

    Raises:
        NotANumber: the rule does not read it.
    """
    found = _AROUND.match(text.strip())
    digits = found[1] if found else ""
    sign, group = (",", ".") if decimal == "," else (".", ",")
    if decimal != "," and _PLAIN.fullmatch(digits):
        return float(digits)
    grouped = re.fullmatch(
        rf"([+-]?)(\d{{1,3}}(?:[{_SPACES}'’{re.escape(group)}]\d{{3}})+|\d+)(?:{re.escape(sign)}(\d+))?",
        digits,
    )
    if grouped is None:
        raise NotANumber(f"not a number: {ascii(text)[:60]}")
    if not decimal and group in grouped[2] and not grouped[3]:
        raise NotANumber(f"ambiguous: {ascii(text)[:60]} has a comma before three digits; give --decimal")
    return float(f"{grouped[1]}{re.sub(r'[^0-9]', '', grouped[2])}.{grouped[3] or 0}")


def decimal_sign(texts: Iterable[str]) -> str:
    """Return the decimal sign that cells show: ``,`` where a comma decides it and no point contradicts; else ""."""
    comma = False
    for text in texts:
        body = text.strip()
        if "." in body:
            return ""
        comma = comma or bool(re.search(r"\d,(\d{1,2}|\d{4,})(?!\d)", body))
    return "," if comma else ""
