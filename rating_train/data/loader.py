"""From a checked dataset to batches, in the order of :mod:`.order`, from any step on."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

import torch

from rating_train.config.resolve import source_shares
from rating_train.config.schema import DataConfig, SourceConfig
from rating_train.data.collate import Batch, Collator, Purpose
from rating_train.data.features.collate import collator_of
from rating_train.data.features.identity import check_features, features_of, refuse_features
from rating_train.data.mixture import Mixture, mixed_epoch, source_seed
from rating_train.data.order import FirstReads, Ids, SampleOrder, evaluation_batches, rank_part
from rating_train.data.prompt import PromptEncoder
from rating_train.data.samples.mixed_dataset import MixedDataset
from rating_train.data.samples.open_shards import MOST_OPEN
from rating_train.data.samples.remote import Source
from rating_train.data.samples.streaming_dataset import Request, SplitDataset, fetch_split
from rating_train.data.shuffle import shuffled_epoch
from rating_train.data.workers.reading import read_in_workers
from rating_train.data.workers.shared_blocks import Room
from rating_train.distributed.collectives import all_gather, on_main
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.shards.manifest import check_split, refuse_unlike

log = logging.getLogger(__name__)

T = TypeVar("T")

CPU = torch.device("cpu")
_AHEAD_BATCHES = 8  # of a DataLoader worker, whose shards are fetched ahead where nothing else is asked for

#: One batch of this rank: its sample ids, and the shards that this rank has to check before it reads them.
Row = tuple[Ids, Sequence[int]]


@dataclass
class OpenSplit:
    """A split that was found good, as this rank reads it.

    Attributes:
        dataset: reads samples by id.
        collator: makes batches of them.
        config: the section `data`.
        world: this rank's place.
        sharers: the ranks that read the same files as this one and share the checking of their hashes; ``None`` checks
            nothing.
        pinned: whether batches are made in pinned memory, from which copies to a GPU need not be waited for.
    """

    dataset: SplitDataset | MixedDataset
    collator: Collator
    config: DataConfig
    world: World
    sharers: Sequence[int] | None
    pinned: bool = False
    first_reads: FirstReads = field(init=False)

    def __post_init__(self) -> None:
        self.first_reads = FirstReads(self.dataset.samples_per_shard, self.world.rank, self.sharers)

    def rows(self, batches: Ids) -> Iterator[Row]:
        """Yield this rank's part of global batches, (K, G) sample ids, of which it keeps no more than that part."""
        checks = self.first_reads.of(batches, self.world.size)
        mine = rank_part(batches, self.world.rank, self.world.size)
        return ((row, checks.get(number, ())) for number, row in enumerate(mine))


@dataclass
class TrainingData:
    """The training split of one rank. ``manifests`` are the datasets'; ``samples`` is N of one epoch."""

    split: OpenSplit
    order: SampleOrder
    rank_items: int
    manifests: list[dict[str, Any]]

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each dataset."""
        return [manifest["fingerprint"] for manifest in self.manifests]

    @property
    def samples(self) -> int:
        return self.order.samples

    def order_digest(self, step: int) -> str:
        """Return the digest of the order of the epoch in which ``step`` starts."""
        return self.order.order_digest(step)

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches of the steps [first_step, last_step), in order.

        The number of completed steps is all the state there is: a resumed run calls this with it.
        """
        return load_rows(
            self.split, self._rows(first_step, last_step), last_step - first_step, self.rank_items
        )

    def _rows(self, first_step: int, last_step: int) -> Iterator[Row]:
        for step, end in self.order.segments(first_step, last_step):
            rows = self.split.rows(self.order.batches(step, end))
            if end < last_step:
                self.order.release(end)
            yield from rows


@dataclass
class EvaluationData:
    """A split to evaluate: every sample on exactly one rank, equal numbers of batches on all ranks."""

    split: OpenSplit
    samples: int
    rank_items: int

    def batches(self) -> Generator[Batch, None, None]:
        """Yield this rank's batches; the last ones may repeat the last sample (see ``evaluation_batches``)."""
        every = evaluation_batches(self.samples, 0, 1, self.split.world.size * self.rank_items)
        return load_rows(self.split, self.split.rows(every), len(every), self.rank_items)


def open_training(
    config: DataConfig,
    prompt: PromptEncoder,
    world: World,
    global_items: int,
    rank_items: int,
    device: torch.device = CPU,
    by_length: bool = False,
) -> TrainingData:
    """Check and open the training split of each source, for batches that go to ``device``. A collective.

    Args:
        config: the section `data`.
        prompt: encodes the texts.
        world: this rank's place.
        global_items: items of a global batch.
        rank_items: items of it that one rank reads.
        device: this rank's device.
        by_length: whether the items of a rank's batch are ordered by length, for micro-batches.

    Raises:
        UserError: a source is missing or damaged, or the sources do not go together.
    """
    sources = config.train_sources
    opened = [_open(config, source, config.train_split, world) for source in sources]
    manifests, parts = [manifest for manifest, _ in opened], [dataset for _, dataset in opened]
    passes = [_passes(part, config, number) for number, part in enumerate(parts)]
    dataset: SplitDataset | MixedDataset = parts[0]
    epoch_ids = passes[0]
    if len(parts) > 1:
        dataset = MixedDataset(parts)
        mixture = Mixture([len(part) for part in parts], source_shares(sources))
        paths = [source.path for source in sources]
        _alike(lambda: refuse_unlike(paths, manifests))
        _alike(lambda: mixture.refuse_tiny_shares(paths))
        epoch_ids = functools.partial(mixed_epoch, mixture, passes)
    collator = collator_of(config, sources[0], prompt, Purpose(by_length, slices=False))
    split = _readable(dataset, config, collator, world, device)
    return TrainingData(split, SampleOrder(len(dataset), global_items, epoch_ids), rank_items, manifests)


