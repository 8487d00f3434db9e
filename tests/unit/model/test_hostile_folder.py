"""A model folder from elsewhere runs no code: neither a pickle of weights nor modules that its config names."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from rating_train.config.schema import ModelConfig
from rating_train.errors import UserError
from rating_train.model.architecture import read_architecture
from rating_train.model.load import load_backbone
from tests.conftest import REPO
from tests.unit.checkpoint.test_safe_load import Hostile

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(REPO / "tests" / "recorded" / "run_before_layout.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "model"


def test_a_pickle_of_weights_runs_nothing(folder: Path) -> None:
    target = folder / "made by the weights"
    (folder / "model.safetensors").unlink()
    torch.save({"model.text_model.norm.weight": Hostile(target)}, folder / "pytorch_model.bin")
    config = ModelConfig(backbone=str(folder), head_hidden=8)
    with pytest.raises(UserError):
        load_backbone(config, read_architecture(config))
    assert not target.exists()


def test_code_that_the_config_names_is_not_imported(folder: Path) -> None:
    target = folder / "made by the code"
    (folder / "hostile.py").write_text(
        f"import os\nos.mkdir({str(target)!r})\nclass Model: pass\nclass Config: pass\n"
    )
    path = folder / "config.json"
    content = json.loads(path.read_text())
    names = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
    path.write_text(json.dumps({**content, "auto_map": names}))
    config = ModelConfig(backbone=str(folder), head_hidden=8)
    assert load_backbone(config, read_architecture(config)) is not None, "its own classes are used instead"
    assert not target.exists()
