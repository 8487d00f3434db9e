"""Gradients of stage 1: written to their buffers when they are complete, sent in one order, clipped, or skipped."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rating_train.engine import partitioned_gradients
from rating_train.engine.partitioned_gradients import PartitionedGradients, divide, scatters
from rating_train.model.param_groups import ParamGroup

pytestmark = pytest.mark.timeout(60)


class Buffers(SimpleNamespace):
    """What DeepSpeed's ``BF16_Optimizer`` has on one rank, with weights in fp32: groups of matrices and of biases."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        parameters = list(net.parameters())
        groups = [[p for p in parameters if p.dim() == d] for d in (2, 1)]
        sizes = [[p.numel() for p in group] for group in groups]
        flats = [torch.full((sum(s) + 2,), torch.nan) for s in sizes]  # two of padding
        for flat in flats:
            flat[-2:] = 0
        masters = [torch.cat([*(p.detach().reshape(-1) for p in g), torch.zeros(2)]) for g in groups]
        super().__init__(
            bf16_groups=groups,
            fp32_groups_gradients_flat=flats,
            fp32_groups_gradients=[list(f[: sum(s)].split(s)) for f, s in zip(flats, sizes)],
            fp32_groups_gradient_flat_partition=[flat.view(-1) for flat in flats],
            fp32_groups_flat_partition=[m.requires_grad_() for m in masters],
            optimizer=torch.optim.AdamW(masters, lr=lr, fused=True),
            _grad_acc_hooks=[],
            _lazy_init_hp_params_optimizer_state=lambda: None,
        )

    @torch.no_grad()
    def update_lp_params(self) -> None:
        for group, master in zip(self.bf16_groups, self.fp32_groups_flat_partition):
            sizes = [p.numel() for p in group]
            for parameter, value in zip(group, master[: sum(sizes)].split(sizes)):
                parameter.copy_(value.view(parameter.shape))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def backward(net: nn.Module, seed: int) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()


def made(net: nn.Module, clip_norm: float = 0.0) -> tuple[PartitionedGradients, Buffers]:
    buffers = Buffers(net)
    return PartitionedGradients(buffers, list(net.parameters()), clip_norm), buffers


def take(net: nn.Module, gradients: PartitionedGradients, step: int, micros: int = 3) -> None:
    for micro in range(micros):
        if micro == micros - 1:
            gradients.start()
        backward(net, 10 * step + micro)
        assert all(p.grad is None for p in net.parameters()), "its memory is free again"
    gradients.finish()
    gradients.step()


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_steps_are_those_of_a_plain_loop(clip_norm: float) -> None:
    """What a buffer held before, here NaN, is overwritten by the first micro-batch of a step."""
    net, plain = model(), model()
    gradients, buffers = made(net, clip_norm)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    for step in range(3):
        take(net, gradients, step)
        for micro in range(3):
            backward(plain, 10 * step + micro)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(buffers._global_grad_norm, norm) and not gradients.found_inf
        for ours, reference in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-6)
    assert all(not flat[-2:].any() for flat in gradients.flats), "padding stays zero"


def test_a_parameter_without_a_gradient_gets_none_of_the_step_before() -> None:
    net = model()
    gradients, buffers = made(net)
    take(net, gradients, 0)
    gradients.start()
    net[:3](torch.ones(2, 4)).sum().backward()
    gradients.finish()
    matrices, biases = buffers.fp32_groups_gradients
    assert [bool(g.any()) for g in (*matrices, *biases)] == [True, True, False, True, True, False]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net = model()
    gradients, buffers = made(net, clip_norm=1.0)
    take(net, gradients, 0)
    weights, moments = copy.deepcopy(net.state_dict()), copy.deepcopy(buffers.optimizer.state_dict()["state"])
    gradients.start()
    (net(torch.ones(2, 4)).sum() * torch.inf).backward()
    gradients.finish()
    gradients.step()
    assert gradients.found_inf == 1 and not torch.isfinite(buffers._global_grad_norm)
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])
    for number, state in buffers.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in state.items())
    take(net, gradients, 1)
    assert gradients.found_inf == 0 and all(torch.isfinite(p).all() for p in net.parameters())


