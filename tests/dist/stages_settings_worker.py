"""Trains staged configurations one after the other; compiled layers are traced by a backend that needs no compiler.

Usage: torchrun stages_settings_worker.py CONFIG.yaml...
"""

from __future__ import annotations

import sys
from unittest import mock

from rating_train.cli import leave
from rating_train.config.load import load_config
from rating_train.engine import compiled
from rating_train.training.loop import train

compile_model = compiled.compile_model


def traced(model, how, lengths):  # type: ignore[no-untyped-def]
    compile_model(model, how, lengths, backend="aot_eager")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        with mock.patch("rating_train.engine.engine.compile_model", traced):
            train(load_config(path, []), "auto")
    leave(0)
