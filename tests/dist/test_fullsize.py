"""The full 228M architecture (random weights) trains on 2 CPU ranks at stages 1, 2 and 3 within 24 GiB."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.conftest import Ranks, full

WORKER = Path(__file__).with_name("fullsize_worker.py")
STEPS = 3  # the second and the third use what the optimizer remembers


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=full), pytest.param(3, marks=full)])
def test_full_architecture_trains(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    ranks.run(2, WORKER, stage, out, STEPS, timeout=380)
    row = json.loads(out.read_text())
    assert row["backbone_parameters"] == 228_099_648
    assert len(row["losses"]) == STEPS and all(math.isfinite(x) and x > 0 for x in row["losses"])
    assert len(set(row["losses"])) == STEPS and all(n is not None for n in row["grad_norms"])
    assert row["peak_gib_all_ranks"] < 24
