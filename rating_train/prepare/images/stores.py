"""Where images are read from: a folder, a zip or tar archive read in place, or the cache of fetched URLs.

Nothing is ever extracted: a member's bytes go to the caller and nowhere else, so a member's name can lead
nowhere. All stores find a listing's image under the same names, in the same order
(:func:`~rating_train.prepare.images.square.image_names`). An archive is read through an index held in memory: about
0.3 KB per member of a tar, 0.8 KB of a zip, in every process.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from rating_train.errors import UserError
from rating_train.files import atomic_write_bytes, atomic_write_json, read_json
from rating_train.prepare.images.square import (
    DEFAULT_MAX_BYTES,
    FolderStore,
    ImageProblem,
    ImageStore,
    check_size,
    image_names,
    is_url,
    missing,
    read_bounded,
)

__all__ = ["CacheStore", "FolderStore", "ImageStore", "LayeredStore", "TarStore", "ZipStore", "open_store"]

_TAR_BLOCK = 512
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PACKED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# The other methods (LZMA above all) let a member's header choose how much memory the reader allocates.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNIX = 3  # zip: the system whose file modes stand in the upper half of external_attr

M = TypeVar("M")


def open_store(
    spec: str | Path | None, cache: str | Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES
) -> ImageStore:
    """The store for a folder, a ``.zip`` or a ``.tar``; with ``cache``, URLs are read from there first.

    Args:
        spec: the folder or archive; ``None`` or ``""`` if all images are URLs (``cache`` is then needed).
        cache: the folder that :func:`rating_train.prepare.images.fetch.fetch_all` fills.
        max_bytes: the most bytes of one image; a larger one is ``image_too_large`` and is not read whole.

    Errors: :class:`UserError` for anything else, and for an archive that is damaged or has no random access.
    """
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
    elif lower.endswith((".tar", *_PACKED_TARS)):
        store = TarStore(path, max_bytes)
    else:
        raise UserError(
            "images are in an unknown kind of file", where=path, expected="a folder, .zip or .tar"
        )
    return LayeredStore(cached, store) if cached else store


class _Members(Generic[M]):
    """The members of an archive by full name and, where that is unambiguous, by last part.

    A folder that all members lie in (``images/`` of an archive made from outside) may be left out of a name.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, M] = {}
        self._by_last_part: dict[str, str | None] = {}  # None: several members have it, so it names none
        self._top = ""

    def add(self, name: str, member: M) -> None:
        """Add a regular file; one whose name is absolute or has ``..`` is left out. The last of a name counts."""
        if name.startswith(("/", "__MACOSX/")) or ".." in name.split("/"):
            return
        name = posixpath.normpath(name)
        if name not in self._by_name:
            folder, last = posixpath.split(name)
            if folder:
                self._by_last_part[last] = None if last in self._by_last_part else name
        self._by_name[name] = member

    def finish(self) -> None:
        """Call after the last ``add``."""
        tops = {name.partition("/")[0] if "/" in name else "" for name in self._by_name}
        self._top = tops.pop() if len(tops) == 1 else ""

    def find(self, image: str, item_id: str) -> M:
        """The member of a listing's image. Errors: ``image_missing``, ``image_outside_root``."""
        for raw in image_names(image, item_id):
            name = posixpath.normpath(raw)
            if name.startswith(("/", "../")):
                raise ImageProblem("image_outside_root", raw[:200])
            for full in (name, f"{self._top}/{name}", self._by_last_part.get(name)):
                if full is not None and full in self._by_name:
                    return self._by_name[full]
        raise missing(image, item_id)


class ZipStore:
    """Images in a zip archive, read in place through its central directory.

    Only stored and deflated regular files; never more than ``max_bytes`` + 1 bytes are inflated. The
    central directory is read once per process. Errors: :class:`UserError` if it is damaged.
    """

    def __init__(self, path: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.path, self.max_bytes = str(path), max_bytes
        self._open()

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:
            raise UserError(f"not a readable zip archive ({e})", where=self.path) from e
        self._members: _Members[zipfile.ZipInfo] = _Members()
        for info in self._zip.infolist():
            mode = info.external_attr >> 16 if info.create_system == _UNIX else 0
            if not info.is_dir() and mode & 0o170000 in (0, 0o100000):  # a link's content is a path
                self._members.add(info.filename, info)
        self._members.finish()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, image: str, item_id: str) -> bytes:
        """A member's bytes, its checksum verified. Errors: :class:`ImageProblem`."""
        if self._pid != os.getpid():  # forked: the parent's file has one position for both
            self._open()
        info = self._members.find(image, item_id)
        if info.file_size > self.max_bytes:
            raise ImageProblem("image_too_large", f"{info.file_size} bytes, at most {self.max_bytes}")
        if info.compress_type not in _ZIP_METHODS:
            raise ImageProblem("image_unreadable", f"zip compression method {info.compress_type}")
        try:
            with self._zip.open(info) as member:
                data = member.read(self.max_bytes + 1)
        except Exception as e:  # a damaged or encrypted member raises half a dozen kinds
            raise ImageProblem("image_unreadable", f"{type(e).__name__}: {e}"[:200]) from e
        return check_size(data, self.max_bytes)

    def close(self) -> None:
        """Close the archive's file."""
        self._zip.close()


class _Span(NamedTuple):
    offset: int
    size: int


