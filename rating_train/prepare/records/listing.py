"""Turn one record, in the field names of Amazon Reviews 2023, into a :class:`Listing` or the reason why it is none.

Reasons given here: ``bad_id``, ``bad_type``, ``missing_field``, ``bad_rating``, ``bad_rating_count``.
"""

from __future__ import annotations

import math
from typing import Any

from rating_train.shards.schema import RATING_MAX, RATING_MIN, Dropped, Listing

MAX_ID_CHARS = 256
MAX_RATING_COUNT = 2**63 - 1  # stored as int64
IMAGE_SEPARATOR = ";"  # between the paths of an ``image_paths`` cell


class _Refused(Exception):
    """A record is not a listing. Internal: never leaves this module."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def to_listing(record: dict[str, Any], source: str, line: int, rated: bool = True) -> Listing | Dropped:
    """Return the listing in a record's fields; nothing that is in them can raise.

    Args:
        record: fields by their names in Amazon Reviews 2023.
        source: the file that it comes from; with ``line``, its place in a :class:`Dropped`.
        rated: whether a rating is needed. If not, none is read: the listing's rating is NaN, of 0 ratings.
    """
    item_id = ""
    try:
        item_id = _id(record.get("parent_asin"))
        group = record.get("group_id")
        image, *more_images = _images(record) or [""]
        return Listing(
            id=item_id,
            title=_text(record, "title"),
            description=_text(record, "description"),
            features=_text(record, "features"),
            main_category=_text(record, "main_category"),
            image=image,
            rating=_rating(record.get("average_rating")) if rated else math.nan,
            rating_count=_rating_count(record.get("rating_number")) if rated else 0,
            group=item_id if group is None else _clean(f"{group}"),
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


def _text(record: dict[str, Any], field: str) -> str:
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


def _rating(value: Any) -> float:
    if value is None:
        raise _Refused("missing_field", "average_rating")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused("bad_rating", f"not a number: {ascii(value)[:60]}")
    if not RATING_MIN <= value <= RATING_MAX:  # False for NaN as well; compares huge integers exactly
        raise _Refused("bad_rating", f"{ascii(value)[:60]} is outside [{RATING_MIN:g}, {RATING_MAX:g}]")
    return float(value)


def _rating_count(value: Any) -> int:
    if value is None:
        raise _Refused("missing_field", "rating_number")
    is_integer = isinstance(value, int) or (
        isinstance(value, float) and math.isfinite(value) and value == int(value)
    )
    if isinstance(value, bool) or not is_integer or not 0 <= value <= MAX_RATING_COUNT:
        raise _Refused("bad_rating_count", f"not a count: {ascii(value)[:60]}")
    return int(value)


def _images(record: dict[str, Any]) -> list[str]:
    """Return the paths or URLs that a record names, each once; else the URL of its main image; else nothing.

    ``image_path`` comes before ``image_paths``, which is one text (``a.jpg;b.jpg``) or a list of texts.
    """
    path, paths = record.get("image_path"), record.get("image_paths")
    if path is not None and not isinstance(path, str):
        raise _Refused("bad_type", "image_path is not text")
    if isinstance(paths, str):
        paths = paths.split(IMAGE_SEPARATOR)
    if paths is not None and not (isinstance(paths, list) and all(isinstance(p, str) for p in paths)):
        raise _Refused("bad_type", "image_paths is neither text nor a list of texts")
    local = [path] if path else []
    local += [p.strip() for p in paths or () if p.strip()]
    found = local or [url for url in (_main_image_url(record.get("images")),) if url]
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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _clean(text: str) -> str:
    """Replace lone surrogates (valid in JSON escapes, impossible in UTF-8) by ``?``."""
    return text if is_clean(text) else text.encode("utf-8", "replace").decode("utf-8")
