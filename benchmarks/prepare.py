"""How fast ``prepare`` is, against what it cannot be faster than. One-off; not part of the package.

    python benchmarks/prepare.py [--items N] [--workers N] [--rounds N] [--images CATALOGUE]

1. Images per second with N workers, parts and all, against decoding and resizing alone (``square_jpeg`` on bytes in
   memory) in N processes at the same time, on the same pictures of about 1000 x 1200 pixels.
2. Samples per second of the shard writer (hashes, SHA-256, flushed to the disk) against streaming's ``MDSWriter``
   on the same samples, without and with a flush of its files.

Rounds take turns, so that a busy machine disturbs both sides; the ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from rating_train.files import read_json
from rating_train.prepare.images.square import square_jpeg
from rating_train.prepare.images.stores import open_store
from rating_train.prepare.parts.part import PartSpec
from rating_train.prepare.parts.pool import Event, build_parts
from rating_train.prepare.plan.plan_dir import PLAN_NAME
from rating_train.prepare.plan.planner import make_plan
from rating_train.prepare.plan.rules import PlanRules
from rating_train.shards.schema import MDS_COLUMNS, TEXT_FIELDS, Listing
from rating_train.shards.writer import SplitWriter

SIZE_PX, QUALITY, SHARD_BYTES = 384, 90, 64 << 20
PICTURES = 48


def make_catalogue(folder: Path, items: int) -> None:
    """Listings that share some noisy pictures."""
    rng = np.random.default_rng(3)
    for i in range(PICTURES):
        size = (int(rng.integers(950, 1050)), int(rng.integers(1150, 1250)))
        coarse = Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).resize(size)
        grain = Image.effect_noise(size, 30).filter(ImageFilter.GaussianBlur(1)).convert("RGB")
        Image.blend(coarse, grain, 0.3).save(folder / f"{i}.jpg", quality=85)
    with open(folder / "catalogue.jsonl", "w") as f:
        for i in range(items):
            line = {"parent_asin": f"B{i:07d}", "title": f"thing {i}", "description": ["some text " * 40]}
            line |= {
                "average_rating": 1 + i % 41 / 10,
                "rating_number": 10 + i,
                "image_path": f"{i % PICTURES}.jpg",
            }
            f.write(json.dumps(line) + "\n")


def decode_alone(folder: str, count: int, pipe: Any) -> None:
    """In a process: so many pictures, from memory; tells how long it took."""
    files = [(Path(folder) / f"{i}.jpg").read_bytes() for i in range(PICTURES)]
    square_jpeg(files[0], SIZE_PX, QUALITY)
    pipe.send("ready")
    pipe.recv()
    for i in range(count):
        square_jpeg(files[i % PICTURES], SIZE_PX, QUALITY)
    pipe.send("done")


def decode_rate(folder: Path, items: int, workers: int) -> float:
    """Images per second of all processes together, start-up left out."""
    context, pipes = get_context("spawn"), []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        context.Process(
            target=decode_alone, args=(str(folder), items // workers, theirs), daemon=True
        ).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    began = time.monotonic()
    for pipe in pipes:
        pipe.send("go")
    for pipe in pipes:
        pipe.recv()
    return items // workers * workers / (time.monotonic() - began)


def build_rate(plan: Path, parts: Path, folder: Path, items: int, workers: int) -> tuple[float, float]:
    """Images per second of a build: from the first image on, and with the start of the processes."""
    first: list[tuple[float, int]] = []

    def on_event(event: Event) -> None:
        if not first:
            first.append((time.monotonic(), event.kept * workers))  # the others have done as much by now

    began = time.monotonic()
    parts_count = len(read_json(plan / PLAN_NAME)["parts"])
    spec = PartSpec(SIZE_PX, QUALITY, SHARD_BYTES)
    build_parts(plan, parts, open_store(str(folder)), spec, workers, range(parts_count), on_event)
    ended = time.monotonic()
    return (items - first[0][1]) / (ended - first[0][0]), items / (ended - began)


def write_rates(folder: Path, samples: list[tuple[Listing, bytes]], turn: int) -> tuple[float, float, float]:
    """Samples per second: ours, MDSWriter, MDSWriter with its files flushed to the disk."""
    from streaming import MDSWriter

    began = time.monotonic()
    ours = SplitWriter(folder / f"ours{turn}", SHARD_BYTES)
    for listing, image in samples:
        ours.write(listing, image)
    ours.finish()
    middle = time.monotonic()
    with MDSWriter(
        columns=MDS_COLUMNS,
        out=str(folder / f"theirs{turn}"),
        hashes=["sha1", "xxh64"],
        size_limit=SHARD_BYTES,
    ) as theirs:
        for listing, image in samples:
            row = {"id": listing.id, **listing.texts}
            row |= {"image": image, "rating": np.float32(listing.rating)}
            theirs.write({**row, "rating_count": np.int64(listing.rating_count)})
    raw = time.monotonic()
    for file in (folder / f"theirs{turn}").iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    ended = time.monotonic()
    n = len(samples)
    return n / (middle - began), n / (raw - middle), n / (ended - middle)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1536)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder = Path(name)
        make_catalogue(folder, args.items)
        rules = PlanRules(part_items=max(1, args.items // (4 * args.workers)))
        make_plan([str(folder / "catalogue.jsonl")], folder / "plan", rules)
        limits, builds, completes = [], [], []
        for turn in range(args.rounds):
            limits.append(decode_rate(folder, args.items, args.workers))
            build, complete = build_rate(
                folder / "plan", folder / f"parts{turn}", folder, args.items, args.workers
            )
            builds.append(build)
            completes.append(complete)
        limit, build, complete = map(statistics.median, (limits, builds, completes))
        print(f"decode + resize alone  {limit:8.1f} images/s in {args.workers} processes")
        print(f"prepare                {build:8.1f} images/s = {build / limit:.0%}")
        print(
            f"  with process start   {complete:8.1f} images/s = {complete / limit:.0%} ({args.items} items)"
        )

        image = square_jpeg((folder / "0.jpg").read_bytes(), SIZE_PX, QUALITY)
        text = "some text " * 40
        samples = [
            (
                Listing(
                    f"B{i:07d}",
                    dict(zip(TEXT_FIELDS, (f"thing {i}", text, text, "Things"))),
                    "Things",
                    "",
                    1 + i % 41 / 10,
                    i,
                    "",
                ),
                image,
            )
            for i in range(8000)
        ]
        rates = [write_rates(folder, samples, turn) for turn in range(args.rounds)]
        ours, raw, flushed = (statistics.median(column) for column in zip(*rates))
        print(f"samples of {len(image)} bytes, on the disk of {name}")
        print(f"MDSWriter              {raw:8.0f} samples/s; {flushed:.0f} with its files flushed")
        print(
            f"SplitWriter            {ours:8.0f} samples/s = {ours / raw:.0%}; {ours / flushed:.0%} of flushed"
        )


if __name__ == "__main__":
    main()
