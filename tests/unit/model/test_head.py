"""Pooling and head: means over real tokens only, ratings inside (1, 5), fp32 whatever the weights are."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import nn

from rating_train.model.head import Linear32, RatingHead, dropout_keys, item_dropout, masked_mean

B, T, D = 5, 11, 8


def hashes(ids: list[str]) -> torch.Tensor:
    """(B,) int64, as the collator makes them."""
    return torch.tensor([zlib.crc32(i.encode("utf-8")) for i in ids])


def hidden_and_used(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=g), torch.tensor([1, T, 4, 7, T - 1])


def test_the_masked_mean_is_a_loop_over_the_real_tokens() -> None:
    hidden, used = hidden_and_used()
    got = masked_mean(hidden, used)
    assert got.shape == (B, D) and got.dtype == torch.float32
    for item in range(B):
        total = torch.zeros(D, dtype=torch.float64)
        for token in range(int(used[item])):
            total += hidden[item, token].double()
        assert torch.allclose(got[item].double(), total / int(used[item]), atol=1e-6)


def test_the_contents_of_the_padding_do_not_matter() -> None:
    hidden, used = hidden_and_used()
    other = hidden.clone()
    for item in range(B):
        other[item, int(used[item]) :] = 1e6
    assert torch.equal(masked_mean(other, used), masked_mean(hidden, used))


def test_the_mean_of_bf16_states_is_summed_in_fp32() -> None:
    hidden = torch.full((1, 1000, 1), 3.140625, dtype=torch.bfloat16)
    hidden[0, -1] = 100.0
    expected = (999 * 3.140625 + 100) / 1000
    assert float(masked_mean(hidden, torch.tensor([1000]))) == pytest.approx(expected, rel=1e-6)


def test_the_head_is_the_recipes_formula() -> None:
    torch.manual_seed(0)
    head = RatingHead(D, 6, dropout=0.0).eval()
    pooled = torch.randn(B, D)
    inner = torch.relu(pooled @ head.inner.weight.T + head.inner.bias)
    x = inner @ head.outer.weight.T + head.outer.bias
    assert torch.allclose(head(pooled), (1 + 4 / (1 + torch.exp(-x))).squeeze(-1), atol=1e-6)
    assert head(pooled).shape == (B,)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0])
def test_ratings_lie_inside_one_and_five(scale: float) -> None:
    torch.manual_seed(1)
    head = RatingHead(D, 32, dropout=0.0).eval()
    ratings = head(scale * torch.randn(500, D))
    assert ratings.min() > 1 and ratings.max() < 5


def test_ratings_stay_between_one_and_five_at_the_extremes() -> None:
    head = RatingHead(D, 32, dropout=0.0).eval()
    ratings = head(1e30 * torch.randn(500, D))
    assert torch.isfinite(ratings).all() and ratings.min() >= 1 and ratings.max() <= 5


def test_the_initial_bias_sets_the_first_rating() -> None:
    head = RatingHead(D, 32, dropout=0.0, rating_bias=1.15).eval()
    nn.init.zeros_(head.outer.weight)
    assert head(torch.randn(3, D)).tolist() == pytest.approx([4.0381] * 3, abs=1e-3)


def test_bf16_weights_still_give_fp32_ratings_finer_than_bf16() -> None:
    torch.manual_seed(2)
    head = RatingHead(D, 64, dropout=0.0, rating_bias=1.1).eval().to(torch.bfloat16)
    assert head.inner.weight.dtype == torch.bfloat16
    pooled = 0.05 * torch.randn(400, D)
    ratings = head(pooled.bfloat16())
    assert ratings.dtype == torch.float32
    assert len(ratings.unique()) > 300 > 10 * len(ratings.bfloat16().unique())


def test_a_linear_layer_computes_in_fp32_from_bf16_weights_exactly() -> None:
    torch.manual_seed(3)
    layer = Linear32(D, 4).to(torch.bfloat16)
    x = torch.randn(B, D)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    assert torch.equal(layer(x), expected)


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(4)
    head = RatingHead(D, 256, dropout=0.5)
    pooled = torch.randn(1, D).expand(4000, D)
    keys = dropout_keys(hashes([f"item {i}" for i in range(4000)]), seed=17, step=3)
    head.train()
    noisy = head(pooled, keys)
    with pytest.raises(ValueError, match="dropout_keys"):
        head(pooled)
    head.eval()
    quiet = head(pooled)
    assert noisy.std() > 0 and torch.equal(quiet, head(pooled))
    logit = torch.log((noisy - 1) / (5 - noisy))
    expected = torch.log((quiet[0] - 1) / (5 - quiet[0]))
    assert float(logit.mean().detach()) == pytest.approx(float(expected.detach()), abs=0.02)


def test_dropout_follows_item_and_step_and_not_the_batch() -> None:
    ids = [f"item {i}" for i in range(64)]
    ones = torch.ones(64, 288)
    together = item_dropout(ones, 0.1, dropout_keys(hashes(ids), 17, 5))
    parts = [
        item_dropout(ones[:16], 0.1, dropout_keys(hashes(ids[i : i + 16]), 17, 5)) for i in range(0, 64, 16)
    ]
    assert torch.equal(together, torch.cat(parts))
    others = [(ids, 17, 6), (ids, 18, 5), (ids[::-1], 17, 5)]
    for other, seed, step in others:
        assert not torch.equal(together, item_dropout(ones, 0.1, dropout_keys(hashes(other), seed, step)))


@pytest.mark.parametrize("seed", [0, 17, 2**31])
@pytest.mark.parametrize("step", [0, 5, 10**6])
def test_dropout_keys_are_those_of_earlier_versions(seed: int, step: int) -> None:
    """A resumed run must drop what it would have dropped: ((seed * 1000003 + step) << 32) + CRC-32, as int64."""
    ids = ["B00000001", "ünïcode", "z" * 40]
    keys = dropout_keys(hashes(ids), seed, step)
    for key, i in zip(keys.tolist(), ids, strict=True):
        value = ((seed * 1_000_003 + step) << 32) + zlib.crc32(i.encode())
        assert key % 2**64 == value % 2**64


def test_dropout_bits_are_evenly_spread() -> None:
    keys = torch.cat(
        [dropout_keys(hashes([f"B{i:09d}" for i in range(200)]), 17, step) for step in range(50)]
    )
    kept = item_dropout(torch.ones(10_000, 288), 0.1, keys) > 0
    deviation = (0.1 * 0.9) ** 0.5
    assert abs(kept.float().mean().item() - 0.9) < 5 * deviation / (10_000 * 288) ** 0.5
    assert (kept.float().mean(0) - 0.9).abs().max() < 5 * deviation / 10_000**0.5  # per unit
    assert (kept.float().mean(1) - 0.9).abs().max() < 6 * deviation / 288**0.5  # per item and step
    neighbours = torch.corrcoef(kept[:, :32].float().T) - torch.eye(32)
    assert neighbours.abs().max() < 5 / 10_000**0.5
    assert item_dropout(torch.ones(2, 4), 0.5, torch.zeros(2, dtype=torch.int64)).unique().tolist() in (
        [0, 2],
        [2],
        [0],
    )


def test_gradients_reach_every_weight_of_the_head_and_only_real_tokens() -> None:
    hidden, used = hidden_and_used()
    hidden.requires_grad_()
    head = RatingHead(D, 16, dropout=0.0)
    head(masked_mean(hidden, used)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    assert hidden.grad is not None
    for item in range(B):
        assert (hidden.grad[item, : int(used[item])] != 0).any(dim=1).all()
        assert (hidden.grad[item, int(used[item]) :] == 0).all()
