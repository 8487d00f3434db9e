"""Opening a dataset: whatever is missing, torn or changed is found before anything trains on it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter

from rating_train.data.samples import streaming_dataset
from rating_train.data.samples.streaming_dataset import Request, SplitDataset
from rating_train.demo.catalogue import make_catalogue
from rating_train.errors import UserError
from rating_train.files import sha256_file
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.run import prepare
from rating_train.shards.manifest import check_split, read_manifest
from rating_train.shards.mds_read import iter_sampled
from rating_train.shards.schema import MANIFEST_NAME, MDS_COLUMNS
from tests.helpers.small_shards import flip_a_byte

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
    dataset = SplitDataset(built, "train")
    stored = list(iter_sampled([built / "train"]))
    assert len(dataset) == len(stored) == read_manifest(built)["splits"]["train"]["items"]
    ids = np.random.default_rng(2).integers(0, len(stored), size=20)
    expected = [stored[i] for i in ids]
    assert dataset.__getitems__(Request(ids)) == expected, "repeated samples included"
    assert dataset.__getitems__(Request(ids[::-1])) == expected[::-1]
    assert [dataset[int(i)] for i in ids] == expected


def test_a_shard_is_hashed_where_it_is_asked_for(data: Path) -> None:
    path = shard(data)
    flip_a_byte(path, 4000)
    dataset = SplitDataset(data, "train")
    assert len(dataset.__getitems__(Request([0, 1]))) == 2
    with pytest.raises(
        UserError, match=rf"shard train/{path.name} has xxh64 .*; none of it was read.*{path}"
    ):
        dataset.__getitems__(Request([0, 1], check=[0]))


def test_a_shard_that_disappears_is_named(data: Path) -> None:
    dataset = SplitDataset(data, "train")
    shard(data).unlink()
    with pytest.raises(UserError, match=r"shard train/shard\.00000\.mds is missing"):
        dataset[0]


def test_bytes_that_are_no_sample_are_named(data: Path) -> None:
    path = shard(data)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"shard train/shard\.00000\.mds holds a sample that cannot be read"):
        SplitDataset(data, "train")[0]


@pytest.mark.timeout(60)
def test_a_file_system_that_fails_for_a_moment_is_waited_for(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory where the shard should be: reading it is an error of the file system, until it is replaced."""
    path = shard(data)
    dataset = SplitDataset(data, "train")
    expected = dataset[3]
    dataset.close()
    path.rename(path.with_suffix(".moved"))
    path.mkdir()

    def repair() -> None:
        path.rmdir()
        path.with_suffix(".moved").rename(path)

    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            repair()

    monkeypatch.setattr(streaming_dataset.time, "sleep", sleep)
    assert dataset[3] == expected and len(waited) == 3
    dataset.close()
    path.rename(path.with_suffix(".moved"))
    path.mkdir()
    monkeypatch.setattr(streaming_dataset.time, "sleep", waited.append)
    with pytest.raises(UserError, match=r"cannot be read \(.*Is a directory"):
        dataset[3]
    assert sum(waited[3:]) > 1, "seconds"


def test_other_columns_are_refused_before_anything_is_unpickled(tmp_path: Path) -> None:
    """A shard may ask for pickle; what it holds would run."""
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    with MDSWriter(columns={**MDS_COLUMNS, "title": "pkl"}, out=str(tmp_path / "data/train")) as writer:
        writer.write(
            {**dict.fromkeys(MDS_COLUMNS, ""), "image": b"", "title": Hostile()}
            | {"rating": np.float32(4), "rating_count": np.int64(3)}
        )
    with pytest.raises(UserError, match=r"has other columns.*'title': 'pkl'"):
        SplitDataset(tmp_path / "data", "train")[0]
    assert not marker.exists()


def test_copies_of_a_dataset_are_told_from_one_that_several_ranks_see(built: Path, data: Path) -> None:
    assert SplitDataset(built, "train").identity() == SplitDataset(built, "train").identity()
    assert SplitDataset(built, "train").identity() != SplitDataset(data, "train").identity()


def test_a_dataset_travels_to_a_spawned_worker(built: Path) -> None:
    dataset = SplitDataset(built, "train")
    assert pickle.loads(pickle.dumps(dataset))[5] == dataset[5]
