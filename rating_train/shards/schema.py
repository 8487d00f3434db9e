"""What a listing is, and what a dataset directory contains. Imports no torch and no streaming.

A dataset directory (made by ``rating-train prepare``)::

    DATA/manifest.json      written last: a directory without it is not a dataset
    DATA/quarantine.jsonl   every dropped record: source, line, id, reason, detail
    DATA/train/  DATA/val/  MDS shards with hashes and their index.json
"""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
MANIFEST_VERSION = 1
SPLITS = ("train", "val", "test")

RATING_MIN = 1.0
RATING_MAX = 5.0

# Columns of every MDS sample and their encodings. Text is stored up to the cap of `prepare`, so that the number of
# characters that a model reads remains a training option.
MDS_COLUMNS: dict[str, str] = {
    "id": "str",
    "image": "bytes",
    "title": "str",
    "description": "str",
    "features": "str",
    "main_category": "str",
    "rating": "float32",
    "rating_count": "int64",
}

TEXT_FIELDS = ("title", "description", "features", "main_category")


@dataclass(frozen=True)
class Listing:
    """One product as a source describes it, before its image is opened.

    Attributes:
        rating: the average star rating, in [1, 5].
        rating_count: the number of ratings behind it.
        image: a path relative to the images folder, a URL, or "".
        group: the same for all variants of one product, which belong to one split (the id where a source has none).
        more_images: further images, in the order in which they are tried if ``image`` cannot be used.
    """

    id: str
    title: str
    description: str
    features: str
    main_category: str
    image: str
    rating: float
    rating_count: int
    group: str
    more_images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A record that did not become a sample: where it was, and why (``reason`` is a fixed word)."""

    source: str
    line: int
    id: str
    reason: str
    detail: str
