"""Stored visual tokens in a batch: bit for bit, in their dtype, and never of another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rating_train.data.collate import Purpose
from rating_train.data.features.collate import FeatureCollator, ImageCollator
from rating_train.data.features.identity import Features
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from tests.unit.data.test_collate import S, sample


@pytest.fixture(scope="module")
def prompt(demo: Path) -> PromptEncoder:
    return PromptEncoder(
        load_tokenizer(str(demo / "model")), visual_tokens=4, text_tokens=96, field_chars=100
    )


def stored(number: int, visual: torch.Tensor) -> dict[str, Any]:
    return sample(number, image=visual.view(-1).view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_batch_holds_the_stored_bits(prompt: PromptEncoder, dtype: str) -> None:
    visual = torch.randn(3, 4, 8).to(getattr(torch, dtype))
    collator = FeatureCollator(prompt, Features("", "", S, 4, 8, dtype), Purpose(by_length=True))
    batch = collator([stored(i, visual[i]) for i in range(3)])
    assert batch.images.dtype == visual.dtype and batch.images.shape == (3, 4, 8)
    assert sorted(batch.places) == [0, 1, 2] and batch.ids_as_read() == [f"item-{i}" for i in range(3)]
    assert torch.equal(batch.images, visual[batch.places])
    assert [part.images.shape[0] for part in batch.split(2)] == [2, 1]
    with pytest.raises(ValueError, match=r"'item-1' have 32 bytes, not"):
        collator([stored(0, visual[0]), sample(1, image=bytes(32))])


def test_images_to_be_encoded_keep_their_other_columns() -> None:
    found = ImageCollator(S)([sample(i) for i in range(2)])
    assert found.images.shape == (2, 3, S, S) and found.images.dtype == torch.uint8 and len(found) == 2
    assert [s["title"] for s in found.samples] == ["Kettle number 0", "Kettle number 1"]
    assert all("image" not in s for s in found.samples)
    assert np.asarray(found.images).any()
