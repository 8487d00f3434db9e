"""Gradients of plain data parallelism (ZeRO stage 0): flat fp32 buckets, averaged while the backward pass still runs.

DeepSpeed 0.19.8 reduces the gradients of stage 0 after the backward pass, through copies into flat buffers and back.
Here every gradient is a view of a flat bucket from the start, so that nothing is copied, and a bucket is sent as soon
as its last gradient is complete. Norm, clipping and zeroing then take a few kernels instead of several per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ALIGNMENT_BYTES = 16


class GradientBuckets:
    """The gradients of ``parameters`` as views of flat buffers, with an overlapped average over all ranks.

    Args:
        parameters: trained parameters in the model's order. The backward pass completes the last ones first, so the
            buckets are filled from the end.
        bucket_bytes: smallest size at which a bucket is closed; a larger one overlaps less, a smaller one takes more
            collectives.
        sent_as: dtype in which a bucket is sent and summed; ``None`` for its own. What is left in the bucket has the
            bucket's dtype.

    All ranks must build it from the same parameters. The buckets are sent in one fixed order, whatever the order in
    which a rank completes them, so that the collectives of the ranks always match.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], bucket_bytes: int, sent_as: torch.dtype | None = None
    ) -> None:
        self.flats: list[Tensor] = []
        self._sent_as = sent_as
        #: Of each bucket, gradients that the current backward pass has not completed.
        self._missing: list[int] = []
        self._sizes: list[int] = []
        #: Of each bucket that was sent, what to wait for, and the tensor that is summed.
        self._works: list[tuple[Any, Tensor]] = []
        self._active = False
        self._hooks: list[Any] = []
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        for members in consecutive(list(parameters), bucket_bytes):
            self._add(members)

    def _add(self, members: list[nn.Parameter]) -> None:
        bucket = len(self.flats)
        sizes = [_aligned(p.numel(), p.element_size()) for p in members]
        flat = torch.zeros(sum(sizes), dtype=members[0].dtype, device=members[0].device)
        offset = 0
        for parameter, size in zip(members, sizes):
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += size
            self._hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._complete(bucket))
            )
        self.flats.append(flat)
        self._sizes.append(len(members))

    def start(self) -> None:
        """Announce the last backward pass of a step: from here on, complete buckets are sent."""
        self._active = True
        self._missing = list(self._sizes)
        self._works = []

    def _complete(self, bucket: int) -> None:
        if not self._active:
            return
        self._missing[bucket] -= 1
        while len(self._works) < len(self.flats) and self._missing[len(self._works)] == 0:
            self._send()

    def _send(self) -> None:
        flat = self.flats[len(self._works)]
        if self._ranks == 1:
            self._works.append((None, flat))
            return
        sent = flat.to(self._sent_as or flat.dtype)  # itself, where it has the dtype
        self._works.append((dist.all_reduce(sent, async_op=True), sent))

    def finish(self) -> None:
        """Wait for the averages. Buckets with a parameter that got no gradient on this rank are sent now."""
        self._active = False
        while len(self._works) < len(self.flats):
            self._send()
        for (work, sent), flat in zip(self._works, self.flats):
            if work is not None:
                work.wait()
                if sent is not flat:
                    flat.copy_(sent)
                flat.div_(self._ranks)
        self._works = []  # and the copies that were sent

    def remove(self) -> None:
        """Remove the hooks of the parameters, which would keep the buckets alive as long as them."""
        for hook in self._hooks:
            hook.remove()

    def zero(self) -> None:
        """Set all gradients to zero; they stay views of the buckets."""
        for flat in self.flats:
            flat.zero_()


def _aligned(elements: int, element_bytes: int) -> int:
    """Round up, so that the next gradient begins at a multiple of 16 bytes: fused CUDA kernels load so many at once.

    What lies between two gradients stays zero, and counts neither in the norm nor in an average.
    """
    per_load = _ALIGNMENT_BYTES // element_bytes
    return -(-elements // per_load) * per_load


def consecutive(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Return consecutive parameters from the end, of one dtype and device, in buckets of at least ``bucket_bytes``."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        last = buckets[-1][-1] if buckets else None
        same = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not same or size >= bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
