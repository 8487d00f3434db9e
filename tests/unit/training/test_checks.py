"""What is refused before anything is opened, downloaded or made: all problems in one error, the network never asked."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.data.features.identity import Features
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.training import checks
from tests.conftest import small_file_system

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
Settings = Callable[..., Config]


@pytest.fixture
def settings(tiny_config: Callable[..., Path]) -> Settings:
    return lambda **sections: load_config(tiny_config(**sections), [])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local checks only: whoever asks for an address fails the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def problem(config: Config, run: Path, resume: str = "auto", ranks: int = 1) -> str:
    with pytest.raises(UserError) as error:
        checks.check_job(config, run, resume, World(0, ranks, 0, ranks), CPU)
    return str(error.value)


def test_what_fits_passes_and_makes_nothing(settings: Settings, tmp_path: Path) -> None:
    for ranks in (1, 2, 4):
        checks.check_job(settings(), tmp_path / "runs" / "run", "auto", World(0, ranks, 0, ranks), CPU)
    assert not (tmp_path / "runs").exists()


def test_all_problems_are_in_one_error(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = settings(
        data={"path": str(tmp_path / "nowhere"), "image_px": 70}, batch={"global_items": 12, "micro_items": 5}
    )
    error = problem(config, tmp_path / "file" / "run", "banana")
    for part in (
        "5 problems",
        "there is no checkpoint directory 'banana'",
        "/file is not a directory",
        "nowhere",
        "micro-batches of 5",
        "an image side of 70 pixels does not divide",
    ):
        assert part in error, part


def test_a_global_batch_that_is_larger_than_the_split(settings: Settings, demo: Path, tmp_path: Path) -> None:
    items = json.loads((demo / "data" / "manifest.json").read_text())["splits"]["train"]["items"]
    error = problem(settings(batch={"global_items": 1_000_000}), tmp_path / "run")
    assert f"a global batch of 1,000,000 items is larger than the split 'train', which has {items}" in error
    assert f"set batch.global_items to {items} or less" in error
    checks.check_job(settings(batch={"global_items": items}), tmp_path / "run", "auto", World(), CPU)
    assert "larger than the split" in problem(settings(batch={"global_items": items + 1}), tmp_path / "run")


def test_each_source_of_a_mixture_is_looked_at(settings: Settings, demo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    manifest = json.loads((demo / "data" / "manifest.json").read_text())

    def mixture(weight: float = 1.0, global_items: int = 12, **more: object) -> Config:
        sources = [{"path": str(demo / "data")}, {"path": str(other), "weight": weight}]
        return settings(data={"path": "", "sources": sources, **more}, batch={"global_items": global_items})

    assert "dataset directory not found" in problem(mixture(), tmp_path / "run")
    error = problem(mixture(train_split="test", eval_path=str(tmp_path / "third")), tmp_path / "run")
    assert "no split data.train_split=test" in error and "third" in error and str(other) in error, (
        "all in one"
    )
    other.mkdir()
    for change, message in (
        ({}, "two sources are the same dataset"),
        ({"fingerprint": "x", "image_size_px": 48}, "images of different sizes"),
    ):
        (other / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert message in problem(mixture(), tmp_path / "run")
    (other / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "x"}))
    items = 2 * manifest["splits"]["train"]["items"]
    assert "items of an epoch" in problem(mixture(weight=1e-4), tmp_path / "run")
    assert f"which has {items}" in problem(mixture(global_items=items + 1), tmp_path / "run")
    checks.check_job(mixture(global_items=items), tmp_path / "run", "auto", World(), CPU)


def test_a_split_that_the_dataset_does_not_have(settings: Settings, tmp_path: Path) -> None:
    error = problem(settings(data={"train_split": "trian", "eval_split": "test"}), tmp_path / "run")
    assert "no split data.train_split=trian, data.eval_split=test" in error and "one of train, val" in error


@pytest.mark.parametrize("backbone", ["/no/such/model", "./no/such/model", "~/model", "a-file"])
def test_a_backbone_path_that_is_no_folder(
    backbone: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    error = problem(settings(model={"backbone": backbone}), tmp_path / "run")
    assert "the backbone's folder is not there" in error and f"model.backbone={backbone}" in error


def test_a_hub_id_is_left_to_the_hub(settings: Settings, tmp_path: Path) -> None:
    checks.check_job(settings(model={"backbone": "some/model"}), tmp_path / "run", "auto", World(), CPU)


def test_the_data_of_a_remote_dataset_is_looked_at_later(settings: Settings, tmp_path: Path) -> None:
    config = settings(data={"path": str(tmp_path / "cache"), "remote": "s3://bucket/data"})
    checks.check_job(config, tmp_path / "run", "auto", World(), CPU)


@pytest.mark.parametrize("runs", ["/dev/null", "/dev/null/runs"])
def test_a_run_directory_that_cannot_be_made(settings: Settings, runs: str) -> None:
    error = problem(settings(), Path(runs) / "run")
    assert "the run directory cannot be made" in error and "set runs_dir" in error


def test_a_file_system_that_says_no_only_when_it_is_asked() -> None:
    with pytest.raises(UserError, match=r"the run directory cannot be made \(.*/proc/runs/run.*set runs_dir"):
        checks.make_run_folder(Path("/proc/runs/run"))


def test_a_run_directory_on_a_read_only_file_system(settings: Settings, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", megabytes=1) as disk:
        assert os.system(f"mount -o remount,ro {disk}") == 0
        assert f"{disk} cannot be written" in problem(settings(), disk / "runs" / "run")


def test_a_step_of_a_rank_that_no_memory_holds(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(batch={"global_items": 200, "micro_items": 1})
    monkeypatch.setattr(checks, "available_memory", lambda: 2 * 2**20)
    error = problem(config, tmp_path / "run")
    assert "one step of a rank reads 200 items, at least" in error and "lower batch.global_items" in error
    assert "reads 50 items" in problem(config, tmp_path / "run", ranks=4)


def test_of_features_what_is_read_in_place_of_images_is_counted(
    settings: Settings, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 64 px image is 12,288 bytes, its four visual tokens of 96 values 768 in bf16."""
    made = Path(shutil.copytree(demo / "data", tmp_path / "features"))
    manifest = json.loads((made / "manifest.json").read_text())
    told = Features(manifest["fingerprint"], "", 64, 4, 96, "bfloat16")
    (made / "manifest.json").write_text(json.dumps({**manifest, "features": vars(told)}))
    monkeypatch.setattr(checks, "available_memory", lambda: 600_000)
    more: dict[str, Any] = {
        "model": {"freeze": ["vision", "connector"]},
        "batch": {"global_items": 200, "micro_items": 1},
    }
    assert "one step of a rank reads 200 items" in problem(settings(**more), tmp_path / "run")
    features = settings(**more, data={"features": str(made)})
    assert "the backward pass of a micro-batch" in problem(features, tmp_path / "run"), "the step fits"
    monkeypatch.setattr(checks, "available_memory", lambda: 200_000)
    assert "one step of a rank reads 200 items" in problem(features, tmp_path / "run")


