"""Score a folder of images, one for each row of a CSV file.

    python examples/score_folder.py MODEL IMAGES LISTINGS.csv OUT.csv

MODEL is a run or an exported folder. LISTINGS.csv has the column ``id`` and any of ``title``, ``description``,
``features``, ``main_category``; the image of a row is IMAGES/ID.jpg. For millions of rows, use `rating-train predict`:
it resumes, runs on several GPUs, and gives bad rows a reason instead of stopping.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from rating_train import load


def main(model_path: str, images: str, listings: str, out: str) -> None:
    """Write ``id,score`` for every row of the listings, in their order."""
    with open(listings, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    model = load(model_path)
    scores = model.score([Path(images) / f"{row['id']}.jpg" for row in rows], rows)
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "score"))
        writer.writerows((row["id"], f"{score:.4f}") for row, score in zip(rows, scores))
    print(f"{len(rows)} scores by {model.name} on {model.device} in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:5])
