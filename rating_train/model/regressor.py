"""The regressor: visual tokens and text, through the decoder, pooled, to one rating.

Legend: B items, S pixels a side, T tokens (V visual), D decoder width.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn

from rating_train.config.schema import ModelConfig
from rating_train.model.architecture import Architecture
from rating_train.model.backbones import BACKBONES
from rating_train.model.cost import visual_tokens
from rating_train.model.head import RatingHead, masked_mean
from rating_train.model.load import load_backbone
from rating_train.model.vision import position_ids

log = logging.getLogger(__name__)


class RatingRegressor(nn.Module):
    """A backbone without its LM head, with mask-aware mean pooling and :class:`~.head.RatingHead`.

    Args:
        backbone: the model of ``transformers``, without its LM head.
        architecture: the backbone's family and shape.
        image_px: side of the square images.
        image_start: position of the first visual token; the same in every item.
        head_dropout, rating_bias: see :class:`~rating_train.config.schema.ModelConfig`.
    """

    positions: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        architecture: Architecture,
        image_px: int,
        image_start: int,
        head_dropout: float = 0.1,
        rating_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.family = BACKBONES[architecture.family]
        vision = architecture.vision
        self.register_buffer(
            "positions", position_ids(image_px, vision.patch, vision.image_size), persistent=False
        )
        self.visual_tokens = visual_tokens(architecture, image_px)
        self.image_start = image_start
        self.head = RatingHead(architecture.text.hidden, architecture.head_hidden, head_dropout, rating_bias)

    def forward(
        self, images: Tensor, input_ids: Tensor, used_tokens: Tensor, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """Rate a batch.

        Args:
            images: (B, 3, S, S) uint8.
            input_ids: (B, T) int64, padded on the right; visual tokens replace the V placeholders that begin at
                ``image_start``.
            used_tokens: (B,) int64, tokens before the padding.
            dropout_keys: (B,) int64 of :func:`~.head.dropout_keys`; needed in training with dropout only.

        Returns:
            (B,) float32 in (1, 5).
        """
        visual = self.family.encode_images(self.backbone, images, self.positions)  # (B, V, D)
        text = self.family.embed_text(self.backbone, input_ids)  # (B, T, D)
        start, end = self.image_start, self.image_start + self.visual_tokens
        merged = torch.cat([text[:, :start], visual.to(text.dtype), text[:, end:]], dim=1)
        hidden = self.family.decode(self.backbone, merged)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return self.head(masked_mean(hidden, used_tokens), dropout_keys)


def build_regressor(
    config: ModelConfig, architecture: Architecture, image_px: int, image_start: int, seed: int
) -> RatingRegressor:
    """Load (or draw) the backbone, draw the head, and freeze the parts that ``config.freeze`` names.

    Args:
        config: the section ``model``.
        architecture: the backbone's shape.
        image_px: side of the square images.
        image_start: position of the first visual token.
        seed: of what is drawn; the same seed gives the same weights on every rank.

    Raises:
        UserError: the backbone cannot be loaded, or the image size does not divide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = load_backbone(config, architecture)
        model = RatingRegressor(
            backbone, architecture, image_px, image_start, config.head_dropout, config.rating_bias
        )
    if config.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in config.freeze)
    return model


def empty_regressor(
    config: ModelConfig, architecture: Architecture, image_px: int, image_start: int
) -> RatingRegressor:
    """Build the regressor without memory for its weights (on the device ``meta``), to count or to trace it."""
    with torch.device("meta"):
        return build_regressor(
            dataclasses.replace(config, weights="random"), architecture, image_px, image_start, seed=0
        )


def part_of(parameter_name: str) -> str:
    """Name the part of the model (of ``PARTS``) that a parameter belongs to.

    Raises:
        KeyError: it belongs to none.
    """
    if parameter_name.startswith("head."):
        return "head"
    for family in BACKBONES.values():
        for prefix, part in family.parts.items():
            if parameter_name.startswith("backbone." + prefix):
                return part
    raise KeyError(f"parameter {parameter_name!r} belongs to no part of the model")
