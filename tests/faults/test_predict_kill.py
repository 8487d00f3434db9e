"""`kill -9` of a prediction, twice, in the middle: the file is that of an undisturbed one, row for row."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from rating_train.files import read_json_lines
from rating_train.prediction.options import PredictOptions
from rating_train.prediction.run import predict
from tests.conftest import Ranks

#: Rows of the catalogue; RATING_TRAIN_PREDICT_ROWS=50000 takes minutes and shows what a real one meets.
ROWS = int(os.environ.get("RATING_TRAIN_PREDICT_ROWS", "300"))
PART_ROWS, BATCH_ITEMS = (6, 4) if ROWS < 3000 else (256, 64)
LIMIT_SECONDS = 600 + ROWS // 10

pytestmark = pytest.mark.timeout(LIMIT_SECONDS)


def catalogue(demo: Path, path: Path) -> Path:
    """The demo's listings again and again, each time with other ids."""
    listings = list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))
    with open(path, "w", encoding="utf-8") as file:
        for number in range(ROWS):
            row = listings[number % len(listings)]
            file.write(json.dumps({**row, "parent_asin": f"B{number:09d}"}) + "\n")
    return path


def parts(out: Path) -> int:
    folder = out.with_name(f"{out.name}.parts")
    return len(list(folder.glob("part_*.csv"))) if folder.is_dir() else 0


def kill_after(process: subprocess.Popen[str], out: Path, more: int) -> int:
    """kill -9 of all ranks once ``more`` parts have been finished; the number that is there then."""
    target, deadline = parts(out) + more, time.monotonic() + 120
    while parts(out) < target:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
    Ranks.kill(process)
    return parts(out)


def test_two_ranks_killed_twice_give_the_file_of_an_undisturbed_run(
    ranks: Ranks, trained_run: Path, demo: Path, tmp_path: Path, alone: None
) -> None:
    source, images, out = catalogue(demo, tmp_path / "rows.jsonl"), demo / "catalogue", tmp_path / "out.csv"
    command = ("predict", trained_run, "--source", source, "--images", images, "--out", out)
    command += ("--part-rows", PART_ROWS, "--batch-items", BATCH_ITEMS, "--workers", 1)
    total = -(-ROWS // PART_ROWS)
    for attempt in (1, 2):
        process = ranks.start(2, "-m", "rating_train", *command, torchrun=False)
        done = kill_after(process, out, more=4)
        assert 4 * attempt <= done < total and not out.exists()
        # As a kill in the middle of a write leaves it: never taken for a part.
        (out.with_name("out.csv.parts") / f".part_0000049.csv.tmp-{attempt}-abcd").write_text("B0,1.0")
    output = ranks.run(2, "-m", "rating_train", *command, timeout=LIMIT_SECONDS)
    assert f"{done} of them finished" in output, "finished parts are not scored again"
    undisturbed = PredictOptions(
        model=str(trained_run), source=(str(source),), images=str(images),
        out=str(tmp_path / "undisturbed.csv"), part_rows=PART_ROWS, batch_items=BATCH_ITEMS, workers=0,
    )  # fmt: skip
    predict(undisturbed)
    assert out.read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()
    assert out.read_text().count("\n") == 1 + ROWS
    assert not out.with_name("out.csv.parts").exists()
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name], "no temporary files are left"
