"""docs/extending.md: its modules and its configuration are written out as they stand, and run on two ranks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from rating_train.demo.model import demo_architecture
from rating_train.files import read_json, read_json_lines
from rating_train.model import architecture, backbones
from tests.helpers.cli import rating_train
from tests.helpers.ranks import Ranks
from tests.repo.pages import PAGES

PAGE = PAGES["docs/extending.md"]
MODULES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, flags=re.M | re.S))
(CONFIG,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)


def write_xml(path: Path, listings: list[dict[str, object]]) -> None:
    """The demo's listings in the form that the page's reader takes."""
    items = [
        f"<product id={quoteattr(str(x['parent_asin']))} stars={quoteattr(str(x['average_rating']))} "
        f"votes={quoteattr(str(x['rating_number']))}><title>{escape(str(x['title']))}</title>"
        f"<text>{escape(' '.join(x['description']))}</text><shelf>{escape(str(x['main_category']))}</shelf></product>"  # type: ignore[arg-type]
        for x in listings
    ]
    path.write_text(f"<products>{''.join(items)}</products>")


def write_tiny_llava(folder: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the config.json of a small LLaVA, made by the page's own class, and the demo's tokenizer."""
    monkeypatch.setattr(architecture, "READERS", dict(architecture.READERS))
    monkeypatch.setattr(backbones, "BACKBONES", dict(backbones.BACKBONES))
    exec(MODULES["llava.py"], {})
    known = read_json(demo_model / "config.json")
    shape = demo_architecture(known["text_config"]["vocab_size"])
    shutil.copytree(demo_model, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    backbones.BACKBONES["llava"].config(shape).save_pretrained(folder)


@pytest.mark.timeout(500)
def test_the_examples_of_the_page_run_together(
    demo: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in MODULES.items():
        (tmp_path / name).write_text(source)
    write_xml(tmp_path / "products.xml", list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))[:80])
    (tmp_path / "images").symlink_to(demo / "catalogue" / "images")
    (line,) = re.findall(r"`rating-train (prepare --extension [^`]*)`", PAGE)
    done = rating_train(*line.split(), "--image-size-px", 64, "--val-fraction", 0.2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["read"] == 80 and manifest["kept"] > 70
    write_tiny_llava(tmp_path / "llava_tiny", demo / "model", monkeypatch)
    (tmp_path / "extended.yaml").write_text(CONFIG)
    output = ranks.train(2, tmp_path / "extended.yaml", cwd=tmp_path)
    run = tmp_path / "runs" / "extended"
    rows = list(read_json_lines(run / "eval.jsonl"))
    assert all(0 <= row["within_half"] <= 1 for row in rows) and "WITHIN_HALF" in output
    recorded = json.loads((run / "provenance.json").read_text())
    assert "careful_loss.py" in json.dumps(recorded), "the file of the loss is recorded"
    best = max((row for row in rows if row["plcc"] is not None), key=lambda row: row["plcc"])
    assert (run / "best_plcc.txt").read_text() == f"{best['plcc']:.4f} at step {best['step']}\n"
    again = rating_train("evaluate", run, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    refused = rating_train("export", run, "--out", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "llava" in refused.stderr, refused.stderr
