"""Trains configurations and evaluates runs one after the other in the same processes: most of a job is its start.

Usage: torchrun train_worker.py CONFIG.yaml|RUN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from rating_train import run_dir
from rating_train.cli import leave
from rating_train.config.load import load_config
from rating_train.evaluation.run import EvaluateOptions, evaluate_model
from rating_train.training.loop import train

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        if path.is_dir():
            evaluate_model(path, load_config(path / run_dir.CONFIG_FILE, []), EvaluateOptions("latest", ridge=False))
        else:
            train(load_config(path, []), "auto")
    leave(0)
