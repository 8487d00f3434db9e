"""Which checkpoint is the best one, and what a failed save means: real files, with a dict in the engine's place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rating_train.checkpoint import manager, store
from rating_train.checkpoint.deepspeed_io import copy_to_memory
from rating_train.checkpoint.manager import Checkpointer, SaveFailed
from rating_train.checkpoint.state import Identity, TrainState
from rating_train.config.schema import TrainConfig
from rating_train.distributed.world import World
from rating_train.files import read_json
from rating_train.training.saver import Saver

pytestmark = pytest.mark.timeout(60)

TOTAL = 100


class Run:
    """A run of which only the saving is real: its steps are numbers, its weights say which step they are of."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        self.state = TrainState()
        self.weights: dict[str, Any] = {"engine/weights.pt": {"step": torch.zeros(1)}}
        self.config = TrainConfig(**{"keep_last": 1, "max_failed_saves": 2, **settings})
        self.start()

    def start(self) -> None:
        """Start a saver, as each attempt of a run does."""
        job = SimpleNamespace(
            checkpointer=Checkpointer(
                self.root, World(), self.config.keep_last, 0, self.config.background_save
            ),
            config=SimpleNamespace(train=self.config),
            world=World(),
            engine=SimpleNamespace(ds=self.weights),
            identity=lambda step: Identity({}, "", {}, {"ranks": 1, "zero_stage": 1}),
            total_steps=TOTAL,
        )
        supervisor = SimpleNamespace(beat=lambda *_: None)
        self.saver = Saver(job, self.state, supervisor)  # type: ignore[arg-type]

    def step(self, step: int) -> None:
        self.state.step = step
        self.weights["engine/weights.pt"]["step"].fill_(step)

    def evaluate(self, value: float | None) -> bool:
        self.state.record_metric(value, larger_is_better=self.config.select_metric in ("plcc", "srcc"))
        return self.saver.keep_if_best(value)

    def best(self) -> tuple[int, float] | None:
        """Step and value of best.json, after all saves are done; its weights are those of its step."""
        self.saver._wait()
        step = store.pointed_step(self.root, store.BEST)
        if step is None:
            return None
        saved = torch.load(self.root / store.step_name(step) / "engine" / "weights.pt")
        assert saved["step"].item() == step
        return step, read_json(self.root / store.BEST)["value"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.setattr(manager, "capture_shards", copy_to_memory)
    return lambda **settings: Run(tmp_path / "checkpoints", **settings)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches a disk without space on and off: every save asks for more than there is."""
    real = manager.tensor_bytes

    def switch(on: bool) -> None:
        monkeypatch.setattr(manager, "tensor_bytes", (lambda _state: 10**17) if on else real)

    return switch


@pytest.mark.parametrize("background_save", [True, False])
def test_a_checkpoint_saved_before_its_evaluation_is_pointed_to_afterwards(
    run: Callable[..., Run], background_save: bool
) -> None:
    r = run(background_save=background_save)
    r.step(10)
    r.saver.save()
    assert r.evaluate(0.5)
    assert r.best() == (10, 0.5)
    r.step(20)
    r.saver.save()
    assert not r.evaluate(0.4)
    r.step(30)
    assert r.evaluate(0.6), "no save was due, so this one is made for the best alone"
    r.saver.finish()
    assert r.best() == (30, 0.6) and read_json(r.root / store.BEST)["metric"] == "plcc"


@pytest.mark.parametrize("background_save", [True, False])
def test_a_failed_save_of_the_best_is_made_good_by_the_next_that_beats_the_one_on_disk(
    run: Callable[..., Run],
    full_disk: Callable[[bool], None],
    caplog: pytest.LogCaptureFixture,
    background_save: bool,
) -> None:
    r = run(background_save=background_save)
    r.step(10)
    assert r.evaluate(0.5)
    assert r.best() == (10, 0.5)
    full_disk(True)
    r.step(20)
    assert r.evaluate(0.7)
    assert r.best() == (10, 0.5) and "checkpoint of step 20 could not be written" in caplog.text
    full_disk(False)
    r.step(25)
    r.saver.save()
    assert r.best() == (10, 0.5), "a save that nobody evaluated is not the best"
    r.step(30)
    assert r.evaluate(0.6), "not the best that was seen, but better than all that is on disk"
    assert r.best() == (30, 0.6)
    assert (r.state.best_value, r.state.best_step) == (0.7, 20), "early stopping counts from the peak"
    r.step(40)
    assert not r.evaluate(0.55)


def test_a_best_that_is_still_to_be_saved_is_remembered_by_the_next_start(
    run: Callable[..., Run], full_disk: Callable[[bool], None]
) -> None:
    r = run()
    r.step(10)
    r.evaluate(0.5)
    full_disk(True)
    r.step(20)
    r.evaluate(0.7)
    full_disk(False)
    r.step(25)
    r.saver.save()
    r.saver.finish()
    r.start()
    r.step(30)
    assert r.evaluate(0.6)
    assert r.best() == (30, 0.6)


def test_a_best_whose_due_save_failed_is_saved_again_at_once(
    run: Callable[..., Run], full_disk: Callable[[bool], None]
) -> None:
    """The weights are still those of the step: nothing is lost where the disk has space again."""
    r = run()
    r.step(10)
    full_disk(True)
    r.saver.save()
    full_disk(False)
    assert r.evaluate(0.5)
    assert r.best() == (10, 0.5)


def test_a_pointer_that_cannot_be_written_leaves_the_best_pending(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = run()
    r.step(10)
    r.saver.save()
    r.saver._wait()

    def point(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(store, "point", point)
        r.evaluate(0.5)
    assert r.best() is None
    r.step(20)
    assert r.evaluate(0.4)
    assert r.best() == (20, 0.4)


def test_failures_at_one_step_count_once_and_a_save_that_works_starts_anew(
    run: Callable[..., Run], full_disk: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    r = run(max_failed_saves=1)
    for step in (10, 30):
        full_disk(True)
        r.step(step)
        r.saver.save()
        r.evaluate(step / 100)  # tries again
        full_disk(False)
        r.step(step + 1)
        r.saver.save()
        r.saver._wait()
    assert caplog.text.count("training continues (train.max_failed_saves)") == 4
    full_disk(True)
    r.step(50)
    r.saver.save()
    r.step(51)
    with pytest.raises(SaveFailed, match="checkpoint of step 51"):
        r.saver.save()


def test_the_last_save_is_tried_again_and_may_not_fail_twice(
    run: Callable[..., Run], full_disk: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    r = run(max_failed_saves=99)
    r.step(TOTAL)
    full_disk(True)
    r.saver.save()
    assert "saving again at the end" in caplog.text
    with pytest.raises(SaveFailed, match=f"checkpoint of step {TOTAL}"):
        r.saver.finish()
    full_disk(False)
    r.start()
    r.saver.finish()
    assert store.pointed_step(r.root, store.LATEST) == TOTAL


def test_what_is_on_disk_is_not_saved_again(
    run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    r = run()
    r.saver.finish()
    assert not r.root.exists(), "a run that was stopped before its first step has nothing to save"
    r.start()
    r.step(10)
    r.saver.save()
    r.saver.finish()
    r.start()
    r.saver.finish()
    assert caplog.text.count("saved ") == 1


def test_another_metric_starts_its_own_best(run: Callable[..., Run]) -> None:
    r = run()
    r.step(10)
    r.evaluate(0.9)
    r.saver.finish()
    r.config = TrainConfig(select_metric="rmse")
    r.start()
    r.step(20)
    assert r.evaluate(0.95), "an RMSE is not compared with a PLCC"
    assert r.best() == (20, 0.95) and read_json(r.root / store.BEST)["metric"] == "rmse"


def test_a_best_of_a_run_from_before_the_metric_was_written(run: Callable[..., Run]) -> None:
    r = run()
    r.step(10)
    r.evaluate(0.5)
    r.saver.finish()
    store.point(r.root, store.BEST, 10, value=0.5)
    r.start()
    r.step(20)
    assert not r.evaluate(0.4)
    assert r.best() == (10, 0.5)
