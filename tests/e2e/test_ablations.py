"""Every row of configs/ablations/ trains: its own settings, on the demo's catalogue, at a small size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rating_train.config.load import dump_config, load_config
from rating_train.config.schema import Config
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from tests.conftest import Ranks, prepare_demo
from tests.helpers.forked import REPO
from tests.helpers.runs import losses

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `eightbit`)")

ABLATIONS = sorted((REPO / "configs" / "ablations").glob("*.yaml"))
STEPS = 5


def small(path: Path, demo: Path, wide: Path, data: Path, runs: Path) -> Config:
    """The ablation with the demo's data and model in the place of the real ones, at an eighth of the image's side."""
    config = load_config(path)
    shape = KNOWN_ARCHITECTURES[config.model.backbone].text.hidden
    settings = {
        "runs_dir": runs,
        "data.path": data,
        "data.image_px": config.data.image_px // 8,
        "data.tiling_px": config.data.tiling_px // 8,
        "data.workers": 0,
        "model.backbone": demo / "model" if shape == 576 else wide,
        "model.tokenizer": demo / "model",
        "model.weights": "random",
        "batch.global_items": 8,
        "eval.max_items": 8,
        "train.max_steps": STEPS,
        "train.log_every_steps": 1,
        "train.eval_every_steps": 0,
        "train.save_every_steps": 0,
        "train.background_save": "false",
    }
    return load_config(path, [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.timeout(300)
def test_every_row_trains_five_steps(ranks: Ranks, demo: Path, few_items: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    shape = json.loads((demo / "model" / "config.json").read_text())
    shape["text_config"] |= {"hidden_size": 160, "num_attention_heads": 5, "intermediate_size": 416}
    (wide / "config.json").write_text(json.dumps(shape))
    files = []
    aspect = tmp_path / "aspect"
    prepare_demo(demo, aspect, limit=20, keep_aspect=True)
    for path in ABLATIONS:
        data = aspect if load_config(path).data.tiling_px else few_items
        config = small(path, demo, wide, data, tmp_path / "runs")
        files.append(tmp_path / path.name)
        files[-1].write_text(dump_config(config))
    output = ranks.run(1, "-m", "tests.dist.train_worker", *files)
    assert output.count(f"step {STEPS}") >= len(ABLATIONS) >= 12
    for path in ABLATIONS:
        run = tmp_path / "runs" / path.stem
        assert len(losses(run)) == STEPS and all(map(math.isfinite, losses(run)))
        own = load_config(run / "config.yaml")
        assert own.model.freeze == load_config(path).model.freeze
