"""What a directory of features is made of, so that it is read for nothing else. Imports no torch.

The directory has the layout of a dataset: a manifest, and for each split shards with the same samples in the same order
and the same division into shards as the dataset's, with the bytes of the visual tokens in place of the image.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rating_train.config.schema import Config, DataConfig, SourceConfig
from rating_train.errors import UserError
from rating_train.shards.manifest import check_split, read_manifest
from rating_train.shards.schema import MANIFEST_NAME

#: Key of the manifest.
KEY = "features"
_BYTES = {"bfloat16": 2, "float32": 4}
_REMAKE = "make them again with `rating-train features`, or set data.features='' to read the images"


def features_dtype(config: Config) -> str:
    """Return the dtype of the visual tokens that a run computes, or reads in place of its images."""
    return "bfloat16" if config.train.precision == "bf16" else "float32"


@dataclass(frozen=True)
class Features:
    """What features were computed from.

    Attributes:
        data: fingerprint of the dataset.
        weights: SHA-256 of vision tower and connector (:func:`rating_train.weights.fingerprint.tower_fingerprint`).
        image_px: side of the square that was encoded, in pixels.
        tokens: V, visual tokens of an item.
        width: D, values of a token.
        dtype: of a value: bfloat16 or float32.
    """

    data: str
    weights: str
    image_px: int
    tokens: int
    width: int
    dtype: str

    @property
    def item_bytes(self) -> int:
        """Bytes of an item's visual tokens."""
        return self.tokens * self.width * _BYTES[self.dtype]


def read_features(path: str | Path) -> Features:
    """Return what the features of a directory were computed from.

    Raises:
        UserError: it holds none.
    """
    entry = read_manifest(path).get(KEY)
    names = {field.name for field in dataclasses.fields(Features)}
    if not isinstance(entry, dict) or entry.keys() != names or entry["dtype"] not in _BYTES:
        raise UserError(
            "the directory holds no features",
            where=f"data.features={path}",
            expected="the directory that `rating-train features --out` made",
        )
    return Features(**entry)


def features_of(config: DataConfig, source: SourceConfig) -> Features | None:
    """Return the features that are read in place of the images of a source; ``None`` where its images are read."""
    return read_features(config.features) if config.features and source.path == config.path else None


def check_features(config: DataConfig, split: str) -> dict[str, Any]:
    """Check that ``data.features`` belongs to ``data.path``, whose shards are not looked at; return its manifest.

    Raises:
        UserError: the features are of another dataset or image size, lack the split, or are damaged.
    """
    found = read_features(config.features)
    manifest = read_manifest(config.path)
    where = f"data.features={config.features}"
    if found.data != manifest.get("fingerprint"):
        raise UserError(f"the features are of another dataset than {config.path}", where=where, fix=_REMAKE)
    if found.image_px != config.image_px:
        raise UserError(
            f"the features are of images of {found.image_px} pixels, data.image_px is {config.image_px}",
            where=where,
            fix=_REMAKE,
        )
    check_split(config.features, split)
    return manifest


def refuse_other_weights(path: str, weights: str, dtype: str) -> None:
    """Refuse features that another vision tower or connector computed, or the same one in another precision.

    Args:
        path: of the features.
        weights: fingerprint of the model's.
        dtype: in which the model computes.

    Raises:
        UserError: see above.
    """
    found = read_features(path)
    if (found.weights, found.dtype) != (weights, dtype):
        what = "weights" if found.dtype == dtype else f"precision ({found.dtype}, the run's is {dtype})"
        raise UserError(
            f"the features were computed with other {what} of vision tower and connector",
            where=f"data.features={path}",
            fix=_REMAKE,
        )


def refuse_features(path: str | Path, manifest: dict[str, Any]) -> None:
    """Refuse a directory of features where a dataset with images is read.

    Raises:
        UserError: see above.
    """
    if KEY in manifest:
        raise UserError(
            "this is a directory of features, without images",
            where=Path(path) / MANIFEST_NAME,
            fix="set data.path to the dataset that they were made from, and data.features to this directory",
        )
