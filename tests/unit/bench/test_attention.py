"""The comparison of attention kernels: real shapes, only kernels that are here, and the chosen one is named."""

from __future__ import annotations

import pytest
import torch

from rating_train.bench.attention import KERNELS, measure_attention, shapes_of
from rating_train.model.architecture import KNOWN_ARCHITECTURES


def test_the_shapes_are_those_of_the_reference_recipe() -> None:
    architecture = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    vision, decoder = shapes_of(architecture, 384, 212, 4, ["vision", "connector"])
    assert (vision.heads, vision.kv_heads, vision.tokens, vision.head_dim) == (12, 12, 576, 64)
    assert (decoder.heads, decoder.kv_heads, decoder.tokens, decoder.head_dim) == (9, 3, 212, 64)
    assert (vision.causal, decoder.causal, vision.trained, decoder.trained) == (False, True, False, True)
    assert [shape.tower for shape in shapes_of(architecture, 0, 176, 4, [])] == ["decoder"]


def test_every_kernel_that_is_here_is_timed_beside_the_default() -> None:
    architecture = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
    shapes = shapes_of(architecture, 64, 24, 1, ["vision"])
    rows = measure_attention(shapes, torch.device("cpu"), torch.bfloat16, rounds=2)
    names = [row.name for row in rows]
    assert names[:3] == [f"vision, forward: {kernel}" for kernel in ("default", "math", "flash")]
    assert names[3:] == [
        f"decoder, forward and backward: {kernel}" for kernel in ("default", "math", "flash")
    ]
    assert {row.limit_name for row in rows} <= {f"the default: {kernel}" for kernel in KERNELS}
    assert all(row.value > 0 and row.larger_is_better is False for row in rows)
    assert rows[0].ratio == rows[3].ratio == pytest.approx(1)
