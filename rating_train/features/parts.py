"""The folder in which features are collected until all are there: one part for each shard of the dataset.

::

    OUT.parts/features.json                 what is computed from what
    OUT.parts/train/part_00003/             a shard, its index, and stats.json; renamed when it is complete

A part holds the samples of one shard, so that the shards of the result divide the samples as the dataset's do, and
a shuffled epoch reads them in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rating_train.data.features.identity import KEY, Features
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, fsync_path, read_json
from rating_train.shards.mds_write import ShardWriter, encode_values, write_synced
from rating_train.shards.writer import DatasetWriter, RatingStats

_IDENTITY_NAME, _STATS_NAME = "features.json", "stats.json"
_LARGEST_SHARD = 2**32 - 1  # offsets in a shard are uint32


class PartsFolder:
    """The parts of one directory of features.

    Args:
        out: the directory that is being made.
    """

    def __init__(self, out: str | Path) -> None:
        self.folder = Path(f"{out}.parts")

    def open(self, features: Features, splits: Sequence[str]) -> None:
        """Make the folder, or take up one that was left; remove what was being written. Rank 0.

        Raises:
            UserError: it holds parts of other features.
        """
        path = self.folder / _IDENTITY_NAME
        for split in splits:
            (self.folder / split).mkdir(parents=True, exist_ok=True)
        if path.exists() and read_json(path) != dataclasses.asdict(features):
            raise UserError(
                "the folder holds features of other weights, data or image size, left by a command that was stopped",
                where=self.folder,
                fix="remove it, or choose another --out",
            )
        atomic_write_json(path, dataclasses.asdict(features))
        for left in self.folder.glob("*/*.tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def missing(self, split: str, shards: int) -> list[int]:
        """Return the shards of a split whose parts are not there."""
        return [shard for shard in range(shards) if not self._part(split, shard).is_dir()]

    def write(
        self,
        split: str,
        shard: int,
        samples: Sequence[Mapping[str, Any]],
        features: Sequence[bytes],
        columns: Mapping[str, str],
    ) -> None:
        """Write the part of a shard durably, then give it its name.

        Args:
            split: of the dataset.
            shard: its number in the split.
            samples: their columns but the image, in the order of the shard.
            features: of each, the bytes of its visual tokens.
            columns: of a sample, with their encodings.

        Raises:
            UserError: they do not fit into one shard.
        """
        part = self._part(split, shard)
        temporary = part.with_name(f"{part.name}.tmp-{secrets.token_hex(4)}")
        writer, stats = ShardWriter(temporary, _LARGEST_SHARD, columns), RatingStats()
        for sample, content in zip(samples, features, strict=True):
            writer.write(encode_values({**sample, "image": content}, columns))
            stats.add(float(np.float32(sample["rating"])))
        writer.finish()
        if len(writer.shards) != 1:
            raise UserError(
                f"the features of {len(samples):,} items do not fit into one shard of 4 GiB",
                where=f"shard {shard} of {split}",
                fix="prepare the dataset with smaller shards (--shard-size-mb)",
            )
        write_synced(temporary / _STATS_NAME, json.dumps(vars(stats)).encode())
        fsync_path(temporary)
        os.rename(temporary, part)
        fsync_path(part.parent)

    def merge(
        self, out: str | Path, manifest: Mapping[str, Any], shards: Mapping[str, int]
    ) -> dict[str, Any]:
        """Make ``out`` of all parts, which are linked, and remove them. Rank 0.

        Args:
            out: the directory to make.
            manifest: of the dataset.
            shards: split -> number of its shards.

        Returns:
            The manifest of the features.
        """
        head = {name: value for name, value in manifest.items() if name not in ("splits", "fingerprint")}
        with DatasetWriter(out) as writer:
            for split, count in shards.items():
                for shard in range(count):
                    part = self._part(split, shard)
                    writer.adopt(split, part, RatingStats(**read_json(part / _STATS_NAME)))
            made = writer.commit({**head, KEY: read_json(self.folder / _IDENTITY_NAME)})
        shutil.rmtree(self.folder, ignore_errors=True)
        return made

    def _part(self, split: str, shard: int) -> Path:
        return self.folder / split / f"part_{shard:05}"
