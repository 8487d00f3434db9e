"""How many records of a build were read, kept, and dropped for which reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rating_train.prepare.plan import selection


@dataclass
class BuildCounts:
    """Counts of one build; every record that was read is kept, dropped, or not decided yet."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # records per reason
    kept: int = 0

    def over_limit(self, max_fraction: float) -> bool:
        """Whether more than this share of the records is unusable, those left out by choice aside."""
        chosen = sum(self.dropped[reason] for reason in selection.CHOSEN_REASONS)
        return sum(self.dropped.values()) - chosen > max_fraction * (self.read - chosen)

    def reasons(self) -> str:
        """Return, for example, ``image_missing 12, bad_json 1``, the most frequent first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.dropped.most_common()) or "none"

    def line(self) -> str:
        """Return, for example, ``kept 40, dropped: image_missing 12``: the details of a progress line."""
        return f"kept {self.kept}, dropped: {self.reasons()}"
