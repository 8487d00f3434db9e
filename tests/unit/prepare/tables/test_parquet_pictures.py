"""Parquet files with images in their rows, as Hugging Face's hub has them, give the dataset of the same Arrow files."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.files import read_json_lines
from rating_train.prepare.images.embedded import EmbeddedStore, have_images, holds_images
from rating_train.prepare.images.lookup import ImageProblem
from rating_train.prepare.images.stores import NoStore, open_store
from rating_train.prepare.records.folders import expand_sources
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.records.sources import first_records, read_source
from rating_train.prepare.run import prepare
from rating_train.prepare.tables import parquet_pictures
from rating_train.prepare.tables.parquet import parquet_rows
from rating_train.prepare.tables.parquet_pictures import image_at
from rating_train.prepare.tables.pictures import Place
from rating_train.shards.schema import Dropped, Listing
from tests.unit.prepare.tables.test_arrow import SAVED, files, options

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def hub_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the saved dataset, in one file with row groups of four."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    tables = []
    for source in expand_sources([str(SAVED)]):
        with pa.memory_map(source) as file:
            tables.append(ipc.open_stream(file).read_all())
    out = tmp_path_factory.mktemp("hub") / "train-00000-of-00001.parquet"
    parquet.write_table(pa.concat_tables(tables), out, row_group_size=4)
    return out


def test_the_dataset_is_that_of_the_same_rows_in_arrow_files(hub_file: Path, tmp_path: Path) -> None:
    from_arrow = prepare(options(tmp_path, "arrow"))
    given = dataclasses.replace(options(tmp_path, "parquet"), source=(str(hub_file),))
    from_parquet = prepare(given)
    assert from_parquet["kept"] == from_arrow["kept"] == 10
    assert from_parquet["dropped"] == from_arrow["dropped"] == {"image_missing": 1}
    assert files(tmp_path / "parquet") == files(tmp_path / "arrow") and len(files(tmp_path / "arrow")) >= 2
    (dropped,) = read_json_lines(tmp_path / "parquet" / "quarantine.jsonl")
    assert (dropped["id"], dropped["line"], dropped["source"]) == ("f3", 3, str(hub_file))


def test_an_image_that_is_too_large_is_dropped_by_name(hub_file: Path) -> None:
    _, rows = parquet_rows(str(hub_file))
    column = next(i for i, value in enumerate(next(rows)) if str(value).startswith("parquet:0:"))
    image = str(Place(9, column, 0, str(hub_file), "parquet"))
    assert image in {row[column] for row in rows}
    size = len(open_store(None, sources=[str(hub_file)]).read(image, ""))
    store = EmbeddedStore([str(hub_file)], NoStore(), max_bytes=size - 1)
    with pytest.raises(ImageProblem, match="image_too_large"):
        store.read(image, "")


def test_lists_of_images_binary_columns_paths_and_any_order_of_reading(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    numbers = range(10)
    photos = [[{"bytes": b"%d" % n, "path": "x"}, {"bytes": b"%d'" % n, "path": None}] for n in numbers]
    rows = {
        "id": pa.array([str(n) for n in numbers]),
        "photos": pa.array([*photos[:8], None, []], pa.list_(picture)),
        "raw": pa.array([None, *(b"raw%d" % n for n in numbers[1:])], pa.binary()),
        "photo": pa.array([{"bytes": None, "path": "b.jpg"}] * 9 + [None], picture),
    }
    file = str(tmp_path / "odd:name.parquet")
    parquet.write_table(pa.table(rows), file, row_group_size=3)
    header, found = parquet_rows(file, lambda header: {"raw"})
    assert header == list(rows)
    read = [dict(zip(header, row)) for row in found]
    assert [row["photo"] for row in read] == ["b.jpg"] * 9 + [None]
    assert (read[0]["raw"], read[8]["photos"], read[9]["photos"]) == (None, None, [])
    for n in (7, 0, 1, 5, 4, 7):
        names = [Place.of(image) or pytest.fail(image) for image in read[n]["photos"]]
        assert [image_at(place) for place in names] == [b"%d" % n, b"%d'" % n]
    assert image_at(Place.of(read[9]["raw"]) or pytest.fail("no place")) == b"raw9"
    store = EmbeddedStore([file], NoStore())
    for row, column in ((10, 1), (8, 1), (0, 2), (0, 3), (0, 0), (0, 9)):
        with pytest.raises(ImageProblem, match="image_unreadable"):
            store.read(str(Place(row, column, 0, file, "parquet")), "")


def test_only_a_file_with_a_column_of_images_needs_pyarrow_and_holds_images(
    hub_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import duckdb

    plain, broken = str(tmp_path / "plain.parquet"), tmp_path / "broken.parquet"
    duckdb.sql(f"COPY (SELECT 'a' AS id, 'a.jpg' AS image, {{'path': 'x'}} AS other) TO '{plain}'")
    broken.write_bytes(hub_file.read_bytes()[:-9])
    assert [holds_images(str(f)) for f in (hub_file, plain, broken, "none.parquet")] == [
        True,
        False,
        False,
        False,
    ]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert list(parquet_rows(plain)[1]) == [("a", "a.jpg", {"path": "x"})]
    with pytest.raises(UserError, match=r"needs the pyarrow package .*rating_train\[huggingface\]"):
        list(parquet_rows(str(hub_file))[1])


def test_damage_within_a_file_is_an_error_of_the_source_and_no_small_catalogue(
    hub_file: Path, tmp_path: Path
) -> None:
    content = bytearray(hub_file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the Parquet file"):
        list(parquet_rows(str(damaged))[1])
    assert parquet_pictures._column.cache_info().maxsize == 8, "files that stay open are few"


@pytest.mark.parametrize("with_image", [False, True])
def test_binary_columns_that_are_not_read_as_images_are_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_image: bool
) -> None:
    """Old writers of Parquet leave texts without their annotation."""
    import duckdb

    if with_image:
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = str(tmp_path / "old.parquet")
    image = "'\\xFF\\xD8'::BLOB" if with_image else "'a.jpg'"
    duckdb.sql(
        f"COPY (SELECT i AS id, encode('Café') AS title, t AS description, 'Toys'::BLOB AS main_category, "
        f"[encode('x')] AS features, 4.5 AS rating, 12 AS rating_count, {image} AS image FROM (VALUES "
        f"(encode('B1'), encode('d')), (encode('B2'), '\\xFF'::BLOB), ('\\xFE'::BLOB, NULL)) t(i, t)) TO '{file}'"
    )
    good, no_text, no_id = (record.item for record in read_source(file))
    assert isinstance(good, Listing) and (good.id, good.category) == ("B1", "Toys")
    assert good.texts == {"title": "Café", "description": "d", "features": "x", "main_category": "Toys"}
    assert good.image == (str(Place(0, 7, 0, file, "parquet")) if with_image else "a.jpg")
    assert isinstance(no_text, Dropped) and (no_text.id, no_text.reason) == ("B2", "bad_type")
    assert isinstance(no_id, Dropped) and no_id.reason == "bad_id"
    assert have_images([file], Reading()) == with_image
    if with_image:
        (first, *_) = first_records(file, 1)
        assert (first["id"], first["image"]) == ("B1", good.image), "before the columns are known"


def test_a_list_of_images_in_rows_of_the_papers_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([[{"bytes": b"one", "path": "x"}, {"bytes": None, "path": "b.jpg"}]], pa.list_(picture))
    rows = {"id": ["a"], "title": ["Pan"], "rating": [4.5], "rating_count": [12], "images": images}
    file = str(tmp_path / "a.parquet")
    parquet.write_table(pa.table(rows), file)
    for reading in (Reading(), Reading(unrated="predict")):
        (record,) = read_source(file, reading)
        assert isinstance(record.item, Listing)
        assert (record.item.image, record.item.more_images) == (
            str(Place(0, 4, 0, file, "parquet")),
            ("b.jpg",),
        )
