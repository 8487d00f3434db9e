"""Shared memory in which DataLoader workers hand images over, used again and again.

Torch takes a new file in /dev/shm for each tensor of each batch. The kernel clears its pages one by one while the
worker writes to them for the first time, which takes longer than tokenizing the batch. Here a worker has a few blocks.
It fills one that its rank no longer reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

#: Gives memory of so many bytes: (N,) uint8, with any content.
Room = Callable[[int], Tensor]

#: The number of no block: of memory that is freed as torch does it.
NONE = -1


def plain_room(size_bytes: int) -> Tensor:
    """Return memory of this process."""
    return torch.empty(size_bytes, dtype=torch.uint8)


class SharedBlocks:
    """The blocks of all workers of a DataLoader. Made by the rank, before its workers start, which get copies.

    A block has one flag in shared memory, which its worker sets when it fills the block, and the rank clears when no
    tensor of its own lies there any more. So each value is written by the one side that waits for the other.

    Args:
        workers: number of DataLoader workers.
        blocks: most blocks of a worker. One that needs more takes memory that is not used again.
    """

    def __init__(self, workers: int, blocks: int) -> None:
        # A tensor, which is also shared with a process that is not forked but gets this pickled.
        self._flags = torch.zeros(workers, blocks, dtype=torch.uint8).share_memory_()
        self._own: dict[int, UntypedStorage] = {}  # of a worker, by number
        self._read: list[tuple[int, int, StorageWeakRef]] = []  # of the rank: worker, number, memory

    def take(self, worker: int, size_bytes: int) -> tuple[int, Tensor]:
        """Take a block that nobody reads: (its number, (N,) uint8). In the worker."""
        if not size_bytes:
            return NONE, plain_room(0)
        flags = self._flags[worker].numpy()
        free = [number for number, lent in enumerate(flags) if not lent]
        if not free:
            return NONE, _tensor(_new(size_bytes), size_bytes)
        number = min(free, key=lambda number: number not in self._own)  # one that is there before a new one
        own = self._own.get(number)
        if own is None or own.nbytes() < size_bytes:
            own = self._own[number] = _new(size_bytes)
        flags[number] = 1
        return number, _tensor(own, size_bytes)

    def receive(self, worker: int, number: int, images: Tensor | None) -> None:
        """Note what a worker has handed over. In the rank.

        Args:
            worker: which one.
            number: of its block.
            images: what lies in it; ``None`` if it was copied elsewhere.
        """
        if number == NONE:
            return
        if images is None:
            self._flags[worker, number] = 0
        else:
            self._read.append((worker, number, StorageWeakRef(images.untyped_storage())))

    def release(self) -> None:
        """Let the workers have the blocks in which no tensor of this process lies any more. In the rank."""
        kept = []
        for worker, number, memory in self._read:
            if memory.expired():
                self._flags[worker, number] = 0
            else:
                kept.append((worker, number, memory))
        self._read = kept


def _new(size_bytes: int) -> UntypedStorage:
    return UntypedStorage._new_shared(size_bytes)


def _tensor(memory: UntypedStorage, size_bytes: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory, 0, (size_bytes,))  # type: ignore[call-overload]
