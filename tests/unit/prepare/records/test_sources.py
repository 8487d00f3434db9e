"""Reading catalogues: good records come out complete, bad ones as rows with a reason, never as exceptions."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rating_train.config.task import PAPER
from rating_train.errors import UserError
from rating_train.prepare.records import csv_split, lines, sources
from rating_train.prepare.records.reading import Reading, with_map
from rating_train.prepare.records.sources import Record, read_source
from rating_train.shards.schema import Dropped, Listing
from tests.helpers.listings import listing as made

HEADER = "id,title,description,features,main_category,rating,rating_count,image\n"
HEADER_BYTES = HEADER.encode()

GOOD: dict[str, Any] = {
    "parent_asin": "B0001",
    "main_category": "All Beauty",
    "title": "Brush",
    "average_rating": 4.5,
    "rating_number": 12,
    "features": ["soft", "small"],
    "description": ["A brush.", "For hair."],
    "images": {
        "hi_res": [None, "https://x.example/I/main_hi.jpg"],
        "large": ["https://x.example/I/side.jpg", "https://x.example/I/main.jpg"],
        "variant": ["PT01", "MAIN"],
    },
}


def read_lines(folder: Path, *lines: bytes, name: str = "a.jsonl") -> list[Record]:
    path = folder / name
    path.write_bytes(b"".join(lines))
    return list(read_source(str(path)))


def read_one(folder: Path, **changes: Any) -> Listing | Dropped:
    record = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    (only,) = read_lines(folder, json.dumps(record).encode() + b"\n")
    return only.item


def reason(item: Listing | Dropped) -> str:
    assert isinstance(item, Dropped), item
    return item.reason


def listing(item: Listing | Dropped) -> Listing:
    assert isinstance(item, Listing), item
    return item


def test_a_listing_is_read_completely(tmp_path: Path) -> None:
    assert read_one(tmp_path) == made(
        item_id="B0001",
        title="Brush",
        description="A brush. For hair.",
        features="soft small",
        main_category="All Beauty",
        image="https://x.example/I/main_hi.jpg",
        rating=4.5,
        rating_count=12,
        group="B0001",
    )


@pytest.mark.parametrize(
    ("images", "url"),
    [
        ([{"large": "u/a.jpg", "variant": "PT01"}, {"large": "u/m.jpg", "variant": "MAIN"}], "u/m.jpg"),
        ([{"large": "u/a.jpg", "hi_res": None, "variant": "PT01"}], "u/a.jpg"),
        ({"large": ["u/a.jpg"], "variant": ["MAIN"]}, "u/a.jpg"),
        ({"large": ["u/a.jpg"], "hi_res": [], "variant": []}, "u/a.jpg"),
        ({"large": [], "variant": ["PT01", "MAIN"]}, ""),
        ({"large": "text", "variant": None}, ""),
        ({}, ""),
        ([], ""),
        (None, ""),
    ],
)
def test_main_image_in_either_shape(tmp_path: Path, images: Any, url: str) -> None:
    assert listing(read_one(tmp_path, images=images)).image == url


@pytest.mark.parametrize("more", [{"votes": 7}, {"image_path": "a.jpg", "votes": 7}])
@pytest.mark.parametrize(
    "images", [GOOD["images"], [{"large": "u/a.jpg", "variant": "MAIN"}], [], None, "u/a", ["u/a"]]
)
def test_images_are_those_of_amazon_with_other_columns_too(tmp_path: Path, images: Any, more: Any) -> None:
    record = {**GOOD, "images": images, **more}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    usual = {**record, "images": None if images == "u/a" else images}
    (expected,) = read_lines(tmp_path, json.dumps(usual).encode(), name="b.jsonl")
    for task in (PAPER, with_map(PAPER, ["rating_count=votes"])):
        (found,) = read_source(str(path), Reading(task, unrated="predict"))
        assert listing(found.item).image == listing(expected.item).image
    (found,) = read_source(str(path), Reading(with_map(PAPER, ["image=other"])))
    assert listing(found.item).image == "", "another column is asked for"


def test_local_path_comes_before_urls_and_group_before_id(tmp_path: Path) -> None:
    item = listing(read_one(tmp_path, image_path="images/7.jpg", group_id=0))
    assert (item.image, item.group) == ("images/7.jpg", "0")


@pytest.mark.parametrize("blank", [None, "", "  ", float("nan")])
def test_a_blank_group_is_none(tmp_path: Path, blank: Any) -> None:
    """As pandas and spreadsheets write a missing one: such items have nothing to do with each other."""
    item = listing(read_one(tmp_path, group_id=blank))
    assert item.group == item.id == "B0001"


def test_a_list_of_texts_under_images_names_images(tmp_path: Path) -> None:
    item = listing(read_one(tmp_path, images=["a.jpg", None, " ", "http://x/b.jpg"]))
    assert (item.image, item.more_images) == ("a.jpg", ("http://x/b.jpg",))


def test_absent_and_null_texts_are_empty(tmp_path: Path) -> None:
    item = listing(read_one(tmp_path, main_category=None, title=..., features=None, description=[None, "x"]))
    assert (item.category, *(item.texts[n] for n in ("title", "features", "description"))) == (
        "",
        "",
        "",
        "x",
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parent_asin": ...}, "missing_field"),
        ({"parent_asin": "  "}, "missing_field"),
        ({"parent_asin": ["x"]}, "bad_id"),
        ({"parent_asin": "x" * 300}, "bad_id"),
        ({"parent_asin": "a\nb"}, "bad_id"),
        ({"title": 5}, "bad_type"),
        ({"features": [1]}, "bad_type"),
        ({"description": {"a": 1}}, "bad_type"),
        ({"images": "http://x"}, "bad_type"),
        ({"images": [3]}, "bad_type"),
        ({"images": ["http://x", {"large": "http://x"}]}, "bad_type"),
        ({"image_path": 3}, "bad_type"),
        ({"image_paths": 3}, "bad_type"),
        ({"image_paths": ["a.jpg", None]}, "bad_type"),
        ({"average_rating": ...}, "missing_field"),
        ({"average_rating": None}, "missing_field"),
        ({"average_rating": "good"}, "bad_rating"),
        ({"average_rating": True}, "bad_rating"),
        ({"average_rating": float("nan")}, "bad_rating"),
        ({"average_rating": float("inf")}, "bad_rating"),
        ({"average_rating": 0.9}, "bad_rating"),
        ({"average_rating": 5.1}, "bad_rating"),
        ({"average_rating": 10**400}, "bad_rating"),
        ({"rating_number": ...}, "missing_field"),
        ({"rating_number": -1}, "bad_rating_count"),
        ({"rating_number": 1.5}, "bad_rating_count"),
        ({"rating_number": float("nan")}, "bad_rating_count"),
        ({"rating_number": "many"}, "bad_rating_count"),
        ({"rating_number": 2**63}, "bad_rating_count"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert reason(read_one(tmp_path, **changes)) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"parent_asin": "B1", ', "bad_json"),
        (b"[1, 2]", "bad_json"),
        (b"null", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"average_rating": ' + b"9" * 5000 + b"}", "bad_json"),
        (b'{"title": "caf\xe9"}', "not_utf8"),
        ("{}".encode("utf-16"), "not_utf8"),
    ],
)
def test_a_corrupt_line_costs_only_itself(tmp_path: Path, line: bytes, expected: str) -> None:
    good = json.dumps(GOOD).encode() + b"\n"
    records = read_lines(tmp_path, good, line + b"\n", b"\n", good)
    assert [r.line for r in records] == [1, 2, 4], "a blank line is not a record"
    assert reason(records[1].item) == expected
    assert isinstance(records[2].item, Listing)


def test_an_endless_line_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    good = json.dumps(GOOD).encode() + b"\n"
    records = read_lines(tmp_path, b"x" * 5000 + b"\n", good, b"y" * 1500)
    assert [(r.line, getattr(r.item, "reason", "ok")) for r in records] == [
        (1, "line_too_long"),
        (2, "ok"),
        (3, "line_too_long"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"x" * (3 << 20)),
        ("a.jsonl.gz", b"\n" * (3 << 20)),
        ("a.jsonl.gz", (b" " * 99 + b"\n") * (3 << 14)),
        ("a.csv.gz", HEADER_BYTES + b"\n" * (3 << 20)),
        ("a.csv.gz", HEADER_BYTES + b"x" * (3 << 20)),
    ],
    ids=["one line", "blank lines", "spaces", "blank rows", "one row"],
)
def test_a_packed_source_that_expands_without_a_record_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setattr(lines, "MAX_USELESS_BYTES", 2 << 20)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1 << 16)
    packed = gzip.compress(content)
    assert len(packed) < 20_000
    with pytest.raises(UserError, match=rf"no record in \d+ MiB.*{name}:\d+"):
        read_lines(tmp_path, packed, name=name)


def test_a_csv_row_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field is short and closed, and the line ends are inside them: the row never ends."""
    monkeypatch.setattr(csv_split, "MAX_LINE_BYTES", 10_000)
    content = HEADER_BYTES + b"B1,T,,,,4.5,12,x.jpg\n" + b'"a\n",' * 5000
    with pytest.raises(UserError, match=r"a row of more than .* MiB.*a\.csv:3.*never closed"):
        read_lines(tmp_path, content, name="a.csv")


