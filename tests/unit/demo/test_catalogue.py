"""The demo catalogue: reproducible, readable by our own reader, and its upper_bounds are what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rating_train.demo.catalogue import BLAME, PRAISE, make_catalogue
from rating_train.errors import UserError
from rating_train.prepare.records.sources import read_source
from rating_train.shards.schema import Listing
from tests.helpers.selection_reference import Groups


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    make_catalogue(out, items=800)
    return out


def listings(out: Path) -> list[Listing]:
    return [r.item for r in read_source(str(out / "catalogue.jsonl")) if isinstance(r.item, Listing)]


def test_same_seed_same_bytes_and_a_smaller_one_is_a_beginning(demo: Path, tmp_path: Path) -> None:
    make_catalogue(tmp_path / "a", items=20)
    make_catalogue(tmp_path / "b", items=20, seed=18)
    for path in sorted((tmp_path / "a" / "images").iterdir()):
        assert path.read_bytes() == (demo / "images" / path.name).read_bytes()
    text = (tmp_path / "a" / "catalogue.jsonl").read_text()
    assert (demo / "catalogue.jsonl").read_text().startswith(text)
    assert text != (tmp_path / "b" / "catalogue.jsonl").read_text()


def test_every_item_is_a_listing_of_its_own_with_its_image(demo: Path) -> None:
    items = listings(demo)
    assert len(items) == 800 and len({i.id for i in items}) == 800
    groups = Groups()
    for item in items:
        groups.add(item)
        assert item.rating_count >= 10
        with Image.open(demo / item.image) as image:
            assert image.format == "JPEG" and all(128 <= side <= 220 for side in image.size)
    assert len(groups.sizes()) == 800


def test_the_text_signal_is_within_the_first_60_characters(demo: Path) -> None:
    for item in listings(demo):
        assert 2 <= sum(word in PRAISE + BLAME for word in item.title[:60].split()) <= 3
        rest = "".join(item.texts[name] for name in ("description", "features", "main_category")).lower()
        assert not any(word.lower() in rest for word in PRAISE + BLAME)


def test_ceilings(demo: Path) -> None:
    upper_bounds = json.loads((demo / "upper_bounds.json").read_text())
    assert upper_bounds["n"] == 800
    assert upper_bounds["plcc_perfect"] == pytest.approx(0.9**0.5, abs=0.02)
    assert upper_bounds["plcc_image_only"] == pytest.approx(0.45**0.5, abs=0.06)
    assert upper_bounds["plcc_text_only"] == pytest.approx(0.45**0.5, abs=0.06)


def test_a_linear_model_nearly_reaches_the_ceilings(demo: Path) -> None:
    """The signals are where they should be: a mean colour and a bag of words find them."""
    items, n = listings(demo), 600
    rating = np.array([i.rating for i in items])
    colour = (
        np.stack([np.asarray(Image.open(demo / i.image).convert("RGB"), float).mean((0, 1)) for i in items])
        / 255
    )
    words = np.array([[i.title.split().count(w) for w in PRAISE + BLAME] for i in items], dtype=float)

    def held_out_plcc(features: np.ndarray) -> float:
        x = np.c_[features, np.ones(len(items))]
        weights = np.linalg.lstsq(x[:n], rating[:n], rcond=None)[0]
        return float(np.corrcoef(x[n:] @ weights, rating[n:])[0, 1])

    both, image, text = held_out_plcc(np.c_[colour, words]), held_out_plcc(colour), held_out_plcc(words)
    assert both > 0.85
    assert 0.4 < image < 0.8 and 0.4 < text < 0.8


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="items >= 2"):
        make_catalogue(tmp_path, items=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        make_catalogue(tmp_path / "file", items=2)
