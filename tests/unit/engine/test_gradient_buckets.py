"""Bucketed gradients: views that stay views, sums over micro-batches, one fixed order of collectives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rating_train.engine import gradient_buckets
from rating_train.engine.gradient_buckets import GradientBuckets

pytestmark = pytest.mark.timeout(60)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def backward(net: nn.Module, seed: int) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**6])
def test_gradients_add_up_over_micro_batches_and_stay_views(bucket_bytes: int) -> None:
    net, plain = model(), model()
    buckets = GradientBuckets(net.parameters(), bucket_bytes)
    for step in range(2):
        for micro in range(3):
            if micro == 2:
                buckets.start()
            backward(net, 10 * step + micro)
            backward(plain, 10 * step + micro)
        buckets.finish()
        for ours, reference in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, reference.grad)
            assert any(
                ours.grad.untyped_storage().data_ptr() == f.untyped_storage().data_ptr()
                for f in buckets.flats
            )
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        assert torch.allclose(torch.nn.utils.get_total_norm(buckets.flats), expected)
        buckets.zero()
        plain.zero_grad()
    assert sum(f.numel() for f in buckets.flats) == sum(-(-p.numel() // 4) * 4 for p in net.parameters())


def test_every_gradient_begins_where_a_fused_kernel_can_load_16_bytes() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(1, 7))
    buckets = GradientBuckets(net.parameters(), 10**6)
    assert [p.grad.storage_offset() * 4 % 16 for p in net.parameters()] == [0] * 6  # type: ignore[union-attr]
    net(torch.randn(2, 3)).sum().backward()
    own = sum(int(p.grad.count_nonzero()) for p in net.parameters())  # type: ignore[union-attr]
    assert sum(int(f.count_nonzero()) for f in buckets.flats) == own, "nothing lies between the gradients"


class Collectives:
    """Stands in for ``torch.distributed`` with two ranks whose gradients are equal; notes what is sent, and when."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, flat: torch.Tensor, async_op: bool) -> Any:
        assert async_op
        self.sent.append(flat.numel())
        flat.mul_(2)
        return type("Work", (), {"wait": lambda self: None})()


def test_buckets_are_sent_from_the_end_while_the_backward_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = Collectives()
    monkeypatch.setattr(gradient_buckets, "dist", collectives)
    net, plain = model(), copy.deepcopy(model())
    buckets = GradientBuckets(net.parameters(), 1)
    seen: list[int] = []
    net[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append(len(collectives.sent)))
    backward(net, 0)
    assert not collectives.sent, "nothing is sent before the last micro-batch"
    buckets.zero()
    buckets.start()
    backward(net, 0)
    backward(plain, 0)
    assert seen[-1] >= len(buckets.flats) - 2, "most buckets are on their way before the first layer is done"
    buckets.finish()
    assert collectives.sent == [f.numel() for f in buckets.flats]
    for ours, reference in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, reference.grad)


def test_a_parameter_without_a_gradient_delays_no_rank_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = Collectives()
    monkeypatch.setattr(gradient_buckets, "dist", collectives)
    net = model()
    unused = nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([*net.parameters(), unused], 1)
    buckets.start()
    backward(net, 0)
    assert collectives.sent == [], "the order is fixed: the unused parameter comes first"
    buckets.finish()
    assert len(collectives.sent) == len(buckets.flats)
    assert unused.grad is not None and not unused.grad.any()


def test_dtypes_are_not_mixed() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    assert [f.dtype for f in GradientBuckets(parameters, 10**6).flats] == [torch.bfloat16, torch.float32]
