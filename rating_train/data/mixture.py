"""The order of several datasets that are mixed by weight: pure functions of (sizes, shares, seed, epoch).

The samples of a mixture are those of its sources, one source after another: sample i of source s has the id
``offset_s + i``, with the sizes of the sources before it as the offset. An epoch has N ids, N being the sum of all
sizes.

Each source is an endless stream: its shuffled passes one after another. An epoch takes the next piece of each stream,
as long as the source's share of N. So what one epoch leaves of a pass comes first in the next: no sample of a pass is
lost, and none comes twice before all others came once. Within the epoch the pieces are spread evenly: of any K ids in a
row, each source has its share to within a few items. :mod:`.order` cuts the epochs into global batches, as those of one
dataset.

Legend: N samples of an epoch, S sources, n_s samples of source s, K ids in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rating_train.data.order import Ids
from rating_train.errors import UserError

_CHUNK = 1 << 20  # ids that are merged at a time

#: Gives the sample ids of one pass over a source, (n_s,), as a pure function of the number of the pass.
PassIds = Callable[[int], Ids]


@dataclass(frozen=True)
class Mixture:
    """Sizes and shares of the sources, which decide how many items of each an epoch has.

    Args:
        sizes: n_s of each source.
        shares: of each source; they add up to 1.
    """

    sizes: Sequence[int]
    shares: Sequence[Fraction]

    @property
    def samples(self) -> int:
        """N: items of an epoch, and number of different ids."""
        return sum(self.sizes)

    @property
    def offsets(self) -> list[int]:
        """The id of each source's first sample."""
        return [sum(self.sizes[:s]) for s in range(len(self.sizes))]

    def spans(self, epoch: int) -> list[tuple[int, int]]:
        """Return the part [begin, end) of each source's stream that an epoch takes.

        Rounded is the end of the sources before and of each source together, over all epochs so far. So the lengths of
        an epoch add up to N exactly, and after any number of epochs each source has its share to within one item.
        """
        begin, end = ([0, *self._ends(e)] for e in (epoch, epoch + 1))
        return [(begin[s + 1] - begin[s], end[s + 1] - end[s]) for s in range(len(self.sizes))]

    def refuse_tiny_shares(self, names: Sequence[str]) -> None:
        """Raise :class:`UserError` where a source has less than two items of an epoch: rounding could make it none."""
        for name, share in zip(names, self.shares, strict=True):
            if share * self.samples < 2:
                raise UserError(
                    f"a source has {float(share * self.samples):.3g} of the {self.samples:,} items of an epoch",
                    where=f"data.sources: {name}",
                    expected="at least 2",
                    fix="raise its weight, or leave it out",
                )

    def _ends(self, epochs: int) -> list[int]:
        total = epochs * self.samples
        return [round(sum(self.shares[: s + 1], Fraction()) * total) for s in range(len(self.sizes))]


def source_seed(seed: int, number: int) -> int:
    """Return the seed of a source's shuffle: the run's own for the first; unrelated ones for the others.

    With one seed, two datasets of equal sizes, such as an original and a translation, would be read in step.
    """
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def mixed_epoch(mixture: Mixture, passes: Sequence[PassIds], epoch: int) -> Ids:
    """Return the ids of an epoch in order: (N,) int32.

    Args:
        mixture: sizes and shares.
        passes: of each source; ids count from 0 in each.
        epoch: number of the epoch.
    """
    if mixture.samples >= 2**31:
        raise ValueError(f"{mixture.samples} samples do not fit into int32 ids")
    parts = [
        _stream(pass_ids, size, offset, *span)
        for pass_ids, size, offset, span in zip(
            passes, mixture.sizes, mixture.offsets, mixture.spans(epoch), strict=True
        )
    ]
    return spread(parts)


def _stream(pass_ids: PassIds, size: int, offset: int, begin: int, end: int) -> Ids:
    """Return the ids at [begin, end) of the passes one after another, counted from ``offset``: int32."""
    ids = np.empty(end - begin, np.int32)
    position = begin
    while position < end:
        number, first = divmod(position, size)
        take = min(size - first, end - position)
        ids[position - begin : position - begin + take] = pass_ids(number)[first : first + take]
        position += take
    ids += np.int32(offset)
    return ids


def spread(parts: Sequence[Ids]) -> Ids:
    """Merge the parts into one order that keeps the order of each and spreads it evenly: (N,) int32.

    Item j of a part of n stands at (j + 1/2) / n of the way; equal places are taken in the order of the parts. Merged
    in chunks of the way, so that 16 million ids need little more memory than themselves.

    Args:
        parts: int32 ids, (n_s,) each.
    """
    total = sum(map(len, parts))
    merged = np.empty(total, np.int32)
    chunks = max(1, -(-total // _CHUNK))
    written = 0
    begins = [0] * len(parts)
    for chunk in range(1, chunks + 1):
        ends = [_before(chunk, chunks, len(part)) for part in parts]
        places = np.concatenate(
            [(2 * np.arange(b, e) + 1) / (2 * max(1, len(part))) for part, b, e in zip(parts, begins, ends)]
        )
        ids = np.concatenate([part[b:e] for part, b, e in zip(parts, begins, ends)])
        merged[written : written + len(ids)] = ids[np.argsort(places, kind="stable")]
        written += len(ids)
        begins = ends
    return merged


def _before(chunk: int, chunks: int, items: int) -> int:
    """Count the items of a part that stand before chunk / chunks of the way: exactly, in integers."""
    return min(items, max(0, -(-(2 * items * chunk - chunks) // (2 * chunks))))
