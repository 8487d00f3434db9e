"""`rating_train.load`: the numbers of `evaluate`, every kind of picture, one error for all that cannot be used."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import rating_train
from rating_train import RatingModel, load
from rating_train.errors import UserError
from rating_train.files import read_json_lines
from tests.helpers.cli import fresh_python

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(trained_run: Path) -> RatingModel:
    return load(trained_run, device="cpu", batch_items=12)


@pytest.fixture(scope="module")
def items(trained_run: Path, demo: Path) -> list[tuple[Path, dict[str, Any], float]]:
    """(image, listing, score of the run's evaluation)."""
    (file,) = (trained_run / "predictions").iterdir()
    listings = {row["parent_asin"]: row for row in read_json_lines(demo / "catalogue" / "catalogue.jsonl")}
    evaluated = [(listings[row["id"]], row["score"]) for row in read_json_lines(file)]
    return [(demo / "catalogue" / row["image_path"], row, score) for row, score in evaluated]


def test_a_batch_gets_the_numbers_of_evaluate(model: RatingModel, items: list[Any]) -> None:
    images, listings, expected = zip(*items)
    assert model.score(images, listings) == pytest.approx(list(expected), abs=1e-5)
    assert model.device == "cpu" and model.name == "trained/step_00000006"


def test_one_item_and_every_kind_of_picture(model: RatingModel, items: list[Any]) -> None:
    path, listing, expected = items[3]
    opened, decoded = Image.open(path), Image.open(path)
    decoded.load()
    for picture in (path, str(path), path.read_bytes(), opened, decoded):
        score = model.score(picture, listing)
        assert isinstance(score, float) and score == pytest.approx(expected, abs=1e-5)


def test_fields_may_be_text_or_lists_or_missing(model: RatingModel, items: list[Any]) -> None:
    path, listing, expected = items[0]
    joined = {**listing, "features": " ".join(listing["features"]), "description": listing["description"][0]}
    assert model.score(path, joined) == pytest.approx(expected, abs=1e-5)
    assert 1 < model.score(path, {"title": "Kettle"}) < 5 and 1 < model.score(path, {}) < 5
    assert model.score([], []) == []


def test_all_that_cannot_be_used_is_in_one_error(
    model: RatingModel, items: list[Any], tmp_path: Path
) -> None:
    path, listing, _ = items[0]
    images = [path, tmp_path / "none.jpg", b"no image", path]
    with pytest.raises(UserError, match="3 problems") as caught:
        model.score(images, [listing, listing, listing, {"title": 5}])
    for part in ("image 1: image_missing", "image 2: image_not_an_image", "listing 3: title is neither text"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="2 images for 1 listings"):
        model.score([path, path], [listing])
    with pytest.raises(UserError, match="one image for several listings"):
        model.score(path, [listing, listing])


def test_large_pictures_are_those_of_prepare(model: RatingModel) -> None:
    """As a file, a large JPEG is reduced by its decoder; the same pixels, decoded, differ a little."""
    out = io.BytesIO()
    Image.effect_mandelbrot((700, 500), (-2, -1.2, 1, 1.2), 60).convert("RGB").save(out, "JPEG", quality=95)
    decoded = Image.open(io.BytesIO(out.getvalue()))
    decoded.load()
    as_file = model.score(out.getvalue(), {"title": "a"})
    assert model.score(Image.open(io.BytesIO(out.getvalue())), {"title": "a"}) == as_file
    assert model.score(decoded, {"title": "a"}) == pytest.approx(as_file, abs=0.05)


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, rating_train\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'yaml', 'argparse'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert rating_train.__version__ and 'load' in rating_train.__all__\n"
    )
    fresh_python(program)


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        rating_train.laod  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(UserError, match="batch_items is 0"):
        load("runs/x", batch_items=0)
