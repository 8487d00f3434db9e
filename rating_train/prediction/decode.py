"""From rows to a batch, in the processes that read and decode images; what cannot be used becomes a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from rating_train.config.task import PAPER, Task
from rating_train.data.collate import Batch, Collator
from rating_train.data.workers.shared_blocks import Room, plain_room
from rating_train.prediction.model import SquareRecipe
from rating_train.prediction.rows import Row
from rating_train.prepare.images.choice import ImageCounts, first_usable
from rating_train.prepare.images.lookup import ImageProblem, ImageStore
from rating_train.prepare.images.square import grey_square, square_jpeg
from rating_train.prepare.images.stores import CacheStore, LayeredStore
from rating_train.shards.schema import Listing


@dataclass(frozen=True)
class Unit:
    """Rows of one forward pass: consecutive rows of one part.

    Attributes:
        part: the part's number.
        rows: at most the items of a batch; none in the last unit of an empty part.
        last: whether the part ends with it.
        cache: folder of the images that were fetched for the part, or "".
    """

    part: int
    rows: list[Row]
    last: bool
    cache: str = ""


@dataclass
class Decoded:
    """A unit, ready for the model.

    Attributes:
        ids: of all its rows.
        reasons: "" for each row that is in the batch, in its order; why not for the others.
        batch: the usable rows; ``None`` if there are none.
    """

    part: int
    last: bool
    ids: list[str]
    reasons: list[str] = field(default_factory=list)
    batch: Batch | None = None

    @property
    def images(self) -> Tensor | None:
        """The images of the batch, as :class:`Batch` has them."""
        return self.batch.images if self.batch else None

    def pin_memory(self) -> Decoded:
        """Called by the DataLoader's pinning thread, for copies that overlap with compute."""
        return replace(self, batch=self.batch.pin_memory()) if self.batch else self


class Decoder:
    """Turns units into batches. Picklable: DataLoader workers hold a copy.

    Args:
        collator: the model's.
        squares: how an image becomes the square that the model was trained on.
        store: where the images of listings are; ``None`` where the rows have their own.
        task: whose images are looked for, and what stands for a missing one.
    """

    def __init__(
        self, collator: Collator, squares: SquareRecipe, store: ImageStore | None = None, task: Task = PAPER
    ) -> None:
        self._collator, self._store = collator, store
        self._grey = grey_square(squares.size_px) if task.missing_image == "grey" else None
        self._convert = partial(square_jpeg, size_px=squares.size_px, quality=squares.jpeg_quality)

    def decode(self, unit: Unit, room: Room = plain_room) -> Decoded:
        """Decode a unit; ``room`` gives memory for the images."""
        store = self._store_of(unit)
        samples: list[Mapping[str, Any]] = []
        decoded = Decoded(unit.part, unit.last, [row.id for row in unit.rows])
        for row in unit.rows:
            reason = row.reason
            if not reason:
                try:
                    samples.append(row.sample or self._sample(row.listing, store))
                except ImageProblem as e:
                    reason = f"{e.reason}: {e.detail}"
            decoded.reasons.append(reason)
        if samples:
            decoded.batch = self._collator(samples, room)
        return decoded

    def _sample(self, listing: Listing | None, store: ImageStore | None) -> dict[str, Any]:
        assert listing is not None  # a row has a listing, a sample, or a reason
        if not self._collator.image_px:
            return sample_of(listing.id, listing.texts, b"")
        try:
            return to_sample(listing, store, self._convert)
        except ImageProblem:
            if self._grey is None:
                raise
            return sample_of(listing.id, listing.texts, self._convert(self._grey))

    def _store_of(self, unit: Unit) -> ImageStore | None:
        if not unit.cache:
            return self._store
        fetched = CacheStore(unit.cache)
        return LayeredStore(fetched, self._store) if self._store else fetched


def to_sample(
    listing: Listing | None, store: ImageStore | None, convert: Callable[[bytes], bytes]
) -> dict[str, Any]:
    """Return a listing as a stored sample, with the square of its first usable image.

    Raises:
        ImageProblem: none of its images can be used.
    """
    assert listing is not None and store is not None  # a row has a listing, a sample, or a reason
    image = first_usable(listing, store, convert, ImageCounts())
    return sample_of(listing.id, listing.texts, image)


def sample_of(item_id: str, texts: Mapping[str, str], square: bytes) -> dict[str, Any]:
    """Return a sample with the columns of a stored one; its rating is not known and not used."""
    return {"id": item_id, **texts, "image": square, "rating": 0.0, "rating_count": 0}


def units(part: int, rows: Iterable[Row], batch_items: int, cache: str) -> Iterator[Unit]:
    """Yield the units of a part: batches of consecutive rows, the last of which may be smaller."""
    listed = list(rows)
    for begin in range(0, max(1, len(listed)), batch_items):
        end = begin + batch_items
        yield Unit(part, listed[begin:end], end >= len(listed), cache)
