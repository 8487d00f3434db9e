"""launch/quickstart.sh, shortened: it ends in numbers, can be run again, and fails where it should."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest

from tests.repo.conftest import REPO, Quickstart, run_quickstart

pytestmark = pytest.mark.timeout(800)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_check", REPO / "launch" / "quickstart_check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_ends_in_plcc_upper_bounds_ces_and_a_report(quickstart: Quickstart) -> None:
    out = quickstart.output
    for words in ("a perfect model", "the best image-only", "the best text-only", "% of it reached"):
        assert words in out
    upper_bounds = json.loads((quickstart.folder / "demo/catalogue/upper_bounds.json").read_text())
    assert f"{upper_bounds['plcc_perfect']:.4f}" in out
    for convention in ("mac_linear", "flop_attention"):
        assert f"[{convention}] " in out
    report = quickstart.run / "report"
    assert f"report: {report}" in out
    assert {"curves.png", "scatter.png", "summary.json"} <= {p.name for p in report.iterdir()}
    assert not (quickstart.folder / "demo" / ".partial").exists()


def test_run_again_it_skips_what_is_done_and_enforces_the_comparison(quickstart: Quickstart) -> None:
    steps = [json.loads(line)["step"] for line in (quickstart.run / "train.jsonl").read_text().splitlines()]
    done = run_quickstart(quickstart.folder, QUICKSTART_CHECK="1")
    assert done.returncode == 1, "7 steps cannot pass the comparison"
    assert "expected: above both single-modality upper bounds" in done.stdout
    assert "already there: demo/catalogue" in done.stdout and "already there: demo/data" in done.stdout
    assert f"resuming from step {steps[-1]} of {steps[-1]}" in done.stdout
    again = [json.loads(line)["step"] for line in (quickstart.run / "train.jsonl").read_text().splitlines()]
    assert again == steps, "a finished run is not trained again"


@pytest.mark.parametrize(
    ("plcc", "good"),
    [(0.94, True), (0.81, True), (0.80, False), (0.67, False), (0.60, False), (None, False)],
)
def test_the_comparison(check: ModuleType, plcc: float | None, good: bool) -> None:
    upper_bounds = {"plcc_perfect": 0.946, "plcc_image_only": 0.671, "plcc_text_only": 0.663}
    lines, verdict = check.compare(plcc, upper_bounds)
    assert verdict is good
    assert plcc is None or f"{100 * plcc / 0.946:.1f} % of it reached" in lines[0]


def test_a_single_modality_that_is_not_beaten_fails(check: ModuleType) -> None:
    upper_bounds = {"plcc_perfect": 0.90, "plcc_image_only": 0.88, "plcc_text_only": 0.5}
    lines, verdict = check.compare(0.87, upper_bounds)
    assert not verdict and "NOT beaten" in lines[1] and lines[2].endswith("   beaten")