def test_a_step_that_was_given_up_leaves_nothing_behind() -> None:
    """The next engine's hooks are other ones: those of an optimizer that is destroyed are gone."""
    net = model()
    gradients, buffers = made(net)
    assert len(buffers._grad_acc_hooks) == 6
    for hook in buffers._grad_acc_hooks:
        hook.remove()
    backward(net, 0)
    assert all(p.grad is not None for p in net.parameters())
    assert all(flat[:-2].isnan().all() for flat in gradients.flats)


class Collectives:
    """Stands in for ``torch.distributed`` with two ranks whose gradients are equal; notes what is sent, and when."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, bool]] = []

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, flat: Tensor, async_op: bool = False) -> Any:
        self.sent.append(("all_reduce", flat.numel(), async_op))
        flat.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    def reduce_scatter_tensor(self, own: Tensor, flat: Tensor, async_op: bool) -> Any:
        self.sent.append(("reduce_scatter", flat.numel(), async_op))
        assert (
            own.data_ptr() >= flat.data_ptr()
            and own.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
        )
        own.mul_(2)
        return SimpleNamespace(wait=lambda: None)


@pytest.mark.parametrize(("scattered", "name"), [(False, "all_reduce"), (True, "reduce_scatter")])
@pytest.mark.parametrize("sent_as", [None, torch.bfloat16])
def test_buffers_are_sent_once_while_the_backward_pass_runs(
    scattered: bool, name: str, sent_as: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    collectives = Collectives()
    monkeypatch.setattr(partitioned_gradients, "dist", collectives)
    monkeypatch.setattr(partitioned_gradients, "scatters", lambda device: scattered)
    net, plain = model(), model()
    buffers = Buffers(net)
    gradients = PartitionedGradients(buffers, list(net.parameters()), 0.0, sent_as)
    backward(net, 0)
    assert not collectives.sent, "not before the last micro-batch"
    gradients.start()
    backward(net, 1)
    # The first layer's matrix is the last to be complete, and its bias comes after it in the model.
    assert collectives.sent == [(name, 17 + 2, True), (name, 104 + 2, True)]
    gradients.finish()
    for seed in (0, 1):
        backward(plain, seed)
    expected = torch.cat([p.grad.reshape(-1) for p in plain.parameters() if p.dim() == 2])  # type: ignore[union-attr]
    tolerance = 1e-6 if sent_as is None else 1e-2
    assert torch.allclose(gradients.flats[0][:-2] / 2, expected, rtol=tolerance, atol=1e-6)
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    gradients.step()
    # The norm's own sum over both ranks counts this rank's buffers twice.
    assert torch.allclose(buffers._global_grad_norm, norm * 2**0.5, rtol=tolerance)
    assert collectives.sent[2:] == [("all_reduce", 1, False)], "of the norm: a number"


def test_large_groups_are_divided_and_small_ones_are_not() -> None:
    net = model()
    groups = [
        ParamGroup("decoder/decay", 1.0, 0.1, tuple(p for p in net.parameters() if p.dim() == 2)),
        ParamGroup("decoder/no_decay", 2.0, 0.0, tuple(p for p in net.parameters() if p.dim() == 1)),
    ]
    matrices, biases = groups
    assert divide(groups, 10**6) == groups
    assert (
        divide(groups, 4 * (8 * 8 + 8))
        == [  # the last two matrices are as large
            dataclasses.replace(matrices, parameters=matrices.parameters[:1]),
            dataclasses.replace(matrices, parameters=matrices.parameters[1:]),
            biases,
        ]
    )
    alone = divide(groups, 1)
    assert [len(g.parameters) for g in alone] == [1] * 6
    assert [p for g in alone for p in g.parameters] == [p for g in groups for p in g.parameters], (
        "in the same order"
    )


def test_gradients_are_scattered_on_gpus() -> None:
    """Also where the group is that of a job, ``cpu:gloo,cuda:nccl``: it has another name than NCCL's."""
    assert scatters(torch.device("cuda", 3)) and not scatters(torch.device("cpu"))
