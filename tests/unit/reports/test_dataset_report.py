"""The page of a dataset: complete in one file, the same each time, and right in its numbers."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from rating_train.cli import main
from rating_train.errors import UserError
from rating_train.reports import dataset_report
from rating_train.reports.dataset_report import PICTURES, collect, make_data_report
from rating_train.shards.mds_read import iter_sampled
from tests.helpers.small_shards import reshard

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report"
    return make_data_report(demo / "data", out, tokenizer=str(demo / "model"))


def test_the_page_needs_no_other_file(page: Path) -> None:
    text = page.read_text("utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(p) for p in pictures] == [
        (page.parent / name).read_bytes() for name, _, _ in PICTURES
    ]
    assert "http" not in re.sub(r'src="[^"]+"', "", text), "nothing is loaded from elsewhere"
    HTMLParser().feed(text)
    for name, _, _ in PICTURES:
        with Image.open(page.parent / name) as image:
            image.load()
            assert image.width > 500


def test_the_page_holds_the_numbers_of_the_manifest(page: Path, demo: Path) -> None:
    text = page.read_text("utf-8")
    manifest = dataset_report.read_manifest(demo / "data")
    assert manifest["fingerprint"] in text and "Pictures show all of them" in text
    for split, entry in manifest["splits"].items():
        assert re.search(f'>{split}</td><td data-key="{entry["items"]}.0">{entry["items"]}</td>', text)
    for reason in manifest["dropped"]:
        assert f">{reason}</td>" in text


def test_nothing_is_written_into_the_dataset(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = Path(shutil.copytree(demo / "data", tmp_path / "my data"))
    before = sorted(data.rglob("*"))
    assert main(["report", str(data)]) == 0
    made = tmp_path / "my data.report" / "index.html"
    assert capsys.readouterr().out.strip() == str(made) and made.is_file()
    assert sorted(data.rglob("*")) == before


def test_a_sample_is_spread_over_all_shards_and_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    data = reshard(demo / "data", tmp_path / "data", 64_000)
    ids = [s["id"] for s in iter_sampled([data / "train", data / "val"], 60)]
    assert len(ids) == len(set(ids)) == 60
    assert ids == [s["id"] for s in iter_sampled([data / "train", data / "val"], 60)]
    everything = [s["id"] for s in iter_sampled([data / "train", data / "val"], 10**6)]
    assert len(everything) == 300 and [i for i in everything if i in set(ids)] == ids, "in stored order"


def test_the_columns_are_those_of_the_items(demo: Path) -> None:
    samples = list(iter_sampled([demo / "data" / "val"], 1000))
    found = collect(iter(samples), lambda text: len(text.split()))
    assert found.ratings == [s["rating"] for s in samples]
    assert found.chars["title"] == [len(s["title"]) for s in samples]
    assert found.image_px == {(64, 64): len(samples)}
    assert found.tokens[50] <= found.tokens[100]
    assert len(found.pictures) == min(48, len(samples))


def test_a_name_cannot_break_the_page(demo: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo / "data", tmp_path / "a<script>b"))
    text = make_data_report(data, tmp_path / "out").read_text("utf-8")
    assert "a<script>b" not in text and "a&lt;script&gt;b" in text


def test_a_damaged_shard_is_named(demo: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo / "data", tmp_path / "data"))
    shard = data / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"it ends within sample.*{shard}.*rating-train verify"):
        make_data_report(data, tmp_path / "out")
