"""`rating-train features`: what is stored is what the tower computes, in the dataset's own shards, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.data.features.collate import ImageCollator
from rating_train.errors import UserError
from rating_train.features.parts import PartsFolder
from rating_train.features.run import make_features
from rating_train.shards.manifest import check_split, read_manifest
from rating_train.shards.mds_read import iter_sampled, read_index
from rating_train.training.job import build_model
from rating_train.training.setup import read_model_inputs

pytestmark = pytest.mark.timeout(120)

FROZEN = {"freeze": ["vision", "connector"]}


@pytest.fixture
def recipe(tiny_config: Callable[..., Path], sharded: Path, tmp_path: Path) -> Config:
    """A frozen recipe on seven small shards, in fp32."""
    return load_config(
        tiny_config(
            data={"path": str(sharded), "features": str(tmp_path / "features")},
            model=FROZEN,
            train={"precision": "fp32", "device": "cpu"},
            zero={"stage": 1},
            batch={"micro_items": 6},
        )
    )


def test_features_are_those_of_the_tower_in_shards_divided_as_the_datasets_and_a_stopped_command_continues(
    recipe: Config, sharded: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = Path(recipe.data.features), []
    original = PartsFolder.write

    def stop_after_two(self: PartsFolder, split: str, shard: int, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((split, shard))
        original(self, split, shard, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PartsFolder, "write", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            make_features(recipe)
    assert written == [("train", 0), ("train", 1)] and not out.exists()
    written.clear()
    monkeypatch.setattr(
        PartsFolder, "write", lambda self, *given: (written.append(given[:2]), original(self, *given))
    )
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="bf16"))
    with pytest.raises(UserError, match="other weights, data or image size"):
        make_features(other)
    manifest = make_features(recipe)
    shards = {split: len(read_index(sharded / split)) for split in ("train", "val")}
    every = [(split, shard) for split, count in shards.items() for shard in range(count)]
    assert written == every[2:], "what was there is not computed again"
    assert not Path(f"{out}.parts").exists()

    own = read_manifest(sharded)
    assert manifest["features"]["data"] == own["fingerprint"] != manifest["fingerprint"]
    model, _ = build_model(recipe, read_model_inputs(recipe), fresh=True)
    for split in shards:
        check_split(out, split)
        divided = [shard["samples"] for shard in read_index(sharded / split)]
        assert [shard["samples"] for shard in read_index(out / split)] == divided
        images, stored = list(iter_sampled([sharded / split])), list(iter_sampled([out / split]))
        texts = [{name: s[name] for name in s if name != "image"} for s in images]
        assert [{name: s[name] for name in s if name != "image"} for s in stored] == texts
        with torch.no_grad():
            visual = model.eval().encode_images(ImageCollator(64)(images[:6]).images)
        found = np.stack([np.frombuffer(s["image"], np.float32) for s in stored[:6]])
        assert np.array_equal(found, visual.flatten(1).numpy()), "the same batch gives the same bits"
    with pytest.raises(UserError, match="exists already"):
        make_features(recipe)
