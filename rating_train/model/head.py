"""Pooling and the two-layer regression head, in fp32.

Legend: B items, T tokens, D decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def masked_mean(hidden: Tensor, used: Tensor) -> Tensor:
    """sum(m * h) / sum(m) over the tokens before the padding.

    Args:
        hidden: (B, T, D), any float dtype.
        used: (B,) int64, tokens before the padding, at least 1.

    Returns:
        (B, D) float32.
    """
    mask = torch.arange(hidden.shape[1], device=hidden.device) < used[:, None]  # (B, T)
    # As a product: sums of T terms in fp32 whatever the dtype of hidden, without an fp32 copy of it.
    total = torch.einsum("btd,bt->bd", hidden.float(), mask.float())
    return total / used[:, None].float()


class Linear32(nn.Linear):
    """A linear layer that computes in fp32 even where its weights are bf16 copies of fp32 master weights.

    A bf16 result would quantise scores near 4 to steps of 2^-6. A module of its own, because ZeRO-3 gathers
    a layer's weights when the layer is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class RatingHead(nn.Module):
    """Linear(D, hidden) -> ReLU -> Dropout -> Linear(hidden, 1), then y = 1 + 4 sigmoid(x), in (1, 5)."""

    def __init__(self, width: int, hidden: int, dropout: float, rating_bias: float = 0.0) -> None:
        super().__init__()
        self.inner = Linear32(width, hidden)
        self.outer = Linear32(hidden, 1)
        self.dropout = dropout
        nn.init.constant_(self.outer.bias, rating_bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B,) float32 ratings."""
        x = F.relu(self.inner(pooled))
        x = F.dropout(x, self.dropout, self.training)
        return (1 + 4 * torch.sigmoid(self.outer(x))).squeeze(-1)
