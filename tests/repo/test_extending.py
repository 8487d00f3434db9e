"""docs/extending.md: its modules and its configuration are written out as they stand, and run on two ranks."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from rating_train.files import read_json, read_json_lines
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


def write_tiny_llava(folder: Path, tokenizer: Path) -> None:
    """A folder with a small LLaVA's config.json and the demo's tokenizer."""
    from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig

    from rating_train.demo.model import demo_architecture

    known = read_json(tokenizer / "config.json")
    shape = dataclasses.asdict(demo_architecture(known["text_config"]["vocab_size"]))
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    text, vision = shape["text"], shape["vision"]
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision["hidden"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["heads"],
            intermediate_size=vision["mlp"],
            patch_size=vision["patch"],
            image_size=vision["image_size"],
        ),
        text_config=LlamaConfig(
            hidden_size=text["hidden"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            num_key_value_heads=text["kv_heads"],
            head_dim=text["head_dim"],
            intermediate_size=text["mlp"],
            vocab_size=text["vocab"],
        ),
        image_token_index=shape["image_token_id"],
    )
    config.save_pretrained(folder)


@pytest.mark.timeout(240)
def test_the_examples_of_the_page_run_together(demo: Path, tmp_path: Path, ranks: Ranks) -> None:
    for name, source in MODULES.items():
        (tmp_path / name).write_text(source)
    write_xml(tmp_path / "products.xml", list(read_json_lines(demo / "catalogue" / "catalogue.jsonl"))[:80])
    (tmp_path / "images").symlink_to(demo / "catalogue" / "images")
    (line,) = re.findall(r"`rating-train (prepare --extension [^`]*)`", PAGE)
    done = rating_train(*line.split(), "--image-size-px", 64, "--val-fraction", 0.2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["read"] == 80 and manifest["kept"] > 70
    write_tiny_llava(tmp_path / "llava_tiny", demo / "model")
    (tmp_path / "extended.yaml").write_text(CONFIG)
    ranks.train(2, tmp_path / "extended.yaml", cwd=tmp_path)
    run = tmp_path / "runs" / "extended"
    rows = list(read_json_lines(run / "eval.jsonl"))
    best = max((row for row in rows if row["plcc"] is not None), key=lambda row: row["plcc"])
    assert (run / "best_plcc.txt").read_text() == f"{best['plcc']:.4f} at step {best['step']}\n"
    again = rating_train("evaluate", run, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    refused = rating_train("export", run, "--out", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "llava" in refused.stderr, refused.stderr
