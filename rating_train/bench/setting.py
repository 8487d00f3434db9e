"""What a benchmark runs on: the configuration with random weights, and synthetic listings where it has no data."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from rating_train.bench.tokenizer import tokenizer_folder
from rating_train.config.phases import stage_configs
from rating_train.config.schema import Config
from rating_train.config.task import Task
from rating_train.demo.model import CATALOGUE_DIR, MODEL_DIR, make_demo
from rating_train.errors import UserError
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.run import prepare
from rating_train.shards.manifest import read_manifest

log = logging.getLogger(__name__)

_SEED = 17


def bench_config(config: Config, folder: Path, items: int) -> Config:
    """Return the configuration as it is measured: with random weights, and into a folder of its own. Rank 0.

    Args:
        config: of the user.
        folder: an empty one; synthetic listings, a tokenizer and a run directory are made in it.
        items: synthetic listings, where no data is there.

    Returns:
        The same shape, batch and precision; with ``stages`` that of the last phase. Speed does not depend on the
        values of the weights.
    """
    config = stage_configs(config)[-1]
    data, model, demo = config.data, config.model, folder / "demo"
    known = Path(model.backbone).is_dir() or model.backbone in KNOWN_ARCHITECTURES
    missing = not _has_data(config)
    # The demo's tiny model has the demo's tokenizer: another one may have more ids than it embeds.
    tokenizer = tokenizer_folder(model) if known else None
    if missing or tokenizer is None:
        make_demo(demo, items=items, seed=_SEED)
    if tokenizer is None:
        tokenizer = str(demo / MODEL_DIR)
        if known:
            log.info("%s: no tokenizer here, the demo's is used", model.tokenizer or model.backbone)
    if missing:
        log.info("%s is no dataset: %d synthetic listings are made", data.path, items)
        data = dataclasses.replace(
            data, path=_synthetic(demo, folder / "data", data.image_px), sources=[], remote=""
        )
        data = dataclasses.replace(data, eval_path="", cache_limit_mb=0, predownload_items=0)
        config = dataclasses.replace(config, task=Task())  # that of the listings
    if not known:
        log.info("%s is no backbone here: the demo's tiny model is measured", model.backbone)
        model = dataclasses.replace(model, backbone=str(demo / MODEL_DIR))
    model = dataclasses.replace(model, weights="random", tokenizer=tokenizer, init_from="")
    train = dataclasses.replace(config.train, epochs=1e6, max_steps=0, time_limit_minutes=0.0)
    return dataclasses.replace(
        config, name="bench", runs_dir=str(folder / "runs"), data=data, model=model, train=train
    )


def _has_data(config: Config) -> bool:
    if config.data.is_remote:
        return True
    try:
        for source in (*config.data.train_sources, config.data.eval_source):
            read_manifest(source.path)
    except UserError:
        return False
    return True


def _synthetic(demo: Path, out: Path, image_px: int) -> str:
    catalogue = demo / CATALOGUE_DIR
    options = PrepareOptions(
        source=(str(catalogue / "catalogue.jsonl"),),
        images=str(catalogue),
        out=str(out),
        image_size_px=image_px,
        val_fraction=0.1,
    )
    prepare(options)
    return str(out)
