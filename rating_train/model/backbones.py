"""Families of backbones: all that the regressor has to know about a vision-language model of ``transformers``.

A family is a subclass of :class:`Backbone` in :data:`BACKBONES`, under the ``model_type`` of its ``config.json``.
How to add one: docs/extending.md.

Legend: B items, S pixels a side, P patches, V visual tokens, T tokens, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import Idefics3Config, PretrainedConfig, SmolVLMConfig

from rating_train.model.architecture import Architecture
from rating_train.model.vision import encode_images


class Backbone:
    """A family with the layout of Idefics3: SigLIP, pixel shuffle and a linear layer, Llama.

    A family with another layout overrides what differs.

    Attributes:
        parts: prefix of a parameter's name in the model -> the part that it belongs to: vision, connector, decoder.
        unused_tensors: what a published checkpoint may hold besides the model's tensors.
    """

    parts: Mapping[str, str] = MappingProxyType(
        {"vision_model.": "vision", "connector.": "connector", "text_model.": "decoder"}
    )
    unused_tensors: tuple[str, ...] = ("lm_head.weight",)

    def config(self, architecture: Architecture) -> PretrainedConfig:
        """Return the ``transformers`` configuration of an architecture, for a model with random weights."""
        raise NotImplementedError

    def encode_images(self, model: Any, images: Tensor, positions: Tensor) -> Tensor:
        """Encode square images as visual tokens; see :func:`rating_train.model.vision.encode_images`.

        Args:
            model: the model of ``transformers``, without its LM head.
            images: (B, 3, S, S) uint8.
            positions: (P,) int64 of :func:`rating_train.model.vision.position_ids`.

        Returns:
            (B, V, D) in the model's dtype.
        """
        return encode_images(model, images, positions)

    def embed_text(self, model: Any, input_ids: Tensor) -> Tensor:
        """Look up the embeddings (B, T, D) of token ids (B, T) int64."""
        return model.get_input_embeddings()(input_ids)

    def decode(self, model: Any, embeddings: Tensor) -> Tensor:
        """Return the decoder's last hidden states (B, T, D) of embeddings (B, T, D), causally and without a mask."""
        # Attention is causal and the padding is on the right, so no real token sees it; the pooling leaves out
        # what the padding computes.
        return model.text_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    def blocks(self, model: Any) -> list[nn.Module]:
        """Return the layers of both towers, in the order of the forward pass: what is compiled one by one."""
        tower = getattr(model.vision_model, "encoder", None)  # none in a model that reads text alone
        return [*(tower.layers if tower is not None else ()), *model.text_model.layers]


class SmolVLM(Backbone):
    """SmolVLM and SmolVLM2 (Marafioti et al. 2025, arXiv 2504.05299)."""

    def config(self, architecture: Architecture) -> PretrainedConfig:
        return SmolVLMConfig(**_idefics3_layout(architecture, "smolvlm_vision"))


class Idefics3(Backbone):
    """Idefics3 (Laurençon et al. 2024, arXiv 2408.12637), and the first SmolVLM, which is published as one."""

    def config(self, architecture: Architecture) -> PretrainedConfig:
        return Idefics3Config(**_idefics3_layout(architecture, "idefics3_vision"))


def _idefics3_layout(architecture: Architecture, vision_type: str) -> dict[str, Any]:
    text, vision = architecture.text, architecture.vision
    return {
        "image_token_id": architecture.image_token_id,
        "pad_token_id": architecture.pad_token_id,
        "scale_factor": architecture.scale_factor,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "use_cache": False,
        "text_config": {
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
        "vision_config": {
            "model_type": vision_type,
            "hidden_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "patch_size": vision.patch,
            "image_size": vision.image_size,
            "num_channels": vision.channels,
            "layer_norm_eps": vision.layer_norm_eps,
        },
    }


#: ``model_type`` -> family.
BACKBONES: dict[str, Backbone] = {"smolvlm": SmolVLM(), "idefics3": Idefics3()}
