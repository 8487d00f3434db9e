"""Which machine, how long: counted by hand where it can be, refused where a number is none."""

from __future__ import annotations

import math

import pytest

from rating_train.config.load import config_from_dict
from rating_train.errors import UserError
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.cost import count_forward, count_parameters, training_flops
from rating_train.reports.planning import (
    GPUS,
    Plan,
    cores_per_gpu,
    make_plan,
    micro_sizes,
    render_plan,
    state_bytes,
)

ARCH = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]


def plan(items: int = 10_000, gpus: int = 4, gpu: str = "a100", **more: float) -> Plan:
    return make_plan(config_from_dict({"batch": {"global_items": 64}}), ARCH, items, gpus, gpu, **more)  # type: ignore[arg-type]


def test_training_is_three_forward_passes_of_what_is_trained_and_one_of_what_is_frozen() -> None:
    forward = count_forward(ARCH, 384, 212)
    part = forward.by_part("flop_attention")
    assert training_flops(forward, []) == 3 * forward.total("flop_attention")
    rest = part["decoder"] + part["head"]
    assert training_flops(forward, ["vision", "connector"]) == part["vision"] + part["connector"] + 3 * rest
    assert training_flops(forward, ["vision"]) == part["vision"] + 3 * (part["connector"] + rest)
    assert training_flops(forward, ["decoder"]) == training_flops(forward, []), "gradients pass through it"


@pytest.mark.parametrize(
    ("stage", "ranks", "per_weight"),
    [(0, 1, 16), (0, 8, 16), (1, 1, 18), (1, 4, 9), (2, 1, 18), (2, 4, 6), (3, 1, 18), (3, 4, 4.5)],
)
def test_the_state_per_trained_weight(stage: int, ranks: int, per_weight: float) -> None:
    """2 of weights, 4 of gradients, 12 of master and moments, divided as the stage says."""
    assert state_bytes(1000, 0, stage, ranks).total == 1000 * per_weight


def test_frozen_weights_have_no_gradient_and_no_moments() -> None:
    for stage, ranks, width in ((0, 4, 4), (1, 4, 2), (2, 4, 2), (3, 4, 0.5)):
        assert state_bytes(0, 1000, stage, ranks).total == 1000 * width
    assert state_bytes(1000, 0, 1, 4, bf16=False).total == 1000 * (4 + 4 + 3)


def test_the_hours_follow_from_rate_steps_and_gpus() -> None:
    found = plan(rate=50.0)
    assert found.steps == math.ceil(5 * 10_000 / 64) and found.gpu_rate == [(0.0, 50.0)]
    assert found.seconds(50.0) == found.steps * 64 / 200
    ((mfu, rate),) = plan(mfu=0.5).gpu_rate
    assert mfu == 0.5 and rate == pytest.approx(0.5 * 312e12 / found.flops)
    assert sum((found.trained, found.frozen)) == count_parameters(ARCH)["total"]


def test_what_is_assumed_is_said() -> None:
    text = render_plan(plan())
    assert text.count("(assumed)") == 3 and "data sheet" in text and "(measured" in text and "counted" in text
    assert "(assumed)" not in render_plan(plan(rate=50.0)) and "rate as given" in render_plan(plan(rate=50.0))
    assert render_plan(plan(gpus=1, gpu="l4")).count("0.00 GB per step") == 1, "one GPU sends nothing"


def test_cores_and_micro_batches() -> None:
    assert [cores_per_gpu(rate) for rate in (1, 746, 747)] == [2, 2, 3]
    assert micro_sizes(12) == [1, 2, 4] and micro_sizes(512) == [16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "gtx"}, f"unknown GPU 'gtx'.*one of {', '.join(GPUS)}"),
        ({"items": 0}, "0 items.*--items"),
        ({"gpus": 0}, "0 GPUs.*--gpus"),
        ({"gpus": 3}, "does not divide over 3 ranks"),
        ({"mfu": 1.5}, "an MFU of 1.5.*--mfu"),
        ({"rate": 0.0}, "0.0 items/s.*--rate"),
        ({"rate": float("nan")}, "--rate"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**options)  # type: ignore[arg-type]


def test_phases_are_planned_each_with_what_it_freezes() -> None:
    frozen = ["vision", "connector", "decoder"]
    stages = [
        {"steps": 30, "freeze": frozen},
        {"steps": 70, "freeze": ["vision"]},
        {"steps": 20, "freeze": frozen},
    ]
    found = make_plan(
        config_from_dict({"batch": {"global_items": 64}, "stages": stages}), ARCH, 10_000, 4, "a100"
    )
    forward = count_forward(ARCH, 384, 212)
    assert found.steps == 120 and found.epochs == pytest.approx(120 * 64 / 10_000)
    one, other = training_flops(forward, frozen), training_flops(forward, ["vision"])
    assert found.flops == pytest.approx((50 * one + 70 * other) / 120)
    counts = count_parameters(ARCH)
    assert found.frozen == counts["vision"], "memory is that of the phase that trains most"
    assert "of phase 2 of 3, which trains the most parameters" in render_plan(found)


def test_with_features_neither_the_tower_nor_images_are_counted() -> None:
    frozen = ["vision", "connector"]
    config = config_from_dict({"model": {"freeze": frozen}, "data": {"features": "DIR"}})
    found = make_plan(config, ARCH, 10_000, 4, "a100")
    forward = count_forward(ARCH, 384, 36 + config.data.text_tokens)
    assert found.flops == training_flops(forward.without(*frozen), frozen)
    assert found.stored_bytes == 36 * 576 * 2, "bf16, without the texts"
    assert "41.5 kB per item (visual tokens, of data.features; counted)" in render_plan(found)
