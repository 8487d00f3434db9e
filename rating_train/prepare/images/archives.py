"""Images in a zip or tar archive, read in place: a member's bytes go to the caller and nowhere else.

Nothing is ever extracted, so a member's name can lead nowhere. An archive is read through an index held in memory:
about 0.3 KB per member of a tar, 0.8 KB of a zip, in every process.
"""

from __future__ import annotations

import os
import posixpath
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from rating_train.errors import UserError
from rating_train.prepare.images.lookup import (
    DEFAULT_MAX_BYTES,
    ImageProblem,
    check_size,
    image_names,
    missing,
)

_TAR_BLOCK = 512
_MAX_TAR_HEADER_BYTES = 1 << 20  # of a long name or the attributes of a member
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PACKED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# Other methods (above all LZMA) let a member's header choose how much memory the reader allocates.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNIX = 3  # zip: the system whose file modes are the upper half of external_attr

M = TypeVar("M")


class _Members(Generic[M]):
    """The members of an archive by full name and, where that is unambiguous, by the last part of it.

    A top folder that all members share (``images/`` of an archive made from outside it) may be left out of a name.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, M] = {}
        self._by_last_part: dict[str, str | None] = {}  # None: several members have it, so it is no name
        self._top = ""

    def add(self, name: str, member: M) -> None:
        """Add a regular file, unless its name is absolute or has ``..``; the last member of a name counts."""
        if name.startswith(("/", "__MACOSX/")) or ".." in name.split("/"):
            return
        name = posixpath.normpath(name)
        if name not in self._by_name:
            folder, last = posixpath.split(name)
            if folder:
                self._by_last_part[last] = None if last in self._by_last_part else name
        self._by_name[name] = member

    def finish(self) -> None:
        """Complete the index, after the last ``add``."""
        tops = {name.partition("/")[0] if "/" in name else "" for name in self._by_name}
        self._top = tops.pop() if len(tops) == 1 else ""

    def find(self, image: str, item_id: str) -> M:
        """Return the member of a listing's image.

        Raises:
            ImageProblem: ``image_missing`` or ``image_outside_root``.
        """
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

    Only stored and deflated regular files are read, and at most ``max_bytes`` + 1 bytes of one are inflated. The
    central directory is read once per process.

    Raises:
        UserError: the central directory is damaged.
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
        """See :meth:`~rating_train.prepare.images.lookup.ImageStore.read`; the member's checksum is verified."""
        if self._pid != os.getpid():  # forked: parent and child share one file position
            self._open()
        info = self._members.find(image, item_id)
        if info.file_size > self.max_bytes:
            raise ImageProblem("image_too_large", f"{info.file_size} bytes, at most {self.max_bytes}")
        if info.compress_type not in _ZIP_METHODS:
            raise ImageProblem("image_unreadable", f"zip compression method {info.compress_type}")
        try:
            with self._zip.open(info) as member:
                data = member.read(self.max_bytes + 1)
        except Exception as e:  # a damaged or encrypted member raises many kinds of error
            raise ImageProblem("image_unreadable", f"{type(e).__name__}: {e}"[:200]) from e
        return check_size(data, self.max_bytes)

    def close(self) -> None:
        """Close the archive's file."""
        self._zip.close()


class _Span(NamedTuple):
    offset: int
    size: int


class TarStore:
    """Images in an uncompressed tar archive: its headers are read once, then every member by its offset.

    The index is part of a pickled store, so that worker processes do not scan the archive again.

    Raises:
        UserError: the archive is compressed, damaged, cut off, or has changed since the scan.
    """

    def __init__(self, path: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.path, self.max_bytes = str(path), max_bytes
        self._file: BinaryIO | None = None
        self._stamp = (0, 0)
        try:
            file = self._open()
            if file.read(6).startswith(_PACKED_MAGIC) or self.path.lower().endswith(PACKED_TARS):
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
                raise UserError("the archive changed while it was read", where=self.path, fix="run again")
            self._file, self._stamp = file, stamp
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def read(self, image: str, item_id: str) -> bytes:
        """See :meth:`~rating_train.prepare.images.lookup.ImageStore.read`."""
        span = self._members.find(image, item_id)
        if span.size > self.max_bytes:
            raise ImageProblem("image_too_large", f"{span.size} bytes, at most {self.max_bytes}")
        try:
            data = os.pread(
                self._open().fileno(), span.size, span.offset
            )  # no file position: forked readers share one
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


class _BoundedReads:
    """A file for :mod:`tarfile`, which otherwise reads a header of any declared size into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}")
        return self._file.read(size)


def _scan_tar(file: BinaryIO) -> _Members[_Span]:
    members: _Members[_Span] = _Members()
    file.seek(0)
    with tarfile.open(fileobj=_BoundedReads(file), mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every header, 1 KB each
            if member.isreg() and not member.issparse():
                members.add(member.name, _Span(member.offset_data, member.size))
        end = tar.offset
    # tarfile takes a damaged header for the end of the archive; after the real end there are only zeros.
    file.seek(end)
    if file.read(_TAR_BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}")
    members.finish()
    return members
