"""What a benchmark measures: what is there, else a stand-in, without waiting for a network."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from rating_train.bench.setting import bench_config
from rating_train.bench.tokenizer import tokenizer_folder
from rating_train.config.schema import Config, DataConfig, ModelConfig
from tests.helpers.hub import COMMIT

KNOWN = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
ITEMS = 16


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The hosts that are asked for while there is no network, and nothing is in the hub's cache."""
    hosts: list[str] = []

    def no_network(host: str, *_: object, **__: object) -> list[object]:
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return hosts


def measured(demo: Path, tmp_path: Path, model: ModelConfig) -> Config:
    data = DataConfig(path=str(demo / "data"), image_px=64)
    return bench_config(Config(data=data, model=model), tmp_path, ITEMS)


@pytest.mark.parametrize("tokenizer", ["", KNOWN])
def test_an_unknown_backbone_is_replaced_without_asking_the_hub(
    demo: Path, tmp_path: Path, asked: list[str], tokenizer: str
) -> None:
    found = measured(demo, tmp_path, ModelConfig(backbone="demo/model", tokenizer=tokenizer))
    stand_in = str(tmp_path / "demo" / "model")
    assert (found.model.backbone, found.model.tokenizer) == (stand_in, stand_in)
    assert asked == []


def test_without_a_network_the_hub_is_asked_once_for_a_tokenizer(
    demo: Path, tmp_path: Path, asked: list[str]
) -> None:
    found = measured(demo, tmp_path, ModelConfig(backbone=KNOWN))
    assert found.model.backbone == KNOWN, "its shape is known"
    assert found.model.tokenizer == str(tmp_path / "demo" / "model")
    assert asked == ["huggingface.co"]


def test_a_folder_is_measured_with_its_own_tokenizer(demo: Path, tmp_path: Path, asked: list[str]) -> None:
    found = measured(demo, tmp_path, ModelConfig(backbone=str(demo / "model")))
    assert found.model.tokenizer == found.model.backbone == str(demo / "model")
    assert asked == [] and not (tmp_path / "demo").exists(), "nothing is made that is not used"


def test_a_tokenizer_that_was_downloaded_before_is_taken_from_disk(
    demo: Path, tmp_path: Path, asked: list[str]
) -> None:
    model = tmp_path / "cache" / "models--someone--tiny"
    snapshot = shutil.copytree(demo / "model", model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    assert tokenizer_folder(ModelConfig(backbone="someone/tiny")) == str(snapshot)
    assert tokenizer_folder(ModelConfig(backbone="someone/else")) is None
    assert asked == ["huggingface.co"], "of the one that is not on disk"
