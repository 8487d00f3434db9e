"""``rating-train bench`` without data, weights or network: every part, with its limits, and the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import Ranks

SETTINGS = {
    "data": {"path": "no/such/data", "image_px": 64, "text_tokens": 96, "workers": 0},
    "model": {"backbone": "no/such/model", "head_hidden": 16},
    "batch": {"global_items": 4, "micro_items": 2},
    "train": {"log_every_steps": 1},
}


@pytest.mark.timeout(240)
def test_every_part_has_a_share_of_a_limit_and_a_slower_run_another_exit_code(
    tmp_path: Path, ranks: Ranks
) -> None:
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = ("-m", "rating_train", "bench", tmp_path / "bench.yaml", "--rounds", 1, "--steps", 2)
    ranks.run(1, *command, "--json", tmp_path / "a.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    limited = {row["part"] for row in rows if row["ratio"] is not None}
    assert limited == {"loader", "forward", "step", "train"}
    named = {row["name"] for row in rows if row["part"] == "train"}
    assert named >= {
        "framework efficiency",
        "waiting for data",
        "host to device",
        "forward",
        "backward",
        "optimizer",
    }
    assert named >= {"outside forward and backward", "pause of a save"}
    assert all(row["value"] > 0 for row in rows if row["unit"] == "items/s")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "bench.yaml"], "nothing else is left"
    for row in rows:
        row["value"] *= 1000 if row["unit"] == "items/s" else 1
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    ranks.run(1, *command, "--part", "loader", "--compare", tmp_path / "a.json", cwd=tmp_path, code=1)
