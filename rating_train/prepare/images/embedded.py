"""Images that are stored in the rows of Arrow and Parquet sources."""

from __future__ import annotations

from collections.abc import Iterable

from rating_train.errors import UserError
from rating_train.prepare.images.lookup import DEFAULT_MAX_BYTES, ImageProblem, ImageStore, check_size
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.tables import arrow, parquet, parquet_pictures
from rating_train.prepare.tables.pictures import ImageColumns, Place

_IMAGE_AT = {"arrow": arrow.image_at, "parquet": parquet_pictures.image_at}


def holds_images(source: str, images: ImageColumns | None = None) -> bool:
    """Whether a source may hold images itself: an Arrow file, or a Parquet file with a column of them.

    Args:
        source: the file.
        images: which binary columns are read as images; ``None``: any may be.
    """
    name = source.lower()
    return name.endswith(arrow.SUFFIX) or (
        name.endswith(parquet.SUFFIX) and parquet.holds_pictures(source, images)
    )


def have_images(sources: Iterable[str], reading: Reading) -> bool:
    """Whether one of the sources, read so, may hold images itself."""
    return any(holds_images(source, reading.image_columns) for source in sources)


class EmbeddedStore:
    """Images in the sources of a build, by their places; every other name is looked for in the store below.

    Args:
        sources: the only files that are opened: a listing's text cannot name another one.
        below: for all other names.
        max_bytes: size limit of one image.
    """

    def __init__(self, sources: Iterable[str], below: ImageStore, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.sources, self.below, self.max_bytes = frozenset(sources), below, max_bytes

    def read(self, image: str, item_id: str) -> bytes:
        """See :meth:`ImageStore.read`."""
        place = Place.of(image)
        if place is None or place.file not in self.sources:
            return self.below.read(image, item_id)
        try:
            return check_size(_IMAGE_AT[place.kind](place), self.max_bytes)
        except (UserError, LookupError) as e:
            raise ImageProblem("image_unreadable", f"{image[:200]}: {e}") from e
