"""Tasks: what a file says is read, and everything that is wrong with it is one error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from rating_train.config.task import PAPER, Task, load_task, task_from_dict, task_of
from rating_train.data.prompt import PromptWords
from rating_train.errors import UserError
from rating_train.model.accounting import item_cost
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.shards.schema import MDS_COLUMNS, sample_columns
from rating_train.shards.writer import SplitWriter
from tests.helpers.listings import listing

#: Of the code before there were tasks: shards of forty listings, the template, and the cost of the paper's item.
SHARDS_SHA256 = "29f4d39ec354a06d84375d3b9f1c1b9162d3fc0d3bb3a2540c6f6eb54de120a0"
TEMPLATE = [
    "<fake_token_around_image>The average user rating of this product, from 1 to 5 stars, given its image and its "
    "metadata. Title:",
    ", Description:",
    ", Features:",
    ", Category:",
]
COST = (228266113, 72024754464.0, 79693314336.0, 144049508928.0, 159386628672.0)


def test_the_papers_shards_prompt_and_cost_are_those_of_before(tmp_path: Path) -> None:
    split = SplitWriter(tmp_path / "train", 4000)
    for i in range(40):
        texts = (f"Title é {i}", "d" * i, f"f {i} \u2028", ["Toys", ""][i % 2])
        split.write(listing(f"B{i}", *texts, "", 1 + i % 41 / 10, i * 10**9, "g"), bytes([i]) * 100)
    split.finish()
    found = hashlib.sha256(b"".join(p.read_bytes() for p in sorted((tmp_path / "train").iterdir())))
    assert found.hexdigest() == SHARDS_SHA256
    assert PromptWords().pieces() == TEMPLATE and PromptWords().names == PAPER.field_names
    assert (PromptWords().question, PromptWords().fields) == (
        PAPER.question,
        tuple((f.name, f.words) for f in PAPER.fields),
    )
    cost = item_cost(KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"], 384, 212)
    assert (cost.parameters, *cost.padded.values()) == COST


def test_an_absent_task_is_the_papers() -> None:
    assert task_of({}) == task_from_dict({}) == Task() == PAPER and PAPER.is_default
    assert sample_columns(PAPER) == MDS_COLUMNS
    other = task_from_dict({"target": {"upper": 10}})
    assert not other.is_default and "upper: 5.0 against 10.0" in PAPER.difference(other)
    assert task_of({"task": json.loads(json.dumps(dataclasses.asdict(other)))}) == other


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("target: {lower: 10, upper: 1}", ["`target.lower` is 10 and `target.upper` 1"]),
        ("target: {transform: log, lower: 0, upper: 9}", ["`target.transform` is log"]),
        ("target: {colum: price}", ["did you mean `target.column`?"]),
        ("fields: [{name: a}, {name: a}]", ["a field is given twice"]),
        ("fields: [{name: rating}]", ["is one of id, image, rating"]),
        ("fields: []\nimages: []", ["neither `fields` nor `images`"]),
        ("id: ''\ntarget: {unit: 3, spread: -1}", ["`target.unit`", "`target.spread`"]),
    ],
)
def test_all_problems_of_a_task_file_are_one_error(tmp_path: Path, text: str, problems: list[str]) -> None:
    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(UserError) as e:
        load_task(tmp_path / "task.yaml")
    assert all(problem in str(e.value) for problem in problems), e.value


def test_a_missing_task_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read.*check --task"):
        load_task(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("target", "value", "problem"),
    [
        ({}, 5.1, "outside [1, 5]"),
        ({}, float("nan"), "outside [1, 5]"),
        ({"lower": None, "upper": None}, 1e39, "float32"),
        ({"lower": None, "upper": None, "transform": "log"}, 0.0, "without a log"),
        ({"lower": None, "upper": 3}, -1e9, ""),
    ],
)
def test_a_value_that_cannot_be_learned_is_named(
    target: dict[str, object], value: float, problem: str
) -> None:
    found = task_from_dict({"target": target}).target.problem(value)
    assert (problem in found) if problem else found == ""
