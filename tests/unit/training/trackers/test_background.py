"""A tracker in its thread: rows arrive in order, and neither a failure nor a stalled network reaches the run."""

from __future__ import annotations

import threading
import time

import pytest

from rating_train.training.trackers.background import Background
from rating_train.training.trackers.base import Listener

Heard = list[tuple[str, object]]


class Remembers:
    """Keeps what it hears, once it may."""

    def __init__(self, heard: Heard, may: threading.Event | None = None) -> None:
        self.heard, self.may = heard, may

    def train(self, row: dict[str, object]) -> None:
        if self.may is not None:
            self.may.wait(30)
        self.heard.append(("train", row["step"]))

    def evaluation(self, row: dict[str, object]) -> None:
        self.heard.append(("evaluation", row["step"]))

    def close(self) -> None:
        self.heard.append(("close", None))


def test_rows_arrive_in_order_before_close_returns() -> None:
    heard: Heard = []
    background = Background("far", lambda: Remembers(heard))
    for step in range(1, 50):
        background.train({"step": step})
    background.evaluation({"step": 49})
    background.close()
    assert heard == [("train", step) for step in range(1, 50)] + [("evaluation", 49), ("close", None)]


def test_a_stalled_network_stalls_neither_rows_nor_the_end(caplog: pytest.LogCaptureFixture) -> None:
    heard: Heard = []
    may = threading.Event()
    background = Background("far", lambda: Remembers(heard, may))
    began = time.monotonic()
    for step in range(1, 4):
        background.train({"step": step})
    background.close(seconds=0.2)
    assert time.monotonic() - began < 5 and heard == []
    assert "were not sent within 0 s; train.jsonl and eval.jsonl have all of them" in caplog.text
    may.set()
    background.close(seconds=30)
    assert [step for kind, step in heard if kind == "train"] == [1, 2, 3]


def test_a_server_that_does_not_answer_delays_the_start_for_a_bounded_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heard: Heard = []
    answers = threading.Event()

    def start() -> Listener:
        answers.wait(30)
        return Remembers(heard)

    background = Background("far", start, start_seconds=0.1)
    assert "far: no answer after 0 s; training starts without waiting" in caplog.text
    background.train({"step": 1})
    answers.set()
    background.close()
    assert heard == [("train", 1), ("close", None)], "what came before the answer is sent after it"


@pytest.mark.parametrize("fails_at", ["start", "row"])
def test_a_tracker_that_fails_is_reported_once_and_told_nothing_more(
    fails_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> Listener:
        if fails_at == "start":
            raise ConnectionError("no route to host")
        return Remembers([])

    background = Background("far", start)
    for _ in range(3):
        background.train({"step": 1} if fails_at == "start" else {})
    background.close()
    background.train({"step": 2})
    assert caplog.text.count("far failed and is told nothing more") == 1
    assert ("no route to host" if fails_at == "start" else "KeyError: 'step'") in caplog.text
