"""Collation of stored visual tokens into a batch, and of stored images alone, to be encoded. In the DataLoader workers.

Legend: B items, S pixels per side, V visual tokens of an item, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rating_train.config.schema import DataConfig, SourceConfig
from rating_train.data.collate import EVALUATION, Collator, Purpose, new_images
from rating_train.data.decode import decode_square
from rating_train.data.features.identity import Features, features_of
from rating_train.data.prompt import PromptEncoder
from rating_train.data.tiling.collate import make_collator
from rating_train.data.workers.shared_blocks import Room, plain_room


class FeatureCollator(Collator):
    """A collate function for samples with visual tokens in place of an image: a batch's images are (B, V, D).

    Args:
        prompt, purpose: as of :class:`Collator`.
        features: what the samples hold.
    """

    def __init__(self, prompt: PromptEncoder, features: Features, purpose: Purpose = EVALUATION) -> None:
        super().__init__(prompt, image_px=0, purpose=purpose)  # nothing is decoded
        self.features = features

    @property
    def _image_shape(self) -> tuple[int, ...]:
        return (self.features.item_bytes,)

    def _fill(self, image: Tensor, sample: Mapping[str, Any]) -> None:
        content = sample["image"]
        if len(content) != len(image):
            raise ValueError(
                f"the stored features of item {sample['id']!r} have {len(content)} bytes, not {len(image)}"
            )
        image.numpy()[:] = np.frombuffer(content, np.uint8)

    def _as_model_input(self, images: Tensor) -> Tensor:
        shape = (len(images), self.features.tokens, self.features.width)
        return images.view(getattr(torch, self.features.dtype)).view(shape)


def collator_of(
    config: DataConfig,
    source: SourceConfig,
    prompt: PromptEncoder,
    purpose: Purpose = EVALUATION,
) -> Collator:
    """Return the collate function of a source's samples: of its images, or of the features that stand for them."""
    if (features := features_of(config, source)) is not None:
        return FeatureCollator(prompt, features, purpose)
    image_px = config.image_px if prompt.words.image else 0
    return make_collator(prompt, image_px, config.tiling_px, purpose)


@dataclass
class StoredImages:
    """Images of some samples, (B, 3, S, S) uint8, and the other columns of each."""

    samples: list[dict[str, Any]]
    images: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def pin_memory(self) -> StoredImages:
        """Pin the images, in the DataLoader's pinning thread."""
        return StoredImages(self.samples, self.images.pin_memory())


class ImageCollator:
    """A collate function that decodes images of ``image_px`` pixels a side, and leaves the texts as they are."""

    def __init__(self, image_px: int) -> None:
        self.image_px = image_px

    def __call__(self, samples: Sequence[Mapping[str, Any]], room: Room = plain_room) -> StoredImages:
        images = new_images(room, len(samples), self.image_px, self.image_px, 3)
        for image, sample in zip(images, samples):
            decode_square(sample["image"], self.image_px, sample["id"], out=image.numpy())
        others = [{name: s[name] for name in s if name != "image"} for s in samples]
        return StoredImages(others, images.permute(0, 3, 1, 2))
