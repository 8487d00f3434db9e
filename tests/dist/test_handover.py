"""An engine hands its weights to the next one, at a boundary of `stages`: exactly, and with all of its memory back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Ranks


@pytest.mark.timeout(300)
def test_weights_are_handed_over_exactly_and_nothing_is_left(ranks: Ranks, tmp_path: Path) -> None:
    """On 2 ranks, stages 0 to 3: decoder and head trained first, then all but the decoder."""
    out = tmp_path / "out.json"
    ranks.run(2, "-m", "tests.dist.handover_worker", out)
    found = json.loads(out.read_text())
    assert len(found["cases"]) == 6
    for case in found["cases"]:
        name = case["case"]
        assert case["shapes"] and case["unrounded"] > 10, "fp32 masters are more than bf16 holds"
        assert case["differ"] == [], name
        assert case["computing_differ"] == [], f"{name}: the weights that compute are those from before"
        assert case["left"] == [] and case["held"] == 0, f"{name}: the old engine holds memory"
        assert case["frozen_moved"] == [], name
        assert case["parts_moved"] == ["connector", "head", "vision_model"], name
    assert found["process_groups"] <= 2, "each further one would be a communicator, with memory of its own on a GPU"
