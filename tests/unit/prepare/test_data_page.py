"""docs/data.md: every example is prepared, every reason and column is the code's, the commands are the parser's."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from PIL import Image

from rating_train.commands import prepare as prepare_verb
from rating_train.files import read_json_lines
from rating_train.prepare.images import lookup, square
from rating_train.prepare.images.fetch_options import FetchOptions, parse_fetch_options
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.plan.selection import CHOSEN_REASONS
from rating_train.prepare.records import columns, lines, listing
from rating_train.prepare.run import prepare
from rating_train.shards.mds_read import iter_sampled
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(120)

PAGE = (REPO / "docs" / "data.md").read_text("utf-8")
EXAMPLES: dict[str, str] = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
REASON_ROWS = re.findall(r"^\| `(\w+)`( \*)? \|", PAGE[PAGE.index("## What is left out") :], re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of the page, as a reader would make them."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("pan", "knife", "lamp", "mug")):
        Image.new("RGB", (40, 30), (50 * number, 99, 199)).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def prepared(folder: Path, source: str, **more: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The manifest, and the samples by id."""
    out = folder / "data"
    manifest = prepare(
        PrepareOptions(
            source=(str(folder / source),),
            images=str(folder / "images"),
            out=str(out),
            image_size_px=32,
            **more,
        )
    )
    return manifest, {s["id"]: s for s in iter_sampled([out / split for split in manifest["splits"]])}


def test_the_example_of_json_lines(folder: Path) -> None:
    manifest, samples = prepared(folder, "listings.jsonl")
    assert (manifest["read"], manifest["kept"], manifest["dropped"]) == (5, 5, {})
    assert samples["B002"]["features"] == "Steel 9 cm" and samples["B005"]["description"] == ""
    assert manifest["groups"] == {"count": 4, "largest": 2}, "the two lamps are one product"


def test_the_examples_of_csv_and_parquet_are_the_same_data(folder: Path) -> None:
    manifest, samples = prepared(folder, "listings.csv")
    assert (manifest["read"], manifest["kept"]) == (4, 4)
    (command,) = [line for line in PAGE.splitlines() if line.endswith("TO 'listings.parquet'\"")]
    sql = shlex.split(command)[-1]
    duckdb.sql(sql.replace("'listings.", f"'{folder}/listings."))
    (folder / "data").rename(folder / "from_csv")
    assert prepared(folder, "listings.parquet")[1] == samples


def test_the_example_with_several_images(folder: Path) -> None:
    manifest, samples = prepared(folder, "several.csv")
    assert manifest["images"]["fell_back_to_a_later_one"] == 1
    (folder / "data").rename(folder / "several")
    assert {i: s["image"] for i, s in samples.items()} == {
        i: s["image"] for i, s in prepared(folder, "listings.csv")[1].items()
    }


def test_the_options_that_name_columns_make_a_dataset(folder: Path) -> None:
    (folder / "mine.csv").write_text(
        "asin,name,stars,votes,photo,color\nB1,Pan,4.5,20,pan.jpg,red\n", "utf-8"
    )
    (words,) = re.findall(r"`--map (\w+=[^`]*)`", PAGE)[:1]
    (sample,) = prepared(folder, "mine.csv", map=tuple(words.split()))[1].values()
    assert (sample["id"], sample["title"], sample["rating"], sample["rating_count"]) == ("B1", "Pan", 4.5, 20)


def test_delimiter_encoding_and_decimal_sign_are_found_out(folder: Path) -> None:
    rows = "id;title;rating;rating_count;image\nB1;Pfännchen;4,5;20;pan.jpg\nB2;Töpfe;3,25;30;knife.jpg\n"
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        (folder / "mine.csv").write_bytes(rows.encode(encoding))
        samples = prepared(folder, "mine.csv")[1]
        (folder / "data").rename(folder / encoding)
        assert [(s["title"], s["rating"]) for s in samples.values()] == [("Pfännchen", 4.5), ("Töpfe", 3.25)]


