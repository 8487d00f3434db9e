"""Does it pay to store what a frozen vision tower computes? Steps and collation, from images and from features."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rating_train.bench.limits import seconds_of
from rating_train.bench.result import Row
from rating_train.data.collate import Batch, Collator
from rating_train.data.features.collate import FeatureCollator
from rating_train.data.features.identity import Features
from rating_train.data.samples.streaming_dataset import Request
from rating_train.errors import UserError
from rating_train.training.job import Job
from rating_train.training.predictor import frozen_visual_tokens

_LOADED_ITEMS = 64  # of which collation is measured, at most


def measure_features(
    job: Job, batches: Sequence[Batch], take: Callable[[Sequence[Batch]], None], rounds: int
) -> list[Row]:
    """Take the same steps on images and on the visual tokens that stand for them, in turn; and collate both.

    Args:
        job: with frozen vision tower and connector.
        batches: with images, on the device.
        take: takes a step on each batch.
        rounds: measurements of each figure.

    Raises:
        UserError: the tower is trained, or its features are read already.
    """
    _refuse_unfit(job)
    stored = [dataclasses.replace(batch, images=_encode(job, batch)) for batch in batches]
    for kind in (batches, stored):
        take(kind)
    device, items = job.engine.device, sum(map(len, batches))
    images, features = [], []
    for _ in range(rounds):
        images.append(items / seconds_of(lambda: take(batches), device))
        features.append(items / seconds_of(lambda: take(stored), device))
    rows = [_row("step from images, one rank", images), _row("step from features, one rank", features)]
    faster = [b / a for a, b in zip(images, features)]
    rows.append(_row("step from features", faster, "times as fast as from images"))
    return [*rows, *_collation(job, stored[0].images, rounds)]


def _refuse_unfit(job: Job) -> None:
    config = job.config
    frozen = {"vision", "connector"} <= set(config.model.freeze)
    if not frozen or config.data.features or config.data.tiling_px or not config.model_px:
        raise UserError(
            "the part `features` compares images with stored features",
            where="--part features",
            expected="one square image for each item, model.freeze: [vision, connector], and no data.features",
            fix="leave the part out, or give --set 'model.freeze=[vision,connector]'",
        )
    if config.zero.stage == 3:
        raise UserError("features need `zero.stage` 0, 1 or 2", where="zero.stage=3")


def _encode(job: Job, batch: Batch) -> Tensor:
    """Return the visual tokens (B, V, D) of a batch, micro-batch by micro-batch, on its device."""
    parts = batch.images.split(job.plan.micro_items)
    return torch.cat([frozen_visual_tokens(job.engine.model, part, job.config) for part in parts])


def _collation(job: Job, visual: Tensor, rounds: int) -> list[Row]:
    """Collate stored samples with images and with features, in one process."""
    split = job.data.split
    ids = np.arange(min(job.data.samples, _LOADED_ITEMS))
    samples = split.dataset.__getitems__(Request(ids))
    dtype = str(visual.dtype).removeprefix("torch.")
    told = Features("", "", job.config.data.image_px, visual.shape[1], visual.shape[2], dtype)
    content = visual[0].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    with_features = [{**sample, "image": content} for sample in samples]
    collator = FeatureCollator(split.collator.prompt, told)
    kinds: list[tuple[str, Collator, list[dict[str, Any]]]] = [
        ("collation of images, one process", split.collator, samples),
        ("collation of features, one process", collator, with_features),
    ]
    rates: dict[str, list[float]] = {name: [] for name, _, _ in kinds}
    for _ in range(rounds):
        for name, collate, given in kinds:
            started = time.perf_counter()
            collate(given)
            rates[name].append(len(given) / (time.perf_counter() - started))
    return [_row(name, found) for name, found in rates.items()]


def _row(name: str, values: Sequence[float], unit: str = "items/s") -> Row:
    return Row("features", name, statistics.median(values), unit, (min(values), max(values)))