def test_useful_records_between_blank_lines_are_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_USELESS_BYTES", 1000)
    good = json.dumps(GOOD).encode() + b"\n"
    assert len(read_lines(tmp_path, *[good, b"\n" * 900] * 5)) == 5


def test_lone_surrogates_become_storable_text(tmp_path: Path) -> None:
    line = json.dumps(GOOD).replace('"Brush"', r'"Br\ud800ush"').encode()
    (record,) = read_lines(tmp_path, line)
    assert listing(record.item).title == "Br?ush"


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (record,) = read_lines(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert isinstance(record.item, Listing)


def test_gzip_and_torn_gzip(tmp_path: Path) -> None:
    packed = gzip.compress(
        b"".join(json.dumps({**GOOD, "parent_asin": f"B{i}"}).encode() + b"\n" for i in range(99))
    )
    assert len(read_lines(tmp_path, packed, name="a.jsonl.gz")) == 99
    with pytest.raises(UserError, match="cannot read the source"):
        read_lines(tmp_path, packed[:-20], name="b.jsonl.gz")
    with pytest.raises(UserError, match="cannot read the source"):
        read_lines(tmp_path, b"no gzip at all", name="c.jsonl.gz")


def test_zstd_is_read_or_explained(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    try:
        import zstandard
    except ImportError:
        with pytest.raises(UserError, match="zstandard"):
            read_lines(tmp_path, line, name="a.jsonl.zst")
        return
    pack = zstandard.ZstdCompressor().compress
    assert len(read_lines(tmp_path, pack(line), pack(line), name="a.jsonl.zst")) == 2
    with pytest.raises(UserError, match=r"cannot read the source .*cut off"):
        read_lines(tmp_path, pack(line), pack(line)[:-5], name="c.jsonl.zst")
    with pytest.raises(UserError, match="cannot read the source"):
        read_lines(tmp_path, b"no zstd at all", name="b.jsonl.zst")


def test_sources_that_cannot_be_read_at_all_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        list(read_source(str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match="not a file"):
        list(read_source(str(tmp_path)))
    with pytest.raises(UserError, match="unknown kind"):
        read_lines(tmp_path, b"x", name="a.xlsx")


# --- CSV ----------------------------------------------------------------------------------------------


def read_csv(folder: Path, text: str | bytes, header: str = HEADER) -> list[Record]:
    body = text.encode() if isinstance(text, str) else text
    return read_lines(folder, header.encode() + body, name="a.csv")


def test_a_csv_row_is_read_completely(tmp_path: Path) -> None:
    (record,) = read_csv(tmp_path, 'B1,"A, ""b""\nc",d,f,Toys,4.25,17.0,images/1.jpg\n')
    assert record.item == made("B1", 'A, "b"\nc', "d", "f", "Toys", "images/1.jpg", 4.25, 17, "B1")


def test_csv_other_names_and_group(tmp_path: Path) -> None:
    header = "group_id,parent_asin,title,average_rating,rating_number,image_path\n"
    (record,) = read_csv(tmp_path, "g7,B1,T,5,10,\n", header)
    assert record.item == made("B1", "T", "", "", "", "", 5.0, 10, "g7")


CHALLENGE = "parent_asin,main_category,title,features,description,image_paths"


@pytest.mark.parametrize(
    ("cell", "paths"),
    [
        ("images/1.jpg", ["images/1.jpg"]),
        ("images/1.jpg;images/2.png", ["images/1.jpg", "images/2.png"]),
        (" images/1.jpg ; a b.png;; ;images/1.jpg;", ["images/1.jpg", "a b.png"]),
        ('"a,b.jpg;c.jpg"', ["a,b.jpg", "c.jpg"]),
        ("https://x.example/I/1.jpg;2.jpg", ["https://x.example/I/1.jpg", "2.jpg"]),
        ("", [""]),
        (" ; ;", [""]),
    ],
)
def test_csv_with_several_images(tmp_path: Path, cell: str, paths: list[str]) -> None:
    header = CHALLENGE + ",average_rating,rating_number\n"
    (record,) = read_csv(tmp_path, f"B1,Toys,T,f,d,{cell},4.5,12\n", header)
    item = listing(record.item)
    assert [item.image, *item.more_images] == paths
    assert (item.id, item.category, item.texts["features"], item.rating_count) == ("B1", "Toys", "f", 12)


def test_one_image_path_comes_before_several(tmp_path: Path) -> None:
    item = listing(read_one(tmp_path, image_path="b.jpg", image_paths=["a.jpg", "b.jpg"]))
    assert (item.image, item.more_images) == ("b.jpg", ("a.jpg",))


@pytest.mark.parametrize(
    ("more", "missing"),
    [
        ("", "rating|average_rating; rating_count|rating_number"),
        (",rating", "rating_count|rating_number"),
        (",rating_number", "rating|average_rating"),
    ],
)
def test_a_csv_without_ratings_is_refused_with_what_to_do(tmp_path: Path, more: str, missing: str) -> None:
    with pytest.raises(UserError) as error:
        read_csv(tmp_path, "", CHALLENGE + more + "\n")
    assert error.value.what == f"CSV header lacks {missing}"
    assert "add these columns, matched by the id" in error.value.fix
    assert str(tmp_path) in error.value.where


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"B1,T,,,,4.5\n", "bad_csv"),
        (b"B1,T,,,,4.5,12,x.jpg,more\n", "bad_csv"),
        (b"B1," + b"x" * 200_000 + b",,,,4.5,12,x.jpg\n", "bad_csv"),
        (b"B1,caf\xe9,,,,4.5,12,x.jpg\n", "not_utf8"),
        (b",T,,,,4.5,12,x.jpg\n", "missing_field"),
        (b"B1,T,,,,,12,x.jpg\n", "missing_field"),
        (b"B1,T,,,,five,12,x.jpg\n", "bad_rating"),
        (b"B1,T,,,,nan,12,x.jpg\n", "bad_rating"),
        (b"B1,T,,,,6,12,x.jpg\n", "bad_rating"),
        (b"B1,T,,,,4.5,1.5,x.jpg\n", "bad_rating_count"),
        (b"B1,T,,,,4.5,inf,x.jpg\n", "bad_rating_count"),
    ],
)
def test_a_corrupt_row_costs_only_itself(tmp_path: Path, row: bytes, expected: str) -> None:
    good = b"B2,T,,,,4.5,12,x.jpg\n"
    records = read_csv(tmp_path, good + row + b"\n" + good)
    assert [r.line for r in records] == [2, 3, 5], "a blank line is not a record"
    assert reason(records[1].item) == expected
    assert isinstance(records[2].item, Listing)


