"""The regressor: visual tokens and text, through the decoder, pooled, to one number.

Legend: B items, S pixels a side, T tokens (V visual), D decoder width.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rating_train.config.schema import ModelConfig
from rating_train.config.task import PAPER, Target
from rating_train.errors import UserError
from rating_train.model.architecture import Architecture
from rating_train.model.backbones import BACKBONES
from rating_train.model.cost import visual_tokens
from rating_train.model.head import STARS, RatingHead, Scale, masked_mean
from rating_train.model.load import load_backbone
from rating_train.model.vision import position_ids

log = logging.getLogger(__name__)


class RatingRegressor(nn.Module):
    """A backbone without its LM head, with mask-aware mean pooling and :class:`~.head.RatingHead`.

    Args:
        backbone: the model of ``transformers``, without its LM head.
        architecture: the backbone's family and shape.
        image_px: side of the square images; 0 for a model that reads none and has no vision tower.
        image_start: position of the first visual token; the same in every item.
        head_dropout, rating_bias: see :class:`~rating_train.config.schema.ModelConfig`.
        scale: how the head's output becomes a score.
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
        scale: Scale = STARS,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.family = BACKBONES[architecture.family]
        vision = architecture.vision
        if not image_px:
            _remove_vision(backbone, self.family.parts)
        self.register_buffer(
            "positions", position_ids(image_px, vision.patch, vision.image_size), persistent=False
        )
        self.visual_tokens = visual_tokens(architecture, image_px)
        self.image_start = image_start
        self.image_token_id = architecture.image_token_id
        self.head = RatingHead(
            architecture.text.hidden, architecture.head_hidden, head_dropout, rating_bias, scale
        )

    def forward(
        self, images: Tensor, input_ids: Tensor, used_tokens: Tensor, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """Rate a batch.

        Args:
            images: (B, 3, S, S) uint8; of tiled images (B, M, 3, S, S), the last ones of an item unused; or the
                visual tokens themselves, (B, V, D) of :meth:`encode_images`, which runs the decoder alone. Not looked
                at by a model without a vision tower.
            input_ids: (B, T) int64, padded on the right; visual tokens replace the V placeholders that begin at
                ``image_start``, or with tiling all placeholders, in order.
            used_tokens: (B,) int64, tokens before the padding.
            dropout_keys: (B,) int64 of :func:`~.head.dropout_keys`; needed in training with dropout only.

        Returns:
            (B,) float32, in the unit of the target: in (1, 5) for stars.
        """
        # Images first: autograd works backwards, so the gradient of the embeddings follows the decoder's. Behind the
        # vision tower's, it would keep the tower's gradients from being sent while they are computed.
        visual = self._visual(images)
        merged = self.family.embed_text(self.backbone, input_ids)  # (B, T, D)
        if visual is not None and images.ndim == 5:
            merged = self._merge_tiles(visual.to(merged.dtype), input_ids, merged)
        elif visual is not None:
            start, end = self.image_start, self.image_start + self.visual_tokens
            merged = torch.cat([merged[:, :start], visual.to(merged.dtype), merged[:, end:]], dim=1)
        hidden = self.family.decode(self.backbone, merged)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return self.head(masked_mean(hidden, used_tokens), dropout_keys)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode squares, (B, 3, S, S) uint8, as visual tokens (B, V, D) in the dtype of the computation."""
        return self.family.encode_images(self.backbone, images, self.positions)

    def _visual(self, images: Tensor) -> Tensor | None:
        """Return the visual tokens (B, V, D), of tiled images (B, M * V, D); ``None`` without a vision tower."""
        if images.ndim == 5:
            visual = self.encode_images(images.flatten(0, 1))  # (B * M, V, D)
            return visual.reshape(len(images), -1, visual.shape[-1])
        if not self.visual_tokens:
            return None
        return images if images.ndim == 3 else self.encode_images(images)

    def _merge_tiles(self, visual: Tensor, input_ids: Tensor, text: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) in which the n-th placeholder of an item is its n-th visual token.

        By index rather than by mask: a mask would wait for the device. What fills up an item has no placeholder.
        """
        placeholder = (input_ids == self.image_token_id).unsqueeze(-1)  # (B, T, 1)
        index = (placeholder.cumsum(1) - 1).clamp(min=0).expand(-1, -1, visual.shape[-1])
        return torch.where(placeholder, visual.gather(1, index), text)


def _remove_vision(backbone: nn.Module, parts: Mapping[str, str]) -> None:
    """Remove the vision tower and the connector: a model that reads text alone has neither their weights nor cost."""
    for prefix, part in parts.items():
        if part in ("vision", "connector"):
            parent, _, name = prefix.rstrip(".").rpartition(".")
            setattr(backbone.get_submodule(parent), name, nn.Identity())


def scale_of(target: Target) -> Scale:
    """Return how the head's output becomes a score of a target.

    Raises:
        UserError: an unbounded target without the statistics of its training split.
    """
    if target.bounds:
        lower, upper = map(target.forward, target.bounds)
        return Scale(lower, upper - lower, True, target.transform)
    if target.center is None or target.spread is None:
        raise UserError(
            "an unbounded target needs the mean and deviation of the training split",
            where="task.target.center, task.target.spread",
            fix="take them from the dataset's manifest.json",
        )
    return Scale(target.center, target.spread or 1.0, False, target.transform)


def starting_bias(target: Target) -> float:
    """Return the head's bias at which training starts at the mean of the training split; 0 where it is not known."""
    if target.center is None or target.bounds is None:
        return 0.0  # a standardised target starts at its mean
    lower, upper = map(target.forward, target.bounds)
    share = min(max((target.center - lower) / (upper - lower), 0.01), 0.99)
    return math.log(share / (1 - share))


def build_regressor(
    config: ModelConfig,
    architecture: Architecture,
    image_px: int,
    image_start: int,
    seed: int,
    target: Target = PAPER.target,
) -> RatingRegressor:
    """Load (or draw) the backbone, draw the head, and freeze the parts that ``config.freeze`` names.

    Args:
        config: the section ``model``.
        architecture: the backbone's shape.
        image_px: side of the square images; 0 for a model that reads none.
        image_start: position of the first visual token.
        seed: of what is drawn; the same seed gives the same weights on every rank.
        target: the number that is predicted.

    Raises:
        UserError: the backbone cannot be loaded, or the image size does not divide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = load_backbone(config, architecture)
        model = RatingRegressor(
            backbone,
            architecture,
            image_px,
            image_start,
            config.head_dropout,
            config.rating_bias or starting_bias(target),
            scale_of(target),
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
