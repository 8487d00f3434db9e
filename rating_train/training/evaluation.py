"""The rank-0 evaluator: every rank runs forward passes, rank 0 scores the whole, every rank gets the numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rating_train.data.collate import Batch
from rating_train.data.loader import EvaluationData
from rating_train.distributed.collectives import gather, on_main
from rating_train.scoring.metrics import Scores, score
from rating_train.scoring.predictions import Prediction, check_coverage, deduplicate, write_predictions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a split, and the file that holds the predictions."""

    scores: Scores
    predictions_path: Path | None
    truncated_tokens: int


def evaluate(
    predict: Callable[[Batch], Tensor],
    data: EvaluationData,
    write_to: Path | None,
    on_batch: Callable[[int], None] = lambda items: None,
) -> Evaluation:
    """Score every item of ``data`` exactly once. A collective.

    Rank 0 removes the repeated items that fill the last batches, checks that every item is there, computes
    PLCC, SRCC, RMSE and MAE in float64 over the whole (never a mean of parts), and writes the predictions.

    Args:
        predict: (batch of B) -> (B,) float32 scores on the CPU; under ZeRO-3 a collective itself.
        data: this rank's part of the split.
        write_to: JSON-lines file for the predictions, or ``None``.
        on_batch: called with the number of items after each batch (progress).

    Raises:
        UserError: an item was not scored, or a score is not finite; on every rank.
    """
    rows: list[Prediction] = []
    cut = 0
    for batch in data.batches():
        scores = predict(batch).tolist()
        rows += [
            Prediction(id=i, score=s, rating=r, category=c)
            for i, s, r, c in zip(batch.ids, scores, batch.ratings.tolist(), batch.categories, strict=True)
        ]
        cut += batch.truncated_tokens
        on_batch(len(batch))
    gathered = gather((rows, cut))

    def finish() -> Evaluation:
        assert gathered is not None
        unique = deduplicate((row for part, _ in gathered for row in part))
        check_coverage(unique, expected_count=data.samples)
        if write_to is not None:
            write_predictions(write_to, unique)
        return Evaluation(
            scores=score([r.score for r in unique], [r.rating for r in unique if r.rating is not None]),
            predictions_path=write_to,
            truncated_tokens=sum(c for _, c in gathered),
        )

    return on_main(finish)
