"""The verb ``export``: a checkpoint to a folder that ``transformers`` loads without this package."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rating_train import __version__
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from rating_train.checkpoint.state import STATE_FILE
from rating_train.config.load import dump_config
from rating_train.config.schema import Config
from rating_train.data.prompt import load_tokenizer
from rating_train.errors import UserError
from rating_train.export import check_scores, onnx_graph
from rating_train.export.card import CardFacts, write_card
from rating_train.export.check_scores import Items
from rating_train.export.hub.configuration_rating import RatingConfig
from rating_train.export.hub.modeling_rating import RatingModel
from rating_train.export.hub.processing_rating import RatingProcessor, fast_tokenizer
from rating_train.export.inline import self_contained
from rating_train.export.options import ExportOptions, check_options
from rating_train.files import fsync_path, read_json
from rating_train.model.backbones import BACKBONES, Backbone
from rating_train.model.regressor import scale_of
from rating_train.prediction.model import FoundModel, Scorer, find_model, load_scorer, pick_device
from rating_train.shards.writer import make_temporary, sweep
from rating_train.weights.exported import (
    CONFIG_NAME,
    ONNX_DIR,
    PREFIX,
    PROCESSOR_NAME,
    TRAINING_NAME,
    WEIGHTS_NAME,
)

log = logging.getLogger(__name__)

_HUB = "rating_train.export.hub"
_MODULES = ("configuration_rating", "modeling_rating", "processing_rating")
_AUTO_MAP = {
    "AutoConfig": "configuration_rating.RatingConfig",
    "AutoModel": "modeling_rating.RatingModel",
    "AutoModelForSequenceClassification": "modeling_rating.RatingModel",
    "AutoProcessor": "processing_rating.RatingProcessor",
}


def export(options: ExportOptions) -> tuple[int, str]:
    """Write a checkpoint as a folder, load it again, compare, and give it its name only if it scores the same.

    Returns:
        The folder's size in bytes, and a table of how its scores compare with the checkpoint's.

    Raises:
        UserError: impossible options, no such checkpoint, an existing folder, no dataset to compare on, or an export
            that scores differently; nothing is left then.
    """
    check_options(options)
    if options.onnx:
        onnx_graph.require()
    out = Path(options.out)
    if out.exists():
        raise UserError("the folder exists already", where=out, fix="remove it, or give another --out")
    found = find_model(Path(options.run), options.checkpoint, options.settings)
    if found.zero_stage is None:
        raise UserError("this is an exported folder already", where=options.run, expected="a run directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent, re.escape(out.name))
    device = pick_device(options.device)
    scorer = load_scorer(found, device)
    _check_family(scorer.inputs.architecture.family)
    split = found.config.data.eval_split
    items = check_scores.score_items(
        scorer, options.data or found.config.data.eval_source.path, split, options.items
    )
    folder, lock = make_temporary(out)
    try:
        _write_files(folder, scorer)
        own = found.config.forward_precision
        compared, fp32 = check_scores.compare_reloaded(folder, items, own, device)
        check_scores.check(compared, out)  # before the graphs: they take minutes
        graphs = _write_graphs(folder / ONNX_DIR, options, found, items)
        compared += check_scores.compare_graphs(
            folder / ONNX_DIR, items, scorer, options.onnx, options.onnx_batch, fp32
        )
        check_scores.check(compared, out)
        step = read_json(found.folder / STATE_FILE)["train_state"]["step"]
        facts = CardFacts(
            run=Path(options.run), step=step, split=split, folder=out.name, fingerprint=_fingerprint(found),
            inputs=scorer.inputs, items=items, own=own, compared=compared, onnx=graphs, licence=options.licence,
        )  # fmt: skip
        write_card(folder, facts)
        size = _make_durable(folder)
        os.rename(folder, out)
        fsync_path(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # no such folder any more where all went well
        os.close(lock)
    return size, check_scores.render(items, own, compared)


def _write_graphs(folder: Path, options: ExportOptions, found: FoundModel, items: Items) -> list[str]:
    """Write the ONNX graphs that were asked for, from the weights in fp32."""
    if not options.onnx:
        return []
    fp32 = dataclasses.replace(found.config, train=dataclasses.replace(found.config.train, precision="fp32"))
    full = load_scorer(dataclasses.replace(found, config=fp32), torch.device("cpu"))
    example = full.collator(items.samples[:2])
    return onnx_graph.write_graphs(folder, full.predictor.model, example, options.onnx, options.onnx_batch)


def _check_family(family: str) -> None:
    """Refuse a family that an extension added: the folder's code is made of this package's modules alone."""
    if type(BACKBONES[family]).__module__ != Backbone.__module__:
        raise UserError(
            f"the backbone's family {family!r} comes from an extension, which an export cannot hold",
            where="model.backbone",
            fix="score with `rating-train predict RUN`, or add the family to rating_train/model/backbones.py",
        )


def _write_files(folder: Path, scorer: Scorer) -> None:
    """Write everything but the model card."""
    found, inputs = scorer.found, scorer.inputs
    assert found.zero_stage is not None  # export() refuses an exported folder
    weights = consolidated_weights(found.folder, found.zero_stage)
    tensors = {f"{PREFIX}{name}": value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    _config(scorer).save_pretrained(folder)
    (folder / WEIGHTS_NAME).chmod(
        (folder / CONFIG_NAME).stat().st_mode
    )  # its writer lets nobody else read it
    _write_processor(folder, scorer)
    for module in _MODULES:
        (folder / f"{module}.py").write_text(self_contained(f"{_HUB}.{module}"), "utf-8")
    (folder / TRAINING_NAME).write_text(dump_config(without_paths(inputs.config)), "utf-8")


def _config(scorer: Scorer) -> RatingConfig:
    found, config = scorer.found, scorer.inputs.config
    return RatingConfig(
        architecture=dataclasses.asdict(scorer.inputs.architecture),
        image_px=config.model_px,
        image_start=scorer.inputs.prompt.layout.image_start,
        head_dropout=config.model.head_dropout,
        scale=dataclasses.asdict(scale_of(config.task.target)),
        trained={
            "by": f"rating_train {__version__}",
            "run": config.name,
            "checkpoint": found.identity["model"],
            "checkpoint_sha256": found.identity["model_sha256"],
            "precision": config.forward_precision,
            "data_fingerprint": _fingerprint(found),
        },
        architectures=[RatingModel.__name__],
        auto_map=_AUTO_MAP,
        dtype="float32",
        id2label={0: config.task.target.name},
        label2id={config.task.target.name: 0},
        # CrossEncoder of sentence-transformers would apply a sigmoid to the one logit.
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"},
    )


def _write_processor(folder: Path, scorer: Scorer) -> None:
    found, inputs = scorer.found, scorer.inputs
    where = found.config.model.tokenizer or found.config.model.backbone
    processor = RatingProcessor(
        fast_tokenizer(load_tokenizer(where, found.config.model.revision)),
        image_px=found.config.model_px,
        stored_px=found.squares.size_px,
        jpeg_quality=found.squares.jpeg_quality,
        visual_tokens=inputs.prompt.layout.visual_tokens,
        text_tokens=inputs.prompt.layout.text_tokens,
        field_chars=inputs.prompt.field_chars,
        words=dataclasses.asdict(inputs.prompt.words),
    )
    processor.save_pretrained(folder)
    path = folder / PROCESSOR_NAME
    path.write_text(json.dumps({**read_json(path), "auto_map": _AUTO_MAP}, indent=2) + "\n", "utf-8")


def _fingerprint(found: FoundModel) -> str:
    identity: dict[str, Any] = read_json(found.folder / STATE_FILE)["identity"]
    found_in = identity["order"].get("data_fingerprint", "")
    return ", ".join(found_in) if isinstance(found_in, list) else str(found_in)


def without_paths(config: Config) -> Config:
    """Return the configuration with the last parts of its local paths: an export tells nothing of the machine."""

    def last(path: str) -> str:
        return Path(path).name if path and Path(path).exists() else path

    data = dataclasses.replace(
        config.data,
        path=Path(config.data.eval_source.path).name,
        sources=[],
        eval_path="",
        remote="",
        cache_limit_mb=0,
        predownload_items=0,
        features="",
    )
    model = dataclasses.replace(
        config.model, backbone=last(config.model.backbone), tokenizer=last(config.model.tokenizer)
    )
    return dataclasses.replace(config, data=data, model=model, runs_dir=Path(config.runs_dir).name)


def _make_durable(folder: Path) -> int:
    """Flush all files to the disk; their size in bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in (*files, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        fsync_path(path)
    return sum(path.stat().st_size for path in files)
