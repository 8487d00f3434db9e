"""The rows of an input by their number: any ascending ranges of it are the same rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.prediction.rows import DatasetRows, Row, Rows, SourceRows
from tests.helpers.small_shards import flip_a_byte, reshard


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    lines = [
        json.dumps({"parent_asin": f"J{n}", "title": f"t{n}", "image_path": f"{n}.jpg"}) for n in range(7)
    ]
    lines[2] = "{broken"
    lines.insert(4, "")  # a blank line is no row
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = [f'C{n},"title, {n}\nover two lines",{n}.jpg' for n in range(5)]
    (tmp_path / "b.csv").write_text("\n".join(["id,title,image", *rows]))
    return [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.csv")]


def ranges(rows: Rows, *bounds: tuple[int, int]) -> list[list[Row]]:
    return [list(rows.read(first, last)) for first, last in bounds]


def test_rows_of_several_sources_in_order(sources: list[str]) -> None:
    rows = SourceRows(sources)
    assert rows.count() == 12
    (found,) = ranges(rows, (0, 12))
    assert [row.id for row in found] == [
        "J0",
        "J1",
        "",
        *(f"J{n}" for n in range(3, 7)),
        *(f"C{n}" for n in range(5)),
    ]
    assert found[2].listing is None and found[2].reason.startswith("bad_json: ")
    assert found[2].reason.endswith("(a.jsonl.gz:3)"), "the reason has its place"
    assert found[8].listing is not None and found[8].listing.title == "title, 1\nover two lines"


def test_ranges_that_are_read_in_ascending_order_are_those_rows(sources: list[str]) -> None:
    (everything,) = ranges(SourceRows(sources), (0, 12))
    some = ranges(SourceRows(sources), (1, 3), (6, 9), (9, 10), (11, 12))
    assert some == [everything[1:3], everything[6:9], everything[9:10], everything[11:12]]


def test_sources_that_became_shorter_are_an_error(sources: list[str]) -> None:
    with pytest.raises(UserError, match=r"12 rows, of which 13 were counted.*b\.csv"):
        list(SourceRows(sources).read(10, 13))


def test_rows_of_a_dataset_are_its_samples(demo: Path, tmp_path: Path) -> None:
    data = reshard(demo / "data", tmp_path / "data", shard_bytes=1 << 16)
    rows = DatasetRows(str(data), "val")
    count = rows.count()
    (everything,) = ranges(rows, (0, count))
    assert len({row.id for row in everything}) == count > 30
    assert all(row.sample and row.sample["image"] for row in everything)
    some = ranges(DatasetRows(str(data), "val"), (3, 17), (20, count))
    assert some == [everything[3:17], everything[20:]]


def test_a_damaged_shard_is_named_and_not_scored(demo: Path, tmp_path: Path) -> None:
    data = reshard(demo / "data", tmp_path / "data", shard_bytes=1 << 16)
    shard = sorted((data / "val").glob("*.mds"))[1]
    flip_a_byte(shard, shard.stat().st_size - 40)
    rows = DatasetRows(str(data), "val")
    list(rows.read(0, 2))
    with pytest.raises(UserError, match=rf"instead of .*{shard.name}"):
        list(rows.read(2, rows.count()))
