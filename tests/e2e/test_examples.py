"""The scripts of examples/: what a user copies gives the numbers of `evaluate`."""

from __future__ import annotations

import base64
import csv
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rating_train.files import read_json_lines
from tests.helpers.forked import REPO, Forked, readable, zygote
from tests.helpers.ranks import clean_environment

pytestmark = pytest.mark.timeout(120)


def start(script: str, *words: object) -> Forked:
    return zygote().start([REPO / "examples" / script, *words], clean_environment())


def output_of(script: str, *words: object) -> str:
    process = start(script, *words)
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def items(trained_run: Path, demo: Path) -> list[tuple[dict[str, Any], float]]:
    """(listing, score of the run's evaluation), of 20 items."""
    (file,) = (trained_run / "predictions").iterdir()
    listings = {row["parent_asin"]: row for row in read_json_lines(demo / "catalogue" / "catalogue.jsonl")}
    return [(listings[row["id"]], row["score"]) for row in read_json_lines(file)][:20]


def test_score_a_folder(trained_run: Path, demo: Path, items: list[Any], tmp_path: Path) -> None:
    names = ("title", "description", "features", "main_category")
    with open(tmp_path / "listings.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", *names))
        for row, _ in items:
            texts = (" ".join(row[n]) if isinstance(row[n], list) else row[n] for n in names)
            writer.writerow((row["parent_asin"], *texts))
    images, out = demo / "catalogue" / "images", tmp_path / "scores.csv"
    said = output_of("score_folder.py", trained_run, images, tmp_path / "listings.csv", out)
    assert "20 scores by trained/step_00000006 on cpu" in said
    with open(out, newline="", encoding="utf-8") as file:
        scores = {row["id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert scores == pytest.approx({row["parent_asin"]: score for row, score in items}, abs=1e-4)


def test_score_a_table(trained_run: Path, demo: Path, items: list[Any], tmp_path: Path) -> None:
    table = tmp_path / "it's a table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row, _ in items))
    lines = output_of("score_frame.py", trained_run, demo / "catalogue", table).splitlines()
    best = max(score for _, score in items)
    assert float(lines[-6].split()[0]) == pytest.approx(best, abs=1e-4)
    mean = sum(score for _, score in items) / len(items)
    assert lines[-1].startswith("20 rows") and float(lines[-1].split()[-1]) == pytest.approx(mean, abs=1e-4)


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def test_serve_over_http(trained_run: Path, demo: Path, items: list[Any]) -> None:
    server = start("serve.py", trained_run, 0)
    try:
        said = ""
        while "http://" not in said:  # what the library logs comes first
            assert server.stdout is not None and readable(server.stdout.fileno(), 60), said
            said = server.stdout.readline()
            assert said, "the server ended"
        url = said.split()[-1]
        for row, score in items[:3]:
            image = base64.b64encode((demo / "catalogue" / row["image_path"]).read_bytes()).decode()
            code, answer = post(url, json.dumps({**row, "image": image}).encode())
            assert code == 200 and answer["score"] == pytest.approx(score, abs=1e-5)
        bad = {"image": base64.b64encode(b"no image").decode(), "title": "a"}
        assert post(url, json.dumps(bad).encode())[1]["error"].startswith(
            "1 problem: image 0: image_not_an_image"
        )
        assert post(url, b"[]")[0] == post(url, b"{}")[0] == post(url, b"\xff")[0] == 400
        assert post(url.replace("/score", "/other"), b"{}")[0] == 404
    finally:
        server.kill()
        server.wait(timeout=30)
