"""`prepare --init-task`: what it proposes can be prepared as it is, and it overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rating_train.cli import main
from rating_train.config.task import load_task
from rating_train.errors import UserError
from rating_train.prepare.propose import propose_task
from rating_train.prepare.records.reading import Reading
from rating_train.prepare.run import PrepareOptions, prepare
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(60)

FILMS = """film_id;Film Title;genre;score;votes;poster;year
f1;A film of some length;Drama;8,4;1200;f1.jpg;1999
f2;Another film;Comedy;6,1;90;f2.jpg;2003
f3;Yet another film;Drama;9,9;15;f3.jpg;2011
f4;The last film;Drama;;33;f4.jpg;2012
"""


def test_a_proposal_is_prepared_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "films.csv").write_text(FILMS)
    for i in range(1, 5):
        Image.new("RGB", (20, 20), (40 * i, 90, 90)).save(tmp_path / f"f{i}.jpg")
    source, file = str(tmp_path / "films.csv"), tmp_path / "task.yaml"
    assert main(["prepare", "--init-task", str(file), "--source", source]) == 0
    shown = capsys.readouterr().out
    assert "[image] The score of this item, given its image and its text. Film title: A film of some" in shown
    assert "Genre: Drama  ->  8.4" in shown and "->  not known" in shown and shown.count("->") == 4
    assert f"rating-train prepare --task {file} --source {source} --images DIR" in shown
    task = load_task(file)
    assert (task.target.column, task.target.lower, task.target.upper) == ("score", 1, 10)
    assert [(f.name, f.sources) for f in task.fields] == [
        ("film_title", ["Film Title"]),
        ("genre", ["genre"]),
    ]
    assert (task.id, task.category, task.weight, task.counted) == ("film_id", "genre", "votes", True)
    assert task.images == ["poster"] and "# Not read: year" in file.read_text()
    manifest = prepare(
        PrepareOptions(
            source=(source,), task=str(file), images=str(tmp_path), out=str(tmp_path / "data"),
            image_size_px=32, val_items=1, unrated="predict",
        )
    )  # fmt: skip
    assert manifest["kept"] == 4 and manifest["dropped"] == {}
    before = file.read_text()
    assert main(["prepare", "--init-task", str(file), "--source", source]) == 2
    assert "exists already" in capsys.readouterr().err and file.read_text() == before


def test_prices_have_no_bounds_and_a_log(tmp_path: Path) -> None:
    rows = [
        {"sku": i, "title": f"Thing number {i}", "price": 10.0 * i, "images": {"large": [f"http://x/{i}.jpg"]},
         "features": ["a", "b"], "weight": 0.5 * i, "group_id": i // 2}
        for i in range(1, 9)
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, listings = propose_task(tmp_path / "t.yaml", [str(tmp_path)], Reading())
    target = task.target
    assert (target.column, target.lower, target.upper, target.transform) == ("price", None, None, "log")
    assert (task.id, task.group, task.weight, task.weight_kind) == ("sku", "group_id", "weight", "any")
    assert task.field_names == ("title", "features") and task.images == ["images.large[0]"]
    assert listings[0].texts == {"title": "Thing number 1", "features": "a b"} and listings[0].rating == 10
    assert [one.image for one in listings[:2]] == ["http://x/1.jpg", "http://x/2.jpg"]


def test_the_images_of_amazon_are_proposed_in_either_shape(tmp_path: Path) -> None:
    rows = [
        {"parent_asin": f"B{i}", "title": f"Thing {i}", "average_rating": 4.5, "rating_number": 20,
         "images": [{"large": f"http://x/{i}.jpg", "variant": "MAIN"}, {"large": "http://x/side.jpg"}]}
        for i in range(8)
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, listings = propose_task(tmp_path / "t.yaml", [str(tmp_path)], Reading())
    assert task.images == ["images[0].large"]
    assert [one.image for one in listings[:2]] == ["http://x/0.jpg", "http://x/1.jpg"]


def test_numbers_that_are_not_known_are_passed_over(tmp_path: Path) -> None:
    rows = [
        {"id": f"a{i}", "title": f"Thing {i}", "price": p}
        for i, p in enumerate([5.5, "n/a", float("nan"), 7])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, listings = propose_task(tmp_path / "t.yaml", [str(tmp_path)], Reading())
    assert task.target.column == "price" and task.field_names == ("title",)
    assert [one.rating for one in listings] == pytest.approx(
        [5.5, float("nan"), float("nan"), 7], nan_ok=True
    )


@pytest.mark.parametrize("name", ["stars.csv", "film_scores.csv", "image_quality.csv", "price.tsv"])
def test_the_examples_are_proposed_as_they_were_written(name: str, tmp_path: Path) -> None:
    folder = REPO / "configs" / "tasks"
    written = load_task(folder / f"{Path(name).stem}.yaml")
    task, listings = propose_task(tmp_path / "t.yaml", [str(folder / name)], Reading())
    assert len(listings) == 5
    assert (task.target.column, task.id, task.weight) == (written.target.column, written.id, written.weight)
    assert task.target.bounded == written.target.bounded
    assert set(task.inputs) >= set(written.inputs), "a text that the example leaves out is proposed"


def test_a_saved_dataset_is_proposed_with_its_images(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    saved = str(REPO / "tests" / "recorded" / "hf_films")
    task, listings = propose_task(tmp_path / "t.yaml", [saved], Reading())
    assert (task.target.column, task.id, task.weight, task.images) == (
        "score",
        "film_id",
        "votes",
        ["poster"],
    )
    assert listings[0].image.startswith("arrow:0:5:0:")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no records"),
        ("a,score\nx,1\nx,2\n", "no column names the items"),
        ("id,title\na,One thing\nb,Two\n", "no column holds numbers"),
        ("id,score\na,1\nb,2\n", "no column holds a text or names an image"),
    ],
)
def test_what_cannot_be_proposed_is_refused_and_writes_nothing(
    text: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=problem):
        propose_task(tmp_path / "t.yaml", [str(tmp_path / "a.csv")], Reading())
    assert not (tmp_path / "t.yaml").exists()
