"""Cost of making the stored squares: images per second of one core, and the ratio to decode + resize alone.

    python benchmarks/images.py [--images 200] [--size 384] [--rounds 3]

Generates JPEGs of 1000 x 1200 pixels in a folder, a zip and a tar, then takes turns (so that a noisy
neighbour meets all of them) between ``store.read`` + ``square_jpeg`` and what nothing can do without: decode,
with the decoder's own reduction as ``square_jpeg`` uses it and without, and resize. CPU time of this process
is counted, the best round of each is printed.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from rating_train.prepare.images.lookup import ImageStore
from rating_train.prepare.images.square import square_jpeg
from rating_train.prepare.images.stores import open_store

WIDTH, HEIGHT = 1000, 1200


def make_jpegs(count: int) -> list[bytes]:
    """``count`` different pictures with edges, gradients and a little noise, as product photographs have."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        picture = picture + rng.integers(-6, 7, picture.shape, dtype=np.int16)
        picture[:150], picture[:, :100] = 255, 255
        out = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
        made.append(out.getvalue())
    return made


def save(folder: Path, jpegs: list[bytes]) -> dict[str, Path]:
    """The same files in a folder, a zip (stored) and a tar."""
    (folder / "images").mkdir()
    with (
        zipfile.ZipFile(folder / "images.zip", "w") as packed,
        tarfile.open(folder / "images.tar", "w") as tar,
    ):
        for n, data in enumerate(jpegs):
            (folder / "images" / f"{n}.jpg").write_bytes(data)
            packed.writestr(f"{n}.jpg", data)
            tar.add(folder / "images" / f"{n}.jpg", f"{n}.jpg")
    return {"folder": folder / "images", "zip": folder / "images.zip", "tar": folder / "images.tar"}


def decode_and_resize(data: bytes, size: int, reduced: bool) -> None:
    """The least that a square takes; ``reduced`` lets the decoder give at least twice the size."""
    with Image.open(io.BytesIO(data)) as image:
        if reduced:
            image.draft("RGB", (2 * size, 2 * size))
        image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)


def read(store: ImageStore, n: int) -> bytes:
    """The n-th file's bytes."""
    return store.read(f"{n}.jpg", "-")


def read_and_square(store: ImageStore, size: int, n: int) -> bytes:
    """All that a build does for one image."""
    return square_jpeg(read(store, n), size)


def best_rates(jobs: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Images per CPU second of each job, the best of ``rounds`` turns."""
    best = dict.fromkeys(jobs, 0.0)
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.process_time()
            for n in range(count):
                job(n)
            best[name] = max(best[name], count / (time.process_time() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=384, help="side of the square in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    jpegs, size = make_jpegs(args.images), args.size
    print(
        f"{len(jpegs)} JPEGs of {WIDTH} x {HEIGHT}, {sum(map(len, jpegs)) / len(jpegs) / 1024:.0f} KiB each"
    )
    with tempfile.TemporaryDirectory() as temporary:
        stores = {kind: open_store(path) for kind, path in save(Path(temporary), jpegs).items()}
        jobs: dict[str, Callable[[int], object]] = {
            "decode + resize, full": lambda n: decode_and_resize(jpegs[n], size, reduced=False),
            "decode + resize, reduced": lambda n: decode_and_resize(jpegs[n], size, reduced=True),
            "square_jpeg": lambda n: square_jpeg(jpegs[n], size),
        }
        for kind, store in stores.items():
            jobs[f"{kind}: read"] = partial(read, store)
            jobs[f"{kind}: read + square_jpeg"] = partial(read_and_square, store, size)
        rates = best_rates(jobs, len(jpegs), args.rounds)
    for name, rate in rates.items():
        full, reduced = (rate / rates[f"decode + resize, {kind}"] for kind in ("full", "reduced"))
        print(f"{name:26} {rate:9.1f} images/s per core   x{full:.2f} of full   x{reduced:.2f} of reduced")


if __name__ == "__main__":
    main()
