"""Exported folders by the code of this package instead of the code in the folder."""

from __future__ import annotations


def register_auto_classes() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoProcessor`` of ``transformers`` know exported folders.

    They then load one by the code of this package, and the code in the folder is not run.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor

    from rating_train.export.hub.configuration_rating import RatingConfig
    from rating_train.export.hub.modeling_rating import RatingModel
    from rating_train.export.hub.processing_rating import RatingProcessor

    AutoConfig.register(RatingConfig.model_type, RatingConfig, exist_ok=True)
    AutoModel.register(RatingConfig, RatingModel, exist_ok=True)
    AutoModelForSequenceClassification.register(RatingConfig, RatingModel, exist_ok=True)
    AutoProcessor.register(RatingConfig, RatingProcessor, exist_ok=True)
