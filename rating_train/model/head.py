"""Pooling and the two-layer regression head, in fp32.

Legend: B items, T tokens, D decoder width, H hidden units of the head.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

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

    def forward(self, pooled: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """(B, D), and in training with dropout (B,) int64 of :func:`dropout_keys` -> (B,) float32 ratings."""
        x = F.relu(self.inner(pooled))
        if self.training and self.dropout > 0:
            if dropout_keys is None:
                raise ValueError("training with dropout needs dropout_keys")
            x = item_dropout(x, self.dropout, dropout_keys)
        return (1 + 4 * torch.sigmoid(self.outer(x))).squeeze(-1)


def dropout_keys(ids: Sequence[str], seed: int, step: int) -> Tensor:
    """(B,) int64: what the dropout masks of these items at this step are made of."""
    base = (seed * 1_000_003 + step) << 32
    return torch.tensor([_signed(base + zlib.crc32(i.encode("utf-8"))) for i in ids], dtype=torch.int64)


def item_dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """Dropout whose mask follows the item and the step, not the process that computes it.

    So a run on another number of ranks, with another micro-batch, or resumed, drops the same units. The random
    bits are SplitMix64 (Steele et al., OOPSLA 2014) of key and unit.

    Args:
        x: (B, H) float32.
        p: probability of a unit to be dropped, in [0, 1).
        keys: (B,) int64.
    """
    units = torch.arange(1, x.shape[1] + 1, device=x.device)
    z = _mix(keys)[:, None] + units * _signed(0x9E3779B97F4A7C15)  # (B, H), wrapping
    uniform = (_mix(z) >> 40 & 0xFFFFFF).float() / 2**24
    return x * (uniform >= p) / (1 - p)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return z >> bits & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The low 64 bits as a signed number, torch's only 64-bit kind that computes everywhere."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
