"""``zero.communication_dtype: bf16`` on 2 gloo ranks: gradients are rounded once, and training hardly sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Ranks

WORKER = Path(__file__).with_name("communication_worker.py")


@pytest.mark.timeout(240)
def test_gradients_in_bf16_train_as_gradients_in_fp32(tmp_path: Path, ranks: Ranks) -> None:
    ranks.run(2, WORKER, tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["stage"] for row in rows] == [0, 1, 2]
    # bf16 has 8 bits: a value is rounded by at most 2^-9 of itself before the sum, and the sum once more.
    assert 0 < rows[0]["gradient_difference"] < 2**-8
    # There the gradients are in bf16 before they are sent, and the sum of two is rounded once either way.
    assert rows[2]["bf16"] == rows[2]["fp32"]
    for row in rows:
        assert row["bf16"][0] == row["fp32"][0], "before the first update nothing differs"
        assert row["bf16"] == pytest.approx(row["fp32"], rel=2e-3), row
