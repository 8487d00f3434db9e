"""What DataLoader workers hand over stays as it is for as long as it is read, and their memory is used again."""

from __future__ import annotations

import gc
import os
import re
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rating_train.data.workers import reading
from rating_train.data.workers.memory_need import worker_batches
from rating_train.data.workers.reading import read_in_workers
from rating_train.data.workers.shared_blocks import Room, SharedBlocks
from rating_train.errors import UserError

pytestmark = pytest.mark.timeout(120)

SIZE = 5000


@dataclass
class Made:
    """A tensor full of the number that was asked for, and the process that made it."""

    images: Tensor
    process: int
    file: int  # in which the worker wrote them

    def pin_memory(self) -> Made:
        """Stand for a copy to pinned memory, which takes a GPU."""
        return Made(self.images.clone(), self.process, self.file)


def make(number: int, room: Room) -> Made:
    if number == 99:
        raise UserError("number 99 is damaged", where="here")
    memory = room(SIZE if number % 7 else 2 * SIZE)  # sizes differ
    return Made(memory.fill_(number).view(-1, 10), os.getpid(), files_of(memory))


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


def files_of_dev_shm() -> set[str]:
    """Return the files of tensors, not those of a queue's semaphores, which take a page."""
    return set(re.findall(r"/dev/shm/torch_\S+", Path("/proc/self/maps").read_text()))


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_is_read_no_more_is_used_again(workers: int) -> None:
    seen, before = [], files_of_dev_shm()
    for number, made in enumerate(read_in_workers(make, iter(range(1, 60)), workers, 2, False), start=1):
        assert (made.images == number).all()
        seen.append(files_of(made.images))
        assert files_of_dev_shm() <= before, "which is small in many a container"
    assert 0 not in seen, "all lie in one"
    assert len(set(seen)) <= workers * worker_batches(workers, 2), "a few files serve all batches"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_pinned_needs_its_block_no_more(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else torch starts no pinning thread.
    for name, value in {
        "is_available": True,
        "current_accelerator": torch.device("cpu"),
        "current_device_index": 0,
        "set_device_index": None,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, found=value, **__: found)
    kept = list(read_in_workers(make, iter(range(1, 40)), workers, prefetch=2, pinned=True))
    for number, made in enumerate(kept, start=1):
        assert (made.images == number).all()
        assert files_of(made.images) == 0, "in memory of this process alone"
        assert made.file, "and all came in a block, which was free again"


def test_the_memory_of_all_workers_is_gone_when_the_last_batch_is_read() -> None:
    gc.collect()
    gc.disable()  # it is not left to the collector
    try:
        before = len(os.listdir("/proc/self/fd"))
        assert len([made.process for made in read_in_workers(make, iter(range(1, 20)), 2, 2, False)]) == 19
        # A thread of multiprocessing closes its end of the pipe to each worker, a moment after the queue was closed.
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [0, 10**6])
def test_a_message_is_written_to_the_pipe_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed in the middle of one would leave its rank waiting for the rest, for ever."""
    monkeypatch.setattr(reading, "get_worker_info", lambda: SimpleNamespace(id=0))
    blocks = SharedBlocks(workers=1, blocks=2)

    def many(number: int, room: Room) -> tuple[Tensor, Tensor]:
        return room(size).fill_(number), torch.full((100_000,), number)

    maker = reading._Maker(many, blocks)
    for number, in_block in ((1, True), (2, True), (3, False)):
        packed = maker[number]
        assert (packed.lent is not None) == in_block
        assert len(ForkingPickler.dumps((number, packed))) < select.PIPE_BUF
        (images, others), _ = packed.unpack()
        assert len(images) == size and (images == number).all() and (others == number).all()


def test_an_error_in_a_worker_is_the_one_that_it_raised() -> None:
    asked: Iterator[int] = iter([1, 2, 99])
    with pytest.raises(UserError, match=r"^number 99 is damaged") as caught:
        list(read_in_workers(make, asked, 1, 2, False))
    assert "Traceback" not in str(caught.value)
