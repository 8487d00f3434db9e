"""Texts and ratings of stored items, without their images: what baselines read, and what tells known items from new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rating_train.config.task import task_of
from rating_train.errors import UserError
from rating_train.log import Progress
from rating_train.shards.manifest import check_split, read_manifest
from rating_train.shards.mds_read import iter_texts, read_index
from rating_train.shards.titles import product_group


@dataclass(frozen=True)
class Texts:
    """Items of a split, in stored order.

    Attributes:
        ids: of the items.
        texts: all text fields of an item, joined by spaces.
        categories: of the items, or "".
        ratings: (N,) float64, in the unit of the target.
        of: items of the split, of which these may be a sample.
    """

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    ratings: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    of: int = 0


def read_texts(data: Path, split: str, most: int | None = None) -> Texts:
    """Read texts and ratings of a split, or of ``most`` of its items, chosen at random with a fixed seed.

    Raises:
        UserError: no such dataset or split, or its shards are not here or damaged.
    """
    names = task_of(check_split(data, split)).field_names
    total = sum(shard["samples"] for shard in read_index(data / split))
    found, ratings = Texts(), []
    for item in _items(data, split, most):
        found.ids.append(item["id"])
        found.texts.append(" ".join(item[name] for name in names))
        found.categories.append(item.get("main_category", ""))
        ratings.append(float(item["rating"]))
    return replace(found, ratings=np.array(ratings, np.float64), of=total)


@dataclass(frozen=True)
class Seen:
    """Which evaluated items were trained on.

    Attributes:
        items: evaluated items.
        by_id: of them, those whose id is in the training split.
        by_group: further ones, of a product that is there under another id.
        unknown: why it cannot be told; "" if it can.
    """

    items: int
    by_id: int = 0
    by_group: int = 0
    unknown: str = ""

    def warning(self) -> str:
        """Return what to tell whoever reads the metrics, or ""."""
        if self.unknown:
            return f"whether these items were trained on is not known: {self.unknown}"
        if not self.by_id + self.by_group:
            return ""
        share = 100 * (self.by_id + self.by_group) / self.items
        return (
            f"{self.by_id + self.by_group:,} of {self.items:,} items ({share:.1f} %) were trained on "
            f"({self.by_id:,} by their id, {self.by_group:,} more by their product): the metrics are too good"
        )


def read_texts_of_all(datasets: Sequence[Path], split: str, most: int) -> Texts:
    """Read texts and ratings of a split of several datasets, an equal number at most of each (:func:`read_texts`)."""
    found = [read_texts(data, split, -(-most // len(datasets))) for data in datasets]
    return Texts(
        [i for each in found for i in each.ids],
        [text for each in found for text in each.texts],
        [category for each in found for category in each.categories],
        np.concatenate([each.ratings for each in found]),
        sum(each.of for each in found),
    )


def trained_on(
    trained: Mapping[Path, str], trained_split: str, evaluated: Path, split: str, items: int
) -> Seen:
    """Count the evaluated items that are in the training split, by id and by product group.

    Args:
        trained: datasets of the training -> their fingerprints as the training knew them; "" where that is not known.
        trained_split: their split.
        evaluated: dataset of the evaluation; may be the same.
        split: its split.
        items: evaluated items.
    """
    try:
        known = read_manifest(evaluated).get("fingerprint") if any(trained.values()) else None
        if split == trained_split and known in trained.values():
            return Seen(items, by_id=items)
        ids, groups = set(), set()
        for data, fingerprint in trained.items():
            if fingerprint and fingerprint == known:
                continue  # the splits of one dataset have no product in common
            if fingerprint and read_manifest(data).get("fingerprint") != fingerprint:
                return Seen(items, unknown=f"{data} is no longer the dataset of the training")
            check_split(data, trained_split)
            for item in _items(data, trained_split):
                ids.add(item["id"])
                groups.add(product_group(item))
        if not ids:
            return Seen(items)
        by_id = by_group = 0
        for item in _items(evaluated, split):
            if item["id"] in ids:
                by_id += 1
            elif product_group(item) in groups:
                by_group += 1
    except UserError as e:
        return Seen(items, unknown=f"{e.what} ({e.where})")
    return Seen(items, by_id, by_group)


def _items(data: Path, split: str, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the items of a split, with their progress."""
    progress = Progress(f"reading the texts of {data / split}", None)
    for item in iter_texts(data / split, most):
        yield item
        progress.add(1)
    progress.close(complete=False)
