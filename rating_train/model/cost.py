"""Count the parameters and operations of a regressor in closed form, from its architecture. Imports no torch.

Counted per item: the patch convolution, every linear layer, and (in the ``*_attention`` conventions) the two
attention products Q K^T and A V over the full T x T square. A causal mask zeroes half of that square, which an
unfused kernel computes all the same; a fused one may skip it.

Left out in every convention: norms, activations, softmax, rotary angles, residual and bias additions, the
embedding look-up, pixel scaling, pooling, the sigmoid. At a few operations per element they add up to about 0.5%
of the FLOPs.

One multiply-accumulate (MAC) is two floating-point operations (FLOPs). A test compares the closed form with
``torch.utils.flop_counter``, which counts nothing for fused attention on a CPU, so the test selects the unfused
("math") kernel.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from rating_train.config.phases import stage_configs
from rating_train.config.schema import PARTS, Config
from rating_train.errors import UserError
from rating_train.model.architecture import Architecture, TextArchitecture, VisionArchitecture
from rating_train.scoring.ces import CONVENTIONS

#: Bytes that training keeps of one token in one layer for the backward pass, at least, per hidden unit in bf16:
#: inputs of the linear layers, norms and activations (Korthikanti et al. 2022, without the attention matrix).
_LAYER_BYTES = 34
_CHECKPOINTED_LAYER_BYTES = 2  # with gradient checkpointing a layer's input alone


@dataclass(frozen=True)
class ForwardCost:
    """Operations of one forward pass over one item.

    Attributes:
        linear_macs: part of the model -> MACs of its linear and convolution layers.
        attention_macs: part of the model -> MACs of its two attention products.
    """

    linear_macs: dict[str, int]
    attention_macs: dict[str, int]

    def by_part(self, convention: str) -> dict[str, float]:
        """Count the operations of each part in ``convention`` (a key of ``scoring.ces.CONVENTIONS``).

        Raises:
            UserError: the convention is unknown.
        """
        if convention not in CONVENTIONS:
            raise UserError(
                f"unknown counting convention {convention!r}",
                where="forward cost",
                expected=f"one of {', '.join(CONVENTIONS)}",
            )
        unit, scope = convention.split("_")
        per_mac = 2 if unit == "flop" else 1
        attention = 1 if scope == "attention" else 0
        return {
            part: float(per_mac * (self.linear_macs[part] + attention * self.attention_macs[part]))
            for part in PARTS
        }

    def total(self, convention: str) -> float:
        """Count the operations of one forward pass in ``convention``."""
        return sum(self.by_part(convention).values())

    def without(self, *parts: str) -> ForwardCost:
        """Return the same forward pass where these parts do not run."""
        linear, attention = (
            {name: 0 if name in parts else macs for name, macs in counts.items()}
            for counts in (self.linear_macs, self.attention_macs)
        )
        return ForwardCost(linear, attention)

    def totals(self) -> dict[str, float]:
        """Count the operations of one forward pass in every convention."""
        return {convention: self.total(convention) for convention in CONVENTIONS}


def visual_tokens(arch: Architecture, image_px: int) -> int:
    """Count the tokens that a square image of ``image_px`` pixels becomes: 36 at 384 pixels, 64 at 512.

    Raises:
        UserError: the side is not a multiple of patch x scale_factor. (0 is a model that reads no image.)
    """
    if image_px == 0:
        return 0
    block = arch.vision.patch * arch.scale_factor
    if image_px < block or image_px % block:
        below = max(block, image_px // block * block)
        raise UserError(
            f"an image side of {image_px} pixels does not divide into visual tokens",
            where="data.image_px",
            expected=f"a positive multiple of {block} (patch {arch.vision.patch} x scale factor "
            f"{arch.scale_factor}), for example {below} or {below + block}",
        )
    return (image_px // block) ** 2


def image_tokens(arch: Architecture, image_px: int, tiles_per_side: int = 0) -> int:
    """Count the tokens that an image takes in the sequence, at most.

    Args:
        arch: the backbone.
        image_px: side of the square image, or of a tile, in pixels; 0 for a model that reads no image.
        tiles_per_side: most tiles beside or above one another; 0 without tiling. Each tile has two tokens before its
            visual ones, and each row a line break after it (the markers of the complete image belong to the text).
    """
    visual = visual_tokens(arch, image_px)
    return tiles_per_side**2 * (visual + 2) + tiles_per_side + visual if visual else 0


def count_parameters(arch: Architecture, image_px: int = 1) -> dict[str, int]:
    """Count the parameters of each part; ``image_px`` 0 counts a model that reads no image, without a vision tower.

    Returns:
        ``vision``, ``connector``, ``decoder`` (with the token embedding, without an LM head), ``head``
        (the regression head), ``backbone_total`` (all but the head) and ``total``. For SmolVLM2-256M the
        backbone has 228,099,648.
    """
    text, vision = arch.text, arch.vision
    connector = vision.hidden * arch.scale_factor**2 * text.hidden
    head = text.hidden * arch.head_hidden + arch.head_hidden + arch.head_hidden + 1
    counts = {
        "vision": _vision_parameters(vision),
        "connector": connector,
        "decoder": _decoder_parameters(text),
    }
    if image_px == 0:
        counts |= {"vision": 0, "connector": 0}
    backbone = sum(counts.values())
    return {**counts, "head": head, "backbone_total": backbone, "total": backbone + head}


def count_forward(
    arch: Architecture, image_px: int, sequence_tokens: int, tiles_per_side: int = 0
) -> ForwardCost:
    """Count the operations of one forward pass over one item with one image.

    Args:
        arch: the backbone and its head.
        image_px: side of the square image, in pixels.
        sequence_tokens: length of the decoder's input in tokens: visual tokens, template, text and
            padding (a padding token costs as much as any other).
        tiles_per_side: with tiling, the most tiles beside or above one another; an item always has the encoder run
            over all of them, and over the complete image.

    Raises:
        UserError: the image size does not divide, or the sequence is shorter than its visual tokens.
    """
    visual = visual_tokens(arch, image_px)
    if sequence_tokens < visual:
        raise UserError(
            f"a sequence of {sequence_tokens} tokens cannot hold {visual} visual tokens",
            where="sequence length",
            expected=f"at least {visual} tokens for an image side of {image_px} pixels",
        )
    text, vision = arch.text, arch.vision
    patches, images = (image_px // vision.patch) ** 2, tiles_per_side**2 + 1
    patch_embedding = vision.channels * vision.patch**2 * vision.hidden
    linear = {
        "vision": images * patches * (patch_embedding + vision.layers * _vision_layer_weights(vision)),
        "connector": images * visual * vision.hidden * arch.scale_factor**2 * text.hidden,
        "decoder": sequence_tokens * text.layers * _decoder_layer_weights(text),
        "head": text.hidden * arch.head_hidden + arch.head_hidden,
    }
    attention = {
        "vision": images * vision.layers * _attention_macs(patches, vision.hidden),
        "connector": 0,
        "decoder": text.layers * _attention_macs(sequence_tokens, text.heads * text.head_dim),
        "head": 0,
    }
    return ForwardCost(linear, attention)


def training_forward(config: Config, arch: Architecture, sequence_tokens: int) -> ForwardCost:
    """Count what runs in a forward pass of training: with `data.features`, neither vision tower nor connector."""
    forward = count_forward(arch, config.model_px, sequence_tokens, config.data.tiles_per_side)
    return forward.without("vision", "connector") if config.data.features else forward


def feature_bytes(config: Config, arch: Architecture) -> int:
    """Count the bytes of the visual tokens of an item, as `rating-train features` stores them."""
    width = 2 if config.train.precision == "bf16" else 4
    return visual_tokens(arch, config.model_px) * arch.text.hidden * width


def training_flops(forward: ForwardCost, freeze: Collection[str]) -> float:
    """Count the FLOPs of training on one item (``flop_attention``): a forward pass, and a backward pass of twice that.

    Frozen parts need no backward pass where nothing below them is trained: with ``vision`` frozen, neither the tower's
    nor, with ``connector``, the connector's. What gradient checkpointing computes again is not counted.
    """
    by_part = forward.by_part("flop_attention")
    backward, needed = 0.0, False
    for part in PARTS:  # in the order of the forward pass
        needed = needed or part not in freeze
        backward += 2 * by_part[part] if needed else 0.0
    return sum(by_part.values()) + backward


def largest_phase(config: Config, arch: Architecture) -> Config:
    """Return the configuration of the phase that trains most parameters, which memory and networks must bear."""
    counts = count_parameters(arch, config.model_px)
    return max(
        stage_configs(config), key=lambda c: sum(counts[part] for part in PARTS if part not in c.model.freeze)
    )


def activation_bytes(
    arch: Architecture,
    image_px: int,
    sequence_tokens: int,
    *,
    freeze: Collection[str] = (),
    bf16: bool = True,
    gradient_checkpointing: bool = False,
    tiles_per_side: int = 0,
) -> int:
    """Return what one item keeps on the device for the backward pass, at least: without the attention matrix."""
    per_unit = _CHECKPOINTED_LAYER_BYTES if gradient_checkpointing else _LAYER_BYTES
    text, vision = arch.text, arch.vision
    patches = (tiles_per_side**2 + 1) * (image_px // vision.patch) ** 2
    decoder = text.layers * sequence_tokens * text.hidden
    tower = 0 if {"vision", "connector"} <= set(freeze) else vision.layers * patches * vision.hidden
    return per_unit * (1 if bf16 else 2) * (decoder + tower)


def _attention_macs(tokens: int, width: int) -> int:
    """Count Q K^T and A V: (T, d) x (d, T) and (T, T) x (T, d) for every head; width = heads x d."""
    return 2 * tokens * tokens * width


def _vision_layer_weights(vision: VisionArchitecture) -> int:
    """Count one layer's weights without biases: q, k, v, out, and two of the MLP."""
    return 4 * vision.hidden**2 + 2 * vision.hidden * vision.mlp


def _decoder_layer_weights(text: TextArchitecture) -> int:
    """Count one layer's weights: q and o; k and v on fewer heads; gate, up and down."""
    query = text.hidden * text.heads * text.head_dim
    key = text.hidden * text.kv_heads * text.head_dim
    return 2 * query + 2 * key + 3 * text.hidden * text.mlp


def _vision_parameters(vision: VisionArchitecture) -> int:
    hidden = vision.hidden
    embedding = vision.channels * vision.patch**2 * hidden + hidden
    positions = (vision.image_size // vision.patch) ** 2 * hidden
    biases = 4 * hidden + vision.mlp + hidden
    norms = 2 * 2 * hidden
    layers = vision.layers * (_vision_layer_weights(vision) + biases + norms)
    return embedding + positions + layers + 2 * hidden


def _decoder_parameters(text: TextArchitecture) -> int:
    norms = 2 * text.hidden
    layers = text.layers * (_decoder_layer_weights(text) + norms)
    return text.vocab * text.hidden + layers + text.hidden
