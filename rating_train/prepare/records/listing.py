"""Turn one record, in the field names of Amazon Reviews 2023, into a :class:`Listing` or the reason why it is none.

Reasons given here: ``bad_id``, ``bad_type``, ``missing_field``, ``bad_rating``, ``bad_rating_count``, ``bad_number``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from rating_train.config.task import Task
from rating_train.prepare.records.numbers import NotANumber
from rating_train.prepare.records.reading import Reading
from rating_train.shards.schema import Dropped, Listing

MAX_ID_CHARS = 256
MAX_RATING_COUNT = 2**63 - 1  # stored as int64
IMAGE_SEPARATOR = ";"  # between the paths of an ``image_paths`` cell


class _Refused(Exception):
    """A record is not a listing. Internal: never leaves this module."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def to_listing(
    record: Mapping[str, Any],
    source: str,
    line: int,
    reading: Reading = Reading(),  # noqa: B008  # immutable
) -> Listing | Dropped:
    """Return the listing in a record's fields; nothing that is in them can raise.

    Args:
        record: fields by their names in Amazon Reviews 2023 and in the task.
        source: the file that it comes from; with ``line``, its place in a :class:`Dropped`.
        reading: which task, and whether a target is needed. If not, none is read: the listing's rating is NaN.
    """
    item_id, task, rated = "", reading.task, reading.rated
    try:
        item_id = _id(record.get("parent_asin"))
        rating = _rating(record.get("average_rating"), reading) if rated else math.nan
        image, *more_images = _images(record) or [""]
        return Listing(
            id=item_id,
            texts={name: _text(record, name) for name in task.field_names},
            category=_text(record, "main_category") if task.category else "",
            image=image,
            rating=rating,
            rating_count=0 if math.isnan(rating) else _weight(record.get("rating_number"), task),
            group=_group(record.get("group_id"), item_id),
            more_images=tuple(more_images),
        )
    except _Refused as e:
        return Dropped(source, line, item_id, e.reason, _clean(e.detail))


def _id(value: Any) -> str:
    if value is None:
        raise _Refused("missing_field", "parent_asin")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Refused("bad_id", f"parent_asin is of type {type(value).__name__}")
    item_id = str(value).strip()
    if not item_id:
        raise _Refused("missing_field", "parent_asin")
    if len(item_id) > MAX_ID_CHARS or not item_id.isprintable():
        raise _Refused("bad_id", f"{len(item_id)} characters: {item_id[:40]!a}")
    return item_id


def _group(value: Any, item_id: str) -> str:
    """Return the product group; the item is its own where the cell is blank or NaN, as pandas writes missing ones."""
    is_blank = value is None or value != value or not f"{value}".strip()
    return item_id if is_blank else _clean(f"{value}")


def _text(record: Mapping[str, Any], field: str) -> str:
    try:
        return plain_text(record.get(field), field)
    except TypeError as e:
        raise _Refused("bad_type", str(e)) from e


def plain_text(value: Any, field: str) -> str:
    """Return the text of a field: as it is, the parts of a list joined by spaces, "" for ``None``.

    Raises:
        TypeError: it is neither text nor a list of texts; the message names ``field``.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, list) and all(v is None or isinstance(v, str) for v in value):
        return _clean(" ".join(v for v in value if v))
    raise TypeError(f"{field} is neither text nor a list of texts")


def _rating(value: Any, reading: Reading) -> float:
    target = reading.task.target
    if value is None:
        if reading.unrated == "predict":
            return math.nan
        name = "average_rating" if target.column == "rating" else target.column
        raise _Refused("missing_field", name)
    if isinstance(value, NotANumber):
        raise _Refused("bad_number", f"{target.column}: {value}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused("bad_rating", f"not a number: {ascii(value)[:60]}")
    if problem := target.problem(value):
        raise _Refused("bad_rating", f"{ascii(value)[:60]} is {problem}")
    return float(value)


def _weight(value: Any, task: Task) -> float | None:
    """Return a number of ratings, or the weight of a task that has one; ``None`` of a task that has none."""
    if not task.weight:
        return None
    if value is None:
        raise _Refused("missing_field", "rating_number" if task.weight == "rating_count" else task.weight)
    if isinstance(value, NotANumber):
        raise _Refused("bad_number", f"{task.weight}: {value}")
    if not task.counted:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 <= value <= sys.float_info.max:  # an integer may be larger than any float
            raise _Refused(
                "bad_rating_count", f"the weight is not a number of 0 or more: {ascii(value)[:60]}"
            )
        return float(value)
    is_integer = isinstance(value, int) or (
        isinstance(value, float) and math.isfinite(value) and value == int(value)
    )
    if isinstance(value, bool) or not is_integer or not 0 <= value <= MAX_RATING_COUNT:
        raise _Refused("bad_rating_count", f"not a count: {ascii(value)[:60]}")
    return int(value)


def _images(record: Mapping[str, Any]) -> list[str]:
    """Return the paths or URLs that a record names, each once; else the URL of its main image; else nothing.

    ``image_path`` comes before ``image_paths``, which is one text (``a.jpg;b.jpg``) or a list of texts. ``images`` is
    Amazon's, or a list of texts: paths, URLs, or the places of images in the rows of a file.
    """
    path, paths, images = (record.get(name) for name in ("image_path", "image_paths", "images"))
    if path is not None and not isinstance(path, str):
        raise _Refused("bad_type", "image_path is not text")
    if isinstance(paths, str):
        paths = paths.split(IMAGE_SEPARATOR)
    if paths is not None and not (isinstance(paths, list) and all(isinstance(p, str) for p in paths)):
        raise _Refused("bad_type", "image_paths is neither text nor a list of texts")
    local = [path] if path else []
    local += [p.strip() for p in paths or () if p.strip()]
    if isinstance(images, list) and all(image is None or isinstance(image, str) for image in images):
        found = local or [image.strip() for image in images if image and image.strip()]
    else:
        found = local or [url for url in (_main_image_url(images),) if url]
    return list(dict.fromkeys(map(_clean, found)))


def _main_image_url(images: Any) -> str:
    """Return the URL of the MAIN picture (else of the first one): ``hi_res``, else ``large``, else "".

    ``images`` is either a dict of parallel lists or a list of dicts; both forms of the data set exist.
    """
    if not images:
        return ""
    if isinstance(images, dict):
        lists = {k: v for k, v in images.items() if isinstance(v, list)}
        variants = lists.get("variant", [])
        at = variants.index("MAIN") if "MAIN" in variants else 0
        main = {k: v[at] for k, v in lists.items() if at < len(v)}
    elif isinstance(images, list) and all(isinstance(entry, dict) for entry in images):
        main = next((entry for entry in images if entry.get("variant") == "MAIN"), images[0])
    else:
        raise _Refused("bad_type", "images is neither a dict of lists nor a list of dicts")
    urls = [url for url in (main.get("hi_res"), main.get("large")) if isinstance(url, str) and url]
    return urls[0] if urls else ""


def is_clean(text: str) -> bool:
    """Whether a text can be stored as UTF-8 (it has no lone surrogates)."""
    return text == _clean(text)


def _clean(text: str) -> str:
    """Replace lone surrogates (valid in JSON escapes, impossible in UTF-8) by ``?``."""
    return text.encode("utf-8", "replace").decode("utf-8")
