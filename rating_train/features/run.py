"""Encode the images of a dataset with the frozen vision tower of a configuration, on all ranks; resumable by shard.

Legend: B items, V visual tokens, D decoder width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rating_train.config.schema import Config
from rating_train.data.features.collate import ImageCollator, StoredImages
from rating_train.data.features.identity import Features, features_dtype, refuse_features
from rating_train.data.loader import OpenSplit, Row, load_rows, open_evaluation
from rating_train.distributed.collectives import all_gather, on_main
from rating_train.distributed.world import World
from rating_train.features.parts import PartsFolder
from rating_train.model.regressor import RatingRegressor
from rating_train.shards.manifest import read_manifest
from rating_train.shards.mds_read import read_index
from rating_train.shards.task import with_task_of_data
from rating_train.shards.writer import refuse_existing
from rating_train.training import setup
from rating_train.training.job import build_model
from rating_train.training.predictor import cast_weights, frozen_visual_tokens
from rating_train.weights.fingerprint import tower_fingerprint

log = logging.getLogger(__name__)

_MOST_ITEMS = 64  # of a forward pass, where the configuration names no micro-batch


def make_features(config: Config) -> dict[str, Any]:
    """Store the visual tokens of ``data.path`` at ``data.features``. A collective.

    Args:
        config: of a recipe with frozen vision tower and connector.

    Returns:
        The manifest of the features.

    Raises:
        UserError: the directory exists, or what was left of it belongs to other features; the dataset or the backbone
            cannot be read.
    """
    world, device = setup.join_job(config.train.collective_timeout_minutes, config.train.device)
    out = config.data.features
    on_main(lambda: refuse_existing(Path(out)))
    images = dataclasses.replace(config.data, features="", eval_path="")
    config = dataclasses.replace(config, data=images)
    config = on_main(lambda: with_task_of_data(config))
    manifest = on_main(lambda: _readable(images.path))
    model, features = _prepare(config, device, manifest["fingerprint"])
    splits = list(dict.fromkeys((images.train_split, images.eval_split)))
    parts = PartsFolder(out)
    on_main(lambda: parts.open(features, splits))
    shards = {}
    for split in splits:
        shards[split] = _encode_split(config, split, model, device, parts, world)
    all_gather(None)  # all parts are there
    return on_main(lambda: parts.merge(out, manifest, shards))


def _readable(path: str) -> dict[str, Any]:
    manifest = read_manifest(path)
    refuse_features(path, manifest)
    return manifest


def _prepare(config: Config, device: torch.device, data: str) -> tuple[RatingRegressor, Features]:
    """Build the model in the run's precision, and say what its features will be."""
    inputs = setup.read_model_inputs(config)
    model, _ = build_model(config, inputs, fresh=True)
    cast_weights(model, config)
    features = Features(
        data=data,
        weights=tower_fingerprint(model),
        image_px=config.data.image_px,
        tokens=model.visual_tokens,
        width=inputs.architecture.text.hidden,
        dtype=features_dtype(config),
    )
    return model.to(device).eval(), features


def _encode_split(
    config: Config, split: str, model: RatingRegressor, device: torch.device, parts: PartsFolder, world: World
) -> int:
    """Write this rank's share of a split's missing parts; return the number of the split's shards."""
    prompt = setup.read_model_inputs(config).prompt
    items = config.batch.micro_items or min(_MOST_ITEMS, config.batch.global_items)
    opened = open_evaluation(config.data, prompt, world, split, items, device=device).split
    opened = dataclasses.replace(opened, collator=ImageCollator(config.data.image_px))  # type: ignore[arg-type]
    entries = read_index(Path(config.data.path) / split)
    columns = dict(zip(entries[0]["column_names"], entries[0]["column_encodings"]))
    missing = on_main(lambda: parts.missing(split, len(entries)))
    on_main(lambda: log.info("%s: %d of %d shards to encode", split, len(missing), len(entries)))

    def encode(images: Tensor) -> Tensor:
        visual = frozen_visual_tokens(model, images.to(device, non_blocking=True), config)
        return visual.to(getattr(torch, features_dtype(config))).cpu()

    own = missing[world.rank :: world.size]
    for shard, encoded in _encoded(opened, own, items, encode, check=config.data.verify == "first_read"):
        samples = [sample for batch, _ in encoded for sample in batch]
        contents = [item.tobytes() for _, visual in encoded for item in visual]
        parts.write(split, shard, samples, contents, columns)
        log.info("%s: shard %d, %d items", split, shard, len(samples))
    return len(entries)


def _encoded(
    split: OpenSplit, shards: Sequence[int], items: int, encode: Callable[[Tensor], Tensor], check: bool
) -> Iterator[tuple[int, list[tuple[list[dict[str, Any]], np.ndarray]]]]:
    """Yield each shard with its batches: samples, and the bytes of their visual tokens, (B, V * D * bytes) uint8."""
    ends = np.cumsum(split.dataset.samples_per_shard)
    rows: list[Row] = []
    counts = []
    for shard in shards:
        ids = np.arange(ends[shard] - split.dataset.samples_per_shard[shard], ends[shard])
        chunks = [ids[start : start + items] for start in range(0, len(ids), items)]
        rows += [(chunk, [shard] if check and number == 0 else []) for number, chunk in enumerate(chunks)]
        counts.append(len(chunks))
    if not rows:
        return
    with contextlib.closing(load_rows(split, rows, len(rows), items)) as batches:
        for shard, count in zip(shards, counts, strict=True):
            encoded = []
            for _ in range(count):
                batch: StoredImages = next(batches)
                visual = encode(batch.images)
                encoded.append((batch.samples, visual.reshape(len(batch), -1).view(torch.uint8).numpy()))
            yield shard, encoded
