"""From a checked dataset to batches, in the order of :mod:`.order`, from any step on."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from rating_train.config.schema import DataConfig
from rating_train.data.cache import Fetched, Source
from rating_train.data.collate import Batch, Collator
from rating_train.data.order import Ids, SampleOrder, digest, epoch_of_step, evaluation_batches, rank_part
from rating_train.data.prompt import PromptEncoder
from rating_train.data.stale_memory import claim_blocks, sweep_stale
from rating_train.data.streaming_dataset import (
    OrderedDataset,
    check_split,
    fetch_split,
    open_split,
    shuffled_epoch,
)
from rating_train.distributed.collectives import all_gather, on_main
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.processes import die_with_parent

log = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """The training split of one rank. ``manifest`` is the dataset's; ``samples`` is N of one epoch."""

    dataset: OrderedDataset
    order: SampleOrder
    collator: Collator
    config: DataConfig
    world: World
    manifest: dict[str, Any]
    epoch_digest: Callable[[int], str]

    @property
    def samples(self) -> int:
        return self.order.samples

    def order_digest(self, step: int) -> str:
        """Digest of the order of the epoch in which ``step`` starts."""
        return self.epoch_digest(epoch_of_step(step, self.samples, self.order.global_items))

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps [first_step, last_step), in order.

        The count of steps done is all the state there is: a resumed run calls this with it.
        """
        step = first_step
        while step < last_step:
            end = min(last_step, self.order.segment_end(step))
            ids = rank_part(self.order.batches(step, end), self.world.rank, self.world.size)
            yield from _load(self.dataset, ids, self.collator, self.config)
            step = end


@dataclass
class EvaluationData:
    """A split to evaluate: every sample on exactly one rank, equal numbers of batches on all ranks."""

    dataset: OrderedDataset
    collator: Collator
    config: DataConfig
    samples: int
    ids: Ids

    def batches(self) -> Generator[Batch, None, None]:
        """This rank's batches; the last ones may repeat the last sample (see ``evaluation_batches``)."""
        return _load(self.dataset, self.ids, self.collator, self.config)


def open_training(
    config: DataConfig, prompt: PromptEncoder, world: World, global_items: int, rank_items: int
) -> TrainingData:
    """Check and open the training split. A collective."""
    manifest, dataset = _open(config, config.train_split, rank_items, world)
    epoch_ids = functools.lru_cache(maxsize=2)(
        lambda epoch: shuffled_epoch(
            dataset.samples_per_shard,
            seed=config.shuffle_seed,
            epoch=epoch,
            block_samples=config.shuffle_block_samples,
            canonical_nodes=config.num_canonical_nodes,
            shuffle=config.shuffle,
        )
    )
    order = SampleOrder(int(dataset.num_samples), global_items, epoch_ids)
    # Asked for at every checkpoint: at 16 million items, hashing an order once per epoch is enough.
    epoch_digest = functools.lru_cache(maxsize=2)(lambda epoch: digest(epoch_ids(epoch)))
    return TrainingData(
        dataset, order, Collator(prompt, config.image_px), config, world, manifest, epoch_digest
    )


def open_evaluation(
    config: DataConfig, prompt: PromptEncoder, world: World, split: str, rank_items: int, max_items: int = 0
) -> EvaluationData:
    """Check and open a split for evaluation. A collective. ``max_items`` 0 takes the whole split."""
    _, dataset = _open(config, split, rank_items, world)
    samples = int(dataset.num_samples)
    if max_items and max_items < samples:
        log.info("evaluating the first %d of %d items of %s", max_items, samples, split)
        samples = max_items
    ids = evaluation_batches(samples, world.rank, world.size, rank_items)
    return EvaluationData(dataset, Collator(prompt, config.image_px), config, samples, ids)


def _open(
    config: DataConfig, split: str, rank_items: int, world: World
) -> tuple[dict[str, Any], OrderedDataset]:
    """Check a split, or fetch its index from the remote, and open it: (manifest, dataset). A collective."""
    source = Source(
        path=config.path,
        remote=config.remote,
        cache_limit_bytes=config.cache_limit_mb << 20,
        predownload_items=config.predownload_items,
        verify_hash=config.verify == "first_read",
    )
    if world.local_rank == 0:
        sweep_stale()
    fetched: Fetched | None = None
    if source.remote:
        fetched = _on_node_leaders(lambda: fetch_split(source, split), world)
        manifest = on_main(lambda: fetched.manifest if fetched else {})
    else:
        manifest = on_main(lambda: check_split(source.path, split))
    dataset = open_split(source, split, rank_items, world, fetched)
    dataset.claim = claim_blocks([dataset])
    return manifest, dataset


def _on_node_leaders(action: Callable[[], Fetched], world: World) -> Fetched | None:
    """Run ``action`` on one rank of every node; what fails on any of them is raised on every rank."""
    result, failure = None, ""
    if world.local_rank == 0:
        try:
            result = action()
        except UserError as e:
            failure = str(e)
        except OSError as e:
            failure = f"the cache cannot be written ({e})"
    failures = [text for text in all_gather(failure) if text]
    if failures:
        error = UserError(failures[0])
        error.on_all_ranks = True
        raise error
    return result


def _load(
    dataset: OrderedDataset, ids: Ids, collator: Collator, config: DataConfig
) -> Generator[Batch, None, None]:
    """Read (K, B) sample ids as K batches, through ``config.workers`` processes."""
    workers = min(config.workers, len(ids))
    dataset.set_batches(ids)
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=ids.shape[1],
        num_workers=workers,
        collate_fn=collator,
        prefetch_factor=config.prefetch_batches if workers else None,
        pin_memory=torch.cuda.is_available(),
        drop_last=False,
        worker_init_fn=set_up_worker,
        # The loader draws a seed when it starts; from the global generator, that would change the dropout of a
        # resumed run, and of every run that evaluates in between.
        generator=torch.Generator().manual_seed(0),
    )
    count = 0
    with contextlib.closing(iterate(loader)) as batches:
        for batch in batches:
            count += 1
            yield batch
    if count != len(ids):
        raise RuntimeError(f"the loader gave {count} of {len(ids)} batches")


def iterate(loader: DataLoader) -> Generator[Any, None, None]:
    """Yield what a DataLoader gives; its workers' errors as they were raised there. No worker outlives the iteration.

    Raises:
        RuntimeError: a worker died.
    """
    batches = iter(loader)
    try:
        yield from batches
    except UserError as e:
        raise _as_raised(e) from None
    except (ConnectionError, EOFError) as e:  # where torch itself says nothing of the process
        raise RuntimeError(
            "a loader process of this rank died while it handed over a batch: killed, perhaps for want of memory "
            "(fewer data.workers, or a smaller data.prefetch_batches, need less)"
        ) from e
    finally:
        # Now, not when the last traceback is collected: at the end of this process, multiprocessing would send
        # SIGTERM to loader processes that are left, which they ignore, and wait for them for ever.
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _as_raised(error: UserError) -> UserError:
    """The error as a loader process raised it.

    Torch hands it over as an error of the same class whose text is the whole traceback, of which the last line
    is the error's own.
    """
    _, marker, text = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")
    return UserError(text) if marker else error


def set_up_worker(_worker: int) -> None:
    """Loader processes leave stopping to their rank, and never outlive it.

    A scheduler signals every process of a job. A loader process that died of it would fail the step in which its
    rank wants to save.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()  # elsewhere than on Linux, torch's own watchdog takes seconds
