"""Tests on a GPU: ``python -m pytest tests/gpu``, on a machine with one, needs no network and no data.

They are skipped where there is no GPU. ``RATING_TRAIN_GPU_TESTS=cpu`` runs the same processes on a CPU with a small
model, without what only a GPU has: that shows that the tests themselves work. They have not been run on a GPU yet.

What is measured and not asserted (bit-equality of a resumed run, memory, synchronisations) is printed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("RATING_TRAIN_GPU_TESTS", "") == "cpu"
DEVICE = "cpu" if REHEARSAL else "cuda"

measurements = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder where there is no GPU."""
    if REHEARSAL or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(
        reason="needs a GPU (torch.cuda.is_available() is False); `python -m pytest tests/gpu` runs it on a "
        "machine with one, RATING_TRAIN_GPU_TESTS=cpu rehearses it on a CPU"
    )
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Note a line for the summary at the end of the session."""

    def note(line: str) -> None:
        request.config.stash.setdefault(measurements, []).append(f"{request.node.name}: {line}")

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured, with the machine."""
    lines = config.stash.get(measurements, [])
    if not lines:
        return
    name = "CPU (rehearsal)" if REHEARSAL else torch.cuda.get_device_name()
    terminalreporter.section(f"measured on {name}, torch {torch.__version__}")
    for line in lines:
        terminalreporter.line(line)