def test_a_row_that_is_too_long_costs_only_itself_at_the_beginning_too(tmp_path: Path) -> None:
    header = "parent_asin,title,average_rating,rating_number\n"
    records = read_csv(tmp_path, "B1,Pan,4.5,20\nB2,Pan, large,4.5,20\nB3,Pan,4.5,20\n", header)
    assert [getattr(r.item, "reason", "kept") for r in records] == ["kept", "bad_csv", "kept"]


def test_the_decimal_sign_is_found_out_beside_rows_that_cannot_be_read(tmp_path: Path) -> None:
    text = "B1;Pan;4,5;20\nB2;Pan;4,5;20;too;long\nB3;Pan\nB4;Pan;4,25;20\nB5;Pan;4;20\n"
    records = read_csv(tmp_path, text, "id;title;rating;rating_count\n")
    assert [r.item.rating for r in records if isinstance(r.item, Listing)] == [4.5, 4.25, 4.0]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_torn_file_of_utf16_is_one_error(tmp_path: Path, encoding: str) -> None:
    packed = ("\ufeff" + HEADER + "B1,T,,,,4.5,12,x.jpg\n" * 9).encode(encoding)
    assert len(read_lines(tmp_path, packed, name="a.csv")) == 9
    with pytest.raises(UserError, match=r"cannot read the source .*b\.csv"):
        read_lines(tmp_path, packed[:-1], name="b.csv")


