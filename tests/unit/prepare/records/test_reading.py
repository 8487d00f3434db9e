"""Where a value is found in a record: by a name, whatever its case, or by a path into what is nested."""

from __future__ import annotations

from typing import Any

import pytest

from rating_train.prepare.records.reading import pick

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
