"""Weights from the hub, once per node, then without a network: real downloads from a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.helpers.hub import Hub, serve

pytestmark = pytest.mark.timeout(300)

MODEL = "someone/tiny"
LOAD = """
import sys
from rating_train.config.schema import Config
from rating_train.errors import UserError
from rating_train.model.architecture import read_architecture
from rating_train.model.load import load_backbone
from rating_train.data.prompt import load_tokenizer
import dataclasses
config = dataclasses.replace(Config().model, backbone=sys.argv[1], head_hidden=16)
try:
    architecture = read_architecture(config)
    load_tokenizer(config.backbone)
    print(sum(p.numel() for p in load_backbone(config, architecture).parameters()))
except UserError as e:
    print(e)
    raise SystemExit(2)
"""


@pytest.fixture
def hub(demo: Path) -> Iterator[Hub]:
    with serve(MODEL, demo / "model") as running:
        yield running


def start(backbone: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """A process that loads the backbone as a rank does."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD, backbone],
        env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_node_downloads_each_file_once_and_needs_no_network_afterwards(hub: Hub, tmp_path: Path) -> None:
    online = hub.env(tmp_path / "home")
    loaded = [process.communicate(timeout=200) for process in [start(MODEL, online) for _ in range(3)]]
    parameters = {out for out, _ in loaded}
    assert len(parameters) == 1 and int(parameters.pop()) > 1000, loaded
    assert hub.sent["model.safetensors"] == 1, "the ranks of a node share one download"
    sent = dict(hub.sent)

    offline = {**hub.env(tmp_path / "home", offline=True), "HF_ENDPOINT": "http://127.0.0.1:9"}
    out, error = start(MODEL, offline).communicate(timeout=100)
    assert int(out) > 1000, error
    assert hub.sent == sent

    out, error = start(MODEL, {**offline, "HF_HOME": str(tmp_path / "other")}).communicate(timeout=100)
    assert f"model.backbone={MODEL}" in out and "model.backbone=FOLDER" in out, out + error
