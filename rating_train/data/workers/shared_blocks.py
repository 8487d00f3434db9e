"""Shared memory in which DataLoader workers hand images over, used again and again.

Torch takes a new file in /dev/shm for each tensor of each batch. The kernel clears its pages one by one while the
worker writes to them for the first time, which takes longer than tokenizing the batch; and a container often has 64 MiB
there, where the worker dies of SIGBUS. Here a worker has a few blocks without a name, whose descriptors it inherits
from its rank. It fills one that its rank no longer reads.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Blocks grow by this many bytes, so that they seldom do.
_STEP = 1 << 20

#: Gives memory of so many bytes: (N,) uint8, with any content.
Room = Callable[[int], Tensor]


def plain_room(size_bytes: int) -> Tensor:
    """Return memory of this process."""
    return torch.empty(size_bytes, dtype=torch.uint8)


class Lent(NamedTuple):
    """A block that a worker has filled for its rank."""

    number: int  # among the blocks of all workers
    descriptor: int  # as the rank has it
    size_bytes: int

    def map(self) -> mmap.mmap:
        """Map the block. In the rank."""
        return mmap.mmap(self.descriptor, self.size_bytes)


class SharedBlocks:
    """The blocks of all workers of a DataLoader. Made by the rank, before its workers start, which get copies.

    A block has one flag in shared memory, which its worker sets when it fills the block, and the rank clears when
    nothing of its own lies there any more. So each value is written by the one side that waits for the other.

    Args:
        workers: number of DataLoader workers.
        blocks: blocks of a worker.
    """

    def __init__(self, workers: int, blocks: int) -> None:
        self._blocks = blocks
        self._files = _Files(1 + workers * blocks)  # the flags, then the blocks
        self._names = tuple(self._files.descriptors)  # of the files, in the rank
        os.ftruncate(self._files.descriptors[0], workers * blocks)
        self._flags = mmap.mmap(self._files.descriptors[0], workers * blocks)
        self._own: dict[int, mmap.mmap] = {}  # of a worker, by number
        self._read: list[tuple[Lent, weakref.ref[mmap.mmap]]] = []  # of the rank

    def take(self, worker: int, size_bytes: int) -> tuple[Lent | None, Tensor]:
        """Take a block that nobody reads: (which, (N,) uint8); where there is none, memory of this process.

        In the worker.
        """
        first = worker * self._blocks
        free = [number for number in range(first, first + self._blocks) if not self._flags[number]]
        if not free or not size_bytes:
            return None, plain_room(size_bytes)
        number = min(free, key=lambda number: number not in self._own)  # one that is there before a new one
        own = self._mapped(number, size_bytes)
        self._flags[number] = 1
        lent = Lent(number, self._names[1 + number], len(own))
        return lent, torch.frombuffer(own, dtype=torch.uint8, count=size_bytes)

    def write(self, lent: Lent, begin: int, content: bytes) -> Lent:
        """Write into a block that was taken, from byte ``begin`` on. It grows where it must. In the worker."""
        end = begin + len(content)
        own = self._mapped(lent.number, end)
        own[begin:end] = content
        return lent._replace(size_bytes=len(own))

    def _mapped(self, number: int, size_bytes: int) -> mmap.mmap:
        """Return a block of at least this size; what lies in it stays. Pages are there once they are written."""
        own = self._own.get(number)
        if own is None or len(own) < size_bytes:
            descriptor, size_bytes = self._files.descriptors[1 + number], -(-size_bytes // _STEP) * _STEP
            os.ftruncate(descriptor, size_bytes)
            own = self._own[number] = mmap.mmap(descriptor, size_bytes)
        return own

    def receive(self, lent: Lent, memory: mmap.mmap | None) -> None:
        """Note what a worker has handed over. In the rank.

        Args:
            lent: which block.
            memory: it, mapped; ``None`` if what lies in it was copied elsewhere.
        """
        if memory is None:
            self._flags[lent.number] = 0
        else:
            self._read.append((lent, weakref.ref(memory)))

    def release(self) -> None:
        """Let the workers have the blocks in which nothing of this process lies any more. In the rank."""
        kept = []
        for lent, memory in self._read:
            if memory() is None:
                self._flags[lent.number] = 0
            else:
                kept.append((lent, memory))
        self._read = kept

    def close(self) -> None:
        """Free the blocks, but for what this process still reads. In the rank, when its workers have ended."""
        self._files.close()

    def __getstate__(self) -> dict[str, Any]:
        """For DataLoader workers that are not forked: they get copies of the descriptors."""
        return {"_blocks": self._blocks, "_files": self._files, "_names": self._names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._flags = mmap.mmap(self._files.descriptors[0], len(self._names) - 1)
        self._own, self._read = {}, []


class _Files:
    """Files in memory that have no name. What is mapped of them stays when they are closed."""

    def __init__(self, count: int) -> None:
        self._start()
        for _ in range(count):
            self.descriptors.append(_new_file())

    def _start(self) -> None:
        self.descriptors: list[int] = []
        self.close = weakref.finalize(self, _close, self.descriptors)

    def __getstate__(self) -> list[Any]:
        return [DupFd(descriptor) for descriptor in self.descriptors]

    def __setstate__(self, copies: list[Any]) -> None:
        self._start()
        self.descriptors += [copy.detach() for copy in copies]


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rating_train-batch")
    with tempfile.TemporaryFile() as f:  # elsewhere than on Linux
        return os.dup(f.fileno())


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
