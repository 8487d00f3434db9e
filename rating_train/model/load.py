"""Weights from ``transformers``: the backbone, without its LM head, through one code path.

A hub id, a local folder and the folder that ``rating-train demo`` writes all go through
:func:`load_backbone`. ``weights: random`` builds the same modules from the architecture's numbers alone.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from rating_train.config.schema import ModelConfig
from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.model.architecture import KNOWN_ARCHITECTURES, Architecture, architecture_from_config
from rating_train.model.attention import register_attention
from rating_train.model.backbones import BACKBONES

log = logging.getLogger(__name__)


def read_architecture(config: ModelConfig) -> Architecture:
    """Return the architecture of a backbone: from its folder, else the table of known ids, else the hub.

    Raises:
        UserError: an unknown folder or id, or one of no known family.
    """
    folder = Path(config.backbone)
    if folder.is_dir():
        path = folder / "config.json"
        return architecture_from_config(read_json(path), path, config.head_hidden)
    if config.backbone in KNOWN_ARCHITECTURES:
        return dataclasses.replace(KNOWN_ARCHITECTURES[config.backbone], head_hidden=config.head_hidden)
    try:
        found = AutoConfig.from_pretrained(config.backbone, revision=config.revision or None)
    except (OSError, ValueError) as e:
        raise _not_found(config, e) from e
    return architecture_from_config(found.to_dict(), config.backbone, config.head_hidden)


def load_backbone(config: ModelConfig, architecture: Architecture) -> nn.Module:
    """Return the backbone in fp32 on the CPU, without an LM head.

    Raises:
        UserError: nothing at that path or id, or a checkpoint with missing or unexpected tensors (only the LM
            head's may be left over).
    """
    if config.weights == "random":
        drawn = BACKBONES[architecture.family].config(architecture)
        return AutoModel.from_config(drawn, attn_implementation=register_attention()).float()
    try:
        model, info = AutoModel.from_pretrained(
            config.backbone,
            revision=config.revision or None,
            dtype=torch.float32,
            attn_implementation=register_attention(),
            output_loading_info=True,
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,  # a pickle that asks for code; transformers 4 makes it an OSError
    ) as e:  # RuntimeError: tensors of another shape
        raise _not_found(config, e) from e
    check_loading_info(info, config.backbone, BACKBONES[architecture.family].unused_tensors)
    return model


def check_loading_info(info: dict[str, Any], where: str, unused: tuple[str, ...]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the backbone's, those that may be ``unused`` aside."""
    problems = []
    missing = sorted(info["missing_keys"])
    unexpected = sorted(k for k in info["unexpected_keys"] if k not in unused)
    mismatched = sorted(
        str(k[0] if isinstance(k, (tuple, list)) else k) for k in info.get("mismatched_keys", ())
    )
    for name, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if keys:
            problems.append(
                f"{len(keys)} tensors {name} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            )
    if problems:
        raise UserError(
            f"the checkpoint does not fit the backbone: {'; '.join(problems)}",
            where=where,
            expected=f"exactly the backbone's tensors, and {', '.join(unused) or 'nothing else'} at most",
        )


def _not_found(config: ModelConfig, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    return UserError(
        f"the backbone could not be loaded ({reason})",
        where=f"model.backbone={config.backbone}",
        expected="a folder with config.json and model.safetensors, or a hub id that can be reached",
        fix="check the path; without a network, download the model elsewhere and set "
        "model.backbone=FOLDER (docs/troubleshooting.md, Offline nodes)",
    )


def save_random_backbone(architecture: Architecture, out: Path, seed: int) -> None:
    """Write a model folder with random weights, including the LM head that published checkpoints have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(BACKBONES[architecture.family].config(architecture))
    model.save_pretrained(out)
