"""The shape of a backbone as plain numbers, from a name or from a ``config.json``. Imports no torch.

SmolVLM and Idefics3 share one layout: a SigLIP vision tower, a pixel shuffle with one linear layer (the
connector), and a Llama decoder. Field names here say what a number is; the names that ``transformers`` uses are
given beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rating_train.config.schema import ModelConfig
from rating_train.errors import UserError, one_error
from rating_train.files import read_json


@dataclass(frozen=True)
class TextArchitecture:
    """A Llama decoder.

    Attributes:
        hidden: width of a token (``hidden_size``).
        layers: ``num_hidden_layers``.
        heads: query heads (``num_attention_heads``).
        kv_heads: key and value heads (``num_key_value_heads``); each serves heads / kv_heads query heads.
        head_dim: width of one head.
        mlp: inner width of the gated MLP (``intermediate_size``).
        vocab: rows of the token embedding (``vocab_size``).
        rope_theta: base of the rotary position angles.
        rms_norm_eps: epsilon of the RMS norms.
        max_positions: longest sequence of the pre-training (``max_position_embeddings``), in tokens.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 8192


@dataclass(frozen=True)
class VisionArchitecture:
    """The SigLIP vision tower.

    Attributes:
        hidden: width of a patch (``hidden_size``).
        layers: ``num_hidden_layers``.
        heads: ``num_attention_heads``.
        mlp: inner width of the MLP (``intermediate_size``).
        patch: side of a square patch, in pixels (``patch_size``).
        image_size: side of the images of the pre-training, in pixels; sets the number of learned positions.
        channels: colour channels of an image (``num_channels``).
        layer_norm_eps: epsilon of the layer norms.
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    patch: int
    image_size: int
    channels: int = 3
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class Architecture:
    """A backbone with its regression head.

    Attributes:
        text: the decoder.
        vision: the vision tower.
        family: ``model_type`` of its configuration, a key of :data:`rating_train.model.backbones.BACKBONES`.
        scale_factor: the pixel shuffle merges scale_factor x scale_factor patches into one visual token.
        image_token_id: the placeholder token that a visual token replaces.
        pad_token_id: the decoder's padding token, or ``None`` where the configuration names none.
        head_hidden: inner width of the regression head.
        tie_word_embeddings: whether the published LM head shares the token embedding. The regressor has no
            LM head; this only tells how large the published checkpoint is.
    """

    text: TextArchitecture
    vision: VisionArchitecture
    scale_factor: int
    image_token_id: int
    pad_token_id: int | None
    head_hidden: int
    tie_word_embeddings: bool = False
    family: str = "smolvlm"


def _smolvlm2(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Architecture:
    """Describe a SmolVLM2 "Video-Instruct" model: the vision tower is the same, decoders differ in size."""
    return Architecture(
        text=TextArchitecture(hidden, layers, heads, kv_heads, head_dim=64, mlp=mlp, vocab=49280),
        vision=VisionArchitecture(hidden=768, layers=12, heads=12, mlp=3072, patch=16, image_size=512),
        scale_factor=4,
        image_token_id=49190,
        pad_token_id=2,
        head_hidden=hidden // 2,
    )


#: Hub id -> shape, so that costs are known without a download. The size of the 500M model's regression head is
#: this project's choice: half of the decoder's width, as in the 256M model.
KNOWN_ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": _smolvlm2(576, 30, 9, 3, 1536),
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _smolvlm2(960, 32, 15, 5, 2560),
    }
)


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
    from transformers import AutoConfig  # only here: whoever asks for a cost need not wait for its import

    try:
        found = AutoConfig.from_pretrained(config.backbone, revision=config.revision or None)
    except (OSError, ValueError) as e:
        raise backbone_not_found(config, e) from e
    return architecture_from_config(found.to_dict(), config.backbone, config.head_hidden)


def backbone_not_found(config: ModelConfig, error: Exception) -> UserError:
    """Return the error for a backbone that neither a folder nor the hub has."""
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    return UserError(
        f"the backbone could not be loaded ({reason})",
        where=f"model.backbone={config.backbone}",
        expected="a folder with config.json and model.safetensors, or a hub id that can be reached",
        fix="check the path; without a network, download the model elsewhere and set "
        "model.backbone=FOLDER (docs/troubleshooting.md, Offline nodes)",
    )


def architecture_from_config(
    config: Mapping[str, Any], where: object, head_hidden: int | None = None
) -> Architecture:
    """Read the architecture from the ``config.json`` of a model of a known family.

    Args:
        config: the parsed ``config.json``.
        where: the file, for the error.
        head_hidden: inner width of the regression head; half of the decoder's width by default.

    Raises:
        UserError: values are missing, of a wrong type, or inconsistent; one error lists them all.
    """
    if not isinstance(config, Mapping):
        raise UserError("the model's configuration is not a JSON object", where=where)
    read = READERS.get(config.get("model_type", ""))
    if read is None:
        raise UserError(
            f"model_type is {config.get('model_type')!r}, expected one of {', '.join(READERS)}",
            where=where,
            fix="use a model of one of these families, or add yours (docs/extending.md)",
        )
    return read(config, where, head_hidden)


def read_idefics3_layout(config: Mapping[str, Any], where: object, head_hidden: int | None) -> Architecture:
    """Read a configuration with the keys of Idefics3, which SmolVLM shares: ``text_config`` and ``vision_config``.

    Published files leave out what equals the defaults of ``transformers``. The same defaults are used here
    (SmolVLMConfig, SmolVLMVisionConfig and LlamaConfig of transformers 4.57), so the numbers are those of the
    model that ``transformers`` would build. Arguments and errors: :func:`architecture_from_config`.
    """
    reader = _Reader()
    text = _read_text(reader, reader.section(config, "text_config"))
    vision = _read_vision(reader, reader.section(config, "vision_config"))
    image_token_id = reader.integer(config, "image_token_id", 128_257, minimum=0)
    scale_factor = reader.integer(config, "scale_factor", 2)
    if head_hidden is not None and head_hidden < 1:
        reader.problems.append(f"head_hidden is {head_hidden}, expected at least 1")
    if not reader.problems and image_token_id >= text.vocab:
        # The placeholder is embedded before it is replaced, so its row must exist.
        reader.problems.append(f"image_token_id {image_token_id} is outside the vocabulary ({text.vocab})")
    if reader.problems:
        raise one_error(
            reader.problems, where=where, fix="use the config.json of a SmolVLM or Idefics3 model"
        )
    return Architecture(
        text=text,
        vision=vision,
        scale_factor=scale_factor,
        image_token_id=image_token_id,
        pad_token_id=_pad_token(config, text.vocab),
        head_hidden=head_hidden or max(1, text.hidden // 2),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        family=config["model_type"],
    )


def architecture_from_dict(values: Mapping[str, Any]) -> Architecture:
    """Return the architecture that ``dataclasses.asdict`` took apart."""
    parts = {
        "text": TextArchitecture(**values["text"]),
        "vision": VisionArchitecture(**values["vision"]),
    }
    return Architecture(**{**values, **parts})


class _Reader:
    """Reads typed values with defaults and collects problems instead of stopping at the first."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.names: dict[int, str] = {}

    def section(self, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = config.get(key)
        if not isinstance(value, Mapping):
            self.problems.append(f"{key} is missing or not an object")
            value = {}
        self.names[id(value)] = f"{key}."
        return value

    def integer(self, config: Mapping[str, Any], key: str, default: int, minimum: int = 1) -> int:
        value = config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            prefix = self.names.get(id(config), "")
            self.problems.append(f"{prefix}{key} is {value!r}, expected an integer of at least {minimum}")
            return default
        return value

    def positive(self, config: Mapping[str, Any], key: str, default: float) -> float:
        value = config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            prefix = self.names.get(id(config), "")
            self.problems.append(f"{prefix}{key} is {value!r}, expected a number above 0")
            return default
        return float(value)


def _read_text(reader: _Reader, section: Mapping[str, Any]) -> TextArchitecture:
    if section.get("model_type", "llama") != "llama":
        reader.problems.append(f"text_config.model_type is {section['model_type']!r}, expected 'llama'")
    for key in ("attention_bias", "mlp_bias"):
        if section.get(key):
            reader.problems.append(f"text_config.{key} is true: linear layers with a bias are not supported")
    hidden = reader.integer(section, "hidden_size", 4096)
    heads = reader.integer(section, "num_attention_heads", 32)
    kv_heads = reader.integer(section, "num_key_value_heads", heads)
    if heads % kv_heads:
        reader.problems.append(f"text_config: {heads} heads are not a multiple of {kv_heads} key/value heads")
    if section.get("head_dim") is None and hidden % heads:
        reader.problems.append(f"text_config: hidden_size {hidden} is not a multiple of {heads} heads")
    # transformers 5 writes rope_theta into rope_parameters.
    rope = section.get("rope_parameters")
    rope_section = rope if isinstance(rope, Mapping) and "rope_theta" in rope else section
    return TextArchitecture(
        hidden=hidden,
        layers=reader.integer(section, "num_hidden_layers", 32),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=reader.integer(section, "head_dim", max(1, hidden // heads)),
        mlp=reader.integer(section, "intermediate_size", 11008),
        vocab=reader.integer(section, "vocab_size", 32000),
        rope_theta=reader.positive(rope_section, "rope_theta", 10_000.0),
        rms_norm_eps=reader.positive(section, "rms_norm_eps", 1e-6),
        max_positions=reader.integer(section, "max_position_embeddings", 2048),
    )


def _read_vision(reader: _Reader, section: Mapping[str, Any]) -> VisionArchitecture:
    vision = VisionArchitecture(
        hidden=reader.integer(section, "hidden_size", 1152),
        layers=reader.integer(section, "num_hidden_layers", 12),
        heads=reader.integer(section, "num_attention_heads", 16),
        mlp=reader.integer(section, "intermediate_size", 3072),
        patch=reader.integer(section, "patch_size", 32),
        image_size=reader.integer(section, "image_size", 224),
        channels=reader.integer(section, "num_channels", 3),
        layer_norm_eps=reader.positive(section, "layer_norm_eps", 1e-6),
    )
    if vision.hidden % vision.heads:
        reader.problems.append(
            f"vision_config: hidden_size {vision.hidden} is not a multiple of {vision.heads} heads"
        )
    if vision.image_size < vision.patch:
        reader.problems.append(
            f"vision_config: image_size {vision.image_size} is smaller than patch_size {vision.patch}"
        )
    return vision


def _pad_token(config: Mapping[str, Any], vocab: int) -> int | None:
    """Find the padding token: the decoder's own, else the outer one if it is in the vocabulary.

    SmolVLM2 files carry the outer 128002 of Idefics3, which is outside their vocabulary of 49280.
    """
    for section in (config["text_config"], config):
        value = section.get("pad_token_id")
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab:
            return value
    return None


#: ``model_type`` -> what reads its ``config.json``; the arguments are those of :func:`architecture_from_config`.
READERS: dict[str, Callable[[Mapping[str, Any], object, int | None], Architecture]] = {
    "smolvlm": read_idefics3_layout,
    "idefics3": read_idefics3_layout,
}
