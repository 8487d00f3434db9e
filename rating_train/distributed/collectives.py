"""The collectives that the package uses. Every rank calls each of them; none is called under ``if rank``.

Objects and flags travel over the CPU (gloo) side of the process group, so that nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rating_train.errors import UserError

T = TypeVar("T")


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def broadcast(value: T | None) -> T:
    """Return rank 0's value on every rank (pickled: only the job's own ranks send)."""
    if _alone():
        return value  # type: ignore[return-value]
    box: list[Any] = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T] | None:
    """Return the values of all ranks in rank order on rank 0, ``None`` on the others."""
    if _alone():
        return [value]
    out: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, out, dst=0)
    return out


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks in rank order, on every rank."""
    if _alone():
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return sums over ranks, in float64. Reduce sums and counts with this, never means."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if not _alone():
        dist.all_reduce(tensor)
    return tensor.tolist()


def max_over_ranks(value: int) -> int:
    """Return the largest of the ranks' integers: how a flag raised on any rank reaches all of them."""
    tensor = torch.tensor([value], dtype=torch.int64)
    if not _alone():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def on_main(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result on every rank; rank 0's exception is raised on every rank."""
    rank = 0 if _alone() else dist.get_rank()
    outcome: tuple[Any, BaseException | None] = (None, None)
    if rank == 0:
        try:
            outcome = (action(), None)
        except Exception as e:  # broadcast, and raised on all ranks
            outcome = (None, e)
    result, error = broadcast(outcome)
    if error is not None:
        if isinstance(error, UserError):
            error.on_all_ranks = True  # shown once, not once per rank
        raise error
    return result
