"""The model card: recipe, data, metrics with intervals, cost by convention, limits, licence of the backbone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from rating_train import run_dir
from rating_train.config.phases import length_in_words, trained_in_words
from rating_train.config.schema import Config
from rating_train.config.task import Target
from rating_train.export import check_scores
from rating_train.export.check_scores import Compared, Items
from rating_train.model.cost import count_forward, count_parameters
from rating_train.scoring.analysis import item_groups
from rating_train.scoring.bootstrap import CONFIDENCE, Interval, intervals
from rating_train.scoring.ces import CONVENTIONS, ces_table
from rating_train.scoring.metrics import metric_label, score
from rating_train.scoring.predictions import read_predictions
from rating_train.shards.titles import product_group
from rating_train.training.setup import ModelInputs
from rating_train.weights.exported import CARD_NAME

TEMPLATE = Path(__file__).with_name("card.md")
PROJECT = "https://arxiv.org/abs/2605.27737"

#: Licences of published backbones, as their model cards state them.
LICENCES = {
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": "apache-2.0",
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": "apache-2.0",
}
#: Metric -> its name on the hub.
_METRICS = {"plcc": "pearsonr", "srcc": "spearmanr", "rmse": "rmse", "mae": "mae"}


@dataclass(frozen=True)
class CardFacts:
    """What the card is written from.

    Attributes:
        run: run directory.
        step: of the checkpoint.
        split: that metrics are of.
        folder: name of the exported folder.
        fingerprint: of the training data.
        inputs: configuration, architecture and prompt.
        items: what the export was compared on.
        own: precision of the checkpoint's scores.
        compared: the comparisons.
        onnx: names of the graphs.
        licence: as given by the user; "" takes the backbone's.
    """

    run: Path
    step: int
    split: str
    folder: str
    fingerprint: str
    inputs: ModelInputs
    items: Items
    own: str
    compared: Sequence[Compared]
    onnx: Sequence[str]
    licence: str


@dataclass(frozen=True)
class Metrics:
    """Metrics of a split: name -> value and interval; ``items`` scored; ``complete``: the whole split."""

    values: dict[str, float | None]
    intervals: dict[str, Interval | None]
    items: int
    complete: bool


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into an exported folder."""
    metrics = read_metrics(facts)
    text = Template(TEMPLATE.read_text("utf-8")).substitute(_values(facts, metrics))
    head = yaml.safe_dump(_front_matter(facts, metrics), sort_keys=False, allow_unicode=True, width=110)
    text = re.sub(r"\n{3,}", "\n\n", text)  # where an optional paragraph is left out
    (folder / CARD_NAME).write_text(f"---\n{head}---\n\n{text}", "utf-8")


def read_metrics(facts: CardFacts) -> Metrics:
    """Compute the metrics from the predictions of an evaluation of this step, else from the compared items.

    Product groups are resampled, as `rating-train evaluate` does.
    """
    file = run_dir.predictions_file(facts.run, facts.split, facts.step)
    if file.is_file():
        rows = [row for row in read_predictions(file) if row.rating is not None]
        scores, ratings = [row.score for row in rows], [float(row.rating or 0) for row in rows]
        groups = item_groups(rows)
    else:
        scores, ratings = facts.items.scores, facts.items.ratings
        groups = [product_group(sample) for sample in facts.items.samples]
    values = score(scores, ratings)
    found = intervals(np.asarray(scores, np.float64), np.asarray(ratings, np.float64), groups)
    return Metrics(
        {name: getattr(values, name) for name in _METRICS}, found, len(scores), complete=file.is_file()
    )


def backbone_name(config: Config) -> str:
    """Return the backbone's hub id, or the last part of a local path: a card names no path of the machine."""
    backbone = config.model.backbone
    return Path(backbone).resolve().name if Path(backbone).exists() else backbone


def backbone_licence(config: Config) -> str:
    """Return the licence of the backbone where it is known: published ones, or a local folder's own model card."""
    backbone = config.model.backbone
    card = Path(backbone) / "README.md"
    if backbone in LICENCES:
        return LICENCES[backbone]
    if card.is_file():
        head = re.match(r"---\n(.*?)\n---\n", card.read_text("utf-8"), flags=re.S)
        values = yaml.safe_load(head[1]) if head else {}
        return str(values.get("license", "")) if isinstance(values, dict) else ""
    return ""


