"""Scaling on paper: closed-form cases, what is hidden behind the backward pass, and the page's table."""

from __future__ import annotations

import pytest

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.errors import UserError
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.reports.cost.scale import (
    Scaled,
    items_for_efficiency,
    reduction_seconds,
    render_scale,
    scale,
)
from tests.conftest import REPO


def config(*settings: str) -> Config:
    return load_config(REPO / "configs" / "full_ft_228m.yaml", settings)


ARCH = KNOWN_ARCHITECTURES[config().model.backbone]


def test_one_gpu_computes_and_reduces_nothing() -> None:
    one = scale(config(), ARCH, "h200", 1, 400, 0.4)[0]
    assert one.inside == one.between == one.exposed == 0
    assert one.compute == pytest.approx(64 * 478.2e9 / (0.4 * 989e12), rel=1e-3)


def test_gradients_cross_a_network_once_for_each_node() -> None:
    stage_0 = config("zero.stage=0")
    inside, between = reduction_seconds(stage_0, ARCH, "h200", 16, 400)
    sent = 4 * 228_266_113
    assert inside == pytest.approx(2 * 7 / 8 * sent / (450e9 * 0.7))
    assert between == pytest.approx(2 * 1 / 2 * sent / (50e9 * 0.7))
    halved = reduction_seconds(config("zero.stage=0", "zero.communication_dtype=bf16"), ARCH, "h200", 16, 400)
    assert halved == pytest.approx((inside / 2, between / 2))
    frozen = config("zero.stage=0", "model.freeze=[vision, connector]")
    assert reduction_seconds(frozen, ARCH, "h200", 16, 400)[1] < 0.7 * between
    # Stage 1: a share of the gradients in fp32, then of the weights in bf16.
    assert reduction_seconds(config(), ARCH, "h200", 16, 400) == pytest.approx(
        (0.75 * inside, 0.75 * between)
    )


def test_gradients_hide_behind_the_backward_pass_and_new_weights_do_not() -> None:
    def at(*settings: str) -> Scaled:
        return scale(config(*settings), ARCH, "h200", 8, 400, 0.4)[-1]

    few = at("zero.stage=0", "batch.global_items=8")
    assert few.exposed == pytest.approx(few.inside - few.compute * 2 / 3) and few.exposed > 0
    assert at("zero.stage=0").exposed == 0
    one = at("batch.global_items=640")
    assert one.exposed == pytest.approx(one.inside * 2 / (4 + 2)), "bf16 weights, after fp32 gradients"
    half = at("batch.global_items=640", "zero.communication_dtype=bf16")
    assert half.exposed == pytest.approx(one.exposed)
    for waits in (at("zero.offload_optimizer=true"), at("train.precision=fp32"), at("zero.stage=3")):
        assert waits.exposed == pytest.approx(waits.inside), "DeepSpeed reduces after the backward pass"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_batch_that_is_named_has_the_efficiency(stage: int) -> None:
    found = scale(config(f"zero.stage={stage}"), ARCH, "h200", 16, 400, 0.4)[-1]
    needed = items_for_efficiency(found)
    settings = (f"zero.stage={stage}", "train.save_every_steps=0", "train.eval_every_steps=0")
    for items, enough in ((needed, True), (needed - 1, False)):
        larger = config(*settings, f"batch.global_items={16 * items}")
        assert (scale(larger, ARCH, "h200", 16, 400, 0.4)[-1].efficiency >= 0.9) == enough


def test_only_numbers_that_divide_the_batch_are_listed() -> None:
    assert [s.gpus for s in scale(config("batch.global_items=48"), ARCH, "h100", 64, 100, 0.3)] == [
        1,
        2,
        4,
        8,
        16,
    ]


@pytest.mark.parametrize(
    ("gpu", "gpus", "network", "mfu"), [("x", 8, 400, 0.4), ("h100", 8, 0, 0.4), ("h100", 8, 1, 2)]
)
def test_what_cannot_be_is_refused(gpu: str, gpus: int, network: float, mfu: float) -> None:
    with pytest.raises(UserError):
        scale(config(), ARCH, gpu, gpus, network, mfu)


def test_the_page_has_the_rows_of_the_command() -> None:
    found = scale(config(), ARCH, "h200", 64, 400, 0.4)
    page = (REPO / "docs" / "scaling.md").read_text("utf-8")
    shown = {s.gpus: s for s in found}
    for gpus in (1, 8, 16, 64):
        s = shown[gpus]
        reduced = f"{1000 * s.inside:.2f}, {1000 * s.between:.2f}"
        cells = (s.gpus, s.rank_items, f"{1000 * s.compute:.2f}", reduced, f"{s.rate:,.0f}")
        assert f"| {' | '.join(map(str, cells))} |" in page
    assert "95 items per GPU" in render_scale(found, "h200", 400, 0.4, 16_455_671)
