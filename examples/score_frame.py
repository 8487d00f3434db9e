"""Score the rows of a table, and show the best ones.

    python examples/score_frame.py MODEL IMAGES TABLE.csv

TABLE (CSV, JSON lines or Parquet) has a column ``image_path`` below IMAGES, and any of ``title``, ``description``,
``features``, ``main_category``. Read with DuckDB, which rating_train installs; with pandas it is three lines::

    frame = pandas.read_parquet("table.parquet")
    images = [f"images/{path}" for path in frame["image_path"]]
    frame["score"] = model.score(images, frame.fillna("").to_dict("records"))
"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb

from rating_train import load


def main(model_path: str, images: str, table: str) -> None:
    """Print the five rows with the highest scores."""
    relation = duckdb.sql("SELECT * FROM " + "'{}'".format(table.replace("'", "''")))
    rows = [dict(zip(relation.columns, values)) for values in relation.fetchall()]
    model = load(model_path)
    for row, score in zip(rows, model.score([Path(images) / row["image_path"] for row in rows], rows)):
        row["score"] = score
    for row in sorted(rows, key=lambda row: -row["score"])[:5]:
        print(f"{row['score']:.4f}  {row['title']}")
    print(f"{len(rows)} rows, mean score {sum(row['score'] for row in rows) / len(rows):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
