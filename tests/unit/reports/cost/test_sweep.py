"""`cost --sweep` and `--budget`: the numbers of `cost`, and text lengths that are measured where there are data."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rating_train.cli import main
from rating_train.errors import UserError
from rating_train.model.accounting import item_cost
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.reports.cost.budget import affordable_lines, needed_lines
from rating_train.reports.cost.prompt_lengths import Lengths, measure_lengths
from rating_train.reports.cost.sweep import (
    equal_ces_plcc,
    parse_sweep,
    render_sweep,
    run_sweep,
    write_sweep,
)
from rating_train.reports.cost_report import measure_cost
from rating_train.scoring.ces import ces_table
from rating_train.shards.mds_read import iter_texts
from tests.conftest import tiny_settings

pytestmark = pytest.mark.timeout(120)

ARCH = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]


@pytest.fixture(scope="module")
def config(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings("tiny", folder / "runs", demo)))
    return str(folder / "tiny.yaml")


def test_all_combinations_are_counted_with_the_text_that_the_tokenizer_needs(
    config: str, demo: Path, tmp_path: Path
) -> None:
    from rating_train.data.prompt import load_tokenizer

    sweep = run_sweep(config, [], parse_sweep(["data.image_px=32,64", "data.field_chars=5,50"]))
    assert [(s.image_px, s.field_chars) for s in sweep.settings] == [(32, 5), (32, 50), (64, 5), (64, 50)]
    items = list(iter_texts(demo / "data" / "train"))
    assert sweep.measured_on == len(items) and not sweep.why_not
    lengths = measure_lengths(items, load_tokenizer(str(demo / "model")), [5, 50])
    for s in sweep.settings:
        own = lengths[s.field_chars]
        assert s.text_tokens == own.needed() and own.covered(s.text_tokens) >= 0.999
        assert s.mean_text_tokens == pytest.approx(own.tokens.mean()) and s.mean_text_tokens < s.text_tokens
        assert s.cost.true is not None and s.cost.true["mac_linear"] < s.cost.padded["mac_linear"]
    paths = write_sweep(sweep, tmp_path / "out", None)
    rows = list(csv.DictReader(paths[0].open()))
    assert len(rows) == 4 and float(rows[3]["c_mac_linear"]) == sweep.settings[3].c("mac_linear")
    with Image.open(paths[1]) as image:
        assert image.width > 800


def test_without_data_lengths_are_as_configured_and_it_is_said(config: str) -> None:
    sweep = run_sweep(config, ["data.path=/no/such/data"], parse_sweep(["data.field_chars=5,50"]))
    assert {s.text_tokens for s in sweep.settings} == {96} and sweep.measured_on == 0
    assert "nothing could be measured" in render_sweep(sweep, None)


def test_a_setting_that_reaches_the_needed_plcc_has_an_equal_ces(config: str) -> None:
    sweep = run_sweep(config, [], parse_sweep(["data.image_px=32,64"]))
    for convention in ("mac_linear", "flop_attention"):
        needed = equal_ces_plcc(sweep, convention, 0.7)
        ces = [
            ces_table(p, s.cost.parameters, {convention: s.cost.padded[convention]})[0].ces
            for p, s in zip(needed, sweep.settings)
        ]
        assert needed[0] == 0.7 and ces[0] == pytest.approx(ces[1])
    assert "PLCC for equal CES" in render_sweep(sweep, 0.7)


def test_all_mistakes_of_a_sweep_are_one_error() -> None:
    with pytest.raises(UserError) as error:
        parse_sweep(["data.image_px", "train.epochs=1,2", "data.image_px=32,,64"])
    text = str(error.value)
    assert "3 problems" in text and "does not change the cost" in text
    with pytest.raises(UserError, match="combinations"):
        parse_sweep([f"data.image_px={','.join('1' * 40)}", f"data.field_chars={','.join('1' * 40)}"])


def test_evaluate_and_cost_agree_by_construction() -> None:
    report = measure_cost(ARCH, 384, 176, 0.7)
    row = item_cost(ARCH, 384, 212).as_row(0.7)
    assert {f"ces_{r.convention}": r.ces for r in report.rows}.items() <= row.items()
    assert row["c_mac_linear"] == next(r.c for r in report.rows if r.convention == "mac_linear")


def test_the_budget_says_what_fits() -> None:
    import numpy as np

    measured = {chars: Lengths(chars, np.full(10, chars)) for chars in (50, 100, 400)}
    text = "\n".join(affordable_lines(ARCH, 384, measured))
    (line,) = (row.split() for row in text.splitlines() if row.startswith("384 (configured)"))
    assert line == ["384", "(configured)", "36", "322", "100", "C", ">", "1", "-"]
    needed = needed_lines(ARCH, 384, 176)
    assert any(row.split() == ["0.70", "0.6966", "out", "of", "reach"] for row in needed)


def test_the_verb_prints_a_sweep_and_a_budget(
    config: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert main(["cost", config, "--sweep", "data.image_px=32,64", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "paper's G" in out and str(tmp_path / "cost_sweep.csv") in out
    assert main(["cost", config, "--budget"]) == 0
    out = capsys.readouterr().out
    assert "PLCC needed, strict [flop_attention]" in out and "64 (configured)" in out and "largest L" in out
