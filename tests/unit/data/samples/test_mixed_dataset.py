"""Several datasets read as one: which sample an id is, which shards are hashed by whom, and damage in any of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rating_train.config.load import config_from_dict
from rating_train.data.loader import OpenSplit, TrainingData, open_training
from rating_train.data.order import rank_part
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from rating_train.data.samples import streaming_dataset
from rating_train.data.samples.mixed_dataset import MixedDataset
from rating_train.data.samples.streaming_dataset import Request, SplitDataset
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.shards.mds_read import iter_sampled, read_index
from tests.helpers.small_shards import flip_a_byte, reshard

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def two(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo in shards of 64 KB, and its items twice in shards of 50 KB."""
    folder = tmp_path_factory.mktemp("mixed")
    return reshard(demo / "data", folder / "a", 64_000), reshard(
        demo / "data", folder / "b", 50_000, copies=2
    )


@pytest.fixture(scope="module")
def prompt(demo: Path) -> PromptEncoder:
    tokenizer = load_tokenizer(str(demo / "model"))
    return PromptEncoder(tokenizer, visual_tokens=4, text_tokens=96, field_chars=100)


def open_mixture(paths: tuple[Path, ...], prompt: PromptEncoder, **data: Any) -> TrainingData:
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (7, 3))]
    settings = {"sources": sources, "image_px": 64, "text_tokens": 96, "workers": 0, **data}
    return open_training(config_from_dict({"data": settings}).data, prompt, World(), 12, 12)


def stored(paths: tuple[Path, ...]) -> list[str]:
    """The ids of all samples, one dataset after another."""
    return [f"{path.name}/{s['id']}" for path in paths for s in iter_sampled([path / "train"])]


def test_an_id_is_a_sample_of_one_of_them_in_any_order(two: tuple[Path, Path]) -> None:
    dataset = MixedDataset([SplitDataset(path, "train") for path in two])
    every = stored(two)
    assert len(dataset) == len(every)
    ids = [len(every) - 1, 0, 300, 3, len(SplitDataset(two[0], "train")), 7, 0]
    for read in (dataset.__getitems__(Request(ids)), [dataset[i] for i in ids]):
        assert [sample["id"] for sample in read] == [every[i].partition("/")[2] for i in ids]
    assert max(dataset.shards_of(ids)) == len(dataset.samples_per_shard) - 1


def test_every_shard_of_every_source_is_hashed_once_by_the_rank_that_reads_it_first(
    two: tuple[Path, Path], prompt: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = streaming_dataset.shard_problem
    monkeypatch.setattr(
        streaming_dataset, "shard_problem", lambda path, *rest: hashed.append(path) or original(path, *rest)
    )
    opened = open_mixture(two, prompt)
    steps = -(-2 * opened.samples // 12)
    order = opened.order.batches(0, steps)
    every = [name.partition("/")[2] for name in stored(two)]
    for rank in range(4):
        split = OpenSplit(
            opened.split.dataset,
            opened.split.collator,
            opened.split.config,
            World(rank, 4, rank, 4),
            range(4),
        )
        data = TrainingData(split, opened.order, 3, opened.manifests)
        read = [batch.ids for batch in data.batches(0, steps)]
        assert read == [[every[i] for i in row] for row in rank_part(order, rank, 4)]
    shards = [path / "train" / s["raw_data"]["basename"] for path in two for s in read_index(path / "train")]
    assert Counter(hashed) == Counter(path.resolve() for path in shards)


def test_damage_in_the_second_one_is_named(
    two: tuple[Path, Path], prompt: PromptEncoder, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(two[1], tmp_path / "b"))
    bad = sorted((copy / "train").glob("*.mds"))[1]
    flip_a_byte(bad, 4000)
    data = open_mixture((two[0], copy), prompt)
    with pytest.raises(UserError, match=rf"shard train/{bad.name} has xxh64 .*where: {bad}"):
        list(data.batches(0, 2 * data.samples // 12))


def test_datasets_that_do_not_go_together_are_refused(
    two: tuple[Path, Path], prompt: PromptEncoder, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(two[1], tmp_path / "b"))
    with pytest.raises(UserError, match=rf"two sources are the same dataset: {two[1]} and {copy}"):
        open_mixture((two[1], copy), prompt)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "image_size_px": 48}))
    with pytest.raises(UserError, match=r"images of different sizes: .* 64 px, .* 48 px"):
        open_mixture((two[0], copy), prompt)


def test_the_first_of_them_alone_is_read_as_if_it_were_the_path(
    two: tuple[Path, Path], prompt: PromptEncoder
) -> None:
    one = open_mixture(two[:1], prompt).order.batches(0, 40)
    config = config_from_dict(
        {"data": {"path": str(two[0]), "image_px": 64, "text_tokens": 96, "workers": 0}}
    )
    assert (one == open_training(config.data, prompt, World(), 12, 12).order.batches(0, 40)).all()
