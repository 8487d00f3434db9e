"""Jobs of 8, 64 and 512 ranks in one process: plans, orders, who checks which shard, and what a rank gathers.

torch's ``fake`` process group has as many ranks as it is told, and its collectives return at once; an all-gather gives
back this rank's own value once for each rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rating_train.config.load import config_from_dict
from rating_train.config.resolve import plan_batch
from rating_train.data.loader import open_evaluation, open_training
from rating_train.data.order import FirstReads, SampleOrder, evaluation_batches, rank_part
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from rating_train.data.shuffle import shuffled_epoch
from rating_train.distributed.collectives import all_gather, gather, max_over_ranks, sum_over_ranks
from rating_train.distributed.groups import connect_groups, limit_collectives
from rating_train.distributed.world import World, detect, export

pytestmark = pytest.mark.timeout(120)

SIZES = [8, 64, 512]
LOCAL = 8
GLOBAL = 1024
SHARD_SAMPLES = np.full(300, 700)  # 210,000 samples

Join = Callable[[int, int], World]


@pytest.fixture
def join() -> Iterator[Join]:
    """Joins a fake process group as one of so many ranks."""
    assert not dist.is_initialized()

    def as_rank(rank: int, size: int) -> World:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        return World(rank, size, rank % LOCAL, LOCAL)

    yield as_rank
    if dist.is_initialized():
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts collectives and the bytes of their tensors, results included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func.overloadpacket.__name__] += 1
            self.bytes += sum(
                t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor)
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_knows_its_place(size: int) -> None:
    nodes = Counter()
    for rank in range(size):
        env = {"MASTER_PORT": "29500"}
        world = World(rank, size, rank % LOCAL, LOCAL)
        export(world, env)
        assert detect(env) == world
        nodes[world.node] += 1
    assert len(nodes) == size // LOCAL and set(nodes.values()) == {LOCAL}
    assert sum(World(r, size, r % LOCAL, LOCAL).is_main for r in range(size)) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("micro", [0, 1, 2])
def test_the_plan_is_exact(size: int, micro: int) -> None:
    plan = plan_batch(GLOBAL, micro, size)
    assert plan.ranks * plan.micro_items * plan.accumulation == GLOBAL and plan.rank_items == GLOBAL // size


def test_the_ranks_of_every_size_read_the_same_global_batches() -> None:
    def epoch(number: int) -> Any:
        return shuffled_epoch(
            SHARD_SAMPLES, seed=5, epoch=number, block_samples=5000, canonical_nodes=1, shuffle=True
        )

    total = int(SHARD_SAMPLES.sum())
    steps = 2 * total // GLOBAL  # across an epoch boundary
    batches = SampleOrder(total, GLOBAL, epoch).batches(0, steps)
    for size in SIZES:
        parts = [rank_part(batches, rank, size) for rank in range(size)]
        assert {part.shape for part in parts} == {(steps, GLOBAL // size)}
        assert np.array_equal(np.concatenate(parts, axis=1), batches)
    assert np.array_equal(np.sort(batches.reshape(-1)[:total]), np.arange(total))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", ["by all", "by each node"])
def test_every_shard_is_checked_by_exactly_one_rank_that_reads_it_first(size: int, shared: str) -> None:
    """On a shared file system by one of all ranks; on copies by one rank of each node."""
    total = int(SHARD_SAMPLES.sum())
    batches = np.random.default_rng(3).permutation(total)[: 24 * GLOBAL].reshape(-1, GLOBAL)
    shard_of = np.repeat(np.arange(len(SHARD_SAMPLES)), SHARD_SAMPLES)
    groups = [list(range(size))]
    if shared == "by each node":  # the first and the last node stand for all
        groups = [list(range(LOCAL)), list(range(size - LOCAL, size))]
    items = GLOBAL // size
    for sharers in groups:
        checks: dict[int, tuple[int, int]] = {}  # shard -> (row, rank)
        for rank in sharers:
            for row, shards in FirstReads(SHARD_SAMPLES, rank, sharers).of(batches, size).items():
                for shard in shards:
                    assert shard not in checks, "checked twice"
                    checks[shard] = row, rank
        read = batches.reshape(-1, size, items)[:, sharers]
        assert set(checks) == set(shard_of[read.reshape(-1)].tolist())
        for shard, (row, rank) in checks.items():
            assert shard in shard_of[rank_part(batches[row : row + 1], rank, size)]
            assert shard not in shard_of[read[:row].reshape(-1)], "some rank read it in an earlier step"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("samples", [1, 999, 10_000])
def test_an_evaluation_covers_every_sample_with_equal_numbers_of_batches(size: int, samples: int) -> None:
    parts = [evaluation_batches(samples, rank, size, 4) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    assert set(np.concatenate(parts, axis=None).tolist()) == set(range(samples))


@pytest.mark.parametrize("size", SIZES)
def test_sums_flags_and_objects_at_the_last_rank(join: Join, size: int) -> None:
    world = join(size - 1, size)
    value = {"rank": world.rank, "text": "x" * 100}
    assert all_gather(value) == [value] * size
    assert gather(value) is None, "only rank 0 gets the list"
    assert sum_over_ranks([1.5, 2.0]) == [1.5, 2.0] and max_over_ranks(3) == 3
    limit_collectives(10)
    with Collectives() as used:
        connect_groups(torch.device("cpu"))
    assert used.calls == {"allreduce_": 1}, "one small all-reduce for each group"


@pytest.mark.parametrize("size", SIZES)
def test_what_opening_a_dataset_gathers_grows_with_ranks_only(join: Join, size: int, demo: Path) -> None:
    """At 512 ranks a few hundred KB, whatever the number of samples and shards."""
    world = join(0, size)
    settings = {"path": str(demo / "data"), "image_px": 64, "text_tokens": 96, "workers": 0}
    config = config_from_dict({"data": settings}).data
    prompt = PromptEncoder(
        load_tokenizer(str(demo / "model")), visual_tokens=4, text_tokens=96, field_chars=100
    )
    with Collectives() as used:
        data = open_training(config, prompt, world, GLOBAL, GLOBAL // size)
        evaluation = open_evaluation(config, prompt, world, "val", 4)
    assert data.split.sharers == list(range(size))
    (ids, _), *_ = list(data._rows(0, 1))
    assert len(ids) == GLOBAL // size
    assert len(list(evaluation.split.rows(evaluation_batches(50, 0, 1, 4 * size)))) == -(-50 // (4 * size))
    print(f"{size} ranks: {sum(used.calls.values())} collectives, {used.bytes / 1024:.0f} KiB of tensors")
    assert sum(used.calls.values()) <= 12
    assert used.bytes < 64 * 1024 + size * 2000
