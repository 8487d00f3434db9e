"""The verb ``demo``: a catalogue whose best possible PLCC is known, and a tiny model, without downloads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rating_train.demo.catalogue import make_catalogue
from rating_train.demo.tokenizer import IMAGE_TOKEN_ID, PAD_TOKEN_ID, make_tokenizer
from rating_train.errors import UserError
from rating_train.files import read_json_lines
from rating_train.model.architecture import Architecture, TextArchitecture, VisionArchitecture

log = logging.getLogger(__name__)

CATALOGUE_DIR = "catalogue"
MODEL_DIR = "model"
_VOCABULARY = 1024


def make_demo(out: Path, items: int, seed: int) -> dict[str, Any]:
    """Write OUT/catalogue (JSON lines and images) and OUT/model (config, tokenizer, safetensors).

    Returns:
        The upper bounds: the PLCC of a perfect model, and of perfect image-only and text-only models.

    Raises:
        UserError: OUT is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError("the folder is not empty", where=out, fix="remove it or give another --out")
    log.info("drawing %d listings", items)
    upper_bounds = make_catalogue(out / CATALOGUE_DIR, items=items, seed=seed)
    make_model(out, seed)
    return upper_bounds


def make_model(out: Path, seed: int) -> None:
    """Train the tokenizer on the catalogue's text and write a tiny SmolVLM with random weights."""
    from rating_train.model.load import save_random_backbone

    rows = list(read_json_lines(out / CATALOGUE_DIR / "catalogue.jsonl"))
    texts = [
        " ".join([r["title"], *r["description"], *r["features"], r["main_category"] or ""]) for r in rows
    ]
    vocabulary = make_tokenizer(texts, out / MODEL_DIR, _VOCABULARY)
    save_random_backbone(demo_architecture(vocabulary), out / MODEL_DIR, seed)


def demo_architecture(vocabulary: int) -> Architecture:
    """Return SmolVLM's layout at a size that a CPU trains in minutes: 0.5 million parameters."""
    return Architecture(
        text=TextArchitecture(
            hidden=96, layers=3, heads=3, kv_heads=1, head_dim=32, mlp=256, vocab=vocabulary
        ),
        vision=VisionArchitecture(hidden=64, layers=2, heads=2, mlp=128, patch=8, image_size=64),
        scale_factor=2,
        image_token_id=IMAGE_TOKEN_ID,
        pad_token_id=PAD_TOKEN_ID,
        head_hidden=48,
    )