def _front_matter(facts: CardFacts, metrics: Metrics) -> dict[str, Any]:
    config = facts.inputs.config
    licence = facts.licence or backbone_licence(config)
    results = []
    for key, hub_name in _METRICS.items():
        if (value := metrics.values[key]) is None:
            continue
        label = metric_label(key, config.task.target.unit)
        found: dict[str, Any] = {"type": hub_name, "name": label, "value": round(value, 5)}
        if interval := metrics.intervals.get(key):
            found["args"] = {
                "confidence": CONFIDENCE, "low": round(interval.low, 5), "high": round(interval.high, 5),
            }  # fmt: skip
        results.append(found)
    dataset_name = Path(config.data.eval_source.path).name
    dataset = {
        "name": dataset_name, "type": dataset_name, "split": facts.split,
        "revision": facts.fingerprint,
    }  # fmt: skip
    published = config.model.backbone in LICENCES
    return {
        "library_name": "transformers",
        "license": licence or "other",
        **({"base_model": config.model.backbone} if published else {}),
        "tags": ["regression", _read(config), "product-ratings", "smolvlm"],
        "model-index": [
            {
                "name": config.name,
                "results": [
                    {
                        "task": {
                            "type": f"{_read(config)}-regression",
                            "name": "Average rating" if config.task.is_default else config.task.target.name,
                        },
                        "dataset": dataset,
                        "metrics": results,
                    }
                ],
            }
        ],
    }


def _values(facts: CardFacts, metrics: Metrics) -> dict[str, object]:
    config, layout = facts.inputs.config, facts.inputs.prompt.layout
    licence = facts.licence or backbone_licence(config)
    return {
        "name": config.name,
        "folder": facts.folder,
        "project": PROJECT,
        "parameters": f"{_parameters(facts.inputs):,}",
        "backbone": f"the backbone `{backbone_name(config)}`",
        "onnx": _onnx_text(facts),
        "metrics_items": f"{metrics.items:,}",
        "split": facts.split,
        "confidence": f"{100 * CONFIDENCE:g}",
        **_task_texts(config),
        "metrics": _metric_table(metrics, config.task.target),
        "metrics_note": ""
        if metrics.complete
        else "These are only the items that the export was compared on: the run has no evaluation of this step.",
        "tokens": layout.length,
        **_input_texts(config, layout.visual_tokens),
        "cost": _cost_table(facts.inputs, metrics.values["plcc"]),
        "compared_items": len(facts.items.scores),
        "compared": check_scores.render(facts.items, facts.own, facts.compared),
        "step": f"{facts.step:,}",
        "run": config.name,
        "trained": trained_in_words(config),
        "recipe": _recipe_table(config),
        "fingerprint": facts.fingerprint,
        "licence": f"{licence}: the backbone's, of which these weights are a fine-tuning."
        if licence
        else "The backbone's licence applies; it is not stated beside its weights. Look it up before you share this.",
    }


_STARS = "the average star rating of a product, from 1 to 5, from {inputs}"
_STAR_LIMITS = """\
- It predicts what buyers' ratings average to in catalogues like that of its training. It does not judge the quality or
  safety of a product, and must not be used to judge people.
- Ratings are skewed towards 4 to 5 stars and differ by category. Compare scores within a category.
- A score is a point estimate in (1, 5). For items with few ratings the true average varies more than the score
  suggests.
"""
_OTHER_LIMITS = """\
- A score is a point estimate{range}. It holds for items like those of its training, and must not be used to judge
  people.
"""
_EXAMPLE = {
    "title": "Brush",
    "description": "A soft brush.",
    "features": ["soft"],
    "main_category": "All Beauty",
}


def _task_texts(config: Config) -> dict[str, object]:
    """Return what the card says of the number, in the words of the task."""
    task, target = config.task, config.task.target
    names = ", ".join(field.name for field in config.model_fields).replace("_", " ")
    inputs = " and ".join(
        filter(None, ["one image" if config.model_px else "", names and f"its text ({names})"])
    )
    listing = {field.name: _EXAMPLE.get(field.name, "...") for field in config.model_fields}
    lines = "".join(f"    {json.dumps(name)}: {json.dumps(value)},\n" for name, value in listing.items())
    return {
        "predicts": _STARS.format(inputs=inputs)
        if task.is_default
        else f'a number from {inputs}: {target.name}{target.label}. The prompt asks: "{task.question}"',
        "listing": f"{{\n{lines}}}" if lines else "{}",
        "unit": f": {target.unit}" if target.unit else "",
        "limits": _STAR_LIMITS.strip()
        if task.is_default
        else _OTHER_LIMITS.format(range=f" in {target.range_text}" if target.bounded else "").strip(),
    }


