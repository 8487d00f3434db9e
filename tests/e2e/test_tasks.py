"""Other numbers than stars, from a task file to scores: prepared, trained, evaluated, refused where they do not fit."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rating_train.config.load import load_config
from rating_train.config.task import Task, load_task, task_of
from rating_train.data.prompt import load_tokenizer
from rating_train.errors import UserError
from rating_train.model.architecture import read_architecture
from rating_train.model.cost import count_forward, count_parameters
from rating_train.model.regressor import build_regressor, starting_bias
from rating_train.prediction.run import PredictOptions
from rating_train.prepare.run import PrepareOptions, prepare
from rating_train.shards.mds_read import iter_sampled
from rating_train.shards.task import with_task_of_data
from rating_train.training import setup
from tests.conftest import REPO
from tests.helpers.cli import rating_train

pytestmark = pytest.mark.timeout(240)

TASKS = REPO / "configs" / "tasks"
#: The sources beside the task files, by task.
SOURCES = {path.stem: path.name for path in sorted(TASKS.glob("*.?sv"))}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task_images")
    for i in range(1, 6):
        Image.new("RGB", (64, 64), (40 * i, 100, 200 - 30 * i)).save(folder / f"f{i}.jpg")
    return folder


def prepared(images: Path, out: Path, source: Path, **options: Any) -> dict[str, Any]:
    given = {"images": str(images), "image_size_px": 64, "val_items": 2, "max_dropped_fraction": 1.0}
    return prepare(PrepareOptions(source=(str(source),), out=str(out), **{**given, **options}))


def settings(demo: Path, data: Path, runs: Path, **model: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "runs_dir": str(runs),
        "data": {"path": str(data), "image_px": 64, "text_tokens": 96, "workers": 0},
        "model": {"backbone": str(demo / "model"), "weights": "random", **model},
        "batch": {"global_items": 2},
        "train": {"max_steps": 2, "precision": "fp32", "device": "cpu", "background_save": False},
    }


@pytest.mark.parametrize("name", SOURCES)
def test_an_example_is_prepared_trained_and_evaluated(
    name: str, images: Path, demo: Path, tmp_path: Path
) -> None:
    data, source = tmp_path / "data", TASKS / SOURCES[name]
    manifest = prepared(images, data, source, task=str(TASKS / f"{name}.yaml"), min_rating_count=0)
    assert (manifest["kept"], manifest["dropped"]) == (5, {}), manifest
    task = task_of(manifest)
    assert task.is_default == (name == "stars")
    assert task.model_part() == load_task(TASKS / f"{name}.yaml").model_part()
    if name in ("stars", "film_scores"):
        return  # trained so in many other tests
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(demo, data, tmp_path / "runs")))
    done = rating_train("train", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    assert load_config(tmp_path / "runs/run/config.yaml").task == task
    if name in ("price", "image_quality"):  # the others are read by the same code
        done = rating_train("evaluate", tmp_path / "runs/run", "--resamples", 50)
        unit = " (USD)" if name == "price" else " "
        assert done.returncode == 0 and f"RMSE{unit}" in done.stdout and "stars" not in done.stdout, (
            done.stdout
        )
        rows = [json.loads(line) for line in (tmp_path / "runs/run/eval.jsonl").read_text().splitlines()]
        model = load_config(tmp_path / "runs/run/config.yaml")
        shape = read_architecture(model.model)
        assert rows[-1]["parameters"] == count_parameters(shape, model.model_px)["total"]
        predicted = next((tmp_path / "runs/run/predictions").glob("*.jsonl")).read_text()
        scores = [json.loads(line)["score"] for line in predicted.splitlines()]
        assert all(0 < s < (100 if name == "image_quality" else math.inf) for s in scores)


@pytest.mark.parametrize("inputs", [["image"], ["text"], ["image", "text"]])
def test_what_a_model_does_not_read_costs_nothing(inputs: list[str], demo: Path, tmp_path: Path) -> None:
    values = settings(demo, demo / "data", tmp_path / "runs", inputs=inputs)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    config = with_task_of_data(load_config(tmp_path / "c.yaml"))
    found = setup.read_model_inputs(config)
    layout = found.prompt.layout
    assert bool(layout.visual_tokens) == ("image" in inputs)
    assert (layout.text_tokens == 96) == ("text" in inputs)
    model = build_regressor(config.model, found.architecture, config.model_px, layout.image_start, 0)
    own = sum(p.numel() for p in model.parameters())
    assert own == count_parameters(found.architecture, config.model_px)["total"]
    cost = count_forward(found.architecture, config.model_px, layout.length)
    assert bool(cost.linear_macs["vision"]) == ("image" in inputs)
    assert load_tokenizer(str(demo / "model")) is not None


def test_columns_of_other_names_and_another_scale(images: Path, tmp_path: Path) -> None:
    rows = [["f1", "A film of some length", "8,4", "f1.jpg"], ["f2", "Another film", "6,1", "f2.jpg"],
            ["f3", "Yet another film", "9,9", "f3.jpg"], ["f4", "The last film", "", "f4.jpg"]]  # fmt: skip
    with open(tmp_path / "films.csv", "w", newline="", encoding="utf-16") as file:
        csv.writer(file, delimiter="\t").writerows([["film_id", "Film_Title", "score", "poster"], *rows])
    names = ("id=film_id", "rating=score,title=film_title", "image=poster", "rating_count=")
    options: dict[str, Any] = {"map": names, "scale": "1:10", "unrated": "predict", "val_items": 1}
    manifest = prepared(images, tmp_path / "data", tmp_path / "films.csv", **options)
    assert {name: entry["items"] for name, entry in manifest["splits"].items()} == {
        "train": 2,
        "val": 1,
        "predict": 1,
    }
    samples = {s["id"]: s for s in iter_sampled([tmp_path / "data" / s for s in manifest["splits"]])}
    assert samples["f3"]["rating"] == pytest.approx(9.9) and math.isnan(samples["f4"]["rating"])
    task = task_of(manifest)
    assert "from 1 to 10" in task.question and (task.target.lower, task.target.upper) == (1.0, 10.0)
    trained = [s["rating"] for s in iter_sampled([tmp_path / "data/train"])]
    assert task.target.center == pytest.approx(sum(trained) / 2)
    share = 1 / (1 + math.exp(-starting_bias(task.target)))
    assert 1 + 9 * share == pytest.approx(task.target.center)


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("id,title,Skore\na,T,3\n", {"map": ("rating=score", "rating_count=")}, "did you mean 'Skore'"),
        ("id,title,rating\na,T,3\n", {"map": ("titel=name",)}, "did you mean 'title'"),
        ("id,title,rating\na,T,3\n", {"map": ("title=a", "title=b")}, "names 'title' twice"),
        ("id,title,rating\na,T,3\n", {"scale": "10:1"}, "'10:1' is not LOWER:UPPER"),
        ("id,title,rating,w\na,T,3,-1\n", {"map": ("weight=w",)}, "bad_rating_count"),
        ("id,title,rating\na,T,8\n", {"map": ("rating_count=",)}, "bad_rating"),
        ('id,title,rating\na,T,"1,234"\n', {"map": ("rating_count=",), "scale": "0:9999"}, "bad_number"),
    ],
)
def test_bad_input_is_one_clear_error(
    text: str, options: dict[str, Any], problem: str, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as e:
        prepared(images, tmp_path / "data", tmp_path / "a.csv", **options)
    assert problem in str(e.value), e.value


def test_records_dropped_for_their_target_are_a_warning_before_any_image_is_opened(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Film scores from 1 to 10 read as stars: everything above 5 would be missing."""
    rows = "".join(f"{i},T{i},{score},f{i}.jpg\n" for i, score in enumerate((3, 8, 4, 9, 5), start=1))
    (tmp_path / "a.csv").write_text(f"id,title,rating,image\n{rows}")
    options = {"map": ("rating_count=",), "val_items": 1, "dry_run": True}
    prepared(images, tmp_path / "data", tmp_path / "a.csv", **options)
    assert "2 of 5 records were dropped for their rating, which is outside [1, 5]" in caplog.text
    assert "--scale LOWER:UPPER" in caplog.text
    caplog.clear()
    prepared(images, tmp_path / "data", tmp_path / "a.csv", scale="1:10", **options)
    assert "dropped for their" not in caplog.text


def test_a_task_that_differs_from_the_manifests_is_refused(demo: Path, tmp_path: Path) -> None:
    values = {**settings(demo, demo / "data", tmp_path / "runs"), "task": {"target": {"upper": 10}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"another task than the configuration: upper: 10.0 against 5.0"):
        with_task_of_data(load_config(tmp_path / "c.yaml"))


def test_a_weight_that_is_not_there_is_refused(demo: Path, tmp_path: Path, images: Path) -> None:
    prepared(images, tmp_path / "data", TASKS / "price.tsv", task=str(TASKS / "price.yaml"))
    values = settings(demo, tmp_path / "data", tmp_path / "runs")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**values, "loss": {"count_weight": "log"}}))
    with pytest.raises(UserError, match=r"needs a number of ratings or a weight"):
        with_task_of_data(load_config(tmp_path / "c.yaml"))


def test_predict_reads_the_columns_of_its_task() -> None:
    options = PredictOptions(model="run", out="out.csv", map=("title=name",))
    assert options.reading(Task()).task.fields[0].columns == ["name"]
    assert not dataclasses.replace(options.reading(Task())).rated
