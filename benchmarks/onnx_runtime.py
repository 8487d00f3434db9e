"""The ONNX graph of an architecture beside PyTorch: difference, images per second, peak memory, on a CPU.

    python benchmarks/onnx_runtime.py configs/full_ft_228m.yaml [--items N] [--batch-items B] [--rounds R]

Random weights, random images and tokens. Each runtime scores the same items in a process of its own, in turns with the
other; its peak memory is that of the process (both import torch: the graph is opened by the project's own code).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rating_train.config.load import load_config
from rating_train.data.collate import Batch
from rating_train.export.onnx_graph import FILES, open_graph, write_graphs
from rating_train.model.architecture import read_architecture
from rating_train.model.cost import visual_tokens
from rating_train.model.regressor import RatingRegressor, build_regressor


def make_model(path: str) -> tuple[RatingRegressor, int, int]:
    """The model with random weights, the side of its images in pixels, and its sequence's tokens."""
    config = load_config(path, ["model.weights=random"])
    architecture = read_architecture(config.model)
    tokens = visual_tokens(architecture, config.data.image_px) + config.data.text_tokens
    return (
        build_regressor(config.model, architecture, config.data.image_px, 1, seed=0).eval(),
        config.data.image_px,
        tokens,
    )


def make_batch(items: int, pixels: int, tokens: int) -> Batch:
    """Random items, the same every time."""
    g = torch.Generator().manual_seed(0)
    return Batch(
        ids=[str(n) for n in range(items)],
        categories=[""] * items,
        images=torch.randint(0, 256, (items, 3, pixels, pixels), generator=g, dtype=torch.uint8),
        input_ids=torch.randint(0, 1000, (items, tokens), generator=g),
        used_tokens=torch.randint(tokens // 2, tokens + 1, (items,), generator=g),
        ratings=torch.zeros(items),
        rating_counts=torch.zeros(items),
        truncated_tokens=0,
    )


def child(args: argparse.Namespace) -> None:
    """Score the items with one runtime; print scores, seconds and the peak of this process as JSON."""
    if args.child == "torch":
        model, pixels, tokens = make_model(args.config)

        def predict(part: Batch) -> torch.Tensor:
            with torch.no_grad():
                return model(part.images, part.input_ids, part.used_tokens)
    else:
        pixels, tokens = args.pixels, args.tokens
        predict = open_graph(Path(args.child), torch.get_num_threads())
    parts = make_batch(args.items, pixels, tokens).split(args.batch_items)
    predict(parts[0])
    began, cpu = time.perf_counter(), time.process_time()
    scores = [score for part in parts for score in predict(part).tolist()]
    found = {"scores": scores, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    # Not getrusage: its peak survives exec, and would be that of the process which made the graph.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({**found, "peak_kib": int(status["VmHWM"].split()[0])}))


def main() -> None:
    """Print one line for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    for name, default in (("items", 8), ("batch-items", 4), ("rounds", 1), ("pixels", 0), ("tokens", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        model, pixels, tokens = make_model(args.config)
        write_graphs(Path(folder), model, make_batch(2, pixels, tokens), ["fp32"], 0)
        del model
        found: dict[str, list[dict[str, Any]]] = {"torch": [], str(Path(folder) / FILES["fp32"]): []}
        more = [
            "--items",
            args.items,
            "--batch-items",
            args.batch_items,
            "--pixels",
            pixels,
            "--tokens",
            tokens,
        ]
        for _ in range(args.rounds):
            for name, rounds in found.items():
                command = [sys.executable, __file__, args.config, "--child", name, *map(str, more)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
        plain, graph = (rounds[0]["scores"] for rounds in found.values())
        print(f"largest difference {max(abs(a - b) for a, b in zip(plain, graph, strict=True)):.2e} stars")
        for name, rounds in found.items():
            seconds, cpu = (min(r[key] for r in rounds) / args.items for key in ("seconds", "cpu"))
            peak = max(r["peak_kib"] for r in rounds) / 2**10
            label = "PyTorch" if name == "torch" else "ONNX Runtime"
            print(
                f"{label:<13} {1 / seconds:7.3f} images/s  {cpu:6.2f} CPU seconds/image  peak {peak:7.0f} MiB"
            )
    return None


if __name__ == "__main__":
    main()
