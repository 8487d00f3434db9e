"""ZeRO stages 0 to 3 x accumulation x clipping x freezing against plain PyTorch, on 2 gloo ranks.

Tolerances, absolute for weights after 4 steps whose largest update is about 1e-2, relative for losses. fp32: at most
1.2e-7 seen in every combination. bf16: most combinations agree as closely, but a master weight that differs in its last fp32
bit (clipping divides in another order) may round to the neighbouring bf16 value, and the next loss then differs by
1e-5 to 4e-4. Gradients accumulated in bf16, which this must catch, differ by 4e-3. Whether a bit flips depends on what
the process did before: one combination (stage 3, no accumulation, no clipping, all trained) differed by 1.3e-3 as the
first of a process, and by 0 when it was repeated in the same process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("parity_worker.py")
COMBINATIONS = list(itertools.product((0, 1, 2, 3), (1, 2), (0.0, 0.5), (False, True)))
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}  # of losses
WEIGHT_TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, dict]:
    from tests.conftest import Ranks

    out = tmp_path_factory.mktemp("parity") / f"{request.param}.json"
    with contextlib.closing(Ranks()) as ranks:
        ranks.run(2, WORKER, out, request.param, timeout=400)
    rows = json.loads(out.read_text())
    return {(r["stage"], r["accumulation"], r["clip"], r["frozen"]): r for r in rows}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "accumulation", "clip", "frozen"), COMBINATIONS)
def test_engine_trains_as_plain_pytorch(
    results: dict, stage: int, accumulation: int, clip: float, frozen: bool
) -> None:
    row = results[stage, accumulation, clip, frozen]
    assert row["largest_update"] > 1e-3, "nothing was trained: the comparison would say nothing"
    assert row["loss_difference"] < TOLERANCE[row["precision"]], row
    assert row["weight_difference"] < WEIGHT_TOLERANCE[row["precision"]], row
    assert row["frozen_moved"] == 0.0, row


@pytest.mark.timeout(600)
def test_gradients_travel_as_the_configuration_says_whatever_engine_the_process_had_before(results: dict) -> None:
    """DeepSpeed remembers that an engine of stage 0 ran under autocast; the next would reduce in the weights' dtype."""
    for (stage, *_), row in results.items():
        if stage > 1:
            assert row["reduced_as"] == ["torch.float32"], row


@pytest.mark.timeout(600)
def test_clipping_and_freezing_change_the_result(results: dict) -> None:
    for stage in range(4):
        plain, clipped = results[stage, 1, 0.0, False], results[stage, 1, 0.5, False]
        assert plain["losses"][-1] != clipped["losses"][-1]
        assert plain["losses"][-1] != results[stage, 1, 0.0, True]["losses"][-1]
