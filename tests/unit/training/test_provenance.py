"""What a run was started with, and what every later start changed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rating_train import run_dir
from rating_train.config.schema import Config
from rating_train.training import provenance
from rating_train.training.provenance import changed_settings, describe, record_start


def start(run: Path, config: Config, step: int, checkpoint: Path | None = None) -> dict[str, list[object]]:
    return record_start(run, config, step, checkpoint, ranks=2)


def changed(config: Config, **sections: dict[str, object]) -> Config:
    """A copy with other values, by section."""
    new = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **new)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "checkpoints" / "step_00000500").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step_00000500"


def test_a_resumed_run_names_every_changed_setting_in_one_warning(
    run: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(name="run")
    assert start(run, config, 0) == {} and not caplog.records
    assert start(run, config, 500, checkpoint) == {} and not caplog.records
    lr = dataclasses.replace(config.optim.lr, head=1e-3)
    other = changed(config, optim={"lr": lr}, train={"seed": 18}, model={"freeze": ["vision"]})
    changes = {"model.freeze": [[], ["vision"]], "optim.lr.head": [4e-4, 1e-3], "train.seed": [17, 18]}
    assert start(run, other, 500, checkpoint) == changes
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelname == "WARNING" and "resumes at step 500 with other settings than before" in text
    assert "optim.lr.head 0.0004 -> 0.001" in text and "model.freeze [] -> ['vision']" in text
    assert "train.seed 17 -> 18 (dropout masks follow it" in text


def test_the_settings_of_each_step_can_be_told(run: Path, checkpoint: Path) -> None:
    """Forwards from the first start, one change after the other, they come to what config.yaml says now."""
    configs = [Config(name="run")]
    configs.append(changed(configs[0], train={"epochs": 3.0}))
    configs.append(changed(configs[1], train={"epochs": 4.0}, optim={"beta1": 0.8}))
    for step, config in zip((0, 500, 500), configs):
        start(run, config, step, checkpoint if step else None)
    facts = json.loads((run / run_dir.PROVENANCE_FILE).read_text())
    first, second, third = facts["history"]
    assert (first["step"], second["step"], third["step"]) == (0, 500, 500)
    assert first["config"]["train"]["epochs"] == 5.0
    assert second["changed"] == {"train.epochs": [5.0, 3.0]}
    assert third["changed"] == {"train.epochs": [3.0, 4.0], "optim.beta1": [0.9, 0.8]}
    now = yaml.safe_load((run / run_dir.CONFIG_FILE).read_text())
    assert (now["train"]["epochs"], now["optim"]["beta1"]) == (4.0, 0.8)
    assert facts["ranks"] == 2 and all(entry["command"] and entry["started"] for entry in facts["history"])


def test_a_checkpoint_of_another_run_is_compared_with_that_run(
    run: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(run, changed(Config(), train={"seed": 3}), 0)
    (tmp_path / "other").mkdir()
    assert start(tmp_path / "other", Config(name="other"), 500, checkpoint) == {"train.seed": [3, 17]}
    assert "train.seed 3 -> 17" in caplog.text and "name" not in caplog.text, (
        "where a run is, is not what it does"
    )


def test_a_run_from_before_there_was_a_history(run: Path, checkpoint: Path) -> None:
    start(run, Config(), 0)
    path = run / run_dir.PROVENANCE_FILE
    facts = json.loads(path.read_text())
    del facts["history"]
    path.write_text(json.dumps(facts))
    start(run, changed(Config(), train={"seed": 3}), 500, checkpoint)
    before, now = json.loads(path.read_text())["history"]
    assert before["config"]["train"]["seed"] == 17 and now["changed"] == {"train.seed": [17, 3]}


@pytest.mark.parametrize("name", [run_dir.CONFIG_FILE, run_dir.PROVENANCE_FILE])
def test_a_damaged_record_is_said_and_does_not_stop_the_run(
    name: str, run: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(run, Config(), 0)
    (run / name).write_bytes(b"{\xff")
    assert start(run, Config(), 500, checkpoint) == {}
    assert name in caplog.text
    assert json.loads((run / run_dir.PROVENANCE_FILE).read_text())["history"]
    assert yaml.safe_load((run / run_dir.CONFIG_FILE).read_text())["train"]["seed"] == 17


def test_a_setting_that_is_new_is_no_change() -> None:
    assert changed_settings({"train": {"seed": 1}}, {"train": {"seed": 1, "new": 2}, "newer": {}}) == {}


def test_changed_phases_are_named_one_by_one_where_their_number_is_the_same() -> None:
    def stages(*lengths: float) -> dict[str, Any]:
        return {"stages": [{"epochs": length, "lr": {"head": 1e-3}} for length in lengths]}

    changes = changed_settings(stages(1, 2), stages(1, 3))
    assert changes == {"stages[1].epochs": [2, 3]}
    assert describe(changes).endswith("(the learning rate of the phase follows its new length)")
    added = changed_settings(stages(1), stages(1, 3))
    assert added == {"stages": [stages(1)["stages"], stages(1, 3)["stages"]]}
    assert changed_settings({"stages": None}, stages(1)).keys() == {"stages"}


def test_the_commit_is_that_of_the_package_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    module = tmp_path / "rating_train" / "training" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(module))
    commit = provenance.source_commit()
    assert commit is not None and len(commit) == 40
    module.write_text("changed")
    assert provenance.source_commit() == f"{commit}+"
    installed = tmp_path / ".venv" / "rating_train" / "training" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.source_commit() is None, "installed below the repository, not run from it"
