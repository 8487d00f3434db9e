"""Several splits read as one: the samples and the shards of all of them, numbered one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rating_train.data.order import Ids
from rating_train.data.samples.streaming_dataset import Request, SplitDataset


class MixedDataset(Dataset[dict[str, Any]]):
    """The samples of several splits. Used as a :class:`SplitDataset` is.

    Args:
        parts: the splits, in the order of ``data.sources``.
    """

    def __init__(self, parts: Sequence[SplitDataset]) -> None:
        self.parts = list(parts)
        self.samples_per_shard: Ids = np.concatenate([part.samples_per_shard for part in parts])
        self._samples = np.cumsum([0, *map(len, parts)])
        self._shards = np.cumsum([0, *(len(part.samples_per_shard) for part in parts)])
        self._ends = np.cumsum(self.samples_per_shard)

    def __len__(self) -> int:
        return int(self._samples[-1])

    def __getitem__(self, sample: int) -> dict[str, Any]:
        return self.__getitems__(Request([sample]))[0]

    def __getitems__(self, request: Request) -> list[dict[str, Any]]:
        """Read the samples of a request, in its order. Raises as :meth:`SplitDataset.__getitems__`."""
        ids, part_of = _divide(request.ids, self._samples)
        checks, part_of_check = _divide(request.check, self._shards)
        ahead, part_of_ahead = _divide(request.ahead, self._shards)
        found: list[dict[str, Any]] = [{}] * len(ids)
        for number, part in enumerate(self.parts):
            places = np.flatnonzero(part_of == number)
            own = Request(
                ids[places],
                checks[part_of_check == number].tolist(),
                ahead[part_of_ahead == number].tolist(),
            )
            for place, sample in zip(places.tolist(), part.__getitems__(own), strict=True):
                found[place] = sample
        return found

    def identity(self) -> tuple[Any, ...]:
        """What tells these files from copies of them. Ranks share the hashing where all parts are the same files."""
        return tuple(part.identity() for part in self.parts)

    def shards_of(self, ids: Sequence[int] | Ids) -> list[int]:
        """Return the shard of each sample."""
        return np.searchsorted(self._ends, ids, side="right").tolist()

    def close(self) -> None:
        """Close files and stop fetching ahead. The next request starts both again."""
        for part in self.parts:
            part.close()


def _divide(numbers: Sequence[int] | Ids, ends: Ids) -> tuple[Ids, Ids]:
    """Return each number within its part, and the part."""
    every = np.asarray(numbers, np.int64)
    part = np.searchsorted(ends[1:], every, side="right")
    return every - ends[part], part
