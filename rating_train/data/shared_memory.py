"""Names of the shared memory that a dataset of streaming keeps on each node.

Streaming walks its names 000000, 000001, ... and takes the first that is free. Two jobs that start on one machine at
the same moment (the tasks of a job array), or two "nodes" of one job that are one machine, find the same one, and the
later of them dies of FileExistsError. Here the leader of each node claims a number drawn at random, which only one
process can create, and tells it to the other ranks of its node.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator

import streaming.base.dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path, _pack_locals
from streaming.base.world import World

from rating_train.distributed.collectives import all_gather, all_or_none

_NUMBERS = 10**6  # streaming writes six digits


@contextlib.contextmanager
def claimed_names() -> Iterator[None]:
    """Datasets made in this context take their names by :func:`claim` instead of streaming's own search."""
    stock = streaming.base.dataset.get_shm_prefix
    streaming.base.dataset.get_shm_prefix = claim  # type: ignore[assignment]
    try:
        yield
    finally:
        streaming.base.dataset.get_shm_prefix = stock


def claim(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """In place of ``get_shm_prefix``: (number, the block that holds it). A collective.

    Args:
        streams_local: directories of the streams, recorded in the block as streaming does it.
        streams_remote: not used: the cache of a remote has a lock of its own (see :mod:`.remote`).
        world: streaming's own world: the place of this rank.
        retry: numbers to try.

    Raises:
        RankFailure: no shared memory could be made on some node (/dev/shm is full, or not writable).
    """
    claimed = all_or_none(lambda: _create(streams_local, retry) if world.is_local_leader else None)
    numbers = all_gather(claimed[0] if claimed else None)
    if claimed:
        return claimed
    number = numbers[world.node * world.ranks_per_node]
    assert number is not None, "the leader of this node has claimed one"
    return number, SharedMemory(_get_path(number, LOCALS), False)


def _create(local: list[str], retry: int) -> tuple[int, SharedMemory]:
    for _ in range(retry):
        number = secrets.randbelow(_NUMBERS)
        if _is_used(number):
            continue
        data = _pack_locals(local, number)
        with contextlib.suppress(FileExistsError):  # somebody was faster: another number
            block = SharedMemory(_get_path(number, LOCALS), True, len(data))
            block.buf[: len(data)] = data
            return number, block
    raise RuntimeError(f"no free name for shared memory in {retry} tries")


def _is_used(number: int) -> bool:
    """Whether anything of this number is there: of a live dataset, or left by a job that was killed."""
    blocks = [os.path.join("/dev/shm", _get_path(number, name)) for name in SHM_TO_CLEAN]
    locks = [
        os.path.join(tempfile.gettempdir(), _get_path(number, name))
        for name in (BARRIER_FILELOCK, CACHE_FILELOCK)
    ]
    return any(map(os.path.exists, blocks + locks))
