"""The names inside a run directory. Only this module knows them.

::

    runs/NAME/
      config.yaml            the resolved configuration
      provenance.json        versions, machine, command, fingerprints
      train.jsonl            one line per logged step        (append-only)
      eval.jsonl             one line per evaluation         (append-only)
      predictions/           predictions of every evaluation (JSON lines)
      checkpoints/           step_00000500/ ..., best.json, latest.json
      logs/rank_00000.log    one log per rank; stacks_00000.txt where it got stuck
      tensorboard/           the same numbers as event files
      samples/               ids read by every step of every rank, if train.log_sample_ids is set
      report/                plots made by `rating-train report`
      STOP                   made by a person: stop at the next step border, with a checkpoint
      REQUEUE                made by a run that stopped before its end and wants to go on
      HUNG                   made by the first rank that gave up for want of progress; removed at the next start
      LOCK                   who is using the run now (rating_train/resilience/run_lock.py)
      heartbeat.json         what that job was doing last; stays when it ends
"""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
TRAIN_LOG = "train.jsonl"
EVAL_LOG = "eval.jsonl"
PREDICTIONS_DIR = "predictions"
CHECKPOINTS_DIR = "checkpoints"
LOGS_DIR = "logs"
TENSORBOARD_DIR = "tensorboard"
REPORT_DIR = "report"
SAMPLES_DIR = "samples"
STOP_FILE = "STOP"
REQUEUE_FILE = "REQUEUE"
HUNG_FILE = "HUNG"
LOCK_FILE = "LOCK"
HEARTBEAT_FILE = "heartbeat.json"


def rank_log(run: Path, rank: int) -> Path:
    """The log file of one rank."""
    return run / LOGS_DIR / f"rank_{rank:05d}.log"


def stacks_file(run: Path, rank: int) -> Path:
    """Where one rank writes the stacks of its threads when it no longer gets anywhere."""
    return run / LOGS_DIR / f"stacks_{rank:05d}.txt"


def samples_file(run: Path, rank: int) -> Path:
    """Where one rank writes the ids that it read."""
    return run / SAMPLES_DIR / f"rank_{rank:05d}.jsonl"


def predictions_file(run: Path, split: str, step: int) -> Path:
    """Where the predictions of an evaluation of ``split`` at ``step`` are written."""
    return run / PREDICTIONS_DIR / f"{split}_step_{step:08d}.jsonl"


def make(run: Path) -> None:
    """Create the directory and its sub-directories (existing ones stay as they are)."""
    for name in (PREDICTIONS_DIR, CHECKPOINTS_DIR, LOGS_DIR):
        (run / name).mkdir(parents=True, exist_ok=True)
