"""Training losses.

Legend: b items of a micro-batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rating_train.config.schema import LossConfig
from rating_train.errors import UserError
from rating_train.model.custom_loss import LossFunction, result_problem


def rating_loss(
    scores: Tensor,
    ratings: Tensor,
    rating_counts: Tensor,
    config: LossConfig,
    custom: LossFunction | None = None,
    transform: str = "none",
) -> Tensor:
    """Compute the loss of a micro-batch.

    * ``mse``: (y - r)^2, the paper's (arXiv 2605.27737).
    * ``huber``: e^2 / 2 for |e| <= d, else d (|e| - d/2) (Huber 1964), with d = ``huber_delta`` (for stars: stars).
    * ``count_weight``: item i is weighted by w(n_i) / w(n_ref) with n_ref = ``count_reference``; w is log(1 + n),
      sqrt(n) or n. The weight depends on the item alone, so the loss does not change with the division of a batch
      over ranks. (The variance of a mean of n ratings falls as 1/n.)
    * ``plcc_weight``: adds weight * (1 - PLCC) over the micro-batch (Pearson's correlation). An item's share
      depends on its neighbours, so this term does change with ``batch.micro_items``.

    Args:
        scores: (b,) float32 predictions.
        ratings: (b,) float32 targets.
        rating_counts: (b,) float32.
        config: the section `loss`.
        transform: of the target; the loss is computed of the transformed scores and ratings.
        custom: the error per item in place of the built-in ones, where ``kind`` names a function of the user's own.

    Returns:
        float32 scalar, a mean over items.

    Raises:
        UserError: ``custom`` returned something else than a float32 tensor of shape (b,) or a scalar.
    """
    if transform != "none":
        function = torch.log if transform == "log" else torch.log1p
        scores, ratings = function(scores.float()), function(ratings)
    error = scores.float() - ratings
    if custom is not None:
        loss = custom(scores.float(), ratings, rating_counts)
        if problem := result_problem(loss, len(ratings), config):
            raise UserError(f"the loss cannot be used: {problem}", where=f"loss.kind={config.kind}")
    elif config.kind == "huber":
        d = config.huber_delta
        size = error.abs()
        loss = torch.where(size <= d, 0.5 * error**2, d * (size - 0.5 * d))
    else:
        loss = error**2
    if config.count_weight == "log":
        loss = loss * torch.log1p(rating_counts) / math.log1p(config.count_reference)
    elif config.count_weight == "sqrt":
        loss = loss * (rating_counts / config.count_reference).sqrt()
    elif config.count_weight == "linear":
        loss = loss * (rating_counts / config.count_reference)
    total = loss.mean()
    if config.plcc_weight:
        total = total + config.plcc_weight * (1 - batch_plcc(scores.float(), ratings))
    return total


def batch_plcc(x: Tensor, y: Tensor) -> Tensor:
    """Correlate two (b,) tensors by Pearson's formula; the 1e-6 under the root makes constants give 0."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / ((x**2).sum() * (y**2).sum() + 1e-6).sqrt()
