"""Opening a dataset: whatever is missing, torn or changed is found before anything trains on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rating_train.data.streaming_dataset import check_split, open_split, read_manifest, shuffled_epoch
from rating_train.demo.catalogue import make_catalogue
from rating_train.errors import UserError
from rating_train.files import sha256_file
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.pipeline import prepare
from rating_train.shards.schema import MANIFEST_NAME

N = 120


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    make_catalogue(folder, items=N)
    prepare(
        PrepareOptions(
            source=(str(folder / "catalogue.jsonl"),),
            images=str(folder),
            out=str(folder / "data"),
            image_size_px=64,
            val_fraction=0.25,
        )
    )
    return folder / "data"


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "data"))


def shard(data: Path, split: str = "train") -> Path:
    return sorted((data / split).glob("*.mds"))[0]


def edit_manifest(data: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((data / MANIFEST_NAME).read_text())
    edit(content)
    (data / MANIFEST_NAME).write_text(json.dumps(content))


def test_a_whole_dataset_passes_and_gives_its_manifest(built: Path) -> None:
    manifest = check_split(built, "train")
    assert manifest == read_manifest(built) == json.loads((built / MANIFEST_NAME).read_text())
    assert check_split(str(built), "val")["splits"]["train"]["items"] > N / 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"directory not found.*absent.*prepare"):
        read_manifest(tmp_path / "absent")


def test_a_folder_without_a_manifest_is_not_a_dataset(data: Path) -> None:
    (data / MANIFEST_NAME).unlink()
    for call in (lambda: read_manifest(data), lambda: check_split(data, "train")):
        with pytest.raises(UserError, match=r"not a dataset.*manifest\.json"):
            call()


def test_a_torn_manifest_is_refused(data: Path) -> None:
    path = data / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"not valid JSON.*manifest\.json"):
        read_manifest(data)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(data: Path, version: object) -> None:
    edit_manifest(data, lambda m: m.update(version=version))
    with pytest.raises(UserError, match=r"has version .*expected: version 1"):
        read_manifest(data)


def test_an_unknown_split_is_refused_with_the_known_ones(built: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'test'.*one of train, val"):
        check_split(built, "test")


@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_truncated_shard_is_found(data: Path, keep: int) -> None:
    path = shard(data)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"damaged shards: {path.name} has \d+ bytes instead of \d+"):
        check_split(data, "train")
    check_split(data, "val")


def test_a_longer_shard_is_found(data: Path) -> None:
    with open(shard(data), "ab") as f:
        f.write(b"\0")
    with pytest.raises(UserError, match="damaged shards"):
        check_split(data, "train")


def test_a_missing_shard_is_found(data: Path) -> None:
    path = shard(data)
    path.unlink()
    with pytest.raises(UserError, match=rf"damaged shards: {path.name} is missing"):
        check_split(data, "train")


def test_a_long_list_of_damage_is_shown_in_part(tmp_path: Path, built: Path) -> None:
    """Twelve shards of which eleven are gone, with an index that the manifest vouches for."""
    data = Path(shutil.copytree(built, tmp_path / "data"))
    index = data / "train" / "index.json"
    content = json.loads(index.read_text())
    (first,) = content["shards"]
    content["shards"] = [
        {**first, "raw_data": {**first["raw_data"], "basename": f"shard.{i:05d}.mds"}} for i in range(12)
    ]
    index.write_text(json.dumps(content))
    edit_manifest(data, lambda m: m["splits"]["train"].update(index_sha256=sha256_file(index)))
    with pytest.raises(UserError, match=r"shard\.00005\.mds is missing; and 6 more"):
        check_split(data, "train")


def test_a_changed_index_is_found(data: Path) -> None:
    index = data / "train" / "index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(UserError, match=r"index is not the one in the manifest.*train/index\.json"):
        check_split(data, "train")


def test_an_index_of_another_split_is_found(data: Path) -> None:
    shutil.copy(data / "val" / "index.json", data / "train" / "index.json")
    with pytest.raises(UserError, match="index is not the one in the manifest"):
        check_split(data, "train")


def test_a_missing_index_is_found(data: Path) -> None:
    (data / "train" / "index.json").unlink()
    with pytest.raises(UserError, match=r"index is missing"):
        check_split(data, "train")


def test_a_split_reads_exactly_the_given_samples_in_the_given_order(built: Path) -> None:
    dataset = open_split(built, "train", 4)
    samples = int(dataset.num_samples)
    assert samples == read_manifest(built)["splits"]["train"]["items"]
    ids = np.random.default_rng(2).integers(0, samples, size=(5, 4))
    dataset.set_batches(ids)
    read = [sample["id"] for sample in dataset]
    assert read == [dataset[int(i)]["id"] for i in ids.reshape(-1)], "repeated samples included"
    dataset.set_batches(ids[::-1])
    assert [sample["id"] for sample in dataset] == [dataset[int(i)]["id"] for i in ids[::-1].reshape(-1)]


def test_reading_without_an_order_is_refused(built: Path) -> None:
    with pytest.raises(RuntimeError, match="set_batches"):
        next(iter(open_split(built, "val", 4)))


# --- the shuffle --------------------------------------------------------------------------------------

SHARDS = np.array([40, 41, 7, 100, 1, 53], dtype=np.int64)
DEFAULTS: dict[str, Any] = {"seed": 9, "epoch": 0, "block_samples": 64, "canonical_nodes": 1, "shuffle": True}


def epoch(shards: np.ndarray = SHARDS, **changes: Any) -> np.ndarray:
    return shuffled_epoch(shards, **{**DEFAULTS, **changes})


@pytest.mark.filterwarnings("ignore:Shuffle block size")
@pytest.mark.parametrize("shards", [[1], [3], [40, 41, 7], [5] * 30, [1000, 1]])
@pytest.mark.parametrize("canonical_nodes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("block_samples", [1, 16, 262_144])
def test_a_shuffled_epoch_is_a_permutation(
    shards: list[int], canonical_nodes: int, block_samples: int
) -> None:
    ids = epoch(np.array(shards), canonical_nodes=canonical_nodes, block_samples=block_samples)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(sum(shards)))


def test_an_unshuffled_epoch_is_in_stored_order_in_every_epoch() -> None:
    for number in (0, 1, 7):
        assert np.array_equal(epoch(shuffle=False, epoch=number), np.arange(SHARDS.sum()))


@pytest.mark.filterwarnings("ignore:Shuffle block size")
def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = {tuple(epoch(epoch=e, seed=s)) for e in range(5) for s in (0, 9, 10)}
    assert len(orders) == 15


@pytest.mark.filterwarnings("ignore:Shuffle block size")
def test_the_order_depends_on_nothing_but_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    first = epoch(epoch=3)
    np.random.seed(4)
    np.random.rand(10)
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    before = np.random.get_state()[1].copy()
    assert np.array_equal(epoch(epoch=3), first), "neither the global generator nor the world size matters"
    assert np.array_equal(np.random.get_state()[1], before), "and the global generator is left alone"


def test_samples_are_mixed_across_shards_within_a_block() -> None:
    shards = np.array([100] * 10)
    ids = epoch(shards, block_samples=1000)
    runs = np.flatnonzero(np.diff(ids // 100)).size
    assert runs > 500, "neighbours come from different shards"
    assert np.abs(np.corrcoef(ids, np.arange(1000))[0, 1]) < 0.2
