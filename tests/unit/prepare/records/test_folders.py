"""A folder, a pattern and a saved dataset are the files that they mean, in one order; anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.prepare.records.folders import expand_sources
from tests.conftest import REPO

SAVED = REPO / "tests" / "recorded" / "hf_films"


def test_folders_and_patterns_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv.gz", "c.parquet", "a.jpg", ".hidden.csv", "_SUCCESS.json", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d.jsonl").touch()
    inside = [str(tmp_path / name) for name in ("a.csv.gz", "b.jsonl", "c.parquet")]
    assert list(expand_sources([str(tmp_path)])) == inside
    assert list(expand_sources([f"{tmp_path}/*.[cp]*"])) == [inside[0], inside[2]]
    both = expand_sources([f"{tmp_path}/**/*.jsonl", inside[0]])
    assert both == (inside[1], str(tmp_path / "deeper" / "d.jsonl"), inside[0])
    (tmp_path / "[x].csv").touch()
    assert expand_sources([str(tmp_path / "[x].csv")]) == (str(tmp_path / "[x].csv"),), "a file of that name"
    assert expand_sources(["absent.csv"]) == ("absent.csv",), "reported where it is read"


def test_a_saved_dataset_is_its_files_in_the_order_of_its_rows(tmp_path: Path) -> None:
    names = [str(Path(file).relative_to(SAVED)) for file in expand_sources([str(SAVED)])]
    assert names == [
        *(f"train/data-0000{n}-of-00002.arrow" for n in range(2)),
        "test/data-00000-of-00001.arrow",
    ]
    state = {"_data_files": [{"filename": "z.arrow"}, {"filename": "a.arrow"}], "_indices_files": []}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "cache-1234.arrow").touch()
    assert [Path(file).name for file in expand_sources([str(tmp_path)])] == ["z.arrow", "a.arrow"]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (
            {"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i"}]},
            "by an index",
        ),
        ({"_data_files": [{"filename": "../a.arrow"}]}, "not the name of a file"),
        ({"_data_files": []}, "has no files"),
        ({}, "no list '_data_files'"),
    ],
)
def test_a_saved_dataset_that_cannot_be_read_is_refused(
    state: dict[str, object], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=problem):
        expand_sources([str(tmp_path)])


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"the folder holds no source .* \.jsonl"):
        expand_sources([str(tmp_path)])
    with pytest.raises(UserError, match="no file matches the pattern"):
        expand_sources([f"{tmp_path}/*.csv"])
