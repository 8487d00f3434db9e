"""Find a trained model, of a run or of an exported folder, and load it for scoring."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rating_train import run_dir
from rating_train.checkpoint import store
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from rating_train.checkpoint.resume import choose_checkpoint
from rating_train.checkpoint.state import STATE_FILE
from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.data.collate import Collator
from rating_train.distributed.device import choose_device, probe
from rating_train.errors import UserError
from rating_train.files import read_json, sha256_file
from rating_train.model.cost import count_forward, count_parameters
from rating_train.shards.manifest import read_manifest
from rating_train.training import setup
from rating_train.training.predictor import Predictor, load_predictor
from rating_train.weights.exported import (
    PROCESSOR_NAME,
    WEIGHTS_NAME,
    exported_architecture,
    exported_config,
    exported_weights,
    is_exported,
)

log = logging.getLogger(__name__)

DEFAULT_JPEG_QUALITY = 90


@dataclass(frozen=True)
class SquareRecipe:
    """How the training's images were stored: the side of the square in pixels, and the quality of its JPEG."""

    size_px: int
    jpeg_quality: int


@dataclass(frozen=True)
class FoundModel:
    """A model that was found and verified, not loaded yet. Travels from rank 0 to the others.

    Attributes:
        folder: the checkpoint, or the exported folder.
        config: the run's configuration.
        squares: how images become the squares that the model was trained on.
        zero_stage: of the checkpoint; ``None`` for an exported folder.
        identity: what the scores depend on, for comparison with that of an unfinished prediction.
    """

    folder: Path
    config: Config
    squares: SquareRecipe
    zero_stage: int | None
    identity: dict[str, Any]


@dataclass
class Scorer:
    """A loaded model with what turns rows into its inputs."""

    found: FoundModel
    inputs: setup.ModelInputs
    predictor: Predictor
    collator: Collator

    def cost(self, convention: str) -> tuple[int, float]:
        """Return the number of parameters, and the operations for one item in a counting convention."""
        architecture = self.inputs.architecture
        forward = count_forward(architecture, self.found.config.model_px, self.inputs.prompt.layout.length)
        return count_parameters(architecture, self.found.config.model_px)["total"], forward.total(convention)


def pick_device(wanted: str = "auto") -> torch.device:
    """Return the device of a process without a launcher: ``auto`` takes a GPU if there is one."""
    return choose_device(wanted, 0, {}, probe())


def find_model(path: Path, checkpoint: str = "best", settings: tuple[str, ...] = ()) -> FoundModel:
    """Find and verify a model. Reads no weights.

    Args:
        path: run directory, or exported folder.
        checkpoint: of a run: best, latest or a step.
        settings: ``section.key=value``, what is to differ from the run's configuration.

    Raises:
        UserError: neither a run nor an exported folder, no such checkpoint, or a damaged one.
    """
    if is_exported(path):
        return _find_exported(path, settings)
    if not (path / run_dir.CONFIG_FILE).is_file():
        raise UserError(
            "neither a run directory (it has no config.yaml) nor an exported model",
            where=path,
            fix="give the folder that `rating-train train` or `rating-train export` made",
        )
    config = load_config(path / run_dir.CONFIG_FILE, settings)
    if config.data.tiling_px:
        raise UserError(
            "predict and export take models of one square for each image; this one has tiles",
            where=f"{path}: data.tiling_px={config.data.tiling_px}",
            fix="score prepared data with `rating-train evaluate --data DATA`",
        )
    folder = choose_checkpoint(path / run_dir.CHECKPOINTS_DIR, checkpoint)
    stage = read_json(folder / STATE_FILE)["identity"]["topology"]["zero_stage"]
    identity = {
        "model": f"{path.resolve().name}/{folder.name}",
        "model_sha256": sha256_file(folder / store.COMPLETE),
    }
    return FoundModel(folder, config, _stored_squares(config), stage, identity)


def _find_exported(path: Path, settings: tuple[str, ...]) -> FoundModel:
    processor = read_json(path / PROCESSOR_NAME)
    identity = {"model": path.resolve().name, "model_sha256": sha256_file(path / WEIGHTS_NAME)}
    squares = SquareRecipe(int(processor["stored_px"]), int(processor["jpeg_quality"]))
    return FoundModel(path, exported_config(path, settings), squares, None, identity)


def load_scorer(found: FoundModel, device: torch.device) -> Scorer:
    """Load the weights, the tokenizer and the backbone's configuration of a model that was found."""
    if found.zero_stage is None:
        inputs = setup.model_inputs_of(found.config, exported_architecture(found.folder))
        weights = exported_weights(found.folder)
    else:
        inputs = setup.read_model_inputs(found.config)
        weights = consolidated_weights(found.folder, found.zero_stage)
    predictor = load_predictor(
        found.config, inputs.architecture, inputs.prompt.layout.image_start, weights, device
    )
    # PNG: what `square_file` makes of a picture that is decoded already.
    collator = Collator(inputs.prompt, found.config.model_px, ("JPEG", "PNG"))
    return Scorer(found, inputs, predictor, collator)


def _stored_squares(config: Config) -> SquareRecipe:
    """As the run's dataset says; without it, the training's own size and the usual quality."""
    paths = [source.path for source in (*config.data.train_sources, config.data.eval_source)]
    for path in paths:
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            manifest = read_manifest(path)
            return SquareRecipe(int(manifest["image_size_px"]), int(manifest["options"]["jpeg_quality"]))
    recipe = SquareRecipe(config.data.image_px, DEFAULT_JPEG_QUALITY)
    log.warning(
        "the run's dataset is not at %s: images are made to %d pixels with JPEG quality %d, as `prepare` does by "
        "default; if it was prepared otherwise, give --set data.%s=DATA",
        paths[0], recipe.size_px, recipe.jpeg_quality, "eval_path" if config.data.sources else "path",
    )  # fmt: skip
    return recipe
