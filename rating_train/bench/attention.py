"""Attention kernels for the shapes of both towers: each that this device has, against the one that is chosen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rating_train.bench.limits import seconds_of
from rating_train.bench.result import Row
from rating_train.model.architecture import Architecture
from rating_train.model.attention import attention_by_products, by_products, maskless_attention

log = logging.getLogger(__name__)

#: Names of torch's kernels; another one may be chosen by a device's own back end.
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_PRODUCTS = "products"  # of this project, not torch's
_CALLS = {"cuda": 50, "cpu": 1}  # of a measurement: a GPU's kernels are shorter than its clock


@dataclass(frozen=True)
class Shape:
    """The attention of one layer: B items, N query heads on K key and value heads, T tokens, d values of a head."""

    tower: str
    items: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    causal: bool
    trained: bool

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Return random queries (B, N, T, d), keys and values (B, K, T, d)."""
        return [
            torch.randn(
                self.items,
                heads,
                self.tokens,
                self.head_dim,
                device=device,
                dtype=dtype,
                requires_grad=self.trained,
            )
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        ]


def shapes_of(
    architecture: Architecture, image_px: int, tokens: int, items: int, freeze: Sequence[str]
) -> list[Shape]:
    """Return the shapes of a micro-batch: of ``items`` images, and of ``items`` sequences of ``tokens``."""
    vision, text = architecture.vision, architecture.text
    patches, width = (image_px // vision.patch) ** 2, vision.hidden // vision.heads
    tower = Shape("vision", items, vision.heads, vision.heads, patches, width, False, "vision" not in freeze)
    decoder = Shape("decoder", items, text.heads, text.kv_heads, tokens, text.head_dim, True, True)
    return [tower, decoder] if image_px else [decoder]


def measure_attention(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, rounds: int
) -> list[Row]:
    """Time each kernel that takes a shape, forward and (where the tower is trained) backward, as the model calls it.

    The kernels take turns, so that a machine whose speed drifts favours none. The limit of each row is the time of the
    kernel that the model calls on this device, or that torch then chooses, which is named there.
    """
    rows = []
    for shape in shapes:
        inputs = shape.inputs(device, dtype)
        usable = [name for name in (*KERNELS, _PRODUCTS) if _works(shape, inputs, name)]
        seconds: dict[str, list[float]] = {name: [] for name in ["default", *usable]}
        products = shape.trained and by_products(device, dtype == torch.bfloat16)
        chosen = _PRODUCTS if products else _chosen(shape, inputs)
        for _ in range(rounds):
            for name in seconds:
                with _allowed(name):
                    kernel = chosen if name == "default" else name
                    seconds[name].append(_seconds(shape, inputs, device, kernel))
        passes = "forward and backward" if shape.trained else "forward"
        rows += [
            _row(f"{shape.tower}, {passes}: {name}", found, seconds["default"], f"the default: {chosen}")
            for name, found in seconds.items()
        ]
    return rows


def _allowed(kernel: str) -> AbstractContextManager[None]:
    """Allow torch one of its kernels alone; all of them where it chooses, or is not asked."""
    return sdpa_kernel([KERNELS[kernel]] if kernel in KERNELS else list(KERNELS.values()))


def _works(shape: Shape, inputs: Sequence[Tensor], name: str) -> bool:
    """Call a kernel once; return whether it takes the shape."""
    try:
        with _allowed(name):
            _call(shape, inputs, name)
    except RuntimeError as e:  # torch's way to say that there is none for this device, dtype or shape
        log.info("%s: no %s kernel here (%s)", shape.tower, name, str(e).splitlines()[0])
        return False
    return True


def _row(name: str, seconds: list[float], by_itself: list[float], chosen: str) -> Row:
    milliseconds = [1000 * s for s in seconds]
    median = statistics.median(milliseconds)
    ratio = statistics.median(a / b for a, b in zip(seconds, by_itself, strict=True))  # within rounds
    spread = (min(milliseconds), max(milliseconds))
    return Row("attention", name, median, "ms/layer", spread, median / ratio, chosen, larger_is_better=False)


def _chosen(shape: Shape, inputs: Sequence[Tensor]) -> str:
    """Return the name of the kernel that torch chooses by itself."""
    query, key, value = inputs
    grouped = shape.heads != shape.kv_heads
    choice = torch._fused_sdp_choice(query, key, value, is_causal=shape.causal, enable_gqa=grouped)
    names = {backend.value: name for name, backend in KERNELS.items()}  # type: ignore[attr-defined]
    return names.get(int(choice), f"back end {int(choice)}")


def _seconds(shape: Shape, inputs: Sequence[Tensor], device: torch.device, kernel: str) -> float:
    """Return the seconds of one call, the mean of several on a GPU."""
    calls = _CALLS.get(device.type, 1)

    def run() -> None:
        for _ in range(calls):
            _call(shape, inputs, kernel)

    return seconds_of(run, device) / calls


def _call(shape: Shape, inputs: Sequence[Tensor], kernel: str) -> None:
    """Run the attention of one layer, and its backward pass where the tower is trained."""
    query, key, value = inputs
    with torch.set_grad_enabled(shape.trained):
        if kernel == _PRODUCTS:
            out = attention_by_products(query, key, value, shape.causal)
        else:
            out, _ = maskless_attention(torch.nn.Module(), query, key, value, None, is_causal=shape.causal)
    if shape.trained:
        torch.autograd.grad(out, inputs, out)
