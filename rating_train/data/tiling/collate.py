"""Collation of samples whose images are cut into tiles. Runs in the DataLoader workers.

Legend: B items, S pixels per side of a tile, M most images of an item.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rating_train.data.collate import EVALUATION, Collator, Purpose
from rating_train.data.decode import STORED_FORMATS
from rating_train.data.prompt import EncodedPrompt, PromptEncoder
from rating_train.data.tiling.prompt import TiledPromptEncoder
from rating_train.data.tiling.tiles import grid_of, tiles_of


class TiledCollator(Collator):
    """A collate function for images in tiles: a batch's images are (B, M, 3, S, S), black where an item has fewer.

    Args:
        prompt, image_px, formats, purpose: as of :class:`Collator`; ``image_px`` is a tile's side.
        tiling_px: the longest side before an image is cut.
    """

    prompt: TiledPromptEncoder

    def __init__(
        self,
        prompt: TiledPromptEncoder,
        image_px: int,
        tiling_px: int,
        formats: tuple[str, ...] = STORED_FORMATS,
        purpose: Purpose = EVALUATION,
    ) -> None:
        super().__init__(prompt, image_px, formats, purpose)
        self.tiling_px = tiling_px

    @property
    def _image_shape(self) -> tuple[int, ...]:
        return (self.tiling_px // self.image_px) ** 2 + 1, self.image_px, self.image_px, 3

    def _encode(self, samples: Sequence[Mapping[str, Any]]) -> list[EncodedPrompt]:
        sizes = [self._open(s).size for s in samples]  # of the headers
        return self.prompt.encode_tiled(samples, [grid_of(*s, self.image_px, self.tiling_px) for s in sizes])

    def _fill(self, image: Tensor, sample: Mapping[str, Any]) -> None:
        try:
            pixels = self._open(sample).convert("RGB")
        except (OSError, SyntaxError) as e:
            raise _undecodable(sample, e) from e
        tiles = torch.from_numpy(tiles_of(pixels, self.image_px, self.tiling_px))
        image.zero_()
        image[: len(tiles)].copy_(tiles)

    def _as_model_input(self, images: Tensor) -> Tensor:
        return images.permute(0, 1, 4, 2, 3)

    def _open(self, sample: Mapping[str, Any]) -> Image.Image:
        try:
            return Image.open(io.BytesIO(sample["image"]), formats=self.formats)
        except (OSError, SyntaxError) as e:
            raise _undecodable(sample, e) from e


def make_collator(
    prompt: PromptEncoder, image_px: int, tiling_px: int, purpose: Purpose = EVALUATION
) -> Collator:
    """Return the collate function of stored samples: squares, or tiles where ``tiling_px`` is not 0."""
    if isinstance(prompt, TiledPromptEncoder):
        return TiledCollator(prompt, image_px, tiling_px, purpose=purpose)
    return Collator(prompt, image_px, purpose=purpose)


def _undecodable(sample: Mapping[str, Any], error: Exception) -> ValueError:
    return ValueError(f"the stored image of item {sample['id']!r} cannot be decoded: {error}")
