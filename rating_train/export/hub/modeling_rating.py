"""A rating regressor for ``transformers``: one image and the token ids of a listing to one number, such as stars.

Legend: B items, S pixels a side, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rating_train.export.hub.configuration_rating import RatingConfig
from rating_train.model.architecture import architecture_from_dict
from rating_train.model.attention import register_attention
from rating_train.model.backbones import BACKBONES
from rating_train.model.head import Scale
from rating_train.model.regressor import RatingRegressor
from rating_train.model.vision import position_ids


class RatingModel(PreTrainedModel):
    """SmolVLM without its LM head, mean pooling, and a two-layer head; ``logits`` are the numbers."""

    config_class = RatingConfig
    base_model_prefix = "regressor"
    main_input_name = "pixel_values"
    _no_split_modules = ["SmolVLMEncoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012  # so in the base class

    def __init__(self, config: RatingConfig) -> None:
        super().__init__(config)
        self.shape = architecture_from_dict(config.architecture)
        backbone = AutoModel.from_config(
            BACKBONES[self.shape.family].config(self.shape), attn_implementation=register_attention()
        )
        self.regressor = RatingRegressor(
            backbone,
            self.shape,
            config.image_px,
            config.image_start,
            config.head_dropout,
            scale=Scale(**config.scale),
        )
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Fill what a checkpoint does not hold: the constants of the vision tower's positions."""
        super()._init_weights(module)
        if isinstance(module, RatingRegressor):
            vision = self.shape.vision
            constants = position_ids(self.config.image_px, vision.patch, vision.image_size)
            module.positions.copy_(constants.to(module.positions.device))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Rate a batch.

        Args:
            pixel_values: (B, 3, S, S) uint8, as :class:`RatingProcessor` makes them: not scaled.
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T), 1 for tokens and 0 for padding; without it, every token counts.
            labels: (B,) true ratings, for a mean squared error.
            return_dict: False returns a tuple.

        Returns:
            ``logits`` (B, 1) float32: the ratings; and ``loss`` where there are labels.

        Raises:
            ValueError: the pixels are not uint8, or an item has padding on the left.
        """
        if pixel_values.dtype != torch.uint8:
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}, expected unscaled uint8 of the processor"
            )
        used = torch.full_like(input_ids[:, 0], input_ids.shape[1])
        if attention_mask is not None:
            used = attention_mask.sum(dim=1, dtype=torch.int64)
        keys = None
        if self.training and self.config.head_dropout > 0:
            keys = torch.randint(2**62, (len(input_ids),), device=input_ids.device)
        ratings = self.regressor(pixel_values, input_ids, used, keys)
        loss: Any = None if labels is None else F.mse_loss(ratings, labels.to(ratings).view(-1))
        logits: Any = ratings[:, None]
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()
