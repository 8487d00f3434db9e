"""The fingerprint of a vision tower: of its values and their precision, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from rating_train.config.schema import ModelConfig
from rating_train.model.architecture import read_architecture
from rating_train.model.regressor import RatingRegressor, build_regressor
from rating_train.weights.fingerprint import tower_fingerprint


def model(demo: Path) -> RatingRegressor:
    config = ModelConfig(backbone=str(demo / "model"), head_hidden=16)
    return build_regressor(config, read_architecture(config), 64, 1, seed=3)


def test_one_changed_value_of_tower_or_connector_is_another_fingerprint(demo: Path) -> None:
    first = model(demo)
    before = tower_fingerprint(first)
    assert before == tower_fingerprint(model(demo))
    with torch.no_grad():
        first.head.inner.weight.add_(1)
        next(first.backbone.text_model.parameters()).add_(1)
    assert tower_fingerprint(first) == before, "decoder and head are trained"
    for part in (first.backbone.connector, first.backbone.vision_model):
        value = next(part.parameters())
        with torch.no_grad():
            value.view(-1)[0] += 1
        assert tower_fingerprint(first) != before
        with torch.no_grad():
            value.view(-1)[0] -= 1
    assert tower_fingerprint(first.bfloat16()) != before, "features in bf16 are others"
