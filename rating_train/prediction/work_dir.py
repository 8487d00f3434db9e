"""The working directory of a prediction, ``OUT.parts``: which prediction it is of, which parts are finished.

::

    OUT.parts/predict.json         what the scores depend on; a command with other options does not continue it
    OUT.parts/lock                 held by rank 0 while it runs
    OUT.parts/rows.json            number of input rows, counted once
    OUT.parts/part_0000012.csv     the lines of a finished part: a fixed range of the input rows, in their order
    OUT.parts/claims-NONCE/        of one start: who has taken which part
    OUT.parts/fetch/part_0000012/  images fetched for a part; removed when it is finished
    OUT.parts/merged.json          size of the output, written just before it gets its name: what is left is to tidy up

A part is written under a temporary name, flushed to the disk and renamed, so one that is there is complete, and what
its lines are depends on neither the number of ranks nor on how often the command was killed. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.files import (
    atomic_write_json,
    atomic_write_text,
    claim_folder,
    fsync_path,
    hold_lock,
    read_json,
)

IDENTITY_NAME = "predict.json"
ROWS_NAME = "rows.json"
MERGED_NAME = "merged.json"
_PART = re.compile(r"part_(\d{7,})\.csv")


class WorkDir:
    """Paths of one prediction's work, and its lock.

    Args:
        out: the file that is to be written.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.path = self.out.with_name(f"{self.out.name}.parts")
        self.fetch = self.path / "fetch"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory and hold it while the block runs. Rank 0.

        Raises:
            UserError: another command has it, it cannot be made, or the output exists already.
        """
        if self.out.exists() and not self.is_merged():
            raise UserError(
                "the output exists already", where=self.out, fix="remove it, or give another --out"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise UserError(f"cannot write here ({e})", where=self.path, fix="choose another --out") from e
        try:
            if hold_lock(lock) is False:
                raise UserError(
                    "another command is writing this output", where=self.out, fix="wait for it, or stop it"
                )
            yield
        finally:
            os.close(lock)

    def belongs_to(self, identity: Mapping[str, Any]) -> None:
        """Note what the scores depend on, or compare with what an earlier start noted. Rank 0.

        Raises:
            UserError: names each difference.
        """
        claim_folder(
            self.path / IDENTITY_NAME,
            identity,
            "prediction",
            "give the options of that prediction to resume it",
        )

    def is_merged(self) -> bool:
        """Return whether the output is in place, and an earlier start was killed before it had tidied up."""
        file = self.path / MERGED_NAME
        return self.out.is_file() and file.is_file() and read_json(file)["bytes"] == self.out.stat().st_size

    def publish(self, temporary: Path) -> None:
        """Give the merged file its name, durably. Rank 0."""
        fsync_path(temporary)
        atomic_write_json(self.path / MERGED_NAME, {"bytes": temporary.stat().st_size})
        os.replace(temporary, self.out)
        fsync_path(self.out.parent)

    def rows(self) -> int | None:
        """Return the number of input rows that an earlier start counted."""
        file = self.path / ROWS_NAME
        return int(read_json(file)["rows"]) if file.is_file() else None

    def note_rows(self, rows: int) -> None:
        """Keep the number of input rows. Rank 0."""
        atomic_write_json(self.path / ROWS_NAME, {"rows": rows})

    def part(self, number: int) -> Path:
        """Return the file of one part."""
        return self.path / f"part_{number:07d}.csv"

    def finished(self) -> set[int]:
        """Return the numbers of the parts that are complete."""
        found = (_PART.fullmatch(name) for name in os.listdir(self.path))
        return {int(match[1]) for match in found if match}

    def commit(self, number: int, text: str) -> None:
        """Write a finished part, durably, and remove the images that were fetched for it."""
        atomic_write_text(self.part(number), text)
        shutil.rmtree(self.images(number), ignore_errors=True)

    def images(self, number: int) -> Path:
        """Return the folder for images that are fetched for a part."""
        return self.fetch / f"part_{number:07d}"

    def new_claims(self) -> str:
        """Make the folder in which the ranks of this start claim parts; its name. Rank 0.

        Of earlier starts' folders nothing is kept: what they claimed and did not finish is to be claimed again.
        """
        for old in self.path.glob("claims-*"):
            shutil.rmtree(old, ignore_errors=True)
        name = f"claims-{secrets.token_hex(6)}"
        (self.path / name).mkdir()
        return name

    def claim(self, claims: str, number: int) -> bool:
        """Take a part for this rank; False if another rank was first."""
        try:
            os.close(os.open(self.path / claims / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        return True

    def remove(self) -> None:
        """Remove the directory; what says that the output is in place goes last, for a removal that is killed."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != MERGED_NAME:
                entry.unlink()
        shutil.rmtree(self.path)
