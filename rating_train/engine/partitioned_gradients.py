"""Gradients of ZeRO stage 1 in bf16: summed in fp32 and divided over the ranks while the backward pass still runs.

DeepSpeed 0.19.8 adds each gradient to a flat fp32 buffer after the backward pass, through a copy in fp32. It then
concatenates the buffers, averages all of it on every rank, copies it back, takes the norm and clips tensor by tensor,
and clears the buffers twice. Here a gradient is written to its place as soon as it is complete, and its bf16 memory is
free again; each buffer is reduced once its last gradient is there, without a copy, and to the ranks that need it; norm,
clipping and update read no more than a rank's own share, and the host waits for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rating_train.engine.gradient_buckets import consecutive
from rating_train.model.param_groups import ParamGroup


class PartitionedGradients:
    """The gradients of DeepSpeed's ``BF16_Optimizer``, and its step.

    Args:
        optimizer: whose flat buffers hold the gradients of each parameter group, (L,) fp32 on every rank, of which each
            rank updates a share of equal size. Its parameters get hooks, which its ``destroy`` removes.
        parameters: all of the model, in its order. The backward pass completes the last ones first.
        clip_norm: largest global norm of the gradients; 0 turns clipping off.
        sent_as: dtype in which gradients are sent and summed; ``None`` for fp32.

    Attributes:
        flats: the buffers; after :meth:`finish` this rank's share of each is a sum over all ranks.
        found_inf: float32 scalar on the device, 1 if the last step was skipped for a norm that is not finite, else 0.

    All ranks must build it from the same parameters. The buffers are sent in one fixed order, whatever the order in
    which a rank completes them, so that the collectives of the ranks always match.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Sequence[nn.Parameter],
        clip_norm: float,
        sent_as: torch.dtype | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._sent_as = sent_as
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.flats: list[Tensor] = optimizer.fp32_groups_gradients_flat
        self._shares: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition  # views of the buffers
        device = self.flats[0].device
        self._scatter = self._ranks > 1 and scatters(device)
        self.found_inf = torch.zeros((), device=device)
        #: Of each parameter its gradient in a buffer, and whether this step has written to it.
        self._views: list[list[Tensor]] = []
        self._written: list[list[bool]] = []
        #: Of each buffer, gradients that the current backward pass has not completed.
        self._missing: list[int] = []
        #: Of each buffer that was sent, in order: what to wait for, and what holds the sum of this rank's share.
        self._works: list[tuple[Any, Tensor]] = []
        self._active = False
        place = {parameter: number for number, parameter in enumerate(parameters)}
        for group, members in enumerate(optimizer.bf16_groups):
            gradients = optimizer.fp32_groups_gradients[group]
            self._views.append([g.view(p.shape) for p, g in zip(members, gradients, strict=True)])
            self._written.append([False] * len(members))
            for number, parameter in enumerate(members):
                optimizer._grad_acc_hooks.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda p, group=group, number=number: self._complete(p, group, number)
                    )
                )
        #: The buffers, the one that is complete first at the beginning.
        self._order = sorted(
            range(len(self.flats)), key=lambda g: -min(place[p] for p in optimizer.bf16_groups[g])
        )

    def start(self) -> None:
        """Announce the last backward pass of a step: from here on, complete buffers are sent."""
        self._active = True
        self._missing = [len(views) for views in self._views]
        self._works = []

    @torch.no_grad()
    def _complete(self, parameter: nn.Parameter, group: int, number: int) -> None:
        assert parameter.grad is not None
        if self._written[group][number]:
            self._views[group][number].add_(parameter.grad)
        else:  # what the step before left there is overwritten, so that nothing has to be cleared
            self._views[group][number].copy_(parameter.grad)
            self._written[group][number] = True
        parameter.grad = None
        if not self._active:
            return
        self._missing[group] -= 1
        while len(self._works) < len(self.flats) and not self._missing[self._order[len(self._works)]]:
            self._send()

    def _send(self) -> None:
        group = self._order[len(self._works)]
        flat, share = self.flats[group], self._shares[group]
        if self._ranks == 1:
            self._works.append((None, share))
            return
        sent = flat.to(self._sent_as or flat.dtype)  # itself, where it has the dtype
        begin = share.storage_offset() - flat.storage_offset()
        own = sent[begin : begin + len(share)]
        if self._scatter:
            work = dist.reduce_scatter_tensor(own, sent, async_op=True)  # in place
        else:
            work = dist.all_reduce(sent, async_op=True)
        self._works.append((work, own))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the sums. Buffers with a parameter that got no gradient on this rank are sent now."""
        self._active = False
        for views, written in zip(self._views, self._written):
            for number, was_written in enumerate(written):
                if not was_written:
                    views[number].zero_()
                written[number] = False
        while len(self._works) < len(self.flats):
            self._send()
        for (work, own), group in zip(self._works, self._order):
            if work is not None:
                work.wait()
                if own.dtype != torch.float32:
                    self._shares[group].copy_(own)
        self._works = []  # and the copies that were sent

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Average, clip by the global norm and update the weights, or skip. Waits for nothing.

        Whether to skip is decided on the device: torch's fused kernels change nothing where ``found_inf`` is 1.
        """
        assert closure is None
        optimizer, inner = self._optimizer, self._optimizer.optimizer
        square = torch.stack(torch._foreach_norm(self._shares)).square().sum()
        if self._ranks > 1:
            dist.all_reduce(square)
        norm = square.sqrt() / self._ranks  # of the average
        optimizer._global_grad_norm = norm
        self.found_inf = inner.found_inf = 1 - torch.isfinite(norm).float()
        # The fused kernel divides by it: neither the average nor clipping takes a pass of its own.
        inner.grad_scale = torch.full_like(norm, self._ranks)
        if self._clip_norm > 0:
            inner.grad_scale *= torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0)
        for weights, share in zip(optimizer.fp32_groups_flat_partition, self._shares, strict=True):
            weights.grad = share
        inner.step()
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()


def divide(groups: Sequence[ParamGroup], bucket_bytes: int) -> list[ParamGroup]:
    """Divide optimizer groups into consecutive ones of at least ``bucket_bytes`` of gradients, where they are larger.

    A rank's share is of a whole buffer, so that none can be sent in parts. A buffer for each group would hold back the
    gradients of the vision tower's matrices, 342 MB, until the last of them is there, when nothing is left to overlap.
    """
    return [
        dataclasses.replace(group, parameters=tuple(reversed(members)))
        for group in groups
        for members in reversed(consecutive(list(group.parameters), bucket_bytes))
    ]


def scatters(device: torch.device) -> bool:
    """Whether a rank gets its share alone. On a CPU, gloo has no faster way to a share than the whole.

    The name of the process group's backend does not tell: that of a job is ``cpu:gloo,cuda:nccl`` everywhere.
    """
    return device.type == "cuda"
