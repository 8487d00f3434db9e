"""``train.compile``: no graph break, one graph for each length, all of them made before the first step, equal losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Ranks

WORKER = Path(__file__).with_name("compile_worker.py")


@pytest.mark.timeout(240)
def test_compiled_models_train_as_eager_ones_at_stages_0_1_2(tmp_path: Path, ranks: Ranks) -> None:
    output = ranks.run(1, WORKER, tmp_path / "rows.json")
    assert "initializing group" not in output, "DeepSpeed's reports of memory, with a garbage collection for each"
    rows = json.loads((tmp_path / "rows.json").read_text())
    runs = [(stage, how) for stage in (0, 1, 2) for how in ("none", "blocks")] + [(1, "none"), (1, "model")]
    assert [(row["stage"], row["how"]) for row in rows] == runs
    for eager, compiled in zip(rows[::2], rows[1::2], strict=True):
        assert eager["graphs"] == 0 and eager["beats"] == []
        assert compiled["breaks"] == compiled["traced_while_training"] == 0
        assert compiled["beats"] == [24, 18]
        # Two lengths; where layers are compiled one by one, those of the vision tower have one of their own.
        graphs = {"blocks": 1 + 2, "model": 2}[compiled["how"]]
        assert compiled["graphs"] == compiled["graphs_of_warm_up"] == graphs
        for a, b in zip(eager["losses"], compiled["losses"], strict=True):
            assert a == pytest.approx(b, rel=2e-3), (eager, compiled)
