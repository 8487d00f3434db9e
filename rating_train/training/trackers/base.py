"""What every tracker has: the run it follows, the numbers of a row, and the id under which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rating_train import run_dir
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, read_json


class Listener(Protocol):
    """What follows a run from rank 0, beside the files: a tracker of a company, a message to a person."""

    def train(self, row: dict[str, Any]) -> None:
        """Take a row of train.jsonl."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Take a row of eval.jsonl."""

    def close(self) -> None:
        """The attempt ends."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker follows.

    Attributes:
        path: the run directory.
        name: the run's name.
        first_step: the step after which rows are told; 0 for a run that starts.
        settings: its configuration, nested.
    """

    path: Path
    name: str = "run"
    first_step: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def id_of(self, tracker: str) -> str | None:
        """Return the id under which an earlier attempt is known to a tracker; ``None`` if no attempt told it."""
        try:
            ids = read_json(self.path / run_dir.TRACKERS_FILE)
        except (FileNotFoundError, UserError):
            return None
        found = ids.get(tracker) if isinstance(ids, dict) else None
        return found if isinstance(found, str) else None

    def remember_id(self, tracker: str, value: str) -> None:
        """Keep the id for the next attempt, beside those of other trackers."""
        file = self.path / run_dir.TRACKERS_FILE
        try:
            ids = read_json(file)
        except (FileNotFoundError, UserError):
            ids = {}
        atomic_write_json(file, {**(ids if isinstance(ids, dict) else {}), tracker: value})


def numbers(prefix: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row as ``PREFIX/KEY``: neither its step nor flags, texts, undefined or nested values."""
    return {
        f"{prefix}/{key}": value
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step"
    }


def evaluation_prefix(row: Mapping[str, Any]) -> str:
    """Return the prefix of an evaluation's numbers: ``eval_val``, say."""
    return f"eval_{row.get('split', '')}"
