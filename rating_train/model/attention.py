"""Attention without a mask tensor, so that a fused (flash) kernel can run in both towers.

Given no mask, ``transformers`` 4 builds a boolean one of (B, 1, T, T) for the decoder in every forward pass, because
it looks for packed sequences, and where there is a mask it repeats the key and value heads; both rule out the flash
kernels. Version 5 drops the mask again, but reads the device back to decide that. An attention function without a
mask function is given no mask at all; causality is then an argument of the kernel.

Legend: B items, N query heads, K key and value heads, T tokens, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

#: ``attn_implementation`` of every backbone that this package builds.
ATTENTION = "rating_train_maskless"


def register_attention() -> str:
    """Make :func:`maskless_attention` known to ``transformers``; returns the name to ask for."""
    AttentionInterface.register(ATTENTION, maskless_attention)
    return ATTENTION


def maskless_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over all tokens (vision tower) or over those before (decoder), in the signature of ``transformers``.

    Exact for the regressor: its padding is on the right, where no real token of a causal decoder sees it, and its
    images have no padding.

    Args:
        module: the attention layer; its ``is_causal`` counts where the argument is ``None``.
        query: (B, N, T, d).
        key: (B, K, T, d); each head serves N / K query heads.
        value: (B, K, T, d).
        attention_mask: must be ``None``.
        dropout: probability of an attention weight to be dropped.
        scaling: factor of the products; 1 / sqrt(d) where it is ``None``.
        is_causal: whether a token sees no later one.

    Returns:
        (B, T, N, d), and ``None`` in place of the attention weights.

    Raises:
        ValueError: a mask is given.
    """
    if attention_mask is not None:
        raise ValueError(
            f"{ATTENTION} takes no mask: causal attention over right-padded sequences needs none"
        )
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None
