"""Inference with a trained model, without an engine: the same numbers as during training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from rating_train.config.schema import Config
from rating_train.data.collate import Batch
from rating_train.model.architecture import Architecture
from rating_train.model.regressor import RatingRegressor, build_regressor


@dataclass
class Predictor:
    """Forward passes in the run's precision: bf16 weights (stages 1 to 3), or fp32 under autocast (stage 0)."""

    model: RatingRegressor
    device: torch.device
    autocast: bool
    length_multiple: int = 0  # batches are cut as in training; 0 leaves them as they are

    @torch.no_grad()
    def launch(self, batch: Batch) -> Tensor:
        """Start the forward pass of B items; return (B,) float32 ratings on the device, without waiting."""
        batch = batch.to(self.device).cut(self.length_multiple)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(batch.images, batch.input_ids, batch.used_tokens).float()

    def __call__(self, batch: Batch) -> Tensor:
        """Return (B,) float32 ratings on the CPU."""
        return self.launch(batch).cpu()


def load_predictor(
    config: Config,
    architecture: Architecture,
    image_start: int,
    weights: dict[str, Tensor],
    device: torch.device,
) -> Predictor:
    """Return a model with these fp32 weights, ready to predict.

    Args:
        weights: the complete state dict, as :func:`rating_train.checkpoint.deepspeed_io.consolidated_weights`
            returns it.
    """
    bare = dataclasses.replace(config.model, weights="random")  # every weight is replaced below
    model = build_regressor(
        bare, architecture, config.model_px, image_start, seed=0, target=config.task.target
    )
    model.load_state_dict(weights, strict=True)
    cast_weights(model, config)
    autocast, multiple = config.forward_precision == "autocast", config.batch.length_multiple_tokens
    return Predictor(model.to(device).eval(), device, autocast, multiple)


@torch.no_grad()
def frozen_visual_tokens(model: RatingRegressor, images: Tensor, config: Config) -> Tensor:
    """Return the visual tokens (B, V, D) that a frozen tower computes of images (B, 3, S, S) uint8 in a run."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.forward_precision == "autocast"):
        return model.encode_images(images)


def cast_weights(model: RatingRegressor, config: Config) -> None:
    """Round fp32 weights as DeepSpeed holds them: in bf16 above stage 0; buffers (rotary frequencies) stay in fp32."""
    if config.forward_precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