@pytest.mark.parametrize("stray", ['B1,"12 inch pan,4.5,20', '"B1,Pan,4.5,20', 'B1,Pan,4.5,"20'])
@pytest.mark.parametrize("last", ['B9,"Pan",4.5,20', "B9,Pan,4.5,20", 'B9,"A ""pan""\nof two lines",4.5,20'])
def test_a_stray_quote_costs_its_own_row_and_no_other(tmp_path: Path, stray: str, last: str) -> None:
    good = "".join(f"C{i},Pan,4.5,20\n" for i in range(500))
    records = read_csv(tmp_path, f"{stray}\n{good}{last}\n", "id,title,rating,rating_count\n")
    assert [r.line for r in records] == list(range(2, 504))
    assert reason(records[0].item) == "bad_csv"
    assert [listing(r.item).id for r in records[1:]] == [*(f"C{i}" for i in range(500)), "B9"]


def test_csv_header_that_lacks_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"average_rating.*; title, description or features"):
        read_csv(tmp_path, "B1,4\n", "id,rating_count\n")
    with pytest.raises(UserError, match="header lacks"):
        read_csv(tmp_path, "", "")


def test_reading_a_csv_leaves_the_modules_limit_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    read_csv(tmp_path, "B1,T,,,,4.5,12,x.jpg\n")
    assert csv.field_size_limit() == before


