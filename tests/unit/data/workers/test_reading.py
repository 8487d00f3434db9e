"""What DataLoader workers hand over stays as it is for as long as it is read, and their memory is used again."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rating_train.data.workers.reading import read_in_workers
from rating_train.data.workers.shared_blocks import NONE, Room, SharedBlocks
from rating_train.data.workers.shared_memory_need import worker_batches
from rating_train.errors import UserError

pytestmark = pytest.mark.timeout(120)

SIZE = 5000


@dataclass
class Made:
    """A tensor full of the number that was asked for, and the process that made it."""

    images: Tensor
    process: int

    def pin_memory(self) -> Made:
        """Stand for a copy to pinned memory, which takes a GPU."""
        return Made(self.images.clone(), self.process)


def make(number: int, room: Room) -> Made:
    if number == 99:
        raise UserError("number 99 is damaged", where="here")
    memory = room(SIZE if number % 7 else 2 * SIZE)  # sizes differ
    return Made(memory.fill_(number).view(-1, 10), os.getpid())


def files_of(images: Tensor) -> int:
    """Return the inode of the shared memory in which a tensor lies."""
    address = images.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
        if first <= address < last:
            return int(line.split()[4])
    raise AssertionError("not mapped")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_that_are_kept_keep_their_content(workers: int) -> None:
    kept = list(read_in_workers(make, iter(range(1, 40)), workers, prefetch=2, pinned=False))
    for number, made in enumerate(kept, start=1):
        assert (made.images == number).all(), "in order, and not written over"
    processes = [made.process for made in kept]
    assert len(set(processes)) == max(1, workers)
    assert processes == [processes[i % max(1, workers)] for i in range(39)], "the workers in turn"


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_is_read_no_more_is_used_again(workers: int) -> None:
    seen = []
    for number, made in enumerate(read_in_workers(make, iter(range(1, 60)), workers, 2, False), start=1):
        assert (made.images == number).all()
        seen.append(files_of(made.images))
    # Sizes differ: a block that is too small is replaced once.
    assert len(set(seen)) <= 2 * workers * worker_batches(workers, 2), "a few files serve all batches"


def test_an_error_in_a_worker_is_the_one_that_it_raised() -> None:
    asked: Iterator[int] = iter([1, 2, 99])
    with pytest.raises(UserError, match=r"^number 99 is damaged") as caught:
        list(read_in_workers(make, asked, 1, 2, False))
    assert "Traceback" not in str(caught.value)


def test_a_worker_takes_no_block_that_its_rank_reads() -> None:
    blocks = SharedBlocks(workers=1, blocks=2)
    taken = [blocks.take(0, SIZE)[0] for _ in range(3)]
    assert taken == [0, 1, NONE], "the third lies outside of the blocks"
    mapped = [torch.zeros(SIZE) for _ in taken]  # as the rank's mappings are: not the worker's tensors
    for number, images in zip(taken, mapped, strict=True):
        blocks.receive(0, number, images)
    blocks.release()
    assert blocks.take(0, SIZE)[0] == NONE, "all are still read"
    mapped, view = mapped[:1], mapped[1][:10]
    del images
    blocks.release()
    assert blocks.take(0, SIZE)[0] == NONE, "the first, and a view of the second"
    mapped.clear()
    blocks.release()
    assert blocks.take(0, SIZE)[0] == 0 and len(view) == 10
    blocks.receive(0, 0, None)  # copied to pinned memory
    assert blocks.take(0, SIZE)[0] == 0
    assert blocks.take(0, 0)[0] == NONE, "nothing lies nowhere"


def test_blocks_are_shared_with_a_process_that_gets_them_pickled() -> None:
    """As one that is not forked does."""
    blocks = SharedBlocks(workers=2, blocks=2)
    pickle.loads(ForkingPickler.dumps(blocks)).take(1, SIZE)
    assert blocks._flags.tolist() == [[0, 0], [1, 0]]
