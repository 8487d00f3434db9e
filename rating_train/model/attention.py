"""Attention without a mask tensor, so that a fused (flash) kernel can run in both towers.

Given no mask, ``transformers`` 4 builds a boolean one of (B, 1, T, T) for the decoder in every forward pass, because
it looks for packed sequences, and where there is a mask it repeats the key and value heads; both rule out the flash
kernels. Version 5 drops the mask again, but reads the device back to decide that. An attention function without a
mask function is given no mask at all; causality is then an argument of the kernel.

On a CPU in bf16 the backward pass of the flash kernel is slow. Three matrix products and a softmax take less time there
(:func:`attention_by_products`, :func:`choose_attention`).

Legend: B items, N query heads, K key and value heads, T tokens, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

#: ``attn_implementation`` of every backbone that this package builds.
ATTENTION = "rating_train_maskless"
_TRAINED_BY_PRODUCTS = "rating_train_products"


def register_attention() -> str:
    """Make :func:`maskless_attention` known to ``transformers``; returns the name to ask for."""
    AttentionInterface.register(ATTENTION, maskless_attention)
    return ATTENTION


def choose_attention(backbone: Any, device: torch.device, bf16: bool) -> None:
    """Have a backbone attend as is fastest where it is trained.

    Args:
        backbone: of :func:`~.load.load_backbone`.
        device: where it computes.
        bf16: whether it computes in bf16.
    """
    if by_products(device, bf16):
        AttentionInterface.register(_TRAINED_BY_PRODUCTS, _trained_by_products)
        backbone.set_attn_implementation(_TRAINED_BY_PRODUCTS)


def by_products(device: torch.device, bf16: bool) -> bool:
    """Return whether :func:`attention_by_products` is the fastest on a device, with the backward pass."""
    return device.type == "cpu" and bf16


def _trained_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Take the products where gradients are wanted. Scores, and what is frozen, round as everywhere else."""
    if not query.requires_grad or attention_mask is not None or options.get("dropout"):
        return maskless_attention(module, query, key, value, attention_mask, **options)
    causal = _sees_no_later(module, options.get("is_causal"))
    return attention_by_products(query, key, value, causal, options.get("scaling")), None


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
        is_causal=_sees_no_later(module, is_causal),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float | None = None
) -> Tensor:
    """Attend with matrix products in the dtype of ``value``.

    In bf16 the products of queries and keys are rounded before the softmax, as in the eager attention of
    ``transformers``; a flash kernel keeps them in fp32. Takes memory for T x T weights of each head and layer.

    Args:
        query: (B, N, T, d).
        key, value: (B, K, T, d); each head serves N / K query heads.
        causal: whether a token sees no later one.
        scaling: factor of the products; 1 / sqrt(d) where it is ``None``.

    Returns:
        (B, T, N, d), in the dtype of ``value``.
    """
    items, heads, tokens, width = query.shape
    groups, dtype = key.shape[1], value.dtype
    scale = width**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # which would compute the softmax in fp32
        # The heads that share a key head are rows of one product.
        rows = (query * scale).to(dtype).reshape(items, groups, heads // groups * tokens, width)
        products = rows @ key.to(dtype).transpose(-1, -2)  # (B, K, N / K * T, T)
        if causal:
            later = torch.full((tokens, tokens), float("-inf"), dtype=dtype, device=query.device).triu(1)
            products = (products.view(items, groups, -1, tokens, tokens) + later).view(products.shape)
        output = (torch.softmax(products, dim=-1) @ value).view(items, heads, tokens, width)
    return output.transpose(1, 2).contiguous()


def _sees_no_later(module: nn.Module, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
