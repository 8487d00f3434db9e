"""Listings of the paper's task by the names of its fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rating_train.shards.schema import TEXT_FIELDS, Listing


def listing(
    item_id: str,
    title: str,
    description: str,
    features: str,
    main_category: str,
    image: str,
    rating: float,
    rating_count: float,
    group: str,
    more_images: tuple[str, ...] = (),
) -> Listing:
    """Return a listing."""
    texts = dict(zip(TEXT_FIELDS, (title, description, features, main_category)))
    return Listing(item_id, texts, main_category, image, rating, rating_count, group, more_images)


def changed(item: Listing, **values: Any) -> Listing:
    """Return a listing with other values; fields of the task by their names."""
    texts = {name: values.pop(name) for name in TEXT_FIELDS if name in values}
    category = texts.get("main_category", item.category)
    return replace(item, texts={**item.texts, **texts}, category=category, **values)
