"""What a listing is, and what a dataset directory contains. Imports no torch and no streaming.

A dataset directory (made by ``rating-train prepare``)::

    DATA/manifest.json      written last: a directory without it is not a dataset
    DATA/quarantine.jsonl   every dropped record: source, line, id, reason, detail
    DATA/train/  DATA/val/  MDS shards with hashes and their index.json
"""

from __future__ import annotations

from dataclasses import dataclass

from rating_train.config.task import PAPER, Task

MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
MANIFEST_VERSION = 1
#: The last one holds items without a target, which can be scored only.
PREDICT_SPLIT = "predict"
SPLITS = ("train", "val", "test", PREDICT_SPLIT)

# Columns of an MDS sample of the paper's task, and their encodings. Text is stored up to the cap of `prepare`, so that
# the number of characters that a model reads remains a training option.
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


#: The text fields of the paper's task.
TEXT_FIELDS = PAPER.field_names


def sample_columns(task: Task) -> dict[str, str]:
    """Return the columns of a sample of a task, and their encodings.

    Whatever the task predicts is stored as ``rating``, and its weight as ``rating_count``.
    """
    if task.is_default and task.counted:
        return MDS_COLUMNS
    columns = {"id": "str", "rating": "float32", **dict.fromkeys(task.field_names, "str")}
    columns |= {"main_category": "str"} if task.category else {}
    columns |= {"image": "bytes"} if task.images else {}
    return columns | ({"rating_count": "float64"} if task.weight else {})


@dataclass(frozen=True)
class Listing:
    """One item as a source describes it, before its image is opened.

    Attributes:
        texts: name -> text of each field of the task.
        category: for slices and windows, or "".
        image: a path relative to the images folder, a URL, or "".
        rating: the number to predict, in its unit; NaN of an item that can be scored only.
        rating_count: the number of ratings behind it, or another weight; ``None`` in a task without one.
        group: the same for all variants of one product, which belong to one split (the id where a source has none).
        more_images: further images, in the order in which they are tried if ``image`` cannot be used.
    """

    id: str
    texts: dict[str, str]
    category: str
    image: str
    rating: float
    rating_count: float | None
    group: str
    more_images: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The title, by which variants of one product are found; "" in a task without one."""
        return self.texts.get("title", "")


@dataclass(frozen=True)
class Dropped:
    """A record that did not become a sample: where it was, and why (``reason`` is a fixed word)."""

    source: str
    line: int
    id: str
    reason: str
    detail: str