def reasons_in(tree: ast.AST) -> Iterator[str]:
    """The fixed words that a module gives as reasons."""
    for node in ast.walk(tree):
        found: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            place = {"ImageProblem": 0, "_Refused": 0, "Dropped": 3}.get(node.func.id)
            if place is not None and len(node.args) > place:
                found = node.args[place]
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found = node.value.elts[0]
        elif (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and node.value.id == "dropped"
        ):
            found = node.slice
        if isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield found.value


def test_every_reason_of_the_code_is_on_the_page_and_no_other() -> None:
    files = sorted((REPO / "rating_train" / "prepare").rglob("*.py"))
    code = {reason for file in files for reason in reasons_in(ast.parse(file.read_text("utf-8")))}
    assert {"few_ratings", "duplicate_id", "not_selected", "bad_json", "fetch_failed"} <= code
    assert {reason for reason, _ in REASON_ROWS} == code
    assert {reason for reason, star in REASON_ROWS if star} == CHOSEN_REASONS


def test_the_modules_own_lists_of_reasons_are_complete() -> None:
    """``Reasons given here`` of a module's docstring names what it gives."""
    for file in sorted((REPO / "rating_train" / "prepare").rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        listed = set(
            re.findall(r"``([a-z]+_[a-z_0-9]+)``", (ast.get_docstring(tree) or "").partition("given here")[2])
        )
        if listed:
            assert set(reasons_in(tree)) <= listed, file


def test_every_column_and_bound_of_the_code_is_on_the_page() -> None:
    rows = [
        line.split("|")[2:4] for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 6
    ]
    table = {tuple(re.findall(r"`(\w+)`", json)): set(re.findall(r"`(\w+)`", csv)) for csv, json in rows}
    assert {fields: table[fields] for fields in table if fields and fields != ("images",)} == {
        (field,): set(names) for field, names in columns._CSV_COLUMNS.items()
    }
    for number, words in (
        (lookup.DEFAULT_MAX_BYTES >> 20, "more than {} MiB"),
        (FetchOptions().max_bytes >> 20, "({} MiB when fetched)"),
        (square.DEFAULT_MAX_PIXELS // 10**6, "{} million pixels"),
        (lines.MAX_LINE_BYTES >> 20, "a line of more than {} MiB"),
        (listing.MAX_ID_CHARS, "at most {} printable characters"),
        (PlanRules().min_rating_count, "`--min-rating-count` ({})"),
    ):
        assert words.format(number) in PAGE


def test_the_commands_of_the_page_are_the_parsers() -> None:
    parser = argparse.ArgumentParser()
    prepare_verb.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"`?(--[a-z][a-z-]+)", PAGE)) <= flags
    for command in re.findall(r"^rating-train prepare (.*)$", PAGE, re.MULTILINE):
        parser.parse_args(shlex.split(command))
    for settings in re.findall(r"--fetch-set (\w+=\w+)", PAGE):
        parse_fetch_options([settings])


def test_an_example_that_breaks_a_rule_is_named_as_the_page_says(folder: Path) -> None:
    more = (
        "B006,Scale of ten,,,Kitchen,8.5,20,pan.jpg",
        "B007,New,,,Kitchen,4,9,pan.jpg",
        "B001,Twin,,,K,4,20,pan.jpg",
    )
    with open(folder / "listings.csv", "a", encoding="utf-8") as f:
        f.write("\n".join(more) + "\n")
    manifest, _ = prepared(folder, "listings.csv")
    assert manifest["dropped"] == {"bad_rating": 1, "duplicate_id": 1, "few_ratings": 1}
    named = [(row["line"], row["reason"]) for row in read_json_lines(folder / "data" / "quarantine.jsonl")]
    assert named == [(6, "bad_rating"), (7, "few_ratings"), (8, "duplicate_id")]
