"""What is timed of a training: the steps after the warm-up, with the same batches as those on the device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from rating_train.bench.parts import _WARM_UP_STEPS, Bench
from rating_train.checkpoint.state import TrainState
from rating_train.engine.step_timer import StepTimer

STEPS = 4


class Engine:
    """Notes which batches it is given, and whether a clock runs."""

    timer: Any = None

    def __init__(self) -> None:
        self.taken: list[tuple[int, bool]] = []

    def step(self, batch: Any, *_: int) -> float:
        self.taken.append((batch.number, self.timer is not None))
        return 0.0

    def read_skipped(self, wait: bool) -> None: ...


def numbered(first: int, last: int) -> Iterator[Any]:
    for number in range(first, last):
        yield SimpleNamespace(number=number, to=lambda device, number=number: SimpleNamespace(number=number))


def bench() -> Bench:
    made = object.__new__(Bench)
    made.rounds, made.steps, made.device = 1, STEPS, torch.device("cpu")
    made.job = SimpleNamespace(  # type: ignore[assignment]
        engine=Engine(),
        data=SimpleNamespace(batches=numbered),
        config=SimpleNamespace(train=SimpleNamespace(log_every_steps=10)),
        plan=SimpleNamespace(global_items=8),
        total_steps=100,
    )
    return made


def test_the_steps_that_are_timed_are_those_on_the_device_without_the_warm_up() -> None:
    measured = bench()
    on_device = [batch.number for batch in measured.batches(_WARM_UP_STEPS)]
    state = TrainState()
    measured._train(state, None, StepTimer(measured.device))
    taken = measured.job.engine.taken  # type: ignore[attr-defined]
    assert taken == [(n, False) for n in range(_WARM_UP_STEPS)] + [(n, True) for n in on_device]
    assert len(on_device) == state.step == STEPS
    assert measured.job.engine.timer is None
