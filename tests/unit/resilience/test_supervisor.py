"""The deadline of a run: its own limit or the end of its job, whichever comes first."""

from __future__ import annotations

import time

import pytest

from rating_train.config.schema import TrainConfig
from rating_train.distributed.world import ScheduledJob
from rating_train.resilience.supervisor import deadline

SLACK = 5.0  # seconds that a slow machine may take between two looks at its clocks


def test_without_any_limit_there_is_no_deadline() -> None:
    assert deadline(TrainConfig(), ScheduledJob(), started=0.0) is None
    assert deadline(TrainConfig(), ScheduledJob("slurm 7", 2, ends_at=None), started=0.0) is None


def test_the_runs_own_limit_counts_from_its_start() -> None:
    assert deadline(TrainConfig(time_limit_minutes=2.5), ScheduledJob(), started=1000.0) == 1150.0


def test_the_end_of_the_job_counts_on_the_wall_clock_less_the_margin() -> None:
    config = TrainConfig(job_end_margin_minutes=3.0)
    found = deadline(config, ScheduledJob("slurm 7", ends_at=time.time() + 900), started=0.0)
    assert found == pytest.approx(time.monotonic() + 900 - 180, abs=SLACK)


@pytest.mark.parametrize("minutes", [5.0, 100.0])
def test_the_earlier_of_the_two_counts(minutes: float) -> None:
    """The job ends in 60 minutes, less a margin of 1."""
    config = TrainConfig(time_limit_minutes=minutes, job_end_margin_minutes=1.0)
    now = time.monotonic()
    found = deadline(config, ScheduledJob("slurm 7", ends_at=time.time() + 3600), started=now)
    assert found == pytest.approx(now + 60 * min(minutes, 59.0), abs=SLACK)


def test_a_job_shorter_than_the_margin_stops_a_quarter_of_its_time_before_its_end() -> None:
    config = TrainConfig(job_end_margin_minutes=3.0)
    found = deadline(config, ScheduledJob("slurm 7", ends_at=time.time() + 60), started=time.monotonic())
    assert found == pytest.approx(time.monotonic() + 45, abs=SLACK)
