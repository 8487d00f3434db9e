"""The cost of one item, and CES, as `cost`, `evaluate` and the report all state it. Imports no torch.

Two choices move a CES by far more than models differ: what an operation is (the paper's convention against the strict
one), and at which length an item is counted (padded, as the model computes it, or true, as its text is). So all four
numbers are computed together, from the same closed form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rating_train.model.architecture import Architecture
from rating_train.model.cost import count_forward, count_parameters
from rating_train.scoring.ces import (
    PAPER_CONVENTION,
    STRICT_CONVENTION,
    CesRow,
    ces_table,
    cost_factor,
    efficiency,
)

#: The conventions that always stand side by side -> what they are called.
SHOWN = {PAPER_CONVENTION: "paper's", STRICT_CONVENTION: "strict"}


@dataclass(frozen=True)
class ItemCost:
    """The operations of one item.

    Attributes:
        parameters: of the regressor, its head included.
        padded_tokens: T of the fixed sequence; every item is counted at it.
        padded: convention -> operations of one item at the padded length.
        true_tokens: mean length of the items before padding, in tokens; ``None`` where no item is at hand.
        true: convention -> mean operations of the items, each at its own length.
    """

    parameters: int
    padded_tokens: int
    padded: Mapping[str, float]
    true_tokens: float | None = None
    true: Mapping[str, float] | None = None

    def rows(self, plcc: float | None, true_length: bool = False) -> list[CesRow]:
        """Return C, E and CES in every convention; empty where the true length is wanted and not known."""
        counts = self.true if true_length else self.padded
        return [] if counts is None else ces_table(plcc, self.parameters, counts)

    def as_row(self, plcc: float | None) -> dict[str, Any]:
        """Return what a row of eval.jsonl holds: CES at both lengths, named by convention, and C."""
        found: dict[str, Any] = {"parameters": self.parameters}
        found |= {"padded_tokens": self.padded_tokens, "true_tokens": self.true_tokens}
        for row in self.rows(plcc):
            found[f"ces_{row.convention}"] = row.ces
        for convention in SHOWN:
            found[f"c_{convention}"] = cost_factor(self.parameters, self.padded[convention])
        for row in self.rows(plcc, true_length=True):
            if row.convention in SHOWN:
                found[f"ces_{row.convention}_true_length"] = row.ces
                found[f"c_{row.convention}_true_length"] = row.c
        return found


def item_cost(
    arch: Architecture,
    image_px: int,
    padded_tokens: int,
    lengths: Iterable[int] = (),
    tiles_per_side: int = 0,
) -> ItemCost:
    """Count one item in closed form.

    Args:
        arch: the backbone and its head.
        image_px: side of the square image, in pixels.
        padded_tokens: T, visual tokens and padding included.
        lengths: tokens of each item before padding, visual tokens included.
        tiles_per_side: as :func:`~rating_train.model.cost.count_forward`.

    Raises:
        UserError: an image size that does not divide, or a length shorter than the visual tokens.
    """
    parameters = count_parameters(arch, image_px)["total"]
    padded = count_forward(arch, image_px, padded_tokens, tiles_per_side).totals()
    counted = Counter(lengths)
    items = sum(counted.values())
    if not items:
        return ItemCost(parameters, padded_tokens, padded)
    # Attention grows with the square of the length: the mean of the costs is not the cost of the mean.
    sums = dict.fromkeys(padded, 0.0)
    for length, count in counted.items():
        for convention, operations in count_forward(arch, image_px, length, tiles_per_side).totals().items():
            sums[convention] += count * operations
    tokens = sum(length * count for length, count in counted.items()) / items
    return ItemCost(parameters, padded_tokens, padded, tokens, {name: v / items for name, v in sums.items()})


def ces_line(row: Mapping[str, Any]) -> str:
    """Return CES of an evaluation on one line: both conventions, at both lengths.

    Args:
        row: of eval.jsonl, with what :meth:`ItemCost.as_row` adds; keys of older rows may be missing.
    """
    parts = []
    for convention, name in SHOWN.items():
        known = [
            (row.get(f"ces_{convention}{suffix}"), tokens, word)
            for suffix, tokens, word in (
                ("", row.get("padded_tokens"), "padded"),
                ("_true_length", row.get("true_tokens"), "true length"),
            )
        ]
        lengths = [
            f"{'undefined' if ces is None else f'{ces:.4f}'} {word}"
            + (f" ({tokens:.4g} tokens)" if tokens is not None else "")
            for ces, tokens, word in known
            if word == "padded" or f"ces_{convention}_true_length" in row
        ]
        parts.append(f"{name} [{convention}] {', '.join(lengths)}")
    return "CES: " + "; ".join(parts)


def plcc_needed(ces: float, parameters: float, operations: float) -> float | None:
    """Return the PLCC at which an item of this cost has the CES; ``None`` where even PLCC 1 does not reach it."""
    needed = ces / efficiency(cost_factor(parameters, operations))
    return needed if needed <= 1 else None


def longest_affordable(arch: Architecture, image_px: int, convention: str, shortest: int) -> int | None:
    """Return the longest sequence with C <= 1 in a convention, in tokens; ``None`` where ``shortest`` costs more."""
    parameters = count_parameters(arch, image_px)["total"]

    def affordable(tokens: int) -> bool:
        return cost_factor(parameters, count_forward(arch, image_px, tokens).total(convention)) <= 1

    if not affordable(shortest):
        return None
    low, high = shortest, 2 * shortest
    while affordable(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low


def image_sizes(arch: Architecture, largest: int) -> Sequence[int]:
    """Return the image sides that divide into visual tokens, up to ``largest`` pixels."""
    block = arch.vision.patch * arch.scale_factor
    return range(block, largest + 1, block)
