"""A loss of the user's own trains on 2 ranks, is recorded, and a change of its file is told at the next resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rating_train.files import sha256_file
from tests.conftest import Ranks
from tests.helpers.runs import losses

pytestmark = pytest.mark.timeout(120)

HUBER = """
def per_item(scores, ratings, rating_counts):
    error, d = scores - ratings, 0.5
    size = error.abs()
    return (size <= d) * (0.5 * error**2) + (size > d) * (d * (size - 0.5 * d))
"""


def test_two_ranks_train_as_with_the_built_in_one_and_a_changed_file_is_told(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "my_losses.py"
    file.write_text(HUBER)
    legs = []
    for name, kind in (("built_in", "huber"), ("own", "my_losses:per_item")):
        sections = {"loss": {"kind": kind, "count_weight": "log"}, "optim": {"schedule": "constant"}}
        for steps in (3, 5):
            train = {"max_steps": steps, "precision": "fp32", "epochs": 1}
            path = tiny_config(name, **sections, train=train, batch={"micro_items": 3})
            legs.append(path.rename(path.with_name(f"{name}_{steps}.yaml")))
    built_in, _, own, resumed = legs
    ranks.run(2, "-m", "tests.dist.train_worker", built_in, own, cwd=tmp_path)
    runs = tmp_path / "runs"
    assert losses(runs / "own") == pytest.approx(losses(runs / "built_in"), rel=1e-6)
    facts = {"kind": "my_losses:per_item", "file": str(file.resolve()), "sha256": sha256_file(file)}
    assert json.loads((runs / "own" / "provenance.json").read_text())["loss"] == facts

    file.write_text(HUBER.replace("0.5 * error", "0.6 * error"))
    output = ranks.train(2, resumed, cwd=tmp_path)
    changed = f"sha256 of {file.resolve()} '{facts['sha256']}' -> '{sha256_file(file)}'"
    assert output.count("resumes at step 3 with other settings than before") == 1 and changed in output
    first, second = json.loads((runs / "own" / "provenance.json").read_text())["history"]
    assert first["loss"] == facts and second["loss"]["sha256"] == sha256_file(file)


def test_a_loss_that_one_rank_cannot_load_is_one_line_of_one_rank(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """As where a node does not see the folder: here rank 1 alone fails on it."""
    broken = 'import os\nassert os.environ["RANK"] == "0", "not here"\n' + HUBER
    (tmp_path / "my_losses.py").write_text(broken)
    config = tiny_config(loss={"kind": "my_losses:per_item"})
    output = ranks.train(2, config, code=1, cwd=tmp_path)
    assert output.count(": error: ") == 1 and "rank 1: my_losses cannot be imported" in output
    assert "Traceback" not in output and not (tmp_path / "runs").exists()
