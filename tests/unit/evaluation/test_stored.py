"""Texts without images, and which evaluated items were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.evaluation.stored import read_texts, read_texts_of_all, trained_on
from rating_train.shards.manifest import read_manifest
from rating_train.shards.mds_read import BadShard, iter_sampled, read_columns, read_index
from rating_train.shards.schema import TEXT_FIELDS

pytestmark = pytest.mark.timeout(120)


def test_texts_are_those_of_the_items_and_a_sample_is_the_same_each_time(demo: Path) -> None:
    samples = list(iter_sampled([demo / "data" / "val"]))
    found = read_texts(demo / "data", "val")
    assert found.ids == [s["id"] for s in samples] and found.of == len(samples)
    assert found.texts == [" ".join(s[name] for name in TEXT_FIELDS) for s in samples]
    assert found.ratings.tolist() == [s["rating"] for s in samples]
    some = read_texts(demo / "data", "val", 10)
    assert len(some.ids) == 10 and some.ids == read_texts(demo / "data", "val", 10).ids
    assert [i for i in found.ids if i in set(some.ids)] == some.ids and some.of == len(samples)


def test_columns_are_read_without_the_others_and_a_torn_shard_is_named(demo: Path, tmp_path: Path) -> None:
    shard = read_index(demo / "data" / "val")[0]
    path = demo / "data" / "val" / shard["raw_data"]["basename"]
    (first, *_) = read_columns(path, shard, ["id", "rating"])
    assert set(first) == {"id", "rating"}
    torn = tmp_path / "torn.mds"
    torn.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadShard, match="impossible offsets"):
        list(read_columns(torn, shard, ["id"]))
    torn.write_bytes(b"\x01")
    with pytest.raises(BadShard, match="ends within"):
        list(read_columns(torn, shard, ["id"]))


def copy_with(data: Path, out: Path, fingerprint: str) -> Path:
    """The same dataset under another fingerprint."""
    shutil.copytree(data, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": fingerprint}))
    return out


def test_items_that_were_trained_on_are_counted_by_id_and_by_product(demo: Path, few_items: Path) -> None:
    data = demo / "data"
    fingerprint = read_manifest(data)["fingerprint"]
    ids = set(read_texts(data, "train").ids)
    known = [i for i in read_texts(few_items, "train").ids if i in ids]
    assert known, "few_items holds listings of the demo"
    seen = trained_on({data: fingerprint}, "train", few_items, "train", 50)
    assert seen.by_id == len(known) and not seen.unknown
    assert f"{seen.by_id + seen.by_group} of 50 items" in seen.warning() and "too good" in seen.warning()
    own = trained_on({data: fingerprint}, "train", data, "val", 50)
    assert own.by_id == own.by_group == 0 and own.warning() == ""
    assert trained_on({data: fingerprint}, "train", data, "train", 250).by_id == 250


def test_every_source_of_a_mixture_is_looked_at(demo: Path, few_items: Path) -> None:
    """Evaluated on the validation split of the first source, of which the second has some items in training."""
    data = demo / "data"
    sources = {path: read_manifest(path)["fingerprint"] for path in (data, few_items)}
    evaluated = set(read_texts(data, "val").ids)
    known = evaluated & set(read_texts(few_items, "train").ids)
    seen = trained_on(sources, "train", data, "val", len(evaluated))
    assert seen.by_id == len(known) and not seen.unknown
    assert trained_on(sources, "train", few_items, "train", 50).by_id == 50
    both = read_texts_of_all(list(sources), "train", 20)
    assert len(both.ids) == len(both.ratings) == 20 and both.of == sum(
        read_texts(p, "train").of for p in sources
    )


def test_another_id_of_the_same_product_is_found(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rating_train.evaluation import stored

    item = {"title": "A lamp with a brass foot", "main_category": "Home", "rating": 4.0}
    parts = {
        "train": [{**item, "id": "a"}],
        "val": [{**item, "id": "b"}, {**item, "id": "c", "title": "Chair"}],
    }
    data = demo / "data"
    other = copy_with(data, tmp_path / "other", "another")
    monkeypatch.setattr(stored, "_items", lambda path, split, most=None: iter(parts[split]))
    seen = trained_on({data: read_manifest(data)["fingerprint"]}, "train", other, "val", 2)
    assert (seen.by_id, seen.by_group) == (0, 1)


def test_where_the_training_data_are_gone_it_is_said(demo: Path, tmp_path: Path) -> None:
    data = demo / "data"
    other = copy_with(data, tmp_path / "other", "another")
    for trained, words in ((tmp_path / "gone", "not found"), (other, "no longer the dataset")):
        seen = trained_on({trained: "first"}, "train", data, "val", 3)
        assert words in seen.unknown and "not known" in seen.warning()


def test_a_dataset_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a dataset"):
        read_texts(tmp_path, "train")
