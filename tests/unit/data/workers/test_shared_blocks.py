"""Blocks of shared memory: never filled while they are read, used again afterwards, gone with their owner."""

from __future__ import annotations

import gc
import os
import pickle
from multiprocessing.reduction import ForkingPickler

import torch

from rating_train.data.workers.shared_blocks import SharedBlocks

SIZE = 5000


def open_blocks() -> int:
    names = (
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    )
    return sum("rating_train-batch" in name for name in names)


def test_a_worker_takes_no_block_that_its_rank_reads() -> None:
    blocks = SharedBlocks(workers=1, blocks=2)
    first, second, third = (blocks.take(0, SIZE)[0] for _ in range(3))
    assert first and second and third is None, "the third lies outside of the blocks"
    mapped = [first.map(), second.map()]
    views = [torch.frombuffer(memory, dtype=torch.uint8) for memory in mapped]
    blocks.receive(first, mapped[0])
    blocks.receive(second, mapped[1])
    mapped.clear()
    blocks.release()
    assert blocks.take(0, SIZE)[0] is None, "all are still read"
    views = [views[0], views[1][:10]]
    blocks.release()
    assert blocks.take(0, SIZE)[0] is None, "the first, and a view of the second"
    views.pop(0)
    blocks.release()
    again, memory = blocks.take(0, SIZE)
    assert again == first and len(memory) == SIZE and len(views[0]) == 10
    blocks.receive(again, None)  # copied to pinned memory
    assert blocks.take(0, SIZE)[0] == first
    assert blocks.take(0, 0)[0] is None, "nothing lies nowhere"


def test_what_the_worker_writes_is_what_the_rank_reads() -> None:
    blocks = SharedBlocks(workers=2, blocks=1)
    for worker in (0, 1):
        lent, memory = blocks.take(worker, SIZE)
        memory.fill_(worker + 1)
        assert lent and set(lent.map()[:SIZE]) == {worker + 1}


def test_a_block_grows_with_what_is_asked_for_and_old_views_stay() -> None:
    blocks = SharedBlocks(workers=1, blocks=1)
    lent, small = blocks.take(0, 10)
    assert lent
    small.fill_(7)
    blocks.receive(lent, None)
    grown, large = blocks.take(0, SIZE)
    assert grown and grown.number == lent.number and len(grown.map()) >= SIZE
    large.fill_(8)
    assert small.tolist() == [8] * 10, "one memory"
    blocks.receive(grown, None)
    smaller, part = blocks.take(0, 100)
    assert smaller and smaller.size_bytes == grown.size_bytes and len(part) == 100


def test_what_is_written_behind_the_images_lets_the_block_grow() -> None:
    blocks = SharedBlocks(workers=1, blocks=1)
    lent, images = blocks.take(0, SIZE)
    assert lent
    images.fill_(7)
    content = bytes(range(256)) * (2 * lent.size_bytes // 256)
    written = blocks.write(lent, SIZE, content)
    memory = written.map()
    assert set(memory[:SIZE]) == {7} and memory[SIZE : SIZE + len(content)] == content
    images.fill_(8)
    assert set(memory[:SIZE]) == {8}, "one memory, also where it was mapped before"


def test_blocks_are_shared_with_a_process_that_gets_them_pickled() -> None:
    """As one that is not forked does."""
    blocks = SharedBlocks(workers=2, blocks=2)
    copy = pickle.loads(ForkingPickler.dumps(blocks))
    lent, memory = copy.take(1, SIZE)
    memory.fill_(9)
    assert set(lent.map()[:SIZE]) == {9}, "by the descriptor that this process has"
    assert [blocks.take(1, SIZE)[0].number for _ in range(1)] == [3], "2 is taken"


def test_no_descriptor_outlives_its_blocks() -> None:
    gc.collect()
    before = open_blocks()
    blocks = SharedBlocks(workers=3, blocks=4)
    lent = blocks.take(2, SIZE)[0]
    view = torch.frombuffer(lent.map(), dtype=torch.uint8)
    assert open_blocks() > before
    blocks.close()
    del blocks
    assert open_blocks() == before + 1, "that of the mapping which is still read"
    assert len(view) == lent.size_bytes and not view.any()
    del view
    assert open_blocks() == before
