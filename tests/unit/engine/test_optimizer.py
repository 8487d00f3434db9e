"""GuardedAdamW: AdamW with clipping, and a skipped step where the gradient is not finite, decided on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.step_operations import StepOperations
from rating_train.engine.optimizer import GuardedAdamW

SHAPES = [(7, 5), (5,), (3, 3)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def set_gradients(ps: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = scale * torch.randn(p.shape, generator=g)


def state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [copy.deepcopy(v) for values in optimizer.state.values() for v in values.values()]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_it_is_adamw_with_clipping(clip: float) -> None:
    ours, plain = parameters(), parameters()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    guarded, adamw = GuardedAdamW(ours, clip, fused=True, **options), torch.optim.AdamW(plain, **options)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(plain, step)
        norm = torch.nn.utils.clip_grad_norm_(plain, clip if clip else float("inf"))
        guarded.step()
        adamw.step()
        assert float(guarded.found_inf) == 0
        assert torch.equal(guarded._global_grad_norm, norm)  # type: ignore[arg-type]
        for a, b in zip(ours, plain, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(bad: float, clip: float) -> None:
    ps = parameters()
    optimizer = GuardedAdamW(ps, clip, lr=1e-2, weight_decay=0.1, fused=True)
    set_gradients(ps, 0)
    optimizer.step()
    weights, moments = copy.deepcopy(ps), state(optimizer)
    set_gradients(ps, 1)
    ps[1].grad[2] = bad  # type: ignore[index]
    optimizer.step()
    assert float(optimizer.found_inf) == 1
    assert all(torch.equal(a, b) for a, b in zip(ps, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state(optimizer), moments, strict=True)), (
        "the step count too"
    )
    set_gradients(ps, 2)
    optimizer.step()
    assert float(optimizer.found_inf) == 0 and not torch.equal(ps[0], weights[0])
    assert all(torch.isfinite(p).all() for p in ps)


def test_a_step_reads_nothing_back() -> None:
    ps = parameters()
    optimizer = GuardedAdamW(ps, 0.5, lr=1e-2, fused=True)
    set_gradients(ps, 0)
    optimizer.step()
    with StepOperations() as counter:
        optimizer.step()
    assert not counter.read_backs and not counter.host_data


def test_kernels_that_ignore_the_flag_are_refused() -> None:
    with pytest.raises(ValueError, match="fused=True"):
        GuardedAdamW(parameters(), 0.5, lr=1e-2)
