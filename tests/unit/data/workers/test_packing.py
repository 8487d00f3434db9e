"""What is unpacked equals what was packed, and tensors in the block are not copied."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rating_train.data.workers.packing import pack, unpack


@dataclass
class Made:
    images: Tensor
    others: dict[str, Tensor]
    names: list[str]


OTHERS = {
    "int64": torch.arange(12).view(3, 4),
    "float32": torch.tensor([1.5, float("nan")]),
    "bf16": torch.tensor([0.1, -3.0], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 5, dtype=torch.int64),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "a part": torch.arange(10)[3:7],
}


def made(images: Tensor) -> Made:
    return Made(images, OTHERS, ["a", "ü"])


def check_others(found: Made) -> None:
    assert found.names == ["a", "ü"]
    for name, value in OTHERS.items():
        assert found.others[name].dtype == value.dtype
        assert torch.equal(found.others[name].nan_to_num(5), value.nan_to_num(5)), name
        found.others[name].zero_()  # they can be written


def test_without_a_block_all_is_copied() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 4).permute(0, 2, 1)
    found = unpack(pack(made(images)))
    check_others(found)
    assert torch.equal(found.images, images) and found.images.stride() == images.stride(), "channels last"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_what_lies_in_the_block_is_told_by_its_place(dtype: torch.dtype) -> None:
    shared = mmap.mmap(-1, 10000)
    block = torch.frombuffer(shared, dtype=torch.uint8)
    images = block[:9600].view(dtype).view(2, 3, 4, -1).permute(0, 3, 1, 2)
    content = pack(made(images), block)
    assert len(content) < 3000
    found = unpack(content, shared)
    check_others(found)
    assert found.images.shape == images.shape and found.images.stride() == images.stride()
    images.fill_(3)
    assert (found.images == 3).all(), "one memory"
    part = unpack(pack(made(images[1:]), block), shared).images
    assert part.data_ptr() == images[1:].data_ptr()
