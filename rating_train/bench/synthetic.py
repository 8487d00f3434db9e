"""Batches and models for measurements that need neither data nor weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from rating_train.data.collate import Batch
from rating_train.model.architecture import KNOWN_ARCHITECTURES, Architecture

_FULL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"


def reduced_architecture(text: Mapping[str, Any], vision: Mapping[str, Any], **own: Any) -> Architecture:
    """Return SmolVLM2-256M with other sizes of its decoder and vision tower, and token ids that fit any vocabulary."""
    full = KNOWN_ARCHITECTURES[_FULL]
    return dataclasses.replace(
        full,
        text=dataclasses.replace(full.text, **text),
        vision=dataclasses.replace(full.vision, **vision),
        **{"image_token_id": 5, "pad_token_id": 2, **own},
    )


def noise_batch(
    items: int, tokens: int, image_px: int, vocabulary: int, seed: int = 0, padding: int = 0
) -> Batch:
    """Return random pixels, tokens and ratings, the same for the same seed, in host memory.

    Args:
        items: B.
        tokens: T, tokens of each item, padding included.
        image_px: side of the square images, in pixels.
        vocabulary: token ids are below it; the first 20 are left out, special tokens among them.
        seed: of the noise, and part of the ids.
        padding: the last tokens of each item that are padding.
    """
    g = torch.Generator().manual_seed(seed)
    return Batch(
        ids=[f"{seed}-{i}" for i in range(items)],
        images=torch.randint(0, 256, (items, 3, image_px, image_px), generator=g, dtype=torch.uint8),
        input_ids=torch.randint(20, vocabulary, (items, tokens), generator=g),
        used_tokens=torch.full((items,), tokens - padding),
        ratings=torch.rand(items, generator=g) * 4 + 1,
        rating_counts=torch.ones(items),
        truncated_tokens=0,
    )
