"""Batches made by DataLoader workers, in the order in which they are asked for."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator as RandomGenerator
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from rating_train.data.workers.memory_need import worker_batches
from rating_train.data.workers.packing import pack, unpack
from rating_train.data.workers.shared_blocks import Lent, Room, SharedBlocks, plain_room
from rating_train.errors import UserError
from rating_train.processes import die_with_parent, give_back_freed_memory


class Pinnable(Protocol):
    """What a worker makes. It can be pickled."""

    def pin_memory(self) -> Any: ...


Asked = TypeVar("Asked")
Made = TypeVar("Made", bound=Pinnable)


@dataclass
class _Packed:
    """What a worker made, on its way to the rank: where it lies.

    It is small. A message that a pipe takes in parts could end in the middle, where a worker is killed: the rank would
    wait for the rest for ever.
    """

    lent: Lent | None
    begin: int = 0
    end: int = 0
    alone: Tensor | None = None  # the bytes, in memory that torch hands over, where no block was free

    def unpack(self) -> tuple[Any, mmap.mmap | None]:
        if self.lent is None:
            assert self.alone is not None
            return unpack(self.alone.numpy().tobytes()), None
        memory = self.lent.map()
        return unpack(memoryview(memory)[self.begin : self.end], memory), memory

    def pin_memory(self) -> _Pinned:
        """Copy to pinned memory. Called by the DataLoader's pinning thread."""
        return _Pinned(self.unpack()[0].pin_memory(), self.lent)


@dataclass
class _Pinned:
    """What a worker made, in pinned memory, and the block that it no longer needs."""

    made: Any
    lent: Lent | None


class _Maker:
    """A dataset of what is asked for: makes it, in a worker with its images in a block."""

    def __init__(self, make: Callable[[Any, Room], Any], blocks: SharedBlocks | None) -> None:
        self._make, self._blocks = make, blocks

    def __getitem__(self, asked: Any) -> Any:
        worker = get_worker_info()
        blocks = self._blocks
        if worker is None or blocks is None:
            return self._make(asked, plain_room)
        taken: list[tuple[Lent | None, Tensor]] = []

        def room(size_bytes: int) -> Tensor:
            taken.append(blocks.take(worker.id, size_bytes))
            return taken[0][1]

        made = self._make(asked, room)
        lent, memory = taken[0] if taken else (None, None)
        content = pack(made, memory if lent else None)
        begin = len(memory) if lent and memory is not None else 0
        if lent is None:  # no image, or no block was free
            lent, _ = blocks.take(worker.id, len(content))
        if lent is None:
            return _Packed(None, alone=torch.frombuffer(bytearray(content), dtype=torch.uint8))
        return _Packed(blocks.write(lent, begin, content), begin, begin + len(content))


class _Once:
    """An iterator as a sampler: the DataLoader takes the next whenever a worker is free for it."""

    def __init__(self, asked: Iterator[Any]) -> None:
        self._asked = asked

    def __iter__(self) -> Iterator[Any]:
        return self._asked


def read_in_workers(
    make: Callable[[Asked, Room], Made], asked: Iterator[Asked], workers: int, prefetch: int, pinned: bool
) -> Generator[Made, None, None]:
    """Yield what ``make`` gives for each of ``asked``, in that order. No worker outlives the iteration.

    Args:
        make: called in a worker with what is asked for and with what gives it room for the images, once at most.
        asked: may be endless; taken as workers are free, by worker 0, 1, ... in turn.
        workers: number of processes; 0 makes all here.
        prefetch: what each worker keeps ready.
        pinned: whether the tensors are copied to pinned memory: for a GPU.

    Raises:
        UserError: as a worker raised it.
        RuntimeError: a worker died.
    """
    blocks = SharedBlocks(workers, worker_batches(workers, prefetch)) if workers else None
    loader: DataLoader[Any] = DataLoader(
        _Maker(make, blocks),  # type: ignore[arg-type]
        batch_size=None,  # what is asked for is a batch already
        sampler=_Once(asked),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,  # the default would look into it for tensors
        prefetch_factor=prefetch if workers else None,
        pin_memory=pinned,
        worker_init_fn=_set_up_worker,
        # The loader draws a seed when it starts; from the global generator, that would change the dropout of a
        # resumed run, and of every run that evaluates in between.
        generator=RandomGenerator().manual_seed(0),
    )
    if workers:
        give_back_freed_memory()
    batches = iter(loader)
    try:
        while (made := next(batches, None)) is not None:
            if blocks is not None:
                made = _received(made, blocks)
            yield made
            del made
            if blocks is not None:
                blocks.release()
    except UserError as e:
        raise _as_raised(e) from None
    except (ConnectionError, EOFError) as e:  # where torch itself says nothing of the process
        raise RuntimeError(
            "a DataLoader worker of this rank died while it handed over a batch: killed, perhaps for lack of memory "
            "(fewer data.workers, or a smaller data.prefetch_batches, need less)"
        ) from e
    finally:
        # Now, not when the last traceback is collected: at the end of this process, multiprocessing would send
        # SIGTERM to DataLoader workers that are left, which they ignore, and wait for them for ever.
        if blocks is not None:
            batches._shutdown_workers()  # type: ignore[attr-defined]
            blocks.close()


def _received(handed: _Packed | _Pinned, blocks: SharedBlocks) -> Any:
    """Return what a worker made, and note what becomes of its block."""
    made, memory = (handed.made, None) if isinstance(handed, _Pinned) else handed.unpack()
    if handed.lent:
        blocks.receive(handed.lent, memory)
    return made


def _as_it_is(made: Any) -> Any:
    return made


def _as_raised(error: UserError) -> UserError:
    """Return the error as a DataLoader worker raised it.

    Torch hands it over as an error of the same class whose text is the complete traceback, of which the last line
    is the error's own.
    """
    _, marker, text = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
    return UserError(text) if marker else error


def _set_up_worker(_worker: int) -> None:
    """Have a DataLoader worker leave stopping to its rank, and never outlive it.

    A scheduler signals every process of a job. A worker that ended by the signal would fail the step in which its
    rank wants to save.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # elsewhere than on Linux, torch's own watchdog takes seconds
