"""The process groups of a job: one time-out for all of them, and all connected at start-up."""

from __future__ import annotations

import datetime
import logging

import torch

log = logging.getLogger(__name__)


def limit_collectives(timeout_minutes: float) -> None:
    """Give every process group of this process the timeout of :func:`connect`.

    Call once a library has created its own groups (DeepSpeed does, for gradients): torch gives those its default,
    which is up to 30 minutes.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    groups = torch.distributed.distributed_c10d
    # The public name is newer than the oldest supported torch.
    set_timeout = getattr(torch.distributed, "set_timeout", None) or groups._set_pg_timeout
    for group in list(groups._world.pg_map):
        set_timeout(timeout, group)


def connect_groups(device: torch.device) -> None:
    """Use every process group once. A collective, to be called once a library has created its own groups.

    NCCL makes the communicator of a group, and takes its memory, at the first collective on it. There are two groups:
    the default one, for the gradients of stages 0 and 1, whose NCCL side nothing else uses before DeepSpeed's
    barrier at the end of the first save; and DeepSpeed's copy of it, for weights and all other gradients. One that is
    made only then may fail for want of memory, or wait for a rank that is already busy, hours after the start.
    """
    groups = list(
        torch.distributed.distributed_c10d._world.pg_map
    )  # in the order in which all ranks made them
    for group in groups:
        torch.distributed.all_reduce(torch.zeros(1, device=device), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    log.info("connected %d process groups", len(groups))
