"""Folders that `datasets` saved (one is recorded) become datasets of ours, each row with its own image."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rating_train.errors import UserError
from rating_train.files import read_json, sha256_file
from rating_train.prepare.images.embedded import EmbeddedStore
from rating_train.prepare.images.lookup import ImageProblem
from rating_train.prepare.images.stores import NoStore
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.records.folders import expand_sources
from rating_train.prepare.run import prepare
from rating_train.prepare.tables import arrow
from rating_train.prepare.tables.arrow import arrow_rows, image_at
from rating_train.prepare.tables.pictures import Place
from rating_train.shards.mds_read import iter_sampled
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(60)

SAVED = REPO / "tests" / "recorded" / "hf_films"
TASK = """\
question: The score of this film.
target: {column: score, name: score, unit: points, lower: 1, upper: 10}
fields: [{name: title, columns: [film_title], words: "Title:"}, {name: plot, words: "Plot:"}]
id: film_id
category: ""
weight: votes
images: [poster]
"""


def options(folder: Path, name: str, **more: Any) -> PrepareOptions:
    (folder / "task.yaml").write_text(TASK)
    given: dict[str, Any] = {"image_size_px": 32, "val_items": 2, "part_items": 3, **more}
    return PrepareOptions(
        source=(str(SAVED),), task=str(folder / "task.yaml"), out=str(folder / name), **given
    )


def files(data: Path) -> dict[str, str]:
    return {str(path.relative_to(data)): sha256_file(path) for path in sorted(data.rglob("*.mds"))}


def test_each_row_keeps_its_own_image_and_a_build_in_stages_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    manifest = prepare(options(tmp_path, "data"))
    assert (manifest["read"], manifest["kept"], manifest["dropped"]) == (11, 10, {"image_missing": 1})
    samples = {s["id"]: s for s in iter_sampled([tmp_path / "data" / split for split in ("train", "val")])}
    assert set(samples) == {f"f{i}" for i in range(1, 12)} - {"f3"}, "the third has no poster"
    for i in (1, 2, *range(4, 12)):
        sample = samples[f"f{i}"]
        assert (sample["title"], sample["plot"]) == (f"Film number {i}", f"A plot. Part {i}")
        assert (sample["rating"], sample["rating_count"]) == (1.0 + i % 9, 10 + i)
        pixel = np.asarray(Image.open(io.BytesIO(sample["image"])))[16, 16].astype(int)
        assert np.abs(pixel - ((40 * i) % 255, 100, max(0, 200 - 20 * i))).max() <= 4
    for stage, only in (("plan", ""), ("parts", "2:4"), ("parts", "0:2"), ("merge", "")):
        staged = prepare(options(tmp_path, "staged", stage=stage, only=only))
    assert staged["fingerprint"] == manifest["fingerprint"]
    assert files(tmp_path / "staged") == files(tmp_path / "data") and len(files(tmp_path / "data")) >= 2


def test_lists_of_images_binary_columns_and_rows_without_one(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    here = {"bytes": b"one", "path": "x.jpg"}
    rows = {
        "id": pa.array(["a", "b", "c"]),
        "photos": pa.array([[here, {"bytes": b"two", "path": None}], None, [here]], pa.list_(picture)),
        "photo": pa.array([None, {"bytes": None, "path": "b.jpg"}, here], picture),
        "raw": pa.array([b"raw", None, b""], pa.binary()),
    }
    file = str(tmp_path / "odd:name.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, pa.table(rows).schema) as out:
        out.write_table(pa.table(rows), max_chunksize=2)
    header, found = arrow_rows(file, lambda header: {"raw"})
    first, second, third = (dict(zip(header, row)) for row in found)
    assert [image_at(Place.of(p) or pytest.fail(p)) for p in first["photos"]] == [b"one", b"two"]
    assert first["photo"] is None and (second["photos"], second["photo"], second["raw"]) == (
        None,
        "b.jpg",
        None,
    )
    assert third["photo"] == str(Place(2, 2, 0, file)) and image_at(Place(2, 2, 0, file)) == b"one"
    assert image_at(Place(0, 3, 0, file)) == b"raw" and image_at(Place(2, 1, 0, file)) == b"one"
    store = EmbeddedStore([file], NoStore())
    for place in (Place(7, 2, 0, file), Place(0, 2, 0, file), Place(0, 0, 0, file), Place(0, 9, 0, file)):
        with pytest.raises(ImageProblem, match="image_unreadable"):
            store.read(str(place), "")
    with pytest.raises(ImageProblem, match="image_empty"):
        store.read(third["raw"], "")
    with pytest.raises(ImageProblem, match="image_missing"):  # a listing cannot name a file that is no source
        EmbeddedStore([], NoStore()).read(third["photo"], "")


def test_a_file_that_is_cut_off_is_no_small_catalogue(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = Path(expand_sources([str(SAVED)])[0]).read_bytes()
    for size in (0, 100, len(data) // 2, len(data) - 8):
        (tmp_path / "a.arrow").write_bytes(data[:size])
        with pytest.raises(UserError, match="cannot read the Arrow file"):
            list(arrow_rows(str(tmp_path / "a.arrow"))[1])


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arrow._mapped.cache_clear()
    with pytest.raises(UserError, match=r"needs the pyarrow package .*rating_train\[huggingface\]"):
        arrow_rows(expand_sources([str(SAVED)])[0])


def test_what_was_recorded_is_what_the_library_writes() -> None:
    assert read_json(SAVED / "dataset_dict.json") == {"splits": ["train", "test"]}
    assert "_data_files" in read_json(SAVED / "train" / "state.json")
