"""A network file system that misbehaves: what is below one directory is slow, fails, and is seen late by other hosts.

The layer itself is ``flaky_fs.c``, which is preloaded into real processes (those that the zygote forks have started
already). Each rank is a host of its own.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from rating_train.log import text_table

SOURCE = Path(__file__).with_suffix(".c")
OPERATIONS = ("open", "stat", "read", "write", "fsync", "close", "rename", "unlink", "mkdir", "list")
COUNTS = ("calls", "waited_us", "estale", "eio", "lost_replies", "hidden")
_STATE_BYTES = 8 * len(OPERATIONS) * len(COUNTS) + 24 * (1 << 16)

Counts = dict[str, dict[str, int]]  # operation -> kind -> how often


@dataclass(frozen=True)
class Trouble:
    """How a file system misbehaves; ``flaky_fs.c`` says what each means.

    Attributes:
        rate: share of calls that fail.
        delay_ms: longest wait of a call.
        late_ms: longest time for which another host does not see a new name.
        outage: ``PERIOD:LENGTH`` in ms; ``""`` for none.
        seed: of the random numbers.
    """

    rate: float = 0.0
    delay_ms: float = 0.0
    late_ms: float = 0.0
    outage: str = ""
    seed: int = 17


class FlakyFiles:
    """The layer over one directory.

    Args:
        root: the directory; may be made later.
        folder: for the compiled layer and its counters, elsewhere.
        trouble: what it does.
    """

    def __init__(self, root: Path, folder: Path, trouble: Trouble) -> None:
        self._state = folder / "flaky_fs.state"
        self._state.write_bytes(bytes(_STATE_BYTES))
        self.env = {
            "LD_PRELOAD": str(compiled(folder)),
            "FLAKY_FS_ROOT": str(root),
            "FLAKY_FS_STATE": str(self._state),
            "FLAKY_FS_SEED": str(trouble.seed),
            "FLAKY_FS_DELAY_MS": str(trouble.delay_ms),
            "FLAKY_FS_RATE": str(trouble.rate),
            "FLAKY_FS_LATE_MS": str(trouble.late_ms),
            **({"FLAKY_FS_OUTAGE": trouble.outage} if trouble.outage else {}),
        }

    def counts(self) -> Counts:
        """Return what was injected so far, over all processes."""
        numbers = iter(
            struct.iter_unpack("=Q", self._state.read_bytes()[: 8 * len(OPERATIONS) * len(COUNTS)])
        )
        return {operation: {kind: next(numbers)[0] for kind in COUNTS} for operation in OPERATIONS}

    def table(self) -> list[str]:
        """Render the counts for a terminal."""
        rows = [[name, *(str(row[kind]) for kind in COUNTS)] for name, row in self.counts().items()]
        rows.append(["all", *(str(self.total(kind)) for kind in COUNTS)])
        return text_table(["call", *COUNTS], rows)

    def total(self, kind: str) -> int:
        """Return one kind of the counts over all operations."""
        return sum(row[kind] for row in self.counts().values())


def compiled(folder: Path) -> Path:
    """Compile the layer into a folder; skips the test where there is no C compiler for Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here: cc not found")
    library = folder / "flaky_fs.so"
    command = [
        compiler,
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(SOURCE),
        "-ldl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return library
