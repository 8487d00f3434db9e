"""Every process group is made and connected at start-up: none while training, when a rank's memory is full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Ranks


@pytest.mark.timeout(240)
def test_no_group_is_made_or_connected_after_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, "-m", "tests.dist.groups_worker", tmp_path)
    rows = json.loads((tmp_path / "groups.json").read_text())
    assert set(rows) == {"0", "1", "2", "3"}
    for stage, row in rows.items():
        assert [made for made in row["made"] if made[0] != "start-up"] == [], f"stage {stage}"
        late = {group: phase for group, phase in row["first_used"].items() if phase != "start-up"}
        assert late == {}, f"stage {stage}: {row}"
    assert rows["0"]["made"], "DeepSpeed makes groups of its own: else there is nothing to see here"
