"""Vision tower and connector for squares of one fixed size.

The stock embedding loops over the images of a batch and synchronises the device for each, to find out how many of
its patches are real. With one square size every position is a constant, computed here once.

Legend: B images, S pixels a side, P patches, Dv vision width, V visual tokens, D decoder width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rating_train.errors import UserError


def position_ids(image_px: int, patch: int, pretrained_px: int) -> Tensor:
    """Look up the learned position of every patch of a square image.

    Patch i of n is at position floor(i * grid / n) of the pre-training grid, in integers: the rule that the model
    was trained with (NaViT-style fractional coordinates), and that transformers 5 computes. transformers 4.55 to
    4.57 multiply by (1 - 1e-6) first; in fp32 that moves every patch on the edge of a bin into the bin below (287
    of 576 patches at 384 px, 1023 of 1024 at 512 px), see transformers issue 41190.

    Args:
        image_px: side of the image, in pixels.
        patch: side of a patch, in pixels.
        pretrained_px: side of the images of the pre-training, in pixels.

    Returns:
        (P,) int64.

    Raises:
        UserError: the side is not a multiple of the patch.
    """
    if image_px % patch:
        raise UserError(
            f"{image_px} pixels are not a multiple of the patch size {patch}", where="data.image_px"
        )
    n, grid = image_px // patch, pretrained_px // patch
    bins = torch.arange(n) * grid // n
    return (bins[:, None] * grid + bins).flatten()


def scale_pixels(images: Tensor) -> Tensor:
    """Scale uint8 in [0, 255] to float32 in [-1, 1]: by 1/255, then (x - 0.5) / 0.5.

    The channels of a batch lie last in memory. They are put first while a value is one byte.
    """
    return (images.contiguous().float() / 255 - 0.5) / 0.5


def encode_images(backbone: Any, images: Tensor, positions: Tensor) -> Tensor:
    """Encode a batch of square images as visual tokens.

    Args:
        backbone: SmolVLMModel or Idefics3Model.
        images: (B, 3, S, S) uint8.
        positions: (P,) int64 of :func:`position_ids`.

    Returns:
        (B, V, D) in the backbone's dtype. No image is dropped; the stock code takes an all-zero image for padding
        and shifts the rows of its neighbours.
    """
    vision = backbone.vision_model
    embeddings = vision.embeddings
    pixels = scale_pixels(images).to(embeddings.patch_embedding.weight.dtype)
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, Dv)
    hidden = patches + embeddings.position_embedding(positions)
    # No mask: every patch is real.
    hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    return backbone.connector(vision.post_layernorm(hidden))
