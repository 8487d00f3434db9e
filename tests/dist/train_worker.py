"""Trains several configurations one after the other in the same processes, which saves most of their starting time.

Usage: torchrun train_worker.py CONFIG...
"""

from __future__ import annotations

import sys

from rating_train.cli import leave
from rating_train.config.load import load_config
from rating_train.train import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(load_config(path, []), "auto")
    leave(0)
