"""From shards to batches in one process: order, what is hashed by whom, damage, what DataLoader workers are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rating_train.config.load import config_from_dict
from rating_train.data.loader import OpenSplit, TrainingData, _requests, open_evaluation, open_training
from rating_train.data.order import rank_part
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from rating_train.data.samples import streaming_dataset
from rating_train.data.samples.streaming_dataset import SplitDataset
from rating_train.data.workers import reading
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.shards.mds_read import iter_sampled, read_index
from tests.helpers.small_shards import flip_a_byte

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def prompt(demo: Path) -> PromptEncoder:
    return PromptEncoder(
        load_tokenizer(str(demo / "model")), visual_tokens=4, text_tokens=96, field_chars=100
    )


Open = Callable[..., TrainingData]


@pytest.fixture
def training(prompt: PromptEncoder) -> Open:
    """Opens a training split for one of some simulated ranks, which need not be processes."""

    def open_one(
        path: Path, *, world: World | None = None, global_items: int = 12, sharers: Any = (), **data: Any
    ) -> TrainingData:
        settings = {"path": str(path), "image_px": 64, "text_tokens": 96, "workers": 0, **data}
        config = config_from_dict({"data": settings}).data
        opened = open_training(config, prompt, World(), global_items, global_items)
        if world is not None:
            split = OpenSplit(opened.split.dataset, opened.split.collator, config, world, sharers)
            opened = TrainingData(split, opened.order, global_items // world.size, opened.manifests)
        return opened

    return open_one


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that are hashed, in order."""
    paths: list[Path] = []
    original = streaming_dataset.shard_problem

    def counting(path: Path, *rest: Any) -> str:
        paths.append(path)
        return original(path, *rest)

    monkeypatch.setattr(streaming_dataset, "shard_problem", counting)
    return paths


def test_workers_change_nothing(sharded: Path, training: Open) -> None:
    orders = []
    for workers in (0, 2):
        data = training(sharded, workers=workers)
        orders.append([batch.ids for batch in data.batches(0, 45)])  # two epoch boundaries
        assert [batch.ids for batch in data.batches(17, 20)] == orders[0][17:20]
    assert orders[0] == orders[1]
    stored = [s["id"] for s in iter_sampled([sharded / "train"])]
    ids = data.order.batches(0, 45)
    assert orders[0] == [[stored[i] for i in row] for row in ids]


@pytest.mark.parametrize("shared", [True, False])
def test_all_nodes_together_hash_each_copy_of_the_dataset_once(
    shared: bool, sharded: Path, training: Open, hashed: list[Path]
) -> None:
    """Four ranks on two nodes, over more than one epoch: every byte once, or once per node that has its own files."""
    sizes = {Path(s["raw_data"]["basename"]): s["raw_data"]["bytes"] for s in read_index(sharded / "train")}
    total = sum(sizes.values())
    bytes_of_node = [0, 0]
    read: list[list[list[str]]] = []
    for rank in range(4):
        node = rank // 2
        world = World(rank=rank, size=4, local_rank=rank % 2, local_size=2)
        sharers = range(4) if shared else range(2 * node, 2 * node + 2)
        before = len(hashed)
        data = training(sharded, world=world, sharers=sharers)
        read.append([batch.ids for batch in data.batches(0, 30)])
        bytes_of_node[node] += sum(sizes[Path(p.name)] for p in hashed[before:])
    assert sum(bytes_of_node) == (total if shared else 2 * total)
    if shared:
        assert min(bytes_of_node) > 0
    else:
        assert bytes_of_node == [total, total]
    order = training(sharded).order.batches(0, 30)
    stored = [s["id"] for s in iter_sampled([sharded / "train"])]
    for rank in range(4):
        assert read[rank] == [[stored[i] for i in row] for row in rank_part(order, rank, 4)]


def test_a_later_epoch_and_a_second_evaluation_hash_nothing(
    sharded: Path, training: Open, prompt: PromptEncoder, hashed: list[Path]
) -> None:
    data = training(sharded)
    list(data.batches(0, 30))
    shards = len(read_index(sharded / "train"))
    assert len(hashed) == len(set(hashed)) == shards
    list(data.batches(30, 60))
    assert len(hashed) == shards
    config = config_from_dict(
        {"data": {"path": str(sharded), "image_px": 64, "text_tokens": 96, "workers": 0}}
    ).data
    evaluation = open_evaluation(config, prompt, World(), "val", 7)
    for _ in range(2):
        assert sum(len(batch) for batch in evaluation.batches()) >= evaluation.samples
    assert len(hashed) == shards + len(read_index(sharded / "val"))
    list(training(sharded, verify="size").batches(0, 30))
    assert len(hashed) == shards + len(read_index(sharded / "val")), (
        "and nothing where only sizes are checked"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_named_and_none_of_it_is_read_but_all_before_it(
    workers: int, data: Path, training: Open
) -> None:
    entries = read_index(data / "train")
    bad = data / "train" / entries[2]["raw_data"]["basename"]
    flip_a_byte(bad, 4000)
    opened = training(data, workers=workers, shuffle=False, prefetch_batches=1)
    good = entries[0]["samples"] + entries[1]["samples"]
    steps = 3 * good // 12
    read: list[list[str]] = []
    with pytest.raises(UserError, match=rf"shard train/{bad.name} has xxh64 .* instead .*{bad}"):
        for batch in opened.batches(0, steps):
            read.append(batch.ids)
    assert len(read) == good // 12, "every batch that the damaged shard has no part in"


def test_a_shard_that_goes_while_reading_is_named(data: Path, training: Open) -> None:
    opened = training(data, shuffle=False)
    gone = data / "train" / read_index(data / "train")[3]["raw_data"]["basename"]
    gone.unlink()
    with pytest.raises(UserError, match=rf"shard train/{gone.name} is missing .*{gone}"):
        list(opened.batches(0, 20))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_worker_is_told_the_shards_of_its_own_next_batches(sharded: Path, workers: int, ahead: int) -> None:
    dataset = SplitDataset(sharded, "train")
    ids = np.random.default_rng(1).permutation(len(dataset))[:200].reshape(-1, 5)
    requests = list(_requests(dataset, ((row, ()) for row in ids), workers, ahead))
    assert np.array_equal(np.stack([r.ids for r in requests]), ids)
    stride = max(1, workers)
    for number, request in enumerate(requests):
        rows = range(number + stride, number + stride * ahead + 1, stride)
        later = [s for row in rows if row < len(ids) for s in dataset.shards_of(ids[row])]
        assert request.ahead == list(dict.fromkeys(later))


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_the_device_that_is_used_not_for_one_that_is_there(
    sharded: Path, prompt: PromptEncoder, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool
) -> None:
    """Pinning on a machine with GPUs initialises CUDA, also where ``train.device`` is cpu."""
    asked: list[bool] = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args: Any, **options: Any) -> None:
            asked.append(options.pop("pin_memory"))
            super().__init__(*args, **options)

    monkeypatch.setattr(reading, "DataLoader", Loader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = config_from_dict(
        {"data": {"path": str(sharded), "image_px": 64, "text_tokens": 96, "workers": 0}}
    ).data
    place = torch.device(device)
    training = open_training(config, prompt, World(), 12, 12, place)
    assert len(next(training.batches(0, 1))) == 12
    evaluation = open_evaluation(config, prompt, World(), "val", 7, device=place)
    assert len(next(evaluation.batches())) == 7
    assert asked == [pinned, pinned]