def test_a_micro_batch_that_no_memory_holds(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full-size model: at least 0.3 GiB for each item in bf16, and a tenth of it with gradient checkpointing."""
    more: dict[str, Any] = {"backbone": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"}
    config = settings(model=more, data={"image_px": 384, "text_tokens": 176}, batch={"global_items": 200})
    monkeypatch.setattr(checks, "available_memory", lambda: 16 * 2**30)
    error = problem(config, tmp_path / "run")
    assert "a micro-batch of 200 items keeps at least" in error and "a rank has 16.0 GiB" in error
    assert "model.gradient_checkpointing=true" in error
    limit = int(error.partition("expected: at most ")[2].split()[0])
    assert 40 <= limit <= 60
    for model, batch in ((more, {"micro_items": 48}), ({**more, "gradient_checkpointing": True}, {})):
        config = settings(
            model=model, data={"image_px": 384, "text_tokens": 176}, batch={"global_items": 192, **batch}
        )
        checks.check_job(config, tmp_path / "run", "auto", World(), CPU)


def test_a_backbone_whose_configuration_is_none(settings: Settings, demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "model", tmp_path / "model")
    for content in ("[]", "{", "{}", '{"model_type": "bert"}'):
        (tmp_path / "model" / "config.json").write_text(content)
        error = problem(settings(model={"backbone": str(tmp_path / "model")}), tmp_path / "run")
        assert str(tmp_path / "model" / "config.json") in error, content


def test_cores_are_counted_by_what_this_process_may_use() -> None:
    """A real affinity: the process is bound to one core, as `srun` without --cpus-per-task does it."""
    allowed = os.sched_getaffinity(0)
    assert checks.missing_cores(World(), workers=0) == []
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert checks.missing_cores(World(), workers=0) == []
        (line,) = checks.missing_cores(World(), workers=8)
        assert ": 1 cores for 1 ranks with 8 DataLoader workers each" in line
    finally:
        os.sched_setaffinity(0, allowed)


def test_too_few_cores_are_one_warning(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    checks.warn_of_missing_cores(settings(data={"workers": 0}), World())
    assert not caplog.records
    checks.warn_of_missing_cores(settings(data={"workers": 200}), World())
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "--cpus-per-task=201" in record.getMessage()


def test_an_absent_dataset_is_found_before_the_hub_is_asked(settings: Settings, tmp_path: Path) -> None:
    config = settings(data={"path": str(tmp_path / "nowhere")}, model={"backbone": "no/such-model"})
    assert "nowhere" in problem(config, tmp_path / "run")


def test_a_tracker_whose_packages_are_missing(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config(), ["tracking=[jsonl, wandb, mlflow]"])
    missing, find = ("mlflow", "sqlalchemy"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    error = problem(config, tmp_path / "run")
    assert "mlflow and sqlalchemy are not installed | where: tracking: [jsonl, wandb, mlflow]" in error
    assert "pip install 'rating_train[tracking]', or leave out mlflow" in error


def test_tiles_need_images_in_their_own_shape(settings: Settings, tmp_path: Path) -> None:
    error = problem(settings(data={"image_px": 64, "tiling_px": 256}), tmp_path / "run")
    assert "its images were stored as squares" in error and "--keep-aspect" in error
    with pytest.raises(UserError, match="expected a multiple of `data"):
        settings(data={"image_px": 64, "tiling_px": 100})
