"""Prices of a catalogue, on a log scale: from the image alone, from the text alone, and from both, in one comparison.

    python benchmarks/prices.py products.jsonl IMAGES OUT [--epochs 3]

Prepares the listings once, trains a tiny model from scratch for each of the three, evaluates it beside ridge regression
on TF-IDF, and compares the runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

TASK = """\
question: The price of this product, given its image and its text.
target: {column: price, name: price, unit: INR, lower: null, upper: null, transform: log}
fields:
- {name: title, words: "Title:"}
- {name: features, words: "Features:"}
id: parent_asin
category: ""
weight: ""
images: [image_path]
"""
INPUTS = {"price_image": ["image"], "price_text": ["text"], "price_both": ["image", "text"]}


def run(*words: object) -> None:
    """Run a verb of the package, and end where it fails."""
    subprocess.run([sys.executable, "-m", "rating_train", *map(str, words)], check=True)


def main() -> None:
    """Prepare, train, evaluate and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=float, default=3)
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True)
    (out / "task.yaml").write_text(TASK)
    run("demo", "--out", out / "demo", "--items", 60)
    run("prepare", "--task", out / "task.yaml", "--source", args.source, "--images", args.images,
        "--out", out / "data", "--image-size-px", 64, "--val-fraction", 0.15)  # fmt: skip
    for name, inputs in INPUTS.items():
        settings = {
            "name": name,
            "runs_dir": f"{out}/runs",
            "data": {"path": f"{out}/data", "image_px": 64, "text_tokens": 128, "workers": 0},
            "model": {"backbone": f"{out}/demo/model", "weights": "random", "inputs": inputs},
            "batch": {"global_items": 32},
            "optim": {"lr": dict.fromkeys(("vision", "connector", "decoder", "head"), 0.001)},
            "train": {"epochs": args.epochs, "precision": "fp32", "device": "cpu", "eval_every_steps": 0},
            "zero": {"stage": 1},
        }
        (out / f"{name}.yaml").write_text(json.dumps(settings))
        run("train", out / f"{name}.yaml")
        run("evaluate", out / "runs" / name)
    run("compare", *(out / "runs" / name for name in INPUTS))


if __name__ == "__main__":
    main()
