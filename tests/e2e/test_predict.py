"""`rating-train predict` on a trained run: the numbers of `evaluate`, every format, bad rows, any number of ranks."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rating_train.errors import UserError
from rating_train.files import read_json_lines
from rating_train.model.cost import count_forward, count_parameters
from rating_train.prediction.options import PredictOptions
from rating_train.prediction.output import OutputRow, Summary, read_output
from rating_train.prediction.run import predict
from tests.conftest import Ranks

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("alone")]

#: Another batch around an item makes kernels add in another order. Seen: 0 for most items, 2.4e-7 for some.
TOLERANCE_STARS = 1e-5


def evaluated(run: Path) -> dict[str, float]:
    (file,) = (run / "predictions").iterdir()
    return {row["id"]: row["score"] for row in read_json_lines(file)}


def score(run: Path, out: Path, **options: Any) -> tuple[Summary, list[OutputRow]]:
    summary = predict(
        PredictOptions(model=str(run), out=str(out), **{"workers": 0, "batch_items": 12, **options})
    )
    assert summary is not None and not out.with_name(f"{out.name}.parts").exists()
    return summary, list(read_output(out)) if out.suffix == ".csv" else []


def catalogue(demo: Path) -> dict[str, Any]:
    return {"source": (str(demo / "catalogue" / "catalogue.jsonl"),), "images": str(demo / "catalogue")}


def some_of(demo: Path, path: Path, ids: set[str]) -> dict[str, Any]:
    """A catalogue of these items of the demo only."""
    lines = (demo / "catalogue" / "catalogue.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["parent_asin"] in ids))
    return {"source": (str(path),), "images": str(demo / "catalogue")}


def test_a_catalogue_gets_the_scores_of_evaluate(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    expected = evaluated(trained_run)
    source = some_of(demo, tmp_path / "val.jsonl", set(expected))
    summary, rows = score(trained_run, tmp_path / "out.csv", part_rows=20, workers=1, **source)
    ids = [row["parent_asin"] for row in read_json_lines(tmp_path / "val.jsonl")]
    assert [row.id for row in rows] == ids, "every row of the input once, in its order"
    assert summary == (len(expected), 0, ())
    assert len(expected) > 30 and len({round(s, 4) for s in expected.values()}) > 20
    for row in rows:
        assert row.score == pytest.approx(expected[row.id], abs=TOLERANCE_STARS)


def test_a_prepared_dataset_gets_the_scores_of_evaluate(
    trained_run: Path, demo: Path, tmp_path: Path
) -> None:
    _, rows = score(trained_run, tmp_path / "out.csv", data=str(demo / "data"))
    expected = evaluated(trained_run)
    assert {row.id for row in rows} == set(expected)
    for row in rows:
        assert row.score == pytest.approx(expected[row.id], abs=TOLERANCE_STARS)


BROKEN = [
    "{torn",
    json.dumps({"title": "no id", "image_path": "images/B0DEMO00001.jpg"}),
    json.dumps({"parent_asin": "NOWHERE", "title": "a", "image_path": "images/nowhere.jpg"}),
    json.dumps({"parent_asin": "NOT-AN-IMAGE", "title": "a", "image_path": "catalogue.jsonl"}),
    json.dumps({"parent_asin": "OUTSIDE", "title": "a", "image_path": "../model/config.json"}),
]


def test_bad_rows_have_a_reason_and_change_no_other(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    lines = (demo / "catalogue" / "catalogue.jsonl").read_text().splitlines()[:24]
    for position, broken in zip((0, 5, 11, 12, 24), BROKEN):
        lines.insert(position, broken)
    lines[13:13] = BROKEN[2:3] * 12  # a batch without any usable row
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    source = {**catalogue(demo), "source": (str(tmp_path / "mixed.jsonl"),)}
    summary, rows = score(trained_run, tmp_path / "out.csv", part_rows=24, **source)
    assert (summary.rows, summary.without_score) == (len(lines), 17) and len(summary.first_reasons) == 5
    reasons = [row.reason.partition(":")[0] for row in rows if row.score is None]
    kinds = ["bad_json", "missing_field", *["image_missing"] * 12, "image_missing", "image_not_an_image"]
    assert sorted(reasons) == sorted([*kinds, "image_outside_root"])
    assert all((row.score is None) == bool(row.reason) for row in rows)
    usable = {row.id for row in rows if row.score is not None}
    _, clean = score(trained_run, tmp_path / "clean.csv", **some_of(demo, tmp_path / "clean.jsonl", usable))
    expected = {row.id: row.score for row in clean}
    for row in rows:
        if row.score is not None:
            assert row.score == pytest.approx(expected[row.id], abs=TOLERANCE_STARS)


def challenge_csv(demo: Path, path: Path, count: int) -> dict[str, Any]:
    """The challenge's columns: no rating, several images, the first of which is missing."""
    listings = list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))[:count]
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow("parent_asin main_category title features description image_paths".split())
        for row in listings:
            texts = (
                row["main_category"],
                row["title"],
                " ".join(row["features"]),
                " ".join(row["description"]),
            )
            writer.writerow((row["parent_asin"], *texts, f"images/none.jpg;{row['image_path']}"))
    return {"source": (str(path),), "images": str(demo / "catalogue")}


