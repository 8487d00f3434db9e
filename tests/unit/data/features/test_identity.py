"""Features are read for the data, the weights, the precision and the image size that they were made from, only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rating_train.config.load import config_from_dict
from rating_train.config.schema import DataConfig
from rating_train.data.features.identity import (
    Features,
    check_features,
    features_of,
    read_features,
    refuse_features,
    refuse_other_weights,
)
from rating_train.errors import UserError
from rating_train.shards.manifest import read_manifest
from rating_train.shards.schema import MANIFEST_NAME


@pytest.fixture
def made(demo: Path, tmp_path: Path) -> Path:
    """A copy of the small demo that says of itself that it holds features."""
    out = Path(shutil.copytree(demo / "data", tmp_path / "features"))
    manifest = read_manifest(out)
    told = Features(manifest["fingerprint"], "ab12", 64, 4, 64, "bfloat16")
    (out / MANIFEST_NAME).write_text(json.dumps({**manifest, "features": vars(told)}))
    return out


def data_config(demo: Path, made: Path, **more: Any) -> DataConfig:
    settings = {"path": str(demo / "data"), "features": str(made), "image_px": 64, **more}
    return config_from_dict({"data": settings, "model": {"freeze": ["vision", "connector"]}}).data


def test_features_of_the_dataset_are_read_in_its_place_and_of_no_other(demo: Path, made: Path) -> None:
    config = data_config(demo, made)
    assert check_features(config, "train") == read_manifest(demo / "data")
    assert features_of(config, config.train_sources[0]) == read_features(made)
    other = data_config(demo, made, eval_path="elsewhere")
    assert features_of(other, other.eval_source) is None, "the images of another dataset are read"


def test_what_does_not_belong_together_is_refused(demo: Path, made: Path) -> None:
    refuse_other_weights(str(made), "ab12", "bfloat16")
    with pytest.raises(UserError, match="other weights"):
        refuse_other_weights(str(made), "cd34", "bfloat16")
    with pytest.raises(UserError, match=r"other precision \(bfloat16, the run's is float32\)"):
        refuse_other_weights(str(made), "ab12", "float32")
    with pytest.raises(UserError, match=r"of 64 pixels, data\.image_px is 128"):
        check_features(data_config(demo, made, image_px=128), "train")
    with pytest.raises(UserError, match="no split 'test'"):
        check_features(data_config(demo, made), "test")
    with pytest.raises(UserError, match="holds no features"):
        check_features(data_config(demo, demo / "data"), "train")
    manifest = read_manifest(made)
    with pytest.raises(UserError, match=r"set data\.path to the dataset"):
        refuse_features(made, manifest)
    manifest["features"]["data"] = "another"
    (made / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="of another dataset"):
        check_features(data_config(demo, made), "train")
