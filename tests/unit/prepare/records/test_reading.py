"""How a record is read: its values by names or paths, and the options of CSV files."""

from __future__ import annotations

from typing import Any

import pytest

from rating_train.errors import UserError
from rating_train.prepare.records.reading import Reading, pick

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