class TarStore:
    """Images in a plain tar archive: its headers are read once, then every member by its offset.

    The index travels with a pickled store, so that worker processes do not scan the archive again.
    Errors: :class:`UserError` if it is compressed, damaged, cut off, or changed since the scan.
    """

    def __init__(self, path: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.path, self.max_bytes = str(path), max_bytes
        self._file: BinaryIO | None = None
        self._stamp = (0, 0)
        try:
            file = self._open()
            if file.read(6).startswith(_PACKED_MAGIC) or self.path.lower().endswith(_PACKED_TARS):
                raise UserError(
                    "a compressed tar has no random access",
                    where=self.path,
                    expected="a plain .tar, a .zip or a folder",
                    fix="decompress it to a .tar (gunzip, zstd -d, xz -d), or extract it to a folder",
                )
            self._members = _scan_tar(file)
        except (OSError, tarfile.TarError, ValueError, ArithmeticError, LookupError) as e:
            raise UserError(f"not a readable tar archive ({e})", where=self.path) from e

    def _open(self) -> BinaryIO:
        if self._file is None:
            file = open(self.path, "rb")  # noqa: SIM115 (it stays open)
            status = os.fstat(file.fileno())
            stamp = (status.st_size, status.st_mtime_ns)
            if self._stamp not in ((0, 0), stamp):
                file.close()
                raise UserError("the archive changed while it was used", where=self.path, fix="run again")
            self._file, self._stamp = file, stamp
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, image: str, item_id: str) -> bytes:
        """A member's bytes. Errors: :class:`ImageProblem`."""
        span = self._members.find(image, item_id)
        if span.size > self.max_bytes:
            raise ImageProblem("image_too_large", f"{span.size} bytes, at most {self.max_bytes}")
        try:
            data = os.pread(self._open().fileno(), span.size, span.offset)  # forked readers share a position
        except OSError as e:
            raise ImageProblem("image_unreadable", str(e)) from e
        if len(data) != span.size:
            raise ImageProblem("image_unreadable", f"{len(data)} of {span.size} bytes are there")
        return check_size(data, self.max_bytes)

    def close(self) -> None:
        """Close the archive's file; the next ``read`` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _scan_tar(file: BinaryIO) -> _Members[_Span]:
    members: _Members[_Span] = _Members()
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header: 1 KB each
            if member.isreg() and not member.issparse():
                members.add(member.name, _Span(member.offset_data, member.size))
        end = tar.offset
    # tarfile takes a damaged header for the end of the archive: behind the real end there are only zeros.
    file.seek(end)
    if file.read(_TAR_BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}")
    members.finish()
    return members


class CacheStore:
    """Fetched images, each under the SHA-256 of its URL: ``CACHE/ab/cd/abcd....img``, or ``.problem`` (JSON).

    A file is written under a temporary name, flushed, and renamed: one that exists is whole. A URL is
    settled when either file exists. Processes may share a cache; they then may fetch a URL twice.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder, self.max_bytes = str(folder), max_bytes

    def _path(self, url: str, suffix: str) -> Path:
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return Path(self.folder, name[:2], name[2:4], name + suffix)

    def has(self, url: str) -> bool:
        """Whether the URL's bytes are here."""
        return self._path(url, ".img").is_file()

    def problem(self, url: str) -> ImageProblem | None:
        """Why the URL could not be fetched, if that was recorded."""
        try:
            record = read_json(self._path(url, ".problem"))
            return ImageProblem(str(record["reason"]), str(record["detail"]))
        except (UserError, OSError, KeyError, TypeError):  # absent, or edited by hand: not settled
            return None

    def read(self, image: str, item_id: str) -> bytes:
        """The bytes of a URL. Errors: the recorded :class:`ImageProblem`; ``image_missing`` if not settled."""
        path = self._path(image, ".img")
        if is_url(image) and path.is_file():
            return read_bounded(path, self.max_bytes)
        raise (is_url(image) and self.problem(image)) or ImageProblem(
            "image_missing", f"not fetched: {image[:200]}"
        )

    def put(self, url: str, data: bytes) -> None:
        """Keep a URL's bytes, durably; forgets its problem. Errors: ``OSError``."""
        path = self._path(url, ".img")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, data)
        self.forget_problem(url)

    def put_problem(self, url: str, problem: ImageProblem) -> None:
        """Record why a URL cannot be had. Errors: ``OSError``."""
        path = self._path(url, ".problem")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, {"url": url[:4096], "reason": problem.reason, "detail": problem.detail})

    def forget_problem(self, url: str) -> None:
        """Make a failed URL unsettled again."""
        self._path(url, ".problem").unlink(missing_ok=True)


class LayeredStore:
    """Fetched URLs first; what was not fetched, and every path, from the folder or archive below."""

    def __init__(self, cache: CacheStore, below: ImageStore) -> None:
        self.cache, self.below = cache, below

    def read(self, image: str, item_id: str) -> bytes:
        """The image's bytes. Errors: :class:`ImageProblem`; for a URL found nowhere, why it was not fetched."""
        if not is_url(image):
            return self.below.read(image, item_id)
        try:
            return self.cache.read(image, item_id)
        except ImageProblem as fetching:
            try:
                return self.below.read(image, item_id)
            except ImageProblem as e:
                raise (fetching if e.reason == "image_missing" else e) from None
