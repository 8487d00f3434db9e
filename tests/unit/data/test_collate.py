"""Batches: divided and moved without changing a value; images are exactly the pixels that were stored."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rating_train.data.collate import Batch, Collator, Purpose
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from rating_train.demo.tokenizer import make_tokenizer

S = 24
TENSORS = ("images", "input_ids", "used_tokens", "ratings", "rating_counts")


def jpeg(size: int = S, seed: int = 0, mode: str = "RGB") -> bytes:
    """Smooth random colours: a photo, not noise, so that a resize keeps them about as they are."""
    small = np.random.default_rng(seed).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).convert(mode)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


def sample(number: int, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "id": f"item-{number}",
        "image": jpeg(seed=number),
        "title": f"Kettle number {number}",
        "description": "",
        "features": "Red. " * number,
        "main_category": "Kitchen" if number % 2 else "Toys",
        "rating": np.float32(1 + number % 5),
        "rating_count": np.int64(10 * number + 3),
    }
    return {**given, **changes}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(["Kettle number 1. Red. Red."] * 4, folder, vocab_size=300)
    return PromptEncoder(load_tokenizer(str(folder)), visual_tokens=9, text_tokens=200, field_chars=100)


@pytest.fixture(scope="module")
def batch(prompt: PromptEncoder) -> Batch:
    return Collator(prompt, S)([sample(i) for i in range(8)])


def equal(a: Batch, b: Batch) -> bool:
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)
    return same and (a.ids, a.categories) == (b.ids, b.categories)


def test_a_batch_holds_every_column_in_order_with_fixed_shapes_and_types(
    batch: Batch, prompt: PromptEncoder
) -> None:
    assert len(batch) == 8 and batch.ids == [f"item-{i}" for i in range(8)]
    assert batch.categories == ["Toys", "Kitchen"] * 4
    assert batch.images.shape == (8, 3, S, S) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last), "as decoders give pixels"
    assert batch.input_ids.shape == (8, 209) and batch.input_ids.dtype == torch.int64
    assert batch.ratings.dtype == batch.rating_counts.dtype == torch.float32
    assert batch.ratings.tolist() == [1 + i % 5 for i in range(8)]
    assert batch.rating_counts.tolist() == [10 * i + 3 for i in range(8)]
    for i in range(8):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg(seed=i))))  # (S, S, 3)
        assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), pixels)
        encoded = prompt.encode(sample(i))
        assert np.array_equal(batch.input_ids[i].numpy(), encoded.ids)
        assert batch.used_tokens[i] == encoded.used


def test_cut_tokens_are_counted_over_all_items(prompt: PromptEncoder) -> None:
    long = [sample(i, title="q" * 100, description="z" * 100, features="x" * 100) for i in range(3)]
    cut = [prompt.encode(s).cut for s in long]
    assert min(cut) > 0
    assert Collator(prompt, S)(long).truncated_tokens == sum(cut)


@pytest.mark.parametrize("items", [1, 2, 3, 8, 100])
def test_micro_batches_joined_are_the_batch(batch: Batch, items: int) -> None:
    parts = batch.split(items)
    assert [len(p) for p in parts] == [len(range(i, min(8, i + items))) for i in range(0, 8, items)]
    joined = Batch(
        ids=[i for p in parts for i in p.ids],
        categories=[c for p in parts for c in p.categories],
        **{name: torch.cat([getattr(p, name) for p in parts]) for name in TENSORS},
        truncated_tokens=0,
    )
    assert equal(joined, batch)


def test_micro_batches_are_views_and_the_count_of_cut_tokens_is_not_doubled(batch: Batch) -> None:
    parts = batch.split(4)
    assert parts[1].images.data_ptr() == batch.images[4:].data_ptr()
    assert sum(p.truncated_tokens for p in parts) == 0


def test_moving_a_batch_keeps_every_value_and_the_original(batch: Batch) -> None:
    moved = batch.to(torch.device("cpu"))
    assert equal(moved, batch) and moved.truncated_tokens == batch.truncated_tokens
    meta = batch.to(torch.device("meta"))
    assert all(getattr(meta, name).device.type == "meta" for name in TENSORS)
    assert meta.ids == batch.ids and batch.images.device.type == "cpu"


def test_one_corrupt_image_among_good_ones_names_the_right_item(prompt: PromptEncoder) -> None:
    samples = [sample(i) for i in range(4)]
    samples[2]["image"] = samples[2]["image"][:100]
    with pytest.raises(ValueError, match="item-2"):
        Collator(prompt, S)(samples)


def test_items_ordered_by_length_are_the_same_items(prompt: PromptEncoder, batch: Batch) -> None:
    ordered = Collator(prompt, S, purpose=Purpose(by_length=True))([sample(i) for i in range(8)])
    assert ordered.lengths == sorted(batch.lengths, reverse=True) == ordered.used_tokens.tolist()
    assert len(set(ordered.lengths)) > 1 and ordered.ids != batch.ids
    assert ordered.ids_as_read() == batch.ids == batch.ids_as_read()
    for i, place in enumerate(ordered.places):
        for name in (*TENSORS, "id_hashes"):
            assert torch.equal(getattr(ordered, name)[i], getattr(batch, name)[place])
        for name in ("ids", "categories", "groups", "text_chars", "lengths"):
            assert getattr(ordered, name)[i] == getattr(batch, name)[place]


def test_a_micro_batch_is_cut_to_its_own_longest_item_without_a_copy(prompt: PromptEncoder) -> None:
    ordered = Collator(prompt, S, purpose=Purpose(by_length=True))([sample(i) for i in range(8)])
    lengths = []
    for micro in ordered.split(2):
        cut = micro.cut(4)
        lengths.append(cut.input_ids.shape[1])
        assert max(micro.lengths) <= lengths[-1] < max(micro.lengths) + 4 and lengths[-1] % 4 == 0
        assert cut.input_ids.data_ptr() == micro.input_ids.data_ptr()
        assert (micro.input_ids[:, lengths[-1] :] == prompt.pad_token_id).all()
        assert micro.cut(0).input_ids.shape[1] == 209
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_a_batch_without_lengths_is_never_cut(batch: Batch) -> None:
    assert dataclasses.replace(batch, lengths=[]).cut(16).input_ids.shape == batch.input_ids.shape
