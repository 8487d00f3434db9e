"""Random numbers: the same seed and rank reproduce them, ranks differ, and a captured state continues exactly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rating_train.distributed.seeding import capture, restore, seed_everything


def draw() -> tuple[Any, ...]:
    """Draw from every generator; normal ones too, which cache a value between calls."""
    return (
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.rand(5).tolist(),
        float(np.random.standard_normal()),
        torch.rand(5).tolist(),
        torch.nn.functional.dropout(torch.ones(20), 0.5).tolist(),
    )


def test_a_seed_and_rank_reproduce_the_same_numbers() -> None:
    seed_everything(17, 3)
    first = draw()
    seed_everything(17, 3)
    assert draw() == first


def test_seeds_and_ranks_differ_in_every_generator() -> None:
    seen = []
    for seed in (0, 1, 17, 2**31):
        for rank in range(8):
            seed_everything(seed, rank)
            seen.append(draw())
    for generator in zip(*seen):
        assert len({str(numbers) for numbers in generator}) == len(seen)


def test_a_captured_state_continues_with_the_very_next_number() -> None:
    seed_everything(17, 0)
    draw()
    state = capture()
    following = draw()
    draw()
    restore(state)
    assert draw() == following


def test_capturing_draws_no_number() -> None:
    seed_everything(17, 0)
    first = draw()
    seed_everything(17, 0)
    capture()
    assert draw() == first


def test_a_state_written_to_a_file_loads_without_running_code(tmp_path: Path) -> None:
    seed_everything(5, 1)
    random.gauss(0, 1)
    np.random.standard_normal()  # both keep a spare number now
    torch.save(capture(), tmp_path / "rank_00000.pt")
    following = draw()
    restore(torch.load(tmp_path / "rank_00000.pt", map_location="cpu", weights_only=True))
    assert draw() == following


def test_a_state_can_be_restored_more_than_once() -> None:
    seed_everything(5, 1)
    state = capture()
    following = draw()
    for _ in range(3):
        restore(state)
        assert draw() == following
