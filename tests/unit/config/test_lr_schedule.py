"""The learning rate against numbers computed by hand: warm-up without a zero step, then decay to the stated end."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rating_train.config.lr_schedule import lr_factor
from rating_train.config.schema import OptimConfig


def factors(total: int, **settings: Any) -> list[float]:
    config = OptimConfig(**settings)
    return [lr_factor(step, total, config) for step in range(total)]


def test_linear_decay_by_hand() -> None:
    got = factors(10, schedule="linear", warmup_fraction=0.2)
    assert got == pytest.approx([0.5, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0])


def test_linear_decay_to_a_final_fraction_by_hand() -> None:
    got = factors(6, schedule="linear", warmup_fraction=0.0, final_fraction=0.5)
    assert got == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5])


def test_cosine_decay_by_hand() -> None:
    got = factors(6, schedule="cosine", warmup_fraction=0.1, final_fraction=0.2)
    half = 1 / math.sqrt(2)
    expected = [1, 1, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2]
    assert got == pytest.approx(expected)


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up() -> None:
    assert factors(8, schedule="constant", warmup_fraction=0.5) == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 10, 101, 1283])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_no_step_is_spent_at_zero_before_the_end_and_none_exceeds_the_peak(
    schedule: str, total: int, warmup: float, final: float
) -> None:
    got = factors(total, schedule=schedule, warmup_fraction=warmup, final_fraction=final)
    assert all(0 < f <= 1 for f in got[:-1]) and 0 <= got[-1] <= 1
    assert max(got) == 1
    peak = got.index(1)
    assert got[: peak + 1] == sorted(got[: peak + 1]), "it rises"
    assert got[peak:] == sorted(got[peak:], reverse=True), "then falls"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total", [3, 10, 101, 1283])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_last_step_reaches_the_final_fraction(schedule: str, total: int, final: float) -> None:
    got = factors(total, schedule=schedule, warmup_fraction=0.03, final_fraction=final)
    assert got[-1] == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize(
    ("total", "fraction", "steps"), [(100, 0.03, 3), (101, 0.03, 4), (1, 0.03, 1), (200, 0.5, 100)]
)
def test_the_warm_up_takes_the_ceiling_of_its_share(total: int, fraction: float, steps: int) -> None:
    got = factors(total, schedule="constant", warmup_fraction=fraction)
    assert got[:steps] == pytest.approx([(k + 1) / steps for k in range(steps)])
    assert got.index(1) == steps - 1


@pytest.mark.parametrize(("total", "fraction", "steps"), [(100, 0.07, 7), (100, 0.14, 14), (100, 0.28, 28)])
def test_the_warm_up_has_no_extra_step_by_float_noise(total: int, fraction: float, steps: int) -> None:
    assert factors(total, schedule="constant", warmup_fraction=fraction).index(1) == steps - 1


def test_the_length_of_the_run_changes_the_schedule_and_clipping_does_not() -> None:
    config = OptimConfig()
    assert lr_factor(50, 100, config) == lr_factor(50, 100, OptimConfig(clip_norm=3.0))
    assert lr_factor(50, 100, config) < lr_factor(50, 200, config)


def test_a_step_beyond_the_end_stays_at_the_final_fraction() -> None:
    assert lr_factor(500, 100, OptimConfig(final_fraction=0.1)) == pytest.approx(0.1)
