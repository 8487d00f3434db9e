"""The columns of a CSV or Parquet file: the paper's, in their order of preference, or those of another task."""

from __future__ import annotations

from collections.abc import Sequence

from rating_train.errors import UserError
from rating_train.prepare.records.reading import Reading

# Column names, in order of preference -> the name of the same thing in Amazon-2023 metadata.
_CSV_COLUMNS: dict[str, tuple[str, ...]] = {
    "parent_asin": ("id", "parent_asin"),
    "title": ("title",),
    "description": ("description",),
    "features": ("features",),
    "main_category": ("main_category",),
    "average_rating": ("rating", "average_rating"),
    "rating_number": ("rating_count", "rating_number"),
    "image_path": ("image", "image_path"),
    "image_paths": ("image_paths",),
    "group_id": ("group_id",),
}
RATINGS = ("average_rating", "rating_number")
_CSV_REQUIRED = ("parent_asin", *RATINGS)


def columns_or_check(
    header: Sequence[str], source: str, reading: Reading, what: str
) -> dict[str, int] | None:
    """Return the places of the paper's columns; for another task ``None``, once its columns are found to be there.

    Raises:
        UserError: columns are missing; names them, the sentence begins with ``what``.
    """
    if reading.is_native:
        return _paper_columns(header, source, reading, what)
    reading.check(header, source, what)
    return None


def _paper_columns(header: Sequence[str], source: str, reading: Reading, what: str) -> dict[str, int]:
    rated = reading.rated
    columns: dict[str, int] = {}
    for field, names in _CSV_COLUMNS.items():
        found = [header.index(name) for name in names if name in header]
        if found:
            columns[field] = found[0]
    required = [f for f in _CSV_REQUIRED if rated or f not in RATINGS]
    missing = ["|".join(_CSV_COLUMNS[f]) for f in required if f not in columns]
    fix = ""
    if rated and not columns.keys() >= {*RATINGS}:
        fix = (
            "add these columns, matched by the id (the item metadata of Amazon Reviews 2023 has both); "
            "listings without ratings can be neither trained on nor scored. Columns of other names: --map "
            "rating=score rating_count=votes; without any count: --map rating_count="
        )
    if reading.needs_text and not {"title", "description", "features"} & columns.keys():
        missing.append("title, description or features")
    if missing:
        raise UserError(
            f"{what} {'; '.join(missing)}",
            where=source,
            expected="id|parent_asin, title, description, features, main_category, rating|average_rating, "
            "rating_count|rating_number, image|image_path or image_paths, and perhaps group_id"
            if rated
            else "id|parent_asin, title, description, features, main_category, image|image_path or image_paths",
            fix=fix or "name other columns with --map NAME=COLUMN, for example --map rating=score",
        )
    return columns
