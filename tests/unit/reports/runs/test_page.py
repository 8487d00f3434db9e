"""The page of a run and of a comparison: complete in one file, right in its numbers, and good in a browser."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rating_train.cli import main
from rating_train.reports.runs.page import make_comparison_page, make_run_page
from rating_train.resilience.run_lock import RunLock
from rating_train.run_dir import EVAL_LOG, PREDICTIONS_DIR, TRAIN_LOG
from rating_train.scoring.metrics import score
from rating_train.shards.mds_read import iter_texts
from tests.helpers.chromium import Browser

pytestmark = pytest.mark.timeout(240)

STEPS = 60


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(run: Path, demo: Path, seed: int = 0, noise: float = 0.3) -> Path:
    """A run as training leaves it: killed and resumed once, with skipped steps, on the demo's validation split."""
    generator = np.random.default_rng(seed)
    train = [
        {"step": s, "epoch": s / 20, "loss": 0.1 + float(np.exp(-s / 8)), "lr": 4e-4 * (1 - s / STEPS),
         "grad_norm": 0.5 + float(generator.random()), "samples_per_second": 100.0, "data_wait_fraction": 0.1,
         "step_seconds": 0.1, "peak_memory_gib": 1.5, "skipped_steps": int(s > 30), "time": 1.7e9 + 10 * s}
        for s in range(1, STEPS + 1)
    ]  # fmt: skip
    write_lines(run / TRAIN_LOG, train)
    items = list(iter_texts(demo / "data" / "val"))
    guesses = np.clip([i["rating"] + generator.normal(0, noise) for i in items], 1, 5).tolist()
    rows = [
        {"id": i["id"], "score": guess, "rating": i["rating"],
         "category": i["main_category"], "rating_count": i["rating_count"], "text_chars": len(i["title"]),
         "group": i["id"], "tokens": 80}
        for i, guess in zip(items, guesses)
    ]  # fmt: skip
    scores = score([r["score"] for r in rows], [r["rating"] for r in rows])
    cost = {
        "ces_mac_linear": 0.5,
        "c_mac_linear": 0.1 + noise,
        "ces_flop_attention": 0.4,
        "c_flop_attention": 0.2,
    }
    evaluations = [{"step": s, "split": "val", "source": "train", "time": 1.7e9 + 10 * s, **scores.as_dict(), **cost}
                   for s in (30, STEPS)]  # fmt: skip
    write_lines(run / EVAL_LOG, evaluations)
    write_lines(run / PREDICTIONS_DIR / f"val_step_{STEPS:08d}.jsonl", rows)
    settings = {"name": run.name, "data": {"path": str(demo / "data")}, "train": {"seed": 40 + seed}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    history = [{"started": "2023-11-14T22:13:30+0000", "step": 0},
               {"started": "2023-11-14T22:18:30+0000", "step": 30, "changed": {"train.seed": [1, 2]}}]  # fmt: skip
    facts = {
        "versions": {"torch": "2.0"},
        "started": "2023-11-14",
        "device": "cpu",
        "ranks": 2,
        "history": history,
    }
    (run / "provenance.json").write_text(json.dumps(facts))
    return run


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        make_run(folder / name, demo, i, 0.2 + 0.2 * i) for i, name in enumerate(("first", "second", "third"))
    ]


def test_a_page_needs_no_other_file_and_holds_the_runs_numbers(runs: list[Path]) -> None:
    page = make_run_page(runs[0])
    text = page.read_text("utf-8")
    assert page == runs[0] / "report" / "index.html" and len(text) < 5_000_000
    HTMLParser().feed(text)
    bare = re.sub(r'src="data:[^"]+"|<style>.*?</style>|<script>.*?</script>', "", text, flags=re.S)
    assert "http" not in text and "url(" not in text and "nan" not in bare.lower()
    rows = [json.loads(line) for line in (runs[0] / PREDICTIONS_DIR / f"val_step_{STEPS:08d}.jsonl").open()]
    expected = score([r["score"] for r in rows], [r["rating"] for r in rows])
    assert f"<b>{expected.plcc:.3f}</b>" in text and f">{expected.kendall:.4f}</td>" in text
    for words in (
        "1 restart ",
        "1 skipped step ",
        "train.seed",
        "Worst items",
        "Residuals by number of ratings",
        "cpu",
    ):
        assert words in text, words
    assert text.count('<img src="data:image/jpeg') == 24, "the best and the worst items have their images"


def test_what_others_wrote_is_shown_and_not_run(runs: list[Path], demo: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)<", demo)
    file = run / PREDICTIONS_DIR / f"val_step_{STEPS:08d}.jsonl"
    rows = [{**json.loads(line), "category": '"><img src=x onerror=alert(2)>'} for line in file.open()]
    write_lines(file, rows)
    text = make_run_page(run).read_text("utf-8")
    assert "<script>alert" not in text and "<img src=x" not in text and "onerror=alert(2)&gt;" in text


