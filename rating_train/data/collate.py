"""Collation of a shard's samples into a batch of tensors. Runs in the DataLoader workers.

Legend: B items, S pixels per side, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rating_train.data.decode import STORED_FORMATS, decode_square
from rating_train.data.lengths import cut_length, longest_first
from rating_train.data.prompt import EncodedPrompt, PromptEncoder
from rating_train.data.workers.shared_blocks import Room, plain_room
from rating_train.shards.titles import product_group

_TENSORS = ("images", "input_ids", "used_tokens", "ratings", "rating_counts", "id_hashes")
_LISTS = ("ids", "categories", "groups", "text_chars", "lengths")


@dataclass
class Batch:
    """Items of one rank.

    Images stay uint8 until they are on the device: copying them moves a quarter of the bytes of fp32.
    """

    ids: list[str]
    #: (B, 3, S, S) uint8; S is 0 where the model reads no images. With tiling (B, M, 3, S, S), M the most of an item.
    #: The channels of a pixel lie beside each other in memory (channels last), as a decoder gives them.
    #: With `data.features` (B, V, D), the visual tokens, in the dtype that they were computed in.
    images: Tensor
    input_ids: Tensor  # (B, T) int64
    used_tokens: Tensor  # (B,) int64: tokens before the padding
    ratings: Tensor  # (B,) float32
    rating_counts: Tensor  # (B,) float32
    truncated_tokens: int  # field tokens that did not fit, summed over all items
    #: (B,) int64, CRC-32 of each id; dropout masks derive from it. Computed here, in the DataLoader worker,
    #: so that it is pinned and copied with the other tensors.
    id_hashes: Tensor = None  # type: ignore[assignment]
    #: What an evaluation is sliced by: each item's category and product group, and its characters in all fields
    #: together. Empty in training.
    categories: list[str] = dataclasses.field(default_factory=list)
    groups: list[str] = dataclasses.field(default_factory=list)
    text_chars: list[int] = dataclasses.field(default_factory=list)
    #: ``used_tokens`` on the host, where lengths are decided without waiting for the device; empty where a batch was
    #: put together by hand, which is then never cut.
    lengths: list[int] = dataclasses.field(default_factory=list)
    #: Of each item, its place among the samples that were read; empty where they stand in that order.
    places: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.id_hashes is None:
            hashes = [zlib.crc32(i.encode("utf-8")) for i in self.ids]
            self.id_hashes = torch.tensor(hashes, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """Pin the tensors, in the DataLoader's pinning thread, so that copies overlap with compute."""
        return self._map(lambda t: t.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Return the same batch with its tensors on ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def cut(self, multiple: int) -> Batch:
        """Return the same batch as a view without the padding that none of its items needs.

        On the device, after the copy: a part of a pinned tensor is no longer contiguous, and would be copied through
        memory that is not pinned.

        Args:
            multiple: see :func:`~rating_train.data.lengths.cut_length`.
        """
        length = cut_length(self.lengths, self.input_ids.shape[1], multiple)
        return dataclasses.replace(self, input_ids=self.input_ids[:, :length])

    def ids_as_read(self) -> list[str]:
        """Return the ids in the order in which the samples were asked for."""
        if not self.places:
            return self.ids
        return [self.ids[i] for i in sorted(range(len(self)), key=self.places.__getitem__)]

    def split(self, items: int) -> list[Batch]:
        """Return micro-batches of ``items`` each, in order, as views; their ``truncated_tokens`` are 0."""
        return [self._take(slice(i, i + items)) for i in range(0, len(self), items)]

    def _take(self, part: slice) -> Batch:
        taken = {name: getattr(self, name)[part] for name in (*_LISTS, *_TENSORS)}
        return Batch(**taken, truncated_tokens=0)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        mapped: dict[str, Any] = {name: f(getattr(self, name)) for name in _TENSORS}
        return dataclasses.replace(self, **mapped)


@dataclass(frozen=True)
class Purpose:
    """What batches are for.

    Attributes:
        by_length: whether the longest items come first, so that micro-batches have items of about one length.
        slices: whether a batch says what an evaluation is sliced by.
    """

    by_length: bool = False
    slices: bool = True


#: Every item in the order in which it was asked for, with what an evaluation is sliced by.
EVALUATION = Purpose()


class Collator:
    """A collate function: decodes and tokenizes samples (mappings with the MDS columns) into a batch.

    Args:
        prompt: makes token ids of the text.
        image_px: side of the images, in pixels; 0 where the model reads none.
        formats: of the samples' images.
        purpose: of the batches.
    """

    def __init__(
        self,
        prompt: PromptEncoder,
        image_px: int,
        formats: tuple[str, ...] = STORED_FORMATS,
        purpose: Purpose = EVALUATION,
    ) -> None:
        self.prompt = prompt
        self.image_px = image_px
        self.formats = formats
        self.purpose = purpose

    def __call__(self, samples: Sequence[Mapping[str, Any]], room: Room = plain_room) -> Batch:
        """Make a batch of samples.

        Args:
            samples: mappings with the MDS columns.
            room: gives memory for the images.

        Raises:
            ValueError: an image cannot be decoded.
        """
        prompts = self._encode(samples)
        places: list[int] = []
        if self.purpose.by_length:
            places = longest_first([p.used for p in prompts])
            samples, prompts = [samples[i] for i in places], [prompts[i] for i in places]
        lengths = [p.used for p in prompts]
        images = new_images(room, len(samples), *self._image_shape)
        for image, s in zip(images, samples if images.numel() else ()):
            self._fill(image, s)
        return Batch(
            ids=[s["id"] for s in samples],
            images=self._as_model_input(images),
            input_ids=torch.from_numpy(np.stack([p.ids for p in prompts])),
            used_tokens=torch.tensor(lengths, dtype=torch.int64),
            ratings=torch.tensor([float(s["rating"]) for s in samples], dtype=torch.float32),
            rating_counts=torch.tensor(
                [float(s.get("rating_count", math.nan)) for s in samples], dtype=torch.float32
            ),
            truncated_tokens=sum(p.cut for p in prompts),
            lengths=lengths,
            places=places,
            **self._slices(samples),
        )

    def _slices(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not self.purpose.slices:
            return {}
        names = self.prompt.words.names
        return {
            "categories": [s.get("main_category", "") for s in samples],
            "groups": [product_group(s) for s in samples],
            "text_chars": [sum(len(s[name]) for name in names) for s in samples],
        }

    @property
    def _image_shape(self) -> tuple[int, ...]:
        return self.image_px, self.image_px, 3

    def _encode(self, samples: Sequence[Mapping[str, Any]]) -> list[EncodedPrompt]:
        return self.prompt.encode_all(samples)

    def _as_model_input(self, images: Tensor) -> Tensor:
        """Return the filled images, (B, S, S, 3), as the model reads them, without a copy."""
        return images.permute(0, 3, 1, 2)

    def _fill(self, image: Tensor, sample: Mapping[str, Any]) -> None:
        """Decode a sample's image into its place, (S, S, 3) uint8."""
        decode_square(sample["image"], self.image_px, sample["id"], self.formats, out=image.numpy())


def new_images(room: Room, *shape: int) -> Tensor:
    """Return a tensor of a shape, uint8, in the memory that ``room`` gives."""
    return room(math.prod(shape)).view(shape)