def _passes(part: SplitDataset, config: DataConfig, number: int) -> Callable[[int], Ids]:
    """Return what gives the ids of a pass over source ``number``, in order."""
    return lambda epoch: shuffled_epoch(
        part.samples_per_shard,
        seed=source_seed(config.shuffle_seed, number),
        epoch=epoch,
        block_samples=config.shuffle_block_samples,
        canonical_nodes=config.num_canonical_nodes,
        shuffle=config.shuffle,
    )


def open_evaluation(
    config: DataConfig,
    prompt: PromptEncoder,
    world: World,
    split: str,
    rank_items: int,
    max_items: int = 0,
    device: torch.device = CPU,
) -> EvaluationData:
    """Check and open a split for evaluation on ``device``. A collective. ``max_items`` 0 takes the complete split."""
    _, dataset = _open(config, config.eval_source, split, world)
    collator = collator_of(config, config.eval_source, prompt)
    opened = _readable(dataset, config, collator, world, device)
    samples = len(dataset)
    if max_items and max_items < samples:
        log.info("evaluating the first %d of %d items of %s", max_items, samples, split)
        samples = max_items
    return EvaluationData(opened, samples, rank_items)


def _open(
    config: DataConfig, where: SourceConfig, split: str, world: World
) -> tuple[dict[str, Any], SplitDataset]:
    """Check a split, or fetch its index from the remote, and open it: (manifest, dataset). A collective."""
    source = Source(where.path, where.remote, where.cache_limit_mb << 20)
    if features_of(config, where) is not None:
        source = Source(config.features)
        manifest = on_main(lambda: check_features(config, split))
    elif source.remote:
        fetched = _on_node_leaders(lambda: fetch_split(source, split), world)
        manifest = on_main(lambda: fetched or {})
    else:
        manifest = on_main(lambda: check_split(source.path, split))
        _alike(lambda: refuse_features(source.path, manifest))
    most_open = max(1, MOST_OPEN // len(config.train_sources))
    return manifest, _alike(lambda: SplitDataset(source, split, most_open))


def _readable(
    dataset: SplitDataset | MixedDataset,
    config: DataConfig,
    collator: Collator,
    world: World,
    device: torch.device,
) -> OpenSplit:
    """Put together what reading the samples takes. A collective."""
    sharers = _sharers(dataset, world) if config.verify == "first_read" else None
    pinned = device.type == "cuda"
    return OpenSplit(dataset, collator, config, world, sharers, pinned)


def _sharers(dataset: SplitDataset | MixedDataset, world: World) -> list[int]:
    """Return the ranks that read the very same files: not copies on the disks of other nodes. A collective."""
    everyone = all_gather(dataset.identity())
    return [rank for rank, identity in enumerate(everyone) if identity == everyone[world.rank]]


def _alike(action: Callable[[], T]) -> T:
    """Run what raises the same :class:`UserError` on every rank, if any: each sees the same files and settings."""
    try:
        return action()
    except UserError as e:
        e.on_all_ranks = True
        raise


def _on_node_leaders(action: Callable[[], dict[str, Any]], world: World) -> dict[str, Any] | None:
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


def _requests(
    dataset: SplitDataset | MixedDataset, rows: Iterable[Row], workers: int, ahead: int
) -> Iterator[Request]:
    """Yield a request for each row, which names the shards of the next ``ahead`` rows of the same worker."""
    rows, stride = iter(rows), max(1, workers)
    window = deque(islice(rows, stride * ahead + 1))
    while window:
        ids, check = window.popleft()
        window.extend(islice(rows, 1))
        coming = [dataset.shards_of(later) for later, _ in list(window)[stride - 1 :: stride][:ahead]]
        yield Request(ids, check, list(dict.fromkeys(chain.from_iterable(coming))))


def load_rows(split: OpenSplit, rows: Iterable[Row], count: int, items: int) -> Generator[Any, None, None]:
    """Read ``count`` rows of ``items`` ids as what the collator makes of them, through ``data.workers`` processes."""
    config = split.config
    workers = min(config.workers, count)
    ahead = -(-config.predownload_items // items) or _AHEAD_BATCHES
    requests = _requests(split.dataset, rows, workers, ahead if config.is_remote else 0)
    read = functools.partial(_read, split.dataset, split.collator)
    done = 0
    with (
        contextlib.closing(split.dataset),
        contextlib.closing(
            read_in_workers(read, requests, workers, config.prefetch_batches, split.pinned)
        ) as batches,
    ):
        for batch in batches:
            done += 1
            yield batch
    if done != count:
        raise RuntimeError(f"the DataLoader gave {done} of {count} batches")


def _read(dataset: SplitDataset | MixedDataset, collate: Collator, request: Request, room: Room) -> Batch:
    return collate(dataset.__getitems__(request), room)
