"""Batches made by DataLoader workers, in the order in which they are asked for."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Generator as RandomGenerator
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from rating_train.data.workers.shared_blocks import NONE, Room, SharedBlocks, plain_room
from rating_train.data.workers.shared_memory_need import worker_batches
from rating_train.errors import UserError
from rating_train.processes import die_with_parent, give_back_freed_memory


class WithImages(Protocol):
    """What a worker makes: some tensors, of which the images are most of the bytes."""

    @property
    def images(self) -> Tensor | None: ...

    def pin_memory(self) -> Any: ...


Asked = TypeVar("Asked")
Made = TypeVar("Made", bound=WithImages)


@dataclass
class _HandedOver:
    """What a worker made, and the block in which the images lie."""

    made: Any
    worker: int
    block: int
    pinned: bool = False

    def pin_memory(self) -> _HandedOver:
        return _HandedOver(self.made.pin_memory(), self.worker, self.block, pinned=True)


class _Maker:
    """A dataset of what is asked for: makes it, with its images in a block of this worker."""

    def __init__(self, make: Callable[[Any, Room], Any], blocks: SharedBlocks | None) -> None:
        self._make, self._blocks = make, blocks

    def __getitem__(self, asked: Any) -> _HandedOver:
        worker = get_worker_info()
        if worker is None or self._blocks is None:
            return _HandedOver(self._make(asked, plain_room), 0, NONE)
        blocks, taken = self._blocks, [NONE]

        def room(size_bytes: int) -> Tensor:
            taken[0], memory = blocks.take(worker.id, size_bytes)
            return memory

        return _HandedOver(self._make(asked, room), worker.id, taken[0])


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
        while (handed := next(batches, None)) is not None:
            made = handed.made
            if blocks is not None:
                blocks.receive(handed.worker, handed.block, None if handed.pinned else made.images)
            del handed
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
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


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
