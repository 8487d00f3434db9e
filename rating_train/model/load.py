"""Weights from ``transformers``: the backbone, without its LM head, through one code path.

A hub id, a local folder and the folder that ``rating-train demo`` writes all go through
:func:`load_backbone`. ``weights: random`` builds the same modules from the architecture's numbers alone.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, SmolVLMConfig, SmolVLMForConditionalGeneration

from rating_train.config.schema import ModelConfig
from rating_train.errors import UserError
from rating_train.files import read_json
from rating_train.model.architecture import KNOWN_ARCHITECTURES, Architecture, architecture_from_config
from rating_train.model.attention import register_attention

log = logging.getLogger(__name__)

# The only tensor of a published checkpoint that the regressor does not use.
LM_HEAD_KEY = "lm_head.weight"


def read_architecture(config: ModelConfig) -> Architecture:
    """Return the architecture of a backbone: from its folder, else the table of known ids, else the hub.

    Raises:
        UserError: an unknown folder or id, or one that is not a SmolVLM/Idefics3 model.
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
    """Return the backbone (SmolVLMModel or Idefics3Model) in fp32 on the CPU, without an LM head.

    Raises:
        UserError: nothing at that path or id, or a checkpoint with missing or unexpected tensors (only the LM
            head's may be left over).
    """
    if config.weights == "random":
        model = AutoModel.from_config(backbone_config(architecture), attn_implementation=register_attention())
        return model.float()
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
    ) as e:  # RuntimeError: tensors of another shape
        raise _not_found(config, e) from e
    check_loading_info(info, config.backbone)
    return model


def check_loading_info(info: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint whose tensors are not exactly the backbone's, the LM head aside."""
    problems = []
    missing = sorted(info["missing_keys"])
    unexpected = sorted(k for k in info["unexpected_keys"] if k != LM_HEAD_KEY)
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
            expected=f"exactly the backbone's tensors, and {LM_HEAD_KEY} at most",
        )


def backbone_config(architecture: Architecture) -> SmolVLMConfig:
    """Return the ``transformers`` configuration of an architecture."""
    text, vision = architecture.text, architecture.vision
    return SmolVLMConfig(
        image_token_id=architecture.image_token_id,
        pad_token_id=architecture.pad_token_id,
        scale_factor=architecture.scale_factor,
        tie_word_embeddings=architecture.tie_word_embeddings,
        use_cache=False,
        text_config={
            "model_type": "llama",
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.mlp,
            "vocab_size": text.vocab,
            "rope_theta": text.rope_theta,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_positions,
            "pad_token_id": architecture.pad_token_id,
        },
        vision_config={
            "model_type": "smolvlm_vision",
            "hidden_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "patch_size": vision.patch,
            "image_size": vision.image_size,
            "num_channels": vision.channels,
            "layer_norm_eps": vision.layer_norm_eps,
        },
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
        model = SmolVLMForConditionalGeneration(backbone_config(architecture))
    model.save_pretrained(out)
