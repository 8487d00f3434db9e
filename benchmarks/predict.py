"""Images per second of `rating-train predict` beside those of the bare forward pass, in one run, in turns.

    python benchmarks/predict.py configs/full_ft_228m.yaml SOURCE IMAGES --tokenizer FOLDER [--rows N] [--batch-items B]

The model has the configuration's architecture and random weights. *Bare* is the forward pass over batches that are
decoded already; *predict* reads the same rows from SOURCE, decodes their images in a worker, scores them, and commits
the parts to the disk. CPU seconds count this process and its workers: on a busy machine they say more than the clock.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rating_train.config.load import load_config
from rating_train.data.collate import Collator
from rating_train.distributed.world import World
from rating_train.model.regressor import build_regressor
from rating_train.prediction.decode import Decoder, units
from rating_train.prediction.model import FoundModel, Scorer, SquareRecipe
from rating_train.prediction.options import PredictOptions
from rating_train.prediction.rows import SourceRows
from rating_train.prediction.run import Plan, _score_parts
from rating_train.prediction.work_dir import WorkDir
from rating_train.prepare.images.stores import open_store
from rating_train.training.predictor import Predictor
from rating_train.training.setup import read_model_inputs


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds, CPU seconds) of some work."""
    began, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - began, cpu_seconds() - cpu


def main() -> None:
    """Print one line for each round, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("config", "source", "images"):
        parser.add_argument(name)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch-items", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()

    config = load_config(args.config, ["model.weights=random", f"model.tokenizer={args.tokenizer}"])
    inputs = read_model_inputs(config)
    start = inputs.prompt.layout.image_start
    model = build_regressor(config.model, inputs.architecture, config.data.image_px, start, seed=0).bfloat16()
    collator = Collator(inputs.prompt, config.data.image_px)
    squares = SquareRecipe(config.data.image_px, 90)
    found = FoundModel(Path(), config, squares, None, {"model": "random"})
    scorer = Scorer(found, inputs, Predictor(model.eval(), torch.device("cpu"), autocast=False), collator)
    listed = list(SourceRows((args.source,)).read(0, args.rows))
    decoder = Decoder(collator, squares, open_store(args.images))
    decoded = [decoder.decode(unit) for unit in units(0, listed, args.batch_items, "")]
    batches = [unit.batch for unit in decoded if unit.batch is not None]
    assert sum(len(b.images) for b in batches) == args.rows, "a row cannot be scored"

    def bare() -> None:
        for batch in batches:
            scorer.predictor(batch)

    def predict() -> None:
        with tempfile.TemporaryDirectory() as folder:
            options = PredictOptions(
                model="", out=f"{folder}/out.csv", source=(args.source,), images=args.images,
                batch_items=args.batch_items, part_rows=args.rows, workers=args.workers,
            )  # fmt: skip
            work = WorkDir(options.out)
            with work.locked():
                plan = Plan(found, options, args.rows, 1, [0], work.new_claims())
                _score_parts(plan, scorer, SourceRows((args.source,)), work, World())
                assert work.finished() == {0}

    bare()  # the first pass allocates
    totals = {"bare": [0.0, 0.0], "predict": [0.0, 0.0]}
    for number in range(args.rounds):
        # In turns, and the order too: on a machine that gets busier, neither has the advantage.
        for name, work in sorted((("bare", bare), ("predict", predict)), reverse=bool(number % 2)):
            for index, value in enumerate(timed(work)):
                totals[name][index] += value
    images = args.rows * args.rounds
    for name, (seconds, cpu) in totals.items():
        print(f"{name:<8} {images / seconds:8.3f} images/s  {cpu / images:8.3f} CPU seconds/image")
    (bare_s, bare_cpu), (predict_s, predict_cpu) = totals["bare"], totals["predict"]
    print(f"predict / bare: {bare_s / predict_s:.3f} by the clock, {bare_cpu / predict_cpu:.3f} by CPU time")


if __name__ == "__main__":
    main()