def test_boundaries_of_phases_are_marked(demo: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", demo)
    rows = [json.loads(line) for line in (run / TRAIN_LOG).read_text().splitlines()]
    write_lines(run / TRAIN_LOG, [{**row, "phase": 1 + (row["step"] > 20)} for row in rows])
    page = make_run_page(run).read_text()
    assert page.count("<title>phase 2 from step 21 on</title>") == page.count('class="phase"') > 3
    assert "2 phases (dotted lines between them)" in page


def test_a_run_that_has_just_begun_or_lost_its_rest_has_a_page(tmp_path: Path, demo: Path) -> None:
    young = tmp_path / "young"
    write_lines(young / TRAIN_LOG, [{"step": 1, "loss": None}, {"step": 2, "loss": float("nan"), "lr": 1e-4}])
    text = make_run_page(young, refresh=7).read_text("utf-8")
    assert "not logged" in text and 'http-equiv="refresh" content="7"' in text
    few = tmp_path / "few"
    write_lines(few / PREDICTIONS_DIR / "val.jsonl", [{"id": "a", "score": 4.0, "rating": 4.5}])
    assert "undefined" in make_run_page(few).read_text("utf-8")
    constant = make_run(tmp_path / "constant", demo)
    file = constant / PREDICTIONS_DIR / f"val_step_{STEPS:08d}.jsonl"
    write_lines(file, [{**json.loads(line), "score": 4.2} for line in file.open()])
    assert "all predictions are 4.2" in make_run_page(constant).read_text("utf-8")


def test_a_living_run_is_followed_until_it_ends(demo: Path, tmp_path: Path) -> None:
    """Its job appends rows meanwhile, the last one not yet complete; a second report may be asked for as well."""
    run = make_run(tmp_path / "living", demo)
    page = run / "report" / "index.html"
    rows = (run / TRAIN_LOG).read_text("utf-8").splitlines(keepends=True)
    (run / TRAIN_LOG).write_text("".join(rows[:20]) + rows[20][:30])

    def shows(steps: int) -> bool:
        return page.is_file() and f"<b>{steps}</b>" in page.read_text("utf-8")

    def wait_for(steps: int) -> str:
        end = time.monotonic() + 120
        while not shows(steps) and time.monotonic() < end:
            time.sleep(0.1)
        return page.read_text("utf-8") if shows(steps) else f"never at step {steps}"

    codes: list[int] = []
    with RunLock(run, beat_seconds=0.1, stale_seconds=1):
        follower = threading.Thread(target=lambda: codes.append(main(["report", str(run), "--follow", "1"])))
        follower.start()
        assert 'http-equiv="refresh" content="1"' in wait_for(20)
        (run / TRAIN_LOG).write_text("".join(rows[:40]) + rows[40][:30])
        assert 'http-equiv="refresh"' in wait_for(40)
        assert main(["report", str(run)]) == 0 and shows(40), "one page of the run so far, once"
    (run / TRAIN_LOG).write_text("".join(rows))
    follower.join(120)
    assert codes == [0] and shows(STEPS) and "refresh" not in page.read_text("utf-8")


def test_several_runs_get_a_page_that_compares_them(runs: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["report", *map(str, runs), "--follow", "1"]) == 0, "nothing trains: it ends by itself"
    told = capsys.readouterr().out.split()
    assert told == [
        *(str(r / "report" / "index.html") for r in runs),
        str(runs[0] / "report" / "comparison.html"),
    ]
    text = Path(told[-1]).read_text("utf-8")
    assert "second is worse than first by" in text and "train.seed" in text
    assert text.count("<circle") > 6 and "no cheaper run reaches" in text and "refresh" not in text


def test_runs_on_different_items_are_shown_side_by_side_with_the_reason(
    runs: list[Path], tmp_path: Path, demo: Path
) -> None:
    other = make_run(tmp_path / "other", demo)
    write_lines(
        other / PREDICTIONS_DIR / f"val_step_{STEPS:08d}.jsonl", [{"id": "x", "score": 4.0, "rating": 4.5}]
    )
    text = make_comparison_page([runs[0], other]).read_text("utf-8")
    assert "cannot be compared item by item: the runs have no item in common" in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_nothing_is_wrong_and_nothing_is_loaded(
    runs: list[Path], demo: Path, browser: Browser, width: int, dark: bool, tmp_path: Path
) -> None:
    from rating_train.reports.dataset_report import make_data_report

    data = tmp_path / "data.report"
    for page in (make_run_page(runs[0]), make_comparison_page(runs), make_data_report(demo / "data", data)):
        browser.open(page, width, dark)
        assert browser.value("document.documentElement.scrollWidth") <= width, "no horizontal scrolling"
        assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.errors == [] and browser.requests == []
        background = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark


def test_a_click_sorts_a_table_and_a_second_one_turns_it_round(runs: list[Path], browser: Browser) -> None:
    browser.open(make_run_page(runs[0]), 1280)
    first = "document.querySelectorAll('#slices table')[0]"
    column = f"[...{first}.tBodies[0].rows].map(r => Number(r.cells[6].dataset.key))"
    click = f"{first}.tHead.rows[0].cells[6].querySelector('button').click()"
    before = browser.value(column)
    assert len(before) > 2 and before != sorted(before), "sorted by something else at first"
    browser.value(click)
    assert browser.value(column) == sorted(before, reverse=True)
    browser.value(click)
    assert browser.value(column) == sorted(before)
    state = "document.querySelector('#slices th[aria-sort]').getAttribute('aria-sort')"
    assert browser.value(state) == "ascending" and browser.errors == []


def test_printed_it_is_light_and_laid_out_for_paper(runs: list[Path], browser: Browser) -> None:
    """Also where the screen is dark: 718 CSS pixels are a sheet of A4 without its margins."""
    browser.open(make_run_page(runs[0]), 718, dark=True, media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.value("document.documentElement.scrollWidth") <= 718, "nothing is cut at the right"
    columns = "getComputedStyle(document.querySelector('%s')).gridTemplateColumns.split(' ').length"
    assert [browser.value(columns % name) for name in (".charts", ".items", ".cards")] == [2, 6, 4]
    whole = "[...document.querySelectorAll('figure, .item, .scroll, tr')].map(e => getComputedStyle(e).breakInside)"
    assert set(browser.value(whole)) == {"avoid"}, "no chart, item or table is cut by the end of a page"
