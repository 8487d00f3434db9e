"""Weights from ``transformers``: the backbone, without its LM head, through one code path.

A hub id, a local folder and the folder that ``rating-train demo`` writes all go through
:func:`load_backbone`. ``weights: random`` builds the same modules from the architecture's numbers alone.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText

from rating_train.config.schema import ModelConfig
from rating_train.errors import UserError
from rating_train.model.architecture import Architecture, backbone_not_found
from rating_train.model.attention import register_attention
from rating_train.model.backbones import BACKBONES

log = logging.getLogger(__name__)


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
        raise backbone_not_found(config, e) from e
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


def save_random_backbone(architecture: Architecture, out: Path, seed: int) -> None:
    """Write a model folder with random weights, including the LM head that published checkpoints have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(BACKBONES[architecture.family].config(architecture))
    model.save_pretrained(out)
