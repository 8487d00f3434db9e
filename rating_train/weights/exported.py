"""The files of an exported folder, and how they are read without running its remote code.

::

    DIR/config.json            model type, architecture, where the weights come from
    DIR/model.safetensors      fp32 weights, the names of the regressor's after ``regressor.``
    DIR/processor_config.json  how an item becomes the model's input; tokenizer.json beside it
    DIR/training_config.yaml   the run's configuration
    DIR/*_rating.py            remote code for ``transformers``
    DIR/onnx/                  graphs, where they were asked for
    DIR/README.md              model card
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.model.architecture import Architecture, architecture_from_dict

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PROCESSOR_NAME = "processor_config.json"
TRAINING_NAME = "training_config.yaml"
CARD_NAME = "README.md"
ONNX_DIR = "onnx"
MODEL_TYPE = "rating_regressor"
PREFIX = "regressor."


def is_exported(path: Path) -> bool:
    """Return whether a folder was made by ``rating-train export``."""
    file = path / CONFIG_NAME
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def exported_config(path: Path, settings: tuple[str, ...] = ()) -> Config:
    """Read the configuration of the run, with the folder as its backbone's and tokenizer's."""
    config = load_config(path / TRAINING_NAME, settings)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, backbone=str(path), tokenizer="", revision="")
    )


def exported_architecture(path: Path) -> Architecture:
    """Read the shape of the model.

    Raises:
        UserError: it is not there, or not complete.
    """
    try:
        return architecture_from_dict(read_json(path / CONFIG_NAME)["architecture"])
    except (KeyError, TypeError) as e:
        raise UserError(
            f"the architecture is not complete ({e})", where=path / CONFIG_NAME, fix="export it again"
        ) from e


def exported_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights by the names of the regressor's state dict.

    Raises:
        UserError: the file is damaged, or holds other tensors.
    """
    try:
        weights = load_file(path / WEIGHTS_NAME)
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"the weights cannot be read ({e})", where=path / WEIGHTS_NAME, fix="copy it again"
        ) from e
    return {name.removeprefix(PREFIX): value.float() for name, value in weights.items()}
