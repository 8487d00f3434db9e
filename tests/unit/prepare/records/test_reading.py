"""How a record is read: its values by names or paths, and the options of CSV files."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rating_train.config.task import Target, Task, TextField
from rating_train.errors import UserError
from rating_train.prepare.records.listing import to_listing
from rating_train.prepare.records.reading import Reading, pick
from rating_train.shards.schema import Dropped, Listing

RECORD: dict[str, Any] = {
    "Images": {"large": ["a.jpg", "b.jpg"]},
    "a.b": 1,
    "list": [[5]],
    "parent_asin": "x",
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("images.large[0]", "a.jpg"),
        ("images.Large[1]", "b.jpg"),
        ("images.large[2]", None),
        ("images.small[0]", None),
        ("images", {"large": ["a.jpg", "b.jpg"]}),
        ("a.b", 1),
        ("list[0][0]", 5),
        ("id", "x"),
        ("absent.large", None),
        ("", None),
    ],
)
def test_a_value_at_a_path(path: str, value: Any) -> None:
    assert pick(RECORD, path) == value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"delimiter": ";;"}, "--delimiter ';;'"),
        ({"delimiter": '"'}, "--delimiter"),
        ({"delimiter": "\n"}, "--delimiter"),
        ({"encoding": "nope"}, "--encoding 'nope'"),
        ({"encoding": "base64"}, "--encoding"),
        ({"encoding": "a\0b"}, "--encoding"),
        ({"encoding": "nope", "delimiter": "ab"}, "2 problems"),
    ],
)
def test_what_no_csv_file_is_written_with_is_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Reading(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("delimiter", "separator"), [("tab", "\t"), ("\\t", "\t"), ("|", "|"), ("", "")])
def test_the_delimiter_is_one_character(delimiter: str, separator: str) -> None:
    assert Reading(delimiter=delimiter, encoding="latin-1").separator == separator


THINGS = Task(
    target=Target(column="price", name="price", unit="", lower=None, upper=None),
    id="id", group="", category="kind", weight="weight", weight_kind="any",
    fields=[TextField(name="size", words="Size:")], images=[],
)  # fmt: skip


def read_thing(**record: Any) -> Listing | Dropped:
    reading = Reading(THINGS, unrated="predict")
    thing = {"id": "a", "price": 5, "weight": 1, "kind": "k", "size": "s", **record}
    return to_listing(reading.record(thing), "a.jsonl", 1, reading)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345678, "12345678"),
        (12345678.0, "12345678"),
        (-3, "-3"),
        (0.1 + 0.2, "0.30000000000000004"),
        (123456.789, "123456.789"),
        (float(np.float32(4.1)), "4.1"),
        (1e300, "1e+300"),
        (10**400, "1" + "0" * 400),
        (math.inf, "inf"),
        (math.nan, ""),
        (None, ""),
        ("007", "007"),
    ],
    ids=lambda value: f"{value!s:.12}",
)
def test_a_number_in_a_text_keeps_its_digits(value: Any, text: str) -> None:
    thing = read_thing(size=value, kind=value)
    assert isinstance(thing, Listing) and (thing.texts["size"], thing.category) == (text, text)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"size": 10**5000}, "bad_type"),
        ({"size": True}, "bad_type"),
        ({"weight": 10**400}, "bad_rating_count"),
        ({"price": 10**400}, "bad_rating"),
        ({"price": "12K"}, "bad_number"),
        ({"weight": "many"}, "bad_number"),
        ({"weight": "n/a"}, "missing_field"),
    ],
    ids=["digits", "truth", "weight", "target", "multiplier", "word", "absent"],
)
def test_what_cannot_be_read_is_dropped(record: dict[str, Any], reason: str) -> None:
    thing = read_thing(**record)
    assert isinstance(thing, Dropped) and thing.reason == reason


@pytest.mark.parametrize("price", [None, "", " ", "n/a", "N/A", "NA", "None", "null", "NaN", math.nan])
def test_a_number_that_is_not_known_is_absent(price: Any) -> None:
    thing = read_thing(price=price)
    assert isinstance(thing, Listing) and math.isnan(thing.rating)
