"""Images and fields of listings to the tensors of :class:`RatingModel`, exactly as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from rating_train.data.decode import decode_square
from rating_train.data.prompt import END, IMAGE_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, PromptEncoder, PromptWords
from rating_train.prepare.images.square import square_file
from rating_train.prepare.records.listing import plain_text

Picture = Image.Image | bytes | str | Path


class RatingProcessor(ProcessorMixin):
    """Makes the model's inputs of pictures and listings.

    Args:
        tokenizer: the backbone's.
        image_px: side of the square that the model sees, in pixels.
        stored_px: side of the square that the training's images were stored as, in pixels.
        jpeg_quality: of its JPEG; a picture goes through it here as well, as it did in training.
        visual_tokens: image tokens of an item.
        text_tokens: all other tokens of an item, template and padding included.
        field_chars: characters kept of each field.
        words: the prompt, as :class:`~rating_train.data.prompt.PromptWords`; by default the paper's.
    """

    attributes = ["tokenizer"]  # noqa: RUF012  # declared so by the base class
    tokenizer_class: Any = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        image_px: int = 384,
        stored_px: int = 384,
        jpeg_quality: int = 90,
        visual_tokens: int = 36,
        text_tokens: int = 176,
        field_chars: int = 100,
        words: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        self.image_px, self.stored_px, self.jpeg_quality = image_px, stored_px, jpeg_quality
        self.visual_tokens, self.text_tokens, self.field_chars = visual_tokens, text_tokens, field_chars
        self.words = words or {}
        said = (
            PromptWords(**{**self.words, "fields": tuple(map(tuple, self.words["fields"]))})
            if words
            else PromptWords()
        )
        self._encoder = PromptEncoder(
            tokenizer.backend_tokenizer, visual_tokens, text_tokens, field_chars, said
        )

    def __call__(  # type: ignore[override]
        self,
        images: Picture | Sequence[Picture] | None,
        listings: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        return_tensors: str = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Make a batch.

        Args:
            images: one picture or a sequence: ``PIL.Image``, the bytes of a file, or its path. A model that reads text
                alone (``image_px`` 0) looks at none.
            listings: one mapping or a sequence, with the fields of ``words`` (``title``, ``description``, ``features``,
                ``main_category``): text, a list of texts, or nothing.
            return_tensors: "pt" for torch, "np" for NumPy.

        Returns:
            ``pixel_values`` (B, 3, S, S) uint8, ``input_ids`` (B, T) int64, ``attention_mask`` (B, T) int64.

        Raises:
            ValueError: numbers of pictures and listings that differ.
        """
        pictures = [images] if isinstance(images, (Image.Image, bytes, str, Path)) else list(images or ())
        fields = [listings] if isinstance(listings, Mapping) else list(listings)
        if self.image_px and len(pictures) != len(fields):
            raise ValueError(f"{len(pictures)} images for {len(fields)} listings")
        squares = [np.zeros((0, 0, 3), np.uint8)] * len(fields)
        if self.image_px:
            squares = [self._square(p, n) for n, p in enumerate(pictures)]
        prompts = [
            self._encoder.encode({name: plain_text(f.get(name), name) for name in self._encoder.words.names})
            for f in fields
        ]
        used = np.array([p.used for p in prompts])
        arrays = {
            "pixel_values": np.stack(squares).transpose(0, 3, 1, 2).copy(),
            "input_ids": np.stack([p.ids for p in prompts]),
            "attention_mask": (np.arange(len(prompts[0].ids)) < used[:, None]).astype(np.int64),
        }
        if return_tensors == "np":
            return BatchFeature(arrays)
        return BatchFeature({name: torch.from_numpy(array) for name, array in arrays.items()})

    def _square(self, picture: Picture, number: int) -> np.ndarray:
        if isinstance(picture, (str, Path)):
            picture = Path(picture).read_bytes()
        square = square_file(picture, self.stored_px, self.jpeg_quality)
        return decode_square(square, self.image_px, f"image {number}", ("JPEG", "PNG"))

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors, in the order of the model's arguments."""
        return ["pixel_values", "input_ids", "attention_mask"]


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a backbone's tokenizer in the form that is saved beside the model."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD_TOKEN, END)],
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
