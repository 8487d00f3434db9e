"""Which of a listing's images is stored: the first that is there, decodes, and is within the limits.

Reason given here: ``image_none_usable``, for a listing with several images none of which can be used; its detail has
the reason of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rating_train.prepare.images.lookup import ImageProblem, ImageStore
from rating_train.shards.schema import Listing


@dataclass
class ImageCounts:
    """What became of the images of listings that name several; listings with one image are not counted.

    The images that they name are ``listings_with_several`` - dropped listings + ``extra_unused`` + all ``refused``.

    Attributes:
        listings_with_several: listings that name more than one image, kept or not.
        fell_back_to_a_later_one: kept listings whose first image could not be used.
        extra_unused: images that were not opened, because an earlier one was used.
        refused: images that were opened and could not be used, by reason.
        placeholders: listings without a usable image that got a grey square, where the task has it so.
    """

    listings_with_several: int = 0
    fell_back_to_a_later_one: int = 0
    extra_unused: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    placeholders: int = 0

    def add(self, recorded: Mapping[str, Any]) -> None:
        """Add the counts that :meth:`recorded` returned elsewhere."""
        self.listings_with_several += recorded["listings_with_several"]
        self.fell_back_to_a_later_one += recorded["fell_back_to_a_later_one"]
        self.extra_unused += recorded["extra_unused"]
        self.placeholders += recorded.get("placeholders", 0)
        self.refused.update(recorded["refused"])

    def recorded(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        found = {**vars(self), "refused": dict(sorted(self.refused.items()))}
        if not self.placeholders:
            del found["placeholders"]
        return found


def first_usable(
    listing: Listing, store: ImageStore, convert: Callable[[bytes], bytes], counts: ImageCounts
) -> bytes:
    """Return what ``convert`` makes of the listing's first usable image.

    Args:
        listing: names the images.
        store: reads them.
        convert: turns the bytes of a file into those of the stored image, or raises :class:`ImageProblem`.
        counts: is added to if the listing names several images.

    Raises:
        ImageProblem: no image can be used.
    """
    names = (listing.image, *listing.more_images)
    if len(names) == 1:
        return convert(store.read(listing.image, listing.id))
    counts.listings_with_several += 1
    problems: list[str] = []
    for place, name in enumerate(names, start=1):
        try:
            # The name of last resort, <id>.jpg, comes after all images that the listing names.
            square = convert(store.read(name, listing.id if place == len(names) else ""))
        except ImageProblem as e:
            counts.refused[e.reason] += 1
            problems.append(f"{name[:200]}: {e.reason} ({e.detail})")
            continue
        counts.fell_back_to_a_later_one += place > 1
        counts.extra_unused += len(names) - place
        return square
    raise ImageProblem("image_none_usable", "; ".join(problems))
