"""Pooling and the two-layer regression head, in fp32.

Legend: B items, T tokens, D decoder width, H hidden units of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Beyond it, the exponential leaves float32.
_LARGEST_LOGARITHM = 80.0


@dataclass(frozen=True)
class Scale:
    """How the head's output x becomes a score y in the unit of the target. The default is stars from 1 to 5.

    Attributes:
        offset, width: z = offset + width sigmoid(x) between two bounds, else z = offset + width x.
        bounded: whether there are two bounds.
        transform: none: y = z; log: y = exp(z); log1p: y = exp(z) - 1.
    """

    offset: float = 1.0
    width: float = 4.0
    bounded: bool = True
    transform: str = "none"

    def __call__(self, x: Tensor) -> Tensor:
        z = self.offset + self.width * (torch.sigmoid(x) if self.bounded else x)
        if self.transform == "none":
            return z
        z = z.clamp(max=_LARGEST_LOGARITHM)
        return torch.exp(z) if self.transform == "log" else torch.expm1(z)


STARS = Scale()


def masked_mean(hidden: Tensor, used: Tensor) -> Tensor:
    """Average the hidden states of the tokens before the padding: sum(m * h) / sum(m).

    Args:
        hidden: (B, T, D), any float dtype.
        used: (B,) int64, tokens before the padding, at least 1.

    Returns:
        (B, D) float32.
    """
    mask = torch.arange(hidden.shape[1], device=hidden.device) < used[:, None]  # (B, T)
    # In fp32 whatever the dtype of hidden: a bf16 sum of hundreds of terms loses most of their bits.
    total = torch.einsum("btd,bt->bd", hidden.float(), mask.float())
    return total / used[:, None].float()


class Linear32(nn.Linear):
    """A linear layer that computes in fp32, also with bf16 weights.

    A bf16 result would round scores near 4 to steps of 2^-6. This is a module, not a function, because ZeRO-3
    gathers the weights of a layer when that layer is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class RatingHead(nn.Module):
    """Linear(D, hidden) -> ReLU -> Dropout -> Linear(hidden, 1), then a :class:`Scale`: 1 + 4 sigmoid(x) for stars."""

    def __init__(
        self, width: int, hidden: int, dropout: float, rating_bias: float = 0.0, scale: Scale = STARS
    ) -> None:
        super().__init__()
        self.inner = Linear32(width, hidden)
        self.outer = Linear32(hidden, 1)
        self.dropout = dropout
        self.scale = scale
        nn.init.constant_(self.outer.bias, rating_bias)

    def forward(self, pooled: Tensor, dropout_keys: Tensor | None = None) -> Tensor:
        """Rate pooled states.

        Args:
            pooled: (B, D).
            dropout_keys: (B,) int64 of :func:`dropout_keys`; needed in training with dropout only.

        Returns:
            (B,) float32, in the unit of the target: in (1, 5) for stars.

        Raises:
            ValueError: training with dropout, and no keys.
        """
        x = F.relu(self.inner(pooled))
        if self.training and self.dropout > 0:
            if dropout_keys is None:
                raise ValueError("training with dropout needs dropout_keys")
            x = item_dropout(x, self.dropout, dropout_keys)
        return self.scale(self.outer(x)).squeeze(-1)


def dropout_keys(id_hashes: Tensor, seed: int, step: int) -> Tensor:
    """Make the keys of the dropout masks of these items at this step, on the device of the hashes.

    Args:
        id_hashes: (B,) int64, a 32-bit hash of each item's id.
        seed: ``train.seed``.
        step: optimizer steps done before this one.

    Returns:
        (B,) int64: the hash in the low 32 bits, seed and step above.
    """
    return id_hashes + _signed((seed * 1_000_003 + step) << 32)


def item_dropout(x: Tensor, p: float, keys: Tensor) -> Tensor:
    """Apply dropout with masks that depend on item and step only, not on the process that computes them.

    A run on another number of ranks, with another micro-batch, or after a resume drops the same units. The random
    bits are SplitMix64 (Steele et al., OOPSLA 2014) of key and unit.

    Args:
        x: (B, H) float32.
        p: probability that a unit is dropped, in [0, 1).
        keys: (B,) int64.

    Returns:
        (B, H) float32, what is kept scaled by 1 / (1 - p).
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
    """Shift to the right and fill with zeros; torch's own shift repeats the sign bit."""
    return z >> bits & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Reinterpret the low 64 bits as signed: int64 is the only 64-bit type with arithmetic on every device."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
