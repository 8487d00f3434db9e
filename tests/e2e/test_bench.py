"""``rating-train bench`` without data, weights or network: every part, with its limits, and the comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.helpers.forked import REPO
from tests.helpers.ranks import clean_environment


@pytest.mark.parametrize(
    ("words", "told"), [(["--out", "x"], "unknown option '--out'"), (["a.b=1"], "is a setting")]
)
def test_the_table_of_a_gpu_refuses_what_is_no_folder(tmp_path: Path, words: list[str], told: str) -> None:
    script = REPO / "benchmarks" / "gpu.sh"
    done = subprocess.run(
        ["bash", str(script), "--cpu", *words],
        cwd=tmp_path, env=clean_environment(RATING_TRAIN_PYTHON=sys.executable), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_peers_that_are_not_known_are_refused_before_the_first_round(tmp_path: Path) -> None:
    script = REPO / "benchmarks" / "peers" / "run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(REPO / "configs" / "demo_cpu.yaml"), "--only", "DDP,nobody"],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (
        "--only: not known, or not installed: nobody | expected some of: rating_train stage 0" in done.stderr
    )


@pytest.mark.timeout(240)
def test_the_table_of_a_gpu_in_its_form_for_a_cpu_and_a_slower_run(tmp_path: Path, ranks: Ranks) -> None:
    script = REPO / "benchmarks" / "gpu.sh"
    told = subprocess.run(
        ["bash", str(script), "--cpu", "out", "train.log_every_steps=1"],
        cwd=tmp_path, env=clean_environment(RATING_TRAIN_PYTHON=sys.executable), capture_output=True, text=True,
        timeout=220,
    )  # fmt: skip
    assert told.returncode == 0 and "failed" not in told.stdout, told.stdout + told.stderr
    assert "| cpu | train | framework efficiency |" in told.stdout
    result = tmp_path / "out" / "cpu.json"
    rows = json.loads(result.read_text())["rows"]
    limited = {row["part"] for row in rows if row["ratio"] is not None}
    assert limited == {"loader", "forward", "step", "train", "profile"}
    named = {row["name"] for row in rows if row["part"] == "train"}
    assert named >= {"framework efficiency", "waiting for data", "host to device", "forward", "backward"}
    assert named >= {"reduction", "optimizer", "outside forward and backward", "pause of a save"}
    assert all(row["value"] > 0 for row in rows if row["unit"] == "items/s")
    left = ["cpu.json", "cpu.log", "out", "peers.json", "peers.log", "trace.json"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == left, "nothing else is left"
    assert "| peers | train | rating_train stage 0 |" in told.stdout and "| 1.00 x DDP |" in told.stdout
    assert {row["name"] for row in rows if row["part"] == "profile"} >= {"operator aten::mm"}
    assert "traceEvents" in json.loads((tmp_path / "out" / "trace.json").read_text())
    for row in rows:
        row["value"] *= 1000 if row["unit"] == "items/s" else 1
    result.write_text(json.dumps({"rows": rows}))
    parts = [word for part in ("loader", "features", "attention") for word in ("--part", part)]
    words = ("--rounds", 1, "--steps", 1, *parts, "--compare", result)
    settings = ("data.path=none", "model.backbone=none", "batch.global_items=4", "train.device=cpu")
    settings = (*settings, "model.freeze=[vision,connector]")
    sets = [word for setting in settings for word in ("--set", setting)]
    printed = ranks.run(
        1,
        "-m",
        "rating_train",
        "bench",
        REPO / "configs" / "demo_cpu.yaml",
        *words,
        *sets,
        cwd=tmp_path,
        code=1,
    )
    assert "times as fast as from images" in printed and "collation of features" in printed
    assert "vision, forward: flash" in printed and "the default: products" in printed
