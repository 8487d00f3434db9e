"""What a site and the command line say a job gets, and what is probably not meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from rating_train.cluster import submission
from rating_train.cluster.site import SITE_NAMES, Request, choose_place, read_site, site_file
from rating_train.errors import UserError

CONFIG = "name: run\ndata: {path: nowhere, workers: 8}\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration of 8 DataLoader workers, in a folder whose site has no settings."""
    monkeypatch.chdir(tmp_path)
    for name in SITE_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLUSTER_ENV", str(tmp_path / "cluster.env"))
    (tmp_path / "run.yaml").write_text(CONFIG)
    return "run.yaml"


def site(text: str) -> None:
    site_file().write_text(text)


def dry_run(config: str, capsys: pytest.CaptureFixture[str], **request: object) -> tuple[str, str]:
    submission.submit([config], [], Request(dry_run=True, **request))  # type: ignore[arg-type]
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_dry_run_without_a_site_says_what_to_set(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = dry_run(config, capsys)
    assert "sbatch " in out and err.count("\n") == 1
    for part in (
        "warning: neither ",
        "cluster.env nor an option says what a node has",
        "1 task without a GPU",
        "cluster.env.example",
        "CLUSTER_GPUS_PER_NODE",
        "--gpus-per-node",
    ):
        assert part in err, part


def test_a_submission_without_a_site_is_refused(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text("#!/bin/sh\ntouch submitted\necho 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(UserError, match=r"says what a node has.*fix: copy .*cluster\.env\.example"):
        submission.submit([config], [], Request())
    assert not (tmp_path / "submitted").exists() and not (tmp_path / "runs").exists()
    submission.submit([config], [], Request(gpus_per_node=0))
    assert (tmp_path / "submitted").exists(), "nodes without GPUs, if that is what is meant"


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("CLUSTER_GPUS_PER_NODE=8", {}),
        ("CLUSTER_TASKS_PER_NODE=2", {}),
        ("", {"gpus_per_node": 8}),
        ("", {"gpus_per_node": 0}),
        ("", {"tasks_per_node": 4}),
    ],
)
def test_what_was_said_is_not_warned_about(
    text: str, request_: dict[str, int], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site(text)
    assert dry_run(config, capsys, **request_)[1] == ""


def test_cores_follow_the_loader_where_nobody_says_how_many(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site("CLUSTER_GPUS_PER_NODE=8")
    out, err = dry_run(config, capsys)
    assert "--cpus-per-task=9" in out and err == ""
    out, err = dry_run(config, capsys, cpus_per_task=4)
    assert "--cpus-per-task=4" in out
    assert "run.yaml: a task has 4 cores for data.workers=8 and itself" in err and "--cpus-per-task=9" in err
    site("CLUSTER_GPUS_PER_NODE=8 CLUSTER_CPUS_PER_TASK=16")
    assert dry_run(config, capsys)[1] == ""


def test_all_problems_of_a_place_are_in_one_error() -> None:
    values = {**dict.fromkeys(SITE_NAMES, ""), "CLUSTER_GPUS_PER_NODE": "many", "CLUSTER_CPUS_PER_TASK": "0"}
    with pytest.raises(UserError) as error:
        choose_place(Request(nodes=0), values, workers=1)
    for part in ("CLUSTER_GPUS_PER_NODE is 'many'", "CLUSTER_CPUS_PER_TASK is '0'", "--nodes is 0"):
        assert part in str(error.value), part


def test_a_site_whose_settings_bash_cannot_read(config: str) -> None:
    site("CLUSTER_SBATCH=(")
    with pytest.raises(UserError, match="the site's settings cannot be read"):
        read_site()
