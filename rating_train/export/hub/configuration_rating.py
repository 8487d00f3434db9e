"""Configuration of a rating regressor: the shape of its backbone, and how an item becomes its input."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class RatingConfig(PretrainedConfig):
    """What :class:`RatingModel` and :class:`RatingProcessor` are made from.

    Args:
        architecture: shape of the backbone and the head: ``text`` and ``vision`` with their widths and depths,
            ``scale_factor``, ``image_token_id``, ``pad_token_id``, ``head_hidden``, ``tie_word_embeddings``.
        image_px: side of the square image, in pixels; 0 for a model that reads text alone.
        image_start: position of the first visual token in the sequence.
        head_dropout: dropout probability of the head while training.
        scale: how the head's output becomes a score, as :class:`~rating_train.model.head.Scale`; by default stars.
        trained: where the weights come from: run, step, precision, fingerprint of the data.
    """

    model_type = "rating_regressor"

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        image_px: int = 384,
        image_start: int = 0,
        head_dropout: float = 0.0,
        scale: dict[str, Any] | None = None,
        trained: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture or {}
        self.image_px = image_px
        self.image_start = image_start
        self.head_dropout = head_dropout
        self.scale = scale or {}
        self.trained = trained or {}
        # One number in the unit of the target, on which nothing is to be applied any more.
        kwargs = {"num_labels": 1, "problem_type": "regression", **kwargs}
        super().__init__(**kwargs)
