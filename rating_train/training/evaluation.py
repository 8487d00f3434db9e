"""Evaluation: every rank runs forward passes, rank 0 scores all items, every rank gets the scores."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rating_train.data.collate import Batch
from rating_train.data.loader import EvaluationData
from rating_train.distributed.collectives import gather, on_main
from rating_train.distributed.world import World
from rating_train.log import Progress
from rating_train.scoring.metrics import Scores, score
from rating_train.scoring.predictions import Prediction, check_coverage, deduplicate, write_predictions


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, the file that holds its predictions, and tokens before padding -> number of items."""

    scores: Scores
    predictions_path: Path | None
    truncated_tokens: int
    lengths: dict[int, int]


def evaluate(
    predict: Callable[[Batch], Tensor],
    data: EvaluationData,
    write_to: Path | None,
    world: World,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every item of ``data`` exactly once. A collective.

    Rank 0 removes the repeated items that fill the last batches, checks that no item is missing, computes
    every metric in float64 over all items (never a mean of parts), and writes the predictions.

    Args:
        predict: (batch of B) -> (B,) float32 scores on the CPU; under ZeRO-3 itself a collective.
        data: this rank's part of the split.
        write_to: JSON-lines file for the predictions, or ``None``.
        world: this rank among all ranks.
        before_batch: called before each batch, equally often on every rank; may raise on all ranks to stop.

    Raises:
        UserError: an item was not scored, or a score is not finite. Raised on every rank.
    """
    rows: list[Prediction] = []
    truncated = 0
    # Both are closed even if the evaluation is abandoned: DataLoader workers are children of this process.
    with contextlib.closing(data.batches()) as batches, _shown(data, world) as show:
        for batch in batches:
            before_batch()
            rows += _rows(batch, predict(batch).tolist())
            truncated += batch.truncated_tokens
            show(len(batch) * world.size)
    gathered = gather((rows, truncated))

    def finish() -> Evaluation:
        assert gathered is not None
        unique = deduplicate(row for part, _ in gathered for row in part)
        check_coverage(unique, expected_count=data.samples)
        if write_to is not None:
            write_predictions(write_to, unique)
        return Evaluation(
            scores=score([r.score for r in unique], [r.rating for r in unique if r.rating is not None]),
            predictions_path=write_to,
            truncated_tokens=sum(count for _, count in gathered),
            lengths=dict(Counter(r.tokens for r in unique if r.tokens is not None)),
        )

    return on_main(finish)


def _rows(batch: Batch, scores: list[float]) -> list[Prediction]:
    """Return one row for each item, with what the evaluation is sliced by."""
    return [
        Prediction(
            id=batch.ids[i],
            score=score,
            rating=rating,
            category=batch.categories[i],
            rating_count=int(count) if count.is_integer() else None,  # NaN, or a weight that is no count
            text_chars=batch.text_chars[i],
            group=batch.groups[i],
            tokens=tokens,
        )
        for i, (score, rating, count, tokens) in enumerate(
            zip(
                scores,
                batch.ratings.tolist(),
                batch.rating_counts.tolist(),
                batch.used_tokens.tolist(),
                strict=True,
            )
        )
    ]


@contextlib.contextmanager
def _shown(data: EvaluationData, world: World) -> Iterator[Callable[[int], None]]:
    """Show progress on rank 0, extrapolated from its own batches to all ranks."""
    if not world.is_main:
        yield lambda items: None
        return
    progress, left = Progress("evaluating", data.samples), data.samples

    def show(items: int) -> None:
        nonlocal left
        items = min(items, left)  # the last batches repeat items
        left -= items
        progress.add(items)

    try:
        yield show
    finally:
        progress.close(complete=False)
