"""The comparison of attention kernels: real shapes, only kernels that are here, and the chosen one is named."""

from __future__ import annotations

import pytest
import torch

from rating_train.bench.attention import measure_attention, shapes_of
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
    kernels = ("default", "math", "flash", "products")
    assert [row.name for row in rows] == [
        f"{passes}: {kernel}"
        for passes in ("vision, forward", "decoder, forward and backward")
        for kernel in kernels
    ]
    assert {row.limit_name for row in rows[:4]} == {"the default: flash"}, "of what is frozen"
    assert {row.limit_name for row in rows[4:]} == {"the default: products"}
    assert all(row.value > 0 and row.larger_is_better is False for row in rows)
    assert rows[0].ratio == rows[4].ratio == pytest.approx(1)
    in_fp32 = measure_attention(shapes[1:], torch.device("cpu"), torch.float32, rounds=1)
    assert {row.limit_name for row in in_fp32} == {"the default: flash"}