def test_the_challenges_file(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    source = challenge_csv(demo, tmp_path / "input.csv", 20)
    _, plain = score(trained_run, tmp_path / "plain.csv", **source)
    predict(
        PredictOptions(
            model=str(trained_run),
            out=str(tmp_path / "s.csv"),
            submission=True,
            convention="flop_attention",
            **source,
        )
    )
    with open(tmp_path / "s.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["item_id", "score", "params", "flops"]
    assert [(row["item_id"], row["score"]) for row in rows] == [(r.id, f"{r.score:.2f}") for r in plain]
    from rating_train.config.load import load_config
    from rating_train.model.architecture import read_architecture

    config = load_config(trained_run / "config.yaml")
    architecture = read_architecture(config.model)
    tokens = 64 // 8 // 2
    forward = count_forward(architecture, 64, tokens**2 + config.data.text_tokens)
    millions, billions = count_parameters(architecture)["total"] / 1e6, forward.total("flop_attention") / 1e9
    for row in rows:
        assert (float(row["params"]), float(row["flops"])) == pytest.approx((millions, billions), abs=1e-6)


def test_a_submission_that_lacks_scores_is_continued_with_a_fill(
    trained_run: Path, demo: Path, tmp_path: Path
) -> None:
    source = challenge_csv(demo, tmp_path / "input.csv", 6)
    with open(tmp_path / "input.csv", "a") as f:
        f.write("LOST,Toys,Bear,soft,A bear.,images/lost.jpg\n")
    options = {
        "model": str(trained_run),
        "out": str(tmp_path / "s.csv"),
        "submission": True,
        "workers": 0,
        **source,
    }
    with pytest.raises(UserError, match=r"1 of 7 rows have no score: LOST: image_missing.*--fill SCORE"):
        predict(PredictOptions(**options))
    assert not (tmp_path / "s.csv").exists()
    predict(PredictOptions(**options, fill=3.9))
    assert (tmp_path / "s.csv").read_text().splitlines()[-1].startswith("LOST,3.90,")


def test_parquet_in_and_out(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    import duckdb

    source = tmp_path / "in.parquet"
    lines = demo / "catalogue" / "catalogue.jsonl"
    duckdb.sql(f"COPY (SELECT * FROM read_json('{lines}') LIMIT 40) TO '{source}' (FORMAT PARQUET)")
    score(trained_run, tmp_path / "out.parquet", **{**catalogue(demo), "source": (str(source),)})
    _, rows = score(trained_run, tmp_path / "out.csv", **{**catalogue(demo), "source": (str(source),)})
    found = duckdb.sql(f"SELECT id, score FROM '{tmp_path / 'out.parquet'}'").fetchall()
    assert found == [(row.id, row.score) for row in rows] and len(found) == 40


class Images(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_images_that_are_urls(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    listings = list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))[:20]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Images, directory=demo / "catalogue")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        with open(tmp_path / "urls.jsonl", "w") as f:
            for number, row in enumerate(listings):
                name = "images/gone.jpg" if number == 7 else row.pop("image_path")
                images = {"large": [f"{host}/{name}"], "variant": ["MAIN"]}
                f.write(json.dumps({**row, "image_path": None, "images": images}) + "\n")
        source = {
            "source": (str(tmp_path / "urls.jsonl"),),
            "fetch": True,
            "fetch_set": ("allow_private=true",),
        }
        _, rows = score(trained_run, tmp_path / "out.csv", part_rows=8, **source)
        server.shutdown()
    assert rows[7].score is None and rows[7].reason.startswith("fetch_gone: ")
    source = some_of(demo, tmp_path / "local.jsonl", {row.id for row in rows})
    _, local = score(trained_run, tmp_path / "local.csv", part_rows=8, **source)
    for row, expected in zip(rows[:7] + rows[8:], local[:7] + local[8:], strict=True):
        assert row.id == expected.id and row.score == pytest.approx(expected.score, abs=TOLERANCE_STARS)


def test_a_changed_source_or_option_is_not_continued(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    source = challenge_csv(demo, tmp_path / "input.csv", 4)
    (tmp_path / "input.csv").write_text((tmp_path / "input.csv").read_text() + "X,a,b,c,d,none.jpg\n")
    options = {
        "model": str(trained_run),
        "out": str(tmp_path / "o.csv"),
        "submission": True,
        "workers": 0,
        **source,
    }
    with pytest.raises(UserError, match="1 of 5 rows have no score"):
        predict(PredictOptions(**options))
    with pytest.raises(UserError, match=r"batch_items was 64, now 7.*remove .*o\.csv\.parts"):
        predict(PredictOptions(**options, batch_items=7))
    challenge_csv(demo, tmp_path / "input.csv", 4)
    with pytest.raises(UserError, match="source was "):
        predict(PredictOptions(**options))


def test_no_run_and_no_such_checkpoint(trained_run: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a run directory .* nor an exported model"):
        predict(PredictOptions(model=str(tmp_path), out=str(tmp_path / "o.csv"), **catalogue(demo)))
    with pytest.raises(UserError, match="there is no checkpoint 77"):
        predict(
            PredictOptions(
                model=str(trained_run), checkpoint="77", out=str(tmp_path / "p.csv"), **catalogue(demo)
            )
        )
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    state = next((run / "checkpoints").glob("step_*/state.json"))
    state.write_text("{}")
    with pytest.raises(UserError, match=r"the checkpoint cannot be trusted: state\.json"):
        predict(PredictOptions(model=str(run), out=str(tmp_path / "q.csv"), **catalogue(demo)))


def test_two_ranks_write_the_bytes_of_one(
    ranks: Ranks, trained_run: Path, demo: Path, tmp_path: Path
) -> None:
    options = ("--data", demo / "data", "--part-rows", 8, "--batch-items", 12)
    output = ranks.run(
        2,
        "-m",
        "rating_train",
        "predict",
        trained_run,
        "--out",
        tmp_path / "two.csv",
        *options,
        "--workers",
        1,
    )
    assert "rows, 0 without a score" in output
    score(trained_run, tmp_path / "one.csv", data=str(demo / "data"), part_rows=8)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
