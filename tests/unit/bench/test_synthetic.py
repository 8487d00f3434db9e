"""Batches and models that need neither data nor weights."""

from __future__ import annotations

import torch

from rating_train.bench.synthetic import noise_batch, reduced_architecture


def test_noise_is_a_function_of_its_seed_and_padding_is_at_the_end() -> None:
    first, again, other = (noise_batch(3, 9, 8, 64, seed=seed, padding=2) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images) and torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.images, other.images) and not set(first.ids) & set(other.ids)
    assert first.input_ids.shape == (3, 9) and first.input_ids.min() >= 20 and first.input_ids.max() < 64
    assert first.used_tokens.tolist() == [7] * 3
    assert first.ratings.min() >= 1 and first.ratings.max() <= 5


def test_a_reduced_architecture_keeps_what_is_not_named() -> None:
    small = reduced_architecture({"layers": 2, "vocab": 64}, {"hidden": 24}, head_hidden=9)
    assert (small.text.layers, small.text.vocab, small.text.hidden) == (2, 64, 576)
    assert (small.vision.hidden, small.vision.layers, small.head_hidden, small.scale_factor) == (24, 12, 9, 4)
    assert max(small.image_token_id, small.pad_token_id or 0) < 64
