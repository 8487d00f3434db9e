"""Two generated tasks with a known ceiling: quality in [0, 100] of an image alone, a log price of a text alone.

    python benchmarks/tasks.py OUT [--items 600] [--epochs 12]

Each is prepared, trained from scratch on this machine and evaluated; the last lines give the PLCC beside that of a
perfect model, which knows everything but the noise.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = """\
question: The quality of this photo, from 0 to 100.
target: {column: mos, name: quality, unit: "", lower: 0, upper: 100}
fields: []
id: photo
group: ""
category: ""
weight: ""
images: [photo]
"""
PRICE = """\
question: The price of this offer, given its text.
target: {column: price, name: price, unit: USD, lower: null, upper: null, transform: log}
fields:
- {name: details, words: "Details:"}
id: sku
group: ""
category: ""
weight: ""
images: []
"""
WORDS = ("steel", "paper", "gold", "used", "large", "spare", "classic", "mini", "silk", "plain")
WORTH = (0.35, -0.5, 0.8, -0.6, 0.4, -0.3, 0.2, -0.4, 0.5, -0.1)  # in natural logarithms


def make_quality(out: Path, items: int) -> float:
    """Write squares whose brightness tells the quality, with noise; return the PLCC of a perfect model."""
    draw = np.random.default_rng(3)
    (out / "images").mkdir(parents=True)
    signal = draw.uniform(10, 90, items)
    mos = np.clip(signal + draw.normal(0, 8, items), 0, 100)
    with open(out / "source.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("photo", "mos"))
        for i, (level, score) in enumerate(zip(signal, mos)):
            pixels = draw.normal(2.5 * level, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(out / "images" / f"{i}.png")
            writer.writerow((f"{i}.png", f"{score:.3f}"))
    (out / "task.yaml").write_text(QUALITY)
    return float(np.corrcoef(signal, mos)[0, 1])


def make_price(out: Path, items: int) -> float:
    """Write texts whose words multiply a price, with noise; return the PLCC of a perfect model, of prices."""
    draw = np.random.default_rng(4)
    (out / "images").mkdir(parents=True)
    present = draw.random((items, len(WORDS))) < 0.35
    signal = np.log(40) + present @ np.array(WORTH)
    price = np.exp(signal + draw.normal(0, 0.15, items))
    with open(out / "source.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("sku", "details", "price"))
        for i, (row, value) in enumerate(zip(present, price)):
            words = [word for word, there in zip(WORDS, row) if there] or ["thing"]
            writer.writerow((f"p{i}", " ".join(words), f"{value:.2f}"))
    (out / "task.yaml").write_text(PRICE)
    return float(np.corrcoef(np.exp(signal), price)[0, 1])


def run(*words: str) -> None:
    """Run a verb of the package, and end where it fails."""
    subprocess.run([sys.executable, "-m", "rating_train", *words], check=True)


def measure(name: str, out: Path, model: Path, epochs: float) -> float:
    """Prepare, train and evaluate; return the PLCC on the validation split."""
    data = out / "data"
    run("prepare", "--task", f"{out}/task.yaml", "--source", f"{out}/source.csv", "--images", f"{out}/images",
        "--out", f"{data}", "--image-size-px", "64", "--val-fraction", "0.2")  # fmt: skip
    settings = {
        "name": name,
        "runs_dir": f"{out}/runs",
        "data": {"path": f"{data}", "image_px": 64, "text_tokens": 64, "workers": 0},
        "model": {"backbone": f"{model}", "weights": "random", "head_dropout": 0.0},
        "batch": {"global_items": 16},
        "optim": {"lr": dict.fromkeys(("vision", "connector", "decoder", "head"), 0.001)},
        "train": {"epochs": epochs, "precision": "fp32", "device": "cpu", "eval_every_steps": 0},
        "zero": {"stage": 1},
    }
    (out / "config.yaml").write_text(json.dumps(settings))
    run("train", f"{out}/config.yaml")
    rows = [json.loads(line) for line in (out / "runs" / name / "eval.jsonl").read_text().splitlines()]
    return float(rows[-1]["plcc"])


def main() -> None:
    """Measure both tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--epochs", type=float, default=12)
    args = parser.parse_args()
    run("demo", "--out", f"{args.out}/demo", "--items", "60")
    lines = []
    for name, make in (("quality", make_quality), ("price", make_price)):
        ceiling = make(args.out / name, args.items)
        found = measure(name, args.out / name, args.out / "demo" / "model", args.epochs)
        lines.append(
            f"{name}: PLCC {found:.4f}, of a perfect model {ceiling:.4f}: {100 * found / ceiling:.1f} %"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
