"""Losses against numbers computed by hand and against independent implementations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from rating_train.config.schema import LossConfig
from rating_train.model.loss import batch_plcc, rating_loss

SCORES = torch.tensor([4.0, 3.0, 4.5, 2.0])
RATINGS = torch.tensor([4.5, 3.0, 4.0, 4.0])  # errors: -0.5, 0, 0.5, -2
COUNTS = torch.tensor([10.0, 100.0, 1000.0, 0.0])


def loss(
    scores: Tensor = SCORES, ratings: Tensor = RATINGS, counts: Tensor = COUNTS, **settings: Any
) -> float:
    return float(rating_loss(scores, ratings, counts, LossConfig(**settings)))


def random_batch(seed: int, items: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores, ratings = (1 + 4 * torch.rand(items, generator=g) for _ in range(2))
    return scores, ratings, torch.randint(10, 100_000, (items,), generator=g).float()


def test_mse_by_hand() -> None:
    assert loss() == pytest.approx((0.25 + 0 + 0.25 + 4) / 4)


def test_huber_by_hand_inside_at_and_beyond_its_delta() -> None:
    # |e| = 0.5 is exactly delta: 0.125; |e| = 2: 0.5 * (2 - 0.25) = 0.875
    assert loss(kind="huber", huber_delta=0.5) == pytest.approx((0.125 + 0 + 0.125 + 0.875) / 4)
    # delta 1: the small ones are still e^2/2; |e| = 2: 1 * (2 - 0.5) = 1.5
    assert loss(kind="huber", huber_delta=1.0) == pytest.approx((0.125 + 0 + 0.125 + 1.5) / 4)


@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_huber_is_torchs_huber(delta: float, seed: int) -> None:
    scores, ratings, counts = random_batch(seed)
    expected = torch.nn.functional.huber_loss(scores, ratings, delta=delta)
    assert loss(scores, ratings, counts, kind="huber", huber_delta=delta) == pytest.approx(
        float(expected), rel=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_mse_is_torchs_mse(seed: int) -> None:
    scores, ratings, counts = random_batch(seed)
    assert loss(scores, ratings, counts) == pytest.approx(
        float(torch.nn.functional.mse_loss(scores, ratings))
    )


def test_count_weights_by_hand() -> None:
    squares = [0.25, 0, 0.25, 4]
    logs = [math.log(1 + n) / math.log(101) for n in (10, 100, 1000, 0)]
    roots = [math.sqrt(n / 100) for n in (10, 100, 1000, 0)]
    assert loss(count_weight="log") == pytest.approx(np.dot(squares, logs) / 4, rel=1e-6)
    assert loss(count_weight="sqrt") == pytest.approx(np.dot(squares, roots) / 4, rel=1e-6)
    assert logs[1] == roots[1] == 1, "an item with the reference's number of ratings counts as one"
    assert loss(count_weight="sqrt", count_reference=400.0) == pytest.approx(loss(count_weight="sqrt") / 2)


@pytest.mark.parametrize("weight", ["none", "log", "sqrt"])
@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_loss_is_the_mean_over_micro_batches_of_equal_size(kind: str, weight: str) -> None:
    batch = random_batch(1)
    settings: dict[str, Any] = {"kind": kind, "count_weight": weight}
    parts = [loss(*(t[i : i + 16] for t in batch), **settings) for i in range(0, 64, 16)]
    assert loss(*batch, **settings) == pytest.approx(sum(parts) / 4, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_plcc_term_is_one_minus_pearsons_correlation(seed: int) -> None:
    scores, ratings, counts = random_batch(seed)
    plcc = scipy.stats.pearsonr(scores.double().numpy(), ratings.double().numpy()).statistic
    assert float(batch_plcc(scores, ratings)) == pytest.approx(plcc, abs=1e-6)
    added = loss(scores, ratings, counts, plcc_weight=0.3) - loss(scores, ratings, counts)
    assert added == pytest.approx(0.3 * (1 - plcc), abs=1e-5)


def test_the_plcc_of_constants_and_of_one_item_is_zero_not_nan() -> None:
    assert float(batch_plcc(torch.full((8,), 3.0), RATINGS.repeat(2))) == 0
    assert float(batch_plcc(torch.tensor([3.0]), torch.tensor([4.0]))) == 0


@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize("weight", ["none", "log", "sqrt"])
@pytest.mark.parametrize("plcc", [0.0, 0.5])
@pytest.mark.parametrize("case", ["usual", "constant scores", "constant ratings", "one item", "exact", "far"])
def test_gradients_are_finite(kind: str, weight: str, plcc: float, case: str) -> None:
    scores, ratings, counts = {
        "usual": random_batch(0, 8),
        "constant scores": (torch.full((8,), 3.0), *random_batch(1, 8)[1:]),
        "constant ratings": (random_batch(2, 8)[0], torch.full((8,), 4.0), torch.full((8,), 10.0)),
        "one item": random_batch(3, 1),
        "exact": (RATINGS.clone(), RATINGS, COUNTS),
        "far": (torch.tensor([1.0, 5.0]), torch.tensor([5.0, 1.0]), torch.tensor([0.0, 1e9])),
    }[case]
    scores = scores.clone().requires_grad_()
    config = LossConfig(kind=kind, count_weight=weight, plcc_weight=plcc)  # type: ignore[arg-type]
    value = rating_loss(scores, ratings, counts, config)
    value.backward()
    assert value.dtype == torch.float32 and value.ndim == 0
    assert torch.isfinite(value) and scores.grad is not None and torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("settings", [{}, {"kind": "huber"}, {"count_weight": "log"}, {"plcc_weight": 0.5}])
def test_gradients_are_those_of_finite_differences(settings: dict[str, Any]) -> None:
    scores, ratings, counts = random_batch(4, 6)
    scores = scores.clone().requires_grad_()
    rating_loss(scores, ratings, counts, LossConfig(**settings)).backward()
    step = 1e-2
    for i in range(6):
        bump = torch.zeros(6)
        bump[i] = step
        difference = loss(scores.detach() + bump, ratings, counts, **settings) - loss(
            scores.detach() - bump, ratings, counts, **settings
        )
        assert float(scores.grad[i]) == pytest.approx(difference / (2 * step), abs=2e-3)  # type: ignore[index]


def test_bf16_scores_are_scored_in_fp32() -> None:
    scores, ratings, counts = random_batch(5)
    half = scores.bfloat16()
    assert loss(half, ratings, counts, plcc_weight=0.5) == loss(
        half.float(), ratings, counts, plcc_weight=0.5
    )