# --- real data, where there is any --------------------------------------------------------------------


def test_real_catalogues_are_read_without_a_loss(shared_data: Path) -> None:
    for path in sorted(shared_data.glob("*/*.jsonl")):
        records = list(read_source(str(path)))
        dropped = [r.item for r in records if isinstance(r.item, Dropped)]
        assert records and not dropped, (path, dropped[:3])
        assert all(r.item.image for r in records if isinstance(r.item, Listing)), path


# ---- records without ratings, and Parquet


def test_ratings_are_not_looked_at_where_none_are_needed(tmp_path: Path) -> None:
    unrated = {k: v for k, v in GOOD.items() if k not in ("average_rating", "rating_number")}
    path = tmp_path / "a.jsonl"
    rows = [unrated, {**GOOD, "average_rating": "many"}, {**GOOD, "parent_asin": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = [record.item for record in read_source(str(path), Reading(rated=False))]
    assert listing(first).title == listing(second).title == "Brush"
    assert math.isnan(listing(first).rating) and listing(second).rating_count == 0
    assert reason(third) == "missing_field"
    assert [reason(r.item) for r in read_source(str(path))] == [
        "missing_field",
        "bad_rating",
        "missing_field",
    ]


def test_the_challenges_csv_needs_no_ratings_to_be_scored(tmp_path: Path) -> None:
    path = tmp_path / "input.csv"
    path.write_text(
        "parent_asin,main_category,title,features,description,image_paths\nB1,Toys,Bear,soft,A bear.,a.jpg;b.jpg\n"
    )
    (only,) = read_source(str(path), Reading(rated=False))
    bear = listing(only.item)
    assert (bear.id, bear.title, bear.image, bear.more_images) == ("B1", "Bear", "a.jpg", ("b.jpg",))
    with pytest.raises(UserError, match=r"CSV header lacks rating\|average_rating"):
        list(read_source(str(path)))


def test_records_that_are_passed_over_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n\n" + json.dumps(GOOD) + "\n")
    broken, good = sources.read_raw(str(path))
    assert (broken.line, good.line) == (1, 3)
    assert reason(broken.parse()) == "bad_json" and listing(good.parse()).id == "B0001"


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import duckdb

    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    duckdb.sql(f"COPY (SELECT * FROM read_json('{lines}')) TO '{path}' (FORMAT PARQUET)")
    return str(path)


def test_parquet_gives_the_listings_of_json_lines_in_order(tmp_path: Path) -> None:
    rows = [{**GOOD, "parent_asin": f"B{n:05d}", "rating_number": n} for n in range(5000)]
    rows[7]["features"] = []
    rows[8]["average_rating"] = 7.0
    path = write_parquet(tmp_path / "a.parquet", rows)
    (first, *_) = read_source(path, Reading(unrated="predict"))
    assert listing(first.item).image.endswith("main_hi.jpg")
    found = [(r.line, r.item) for r in read_source(path)]
    expected = [(r.line, r.item) for r in read_source(str(tmp_path / "a.jsonl"))]
    for (line, item), (other_line, other) in zip(found, expected, strict=True):
        assert line == other_line
        if isinstance(item, Listing):
            assert item == other
    assert reason(found[8][1]) == "bad_rating" and listing(found[0][1]).image.endswith("main_hi.jpg")


def test_parquet_of_decimal_columns(tmp_path: Path) -> None:
    """As databases export numbers."""
    import duckdb

    path = str(tmp_path / "a.parquet")
    duckdb.sql(
        "COPY (SELECT 12::DECIMAL(18, 0) AS id, 'Pan' AS title, 4.50::DECIMAL(3, 2) AS rating, "
        f"7::DECIMAL(10, 0) AS rating_count) TO '{path}'"
    )
    (record,) = read_source(path)
    item = listing(record.item)
    assert (item.id, item.rating, item.rating_count) == ("12", 4.5, 7)


def test_parquet_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match=r"cannot read the Parquet file .*a\.parquet"):
        list(read_source(str(path)))
    path = Path(write_parquet(tmp_path / "b.parquet", [{"title": "Brush", "other": 1}]))
    with pytest.raises(UserError, match=r"Parquet schema lacks id\|parent_asin; rating\|average_rating"):
        list(read_source(str(path)))
