"""The content of a ``.zst`` file. A file that is cut off is an error, as of gzip."""

from __future__ import annotations

import importlib
import io
from typing import Any, BinaryIO

from rating_train.errors import UserError

_PACKED_BYTES = 1 << 10  # a call unpacks 4 bytes to at most 128 KiB: 32 MiB of memory for the worst of files


def import_zstandard(path: str) -> Any:
    """Return the package that reads such files.

    Raises:
        UserError: it is not installed; names ``path``.
    """
    try:
        return importlib.import_module("zstandard")
    except ImportError as e:
        fix = "pip install 'zstandard>=0.19', or unpack the file with unzstd"
        raise UserError("reading .zst needs the zstandard package", where=path, fix=fix) from e


class ZstdFile(io.RawIOBase):
    """Read the frames of a file one after the other; parallel compressors write many.

    The package's own ``stream_reader`` ends without an error where a file ends within a frame, so that a torn download
    would be a smaller catalogue.
    """

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        super().__init__()
        self._file, self._package = file, zstandard
        self._frame: Any = None
        self._packed = self._content = b""
        self._at = 0  # bytes of the content that were read

    def readable(self) -> bool:
        """Return whether it can be read."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer; return the number of bytes, 0 at the end.

        Raises:
            EOFError: the file ends within a frame.
        """
        while self._at == len(self._content):
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file is cut off: it ends within a zstd frame")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._content) - self._at)
        buffer[:size] = self._content[self._at : self._at + size]
        self._at += size
        return size

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._package.ZstdDecompressor().decompressobj()
        self._content, self._at = self._frame.decompress(self._packed), 0
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