def _input_texts(config: Config, visual: int) -> dict[str, object]:
    """Return what the card says of the image and the text, as far as the model reads them."""
    px, fields = config.model_px, config.model_fields
    sees = [f"one image, resized to a {px} px square without keeping its aspect ratio"] if px else []
    sees += [f"the first {config.data.field_chars} characters of each field"] if fields else []
    return {
        "visual": f"{visual} of the image of {px} x {px} pixels" if px else "none of an image",
        "sees": f"It sees {' and '.join(sees)}; it does not read the reviews.",
        "picture_import": "from PIL import Image\n" if px else "",
        "call": 'Image.open("brush.jpg"), listing' if px else "None, listing",
        "score": "images, listings" if px else "None, listings",
        "images": " --images DIR" if px else "",
    }


def _read(config: Config) -> str:
    return "-".join(name for name in ("image", "text") if name in config.model.inputs)


def _onnx_text(facts: CardFacts) -> str:
    if not facts.onnx:
        return ""
    names = ", ".join(f"`onnx/{name}`" for name in facts.onnx)
    return (
        f"\nONNX graphs, pooling and head inside: {names}. Inputs: `images` (B, 3, S, S) uint8,\n"
        "`input_ids` (B, T) int64, and `used_tokens` (B,) int64, the sum of the processor's `attention_mask`.\n"
        "Output: `rating` (B,) float32.\n"
    )


def _metric_table(metrics: Metrics, target: Target) -> str:
    rows = []
    for key in _METRICS:
        value, interval = metrics.values[key], metrics.intervals.get(key)
        shown = "undefined" if value is None else f"{value:.4f}"
        rows.append(
            (
                metric_label(key, target.unit),
                shown,
                f"{interval.low:.4f} to {interval.high:.4f}" if interval else "undefined",
            )
        )
    return _markdown(("metric", "value", "interval"), rows)


def _parameters(inputs: ModelInputs) -> int:
    return count_parameters(inputs.architecture, inputs.config.model_px)["total"]


def _cost_table(inputs: ModelInputs, plcc: float | None) -> str:
    parameters = _parameters(inputs)
    forward = count_forward(inputs.architecture, inputs.config.model_px, inputs.prompt.layout.length)
    rows = [
        (
            f"`{row.convention}`: {CONVENTIONS[row.convention]}", f"{row.count / 1e9:.3f} G", f"{row.c:.3f}",
            f"{row.e:.3f}", "undefined" if row.ces is None else f"{row.ces:.4f}",
        )
        for row in ces_table(plcc, parameters, forward.totals())
    ]  # fmt: skip
    return _markdown(("convention", "operations of one item", "C", "E", "CES"), rows)


def _recipe_table(config: Config) -> str:
    o, t = config.optim, config.train
    rates = ", ".join(
        f"{part} {getattr(o.lr, part):g}" for part in ("vision", "connector", "decoder", "head")
    )
    rows = [
        ("image", f"{config.model_px} px square, bilinear" if config.model_px else "none"),
        (
            "text",
            f"{config.data.field_chars} characters of each field, {config.data.text_tokens} text tokens"
            if config.model_fields
            else "none",
        ),
        ("loss", config.loss.kind),
        ("global batch", f"{config.batch.global_items} items"),
        ("peak learning rates", rates),
        ("schedule", f"{o.schedule}, {100 * o.warmup_fraction:g} % warm-up, {length_in_words(config)}"),
        (
            "AdamW",
            f"betas {o.beta1:g}, {o.beta2:g}; weight decay {o.weight_decay:g}; clipping at {o.clip_norm:g}",
        ),
        ("precision", f"{t.precision}, DeepSpeed ZeRO stage {config.zero.stage}"),
        ("checkpoint chosen by", t.select_metric),
    ]
    return _markdown(("setting", "value"), rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
