"""The door to MosaicML Streaming for reading: shards by streaming, their order by :mod:`.order`.

Streaming's own iteration order depends on the number of nodes, ranks and workers, its state counts what was
yielded instead of what was trained on, and after the last batch of an epoch it resumes into an empty epoch.
So its transport (shards, download, cache, threads that prepare ahead) is kept, and the ids are given to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.shuffle import get_shuffle
from torch.utils.data import get_worker_info

from rating_train.data.order import Ids, interleave, worker_part
from rating_train.data.schema import MANIFEST_NAME, MANIFEST_VERSION, SPLITS
from rating_train.errors import UserError
from rating_train.files import read_json, sha256_file


class OrderedDataset(StreamingDataset):
    """A split whose sample order is given, one rank's batches at a time, before each iteration."""

    _batches: Ids | None = None

    def set_batches(self, batches: Ids) -> None:
        """Read these batches next: (K, B) int64 sample ids of this rank. Call before ``iter(loader)``."""
        self._batches = batches

    # The two hooks by which StreamingDataset.__iter__ learns what to read. Overriding both leaves out its
    # shared-memory epoch counter and barrier, which a dead neighbour would hold for ever.
    def _resume_incr_epoch(self) -> tuple[int, int]:
        return 0, 0

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Ids:
        if self._batches is None:
            raise RuntimeError("set_batches() was not called before iterating")
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return np.ascontiguousarray(worker_part(self._batches, worker, workers)).reshape(-1)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a dataset directory.

    Raises:
        UserError: the directory or its manifest is missing (an unfinished build), or of another version.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            "dataset directory not found", where=root, fix="make it with `rating-train prepare --out`"
        )
    if not (root / MANIFEST_NAME).is_file():
        raise UserError(
            f"not a dataset: it has no {MANIFEST_NAME} (written last, so the build did not finish)",
            where=root,
            fix="run `rating-train prepare` again",
        )
    manifest = read_json(root / MANIFEST_NAME)
    if manifest.get("version") != MANIFEST_VERSION:
        raise UserError(
            f"the dataset has version {manifest.get('version')}",
            where=root,
            expected=f"version {MANIFEST_VERSION}",
        )
    return manifest


def check_split(path: str | Path, split: str) -> dict[str, Any]:
    """Verify a split against the manifest before anything trains on it; returns the manifest.

    Checks the index by its hash and every shard by its size in bytes. (Streaming checks hashes only when it
    downloads, never for local shards.)
    """
    root = Path(path)
    manifest = read_manifest(root)
    if split not in manifest["splits"]:
        raise UserError(
            f"the dataset has no split {split!r}",
            where=root / MANIFEST_NAME,
            expected=f"one of {', '.join(manifest['splits'])}" if manifest["splits"] else f"any of {SPLITS}",
            fix="set data.train_split / data.eval_split, or prepare with another --val-fraction",
        )
    index = root / split / "index.json"
    if not index.is_file():
        raise UserError("the split's index is missing", where=index, fix="run `rating-train prepare` again")
    if sha256_file(index) != manifest["splits"][split]["index_sha256"]:
        raise UserError(
            "the index is not the one in the manifest", where=index, fix="prepare the dataset again"
        )
    problems = []
    for shard in read_json(index)["shards"]:
        name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        file = root / split / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            problems.append(
                f"{name} {'is missing' if found is None else f'has {found} bytes instead of {size}'}"
            )
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(
            f"damaged shards: {shown}", where=root / split, fix="copy or prepare the dataset again"
        )
    return manifest


def open_split(path: str | Path, split: str, rank_items: int) -> OrderedDataset:
    """Open a checked split. A collective: every rank calls it.

    Args:
        path: dataset directory. Local only: streaming's cache limit could delete the only copy.
        split: sub-directory.
        rank_items: items per batch of one rank.
    """
    return OrderedDataset(local=str(Path(path).resolve()), split=split, batch_size=rank_items, shuffle=False)


def shuffled_epoch(
    shard_samples: Ids, *, seed: int, epoch: int, block_samples: int, canonical_nodes: int, shuffle: bool
) -> Ids:
    """(N,) int64: the ids of an epoch in order, by streaming's py1e shuffle (shards, then within blocks)."""
    samples = int(shard_samples.sum())
    if not shuffle:
        return np.arange(samples, dtype=np.int64)
    parts = min(canonical_nodes, samples)
    return interleave(get_shuffle("py1e", shard_samples, parts, seed, epoch, block_samples), parts)
