"""How a listing's image is found: its names, in a fixed order, and the bytes behind one of them.

Every store (a folder, an archive, the cache of fetched URLs) finds an image under the same names. Nothing about a name
or a file is trusted: where a path leads, what kind of file is there, how many bytes it has.

Reasons given here: ``image_missing``, ``image_outside_root``, ``image_unreadable``, ``image_empty``,
``image_too_large``.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

DEFAULT_MAX_BYTES = 64 << 20
EXTENSIONS = (".jpg", ".png", ".jpeg", ".webp")


class ImageProblem(Exception):
    """Why an image cannot be used: ``reason`` is a fixed word, ``detail`` is for a person, and valid UTF-8."""

    def __init__(self, reason: str, detail: str) -> None:
        detail = detail.encode("utf-8", "replace").decode("utf-8")  # a server's header may hold any bytes
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class ImageStore(Protocol):
    """A place that images are read from. Picklable, for worker processes: files are opened where they are used."""

    def read(self, image: str, item_id: str) -> bytes:
        """Return the undecoded bytes of a listing's image.

        Args:
            image: a path inside the store, an http(s) URL (nothing is fetched), or "".
            item_id: the listing's id, for the names of last resort; "" has none.

        Raises:
            ImageProblem: it is not there or cannot be read; an ``OSError`` never leaves a store.
        """
        ...


class FolderStore:
    """Images in a folder, found as :func:`find_image` says, of at most ``max_bytes`` each."""

    def __init__(self, root: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.root, self.max_bytes = str(root), max_bytes

    def read(self, image: str, item_id: str) -> bytes:
        """See :meth:`ImageStore.read`."""
        return read_bounded(find_image(self.root, image, item_id), self.max_bytes)


def find_image(root: str | Path, image: str, item_id: str) -> Path:
    """Return the local file of a listing's image, the first that exists of :func:`image_names`.

    Args:
        root: the images folder. Nothing outside it is opened, wherever ``..`` or links lead.
        image: a path relative to ``root``, or an http(s) URL (nothing is fetched), or ``""``.
        item_id: for ``<id>.jpg/.png/.jpeg/.webp``, the names of last resort; "" has none.

    Raises:
        ImageProblem: ``image_outside_root`` or ``image_missing``.
    """
    real_root = os.path.realpath(root)
    for name in image_names(image, item_id):
        try:
            path = os.path.realpath(os.path.join(real_root, name))
            if os.path.commonpath((real_root, path)) != real_root:
                raise ImageProblem("image_outside_root", name[:200])
            if stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block or never end
                return Path(path)
        except (OSError, ValueError):  # absent, no permission, a NUL byte, a name too long, a circle of links
            continue
    raise missing(image, item_id)


def image_names(image: str, item_id: str) -> list[str]:
    """Return the names under which every store looks for a listing's image, in this order.

    They are its path or the last part of its URL, then ``<id>.jpg`` and so on. Without an ``item_id`` there are no
    names of last resort: all images that the listing names come before them.
    """
    names = [_url_name(image) if is_url(image) else image]
    if item_id and os.path.basename(item_id) == item_id:
        names += [item_id + extension for extension in EXTENSIONS]
    return [name for name in names if name and name not in (".", "..")]


def missing(image: str, item_id: str) -> ImageProblem:
    """Return the problem of an image that exists under none of its names."""
    return ImageProblem("image_missing", image[:200] or f"no image is named, and there is no {item_id}.jpg")


def is_url(image: str) -> bool:
    """Whether this is an http(s) address and not a path."""
    return image.lower().startswith(("http://", "https://"))


def _url_name(url: str) -> str:
    try:
        return unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    except ValueError:
        return ""


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """Return a file's bytes, of which there must be at least one and at most ``max_bytes``.

    Raises:
        ImageProblem: the file is missing, unreadable, empty or too large.
    """
    try:
        with open(path, "rb") as f:
            data = f.read(max_bytes + 1)
    except FileNotFoundError as e:
        raise ImageProblem("image_missing", str(path)) from e
    except OSError as e:
        raise ImageProblem("image_unreadable", str(e)) from e
    return check_size(data, max_bytes)


def check_size(data: bytes, max_bytes: int) -> bytes:
    """Return ``data`` if it is neither empty nor longer than ``max_bytes``.

    Raises:
        ImageProblem: ``image_empty`` or ``image_too_large``.
    """
    if not data:
        raise ImageProblem("image_empty", "the file has no bytes")
    if len(data) > max_bytes:
        raise ImageProblem("image_too_large", f"more than {max_bytes} bytes")
    return data
