"""Where images are read from: a folder, an archive, the cache of fetched URLs, or the cache over one of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from rating_train.errors import UserError
from rating_train.files import atomic_write_bytes, atomic_write_json, read_json
from rating_train.prepare.images.archives import PACKED_TARS, TarStore, ZipStore
from rating_train.prepare.images.embedded import EmbeddedStore, holds_images
from rating_train.prepare.images.lookup import (
    DEFAULT_MAX_BYTES,
    FolderStore,
    ImageProblem,
    ImageStore,
    is_url,
    read_bounded,
)


def open_store(
    spec: str | Path | None,
    cache: str | Path | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    sources: Sequence[str] = (),
) -> ImageStore:
    """Return the store for a folder, a ``.zip`` or a ``.tar``; with ``cache``, URLs are read from there first.

    Args:
        spec: the folder or archive; ``None`` or ``""`` if all images are URLs (``cache`` is then needed).
        cache: the folder that :func:`rating_train.prepare.images.fetch.fetch_all` fills.
        max_bytes: size limit of one image; a larger one is ``image_too_large`` and is not read to its end.
        sources: of the listings; those that hold images themselves are read from.

    Raises:
        UserError: it is something else, or an archive that is damaged or has no random access.
    """
    if embedded := [source for source in sources if holds_images(source)]:
        outside = open_store(spec, cache, max_bytes) if spec or cache else NoStore()
        return EmbeddedStore(embedded, outside, max_bytes)
    cached = CacheStore(cache, max_bytes) if cache else None
    if not spec:
        if cached is None:
            raise UserError(
                "no images are given", expected="a folder, a .zip, a .tar, or a cache of fetched URLs"
            )
        return cached
    path, lower = Path(spec), str(spec).lower()
    store: ImageStore
    if path.is_dir():
        store = FolderStore(path, max_bytes)
    elif not path.exists():
        raise UserError("images not found", where=path, expected="a folder, a .zip or a .tar")
    elif lower.endswith(".zip"):
        store = ZipStore(path, max_bytes)
    elif lower.endswith((".tar", *PACKED_TARS)):
        store = TarStore(path, max_bytes)
    else:
        raise UserError(
            "images are in an unknown kind of file", where=path, expected="a folder, .zip or .tar"
        )
    return LayeredStore(cached, store) if cached else store


class NoStore:
    """No image at all, of items that have none."""

    def read(self, image: str, item_id: str) -> bytes:
        """Refuse any image.

        Raises:
            ImageProblem: always.
        """
        raise ImageProblem("image_missing", "no images are given")


class CacheStore:
    """Fetched images, each under the SHA-256 of its URL: ``CACHE/ab/cd/abcd....img``, or ``.problem`` (JSON).

    A file is written under a temporary name, flushed, and renamed: one that exists is complete. A URL is settled when
    either file exists. Processes may share a cache; they may then fetch a URL twice.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder, self.max_bytes = str(folder), max_bytes

    def _path(self, url: str, suffix: str) -> Path:
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return Path(self.folder, name[:2], name[2:4], name + suffix)

    def has(self, url: str) -> bool:
        """Whether the URL's bytes are in the cache."""
        return self._path(url, ".img").is_file()

    def problem(self, url: str) -> ImageProblem | None:
        """Return why the URL could not be fetched, if that was recorded."""
        try:
            record = read_json(self._path(url, ".problem"))
            return ImageProblem(str(record["reason"]), str(record["detail"]))
        except (UserError, OSError, KeyError, TypeError):  # absent, or edited by hand: then it is not settled
            return None

    def read(self, image: str, item_id: str) -> bytes:
        """Return the bytes of a URL.

        Raises:
            ImageProblem: the one that was recorded, or ``image_missing`` if the URL is not settled.
        """
        path = self._path(image, ".img")
        if is_url(image) and path.is_file():
            return read_bounded(path, self.max_bytes)
        raise (is_url(image) and self.problem(image)) or ImageProblem(
            "image_missing", f"not fetched: {image[:200]}"
        )

    def put(self, url: str, data: bytes) -> None:
        """Store a URL's bytes durably and forget its problem.

        Raises:
            OSError: the cache cannot be written.
        """
        path = self._path(url, ".img")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, data)
        self._path(url, ".problem").unlink(missing_ok=True)

    def put_problem(self, url: str, problem: ImageProblem) -> None:
        """Record why a URL cannot be fetched.

        Raises:
            OSError: the cache cannot be written.
        """
        path = self._path(url, ".problem")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, {"url": url[:4096], "reason": problem.reason, "detail": problem.detail})


class LayeredStore:
    """Fetched URLs from the cache; what was not fetched, and every path, from the folder or archive below it."""

    def __init__(self, cache: CacheStore, below: ImageStore) -> None:
        self.cache, self.below = cache, below

    def read(self, image: str, item_id: str) -> bytes:
        """Return the image's bytes.

        Raises:
            ImageProblem: for a URL that is found nowhere, the reason why it was not fetched.
        """
        if not is_url(image):
            return self.below.read(image, item_id)
        try:
            return self.cache.read(image, item_id)
        except ImageProblem as fetching:
            try:
                return self.below.read(image, item_id)
            except ImageProblem as e:
                raise (fetching if e.reason == "image_missing" else e) from None
