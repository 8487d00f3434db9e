"""The names inside a run directory, defined only here.

::

    runs/NAME/
      config.yaml            the resolved configuration
      provenance.json        versions, host, command, fingerprints
      train.jsonl            one line per logged step        (append-only)
      eval.jsonl             one line per evaluation         (append-only)
      predictions/           predictions of every evaluation (JSON lines)
      evaluations/           what `rating-train evaluate` found: intervals, slices, calibration, baselines
      checkpoints/           step_00000500/ ..., best.json, latest.json
      logs/rank_00000.log    one log per rank; stacks_00000.txt if it got stuck
      tensorboard/           the same metrics as event files
      trackers.json          the ids under which other trackers know the run (setting `tracking`)
      wandb/  mlflow.db      what those trackers keep here
      samples/               ids read by every step of every rank, if train.log_sample_ids is set
      report/                plots made by `rating-train report`
      STOP                   created by a person: save a checkpoint and stop at the next step boundary
      REQUEUE                created by a run that stopped before its end and is to resume
      HUNG                   created by the first rank that gave up without progress; removed at the next start
      LOCK                   which job uses the run now (rating_train/resilience/run_lock.py)
      heartbeat.json         what that job did last; stays when it ends
"""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
TRAIN_LOG = "train.jsonl"
EVAL_LOG = "eval.jsonl"
PREDICTIONS_DIR = "predictions"
EVALUATIONS_DIR = "evaluations"
CHECKPOINTS_DIR = "checkpoints"
LOGS_DIR = "logs"
TENSORBOARD_DIR = "tensorboard"
TRACKERS_FILE = "trackers.json"
MLFLOW_FILE = "mlflow.db"
REPORT_DIR = "report"
SAMPLES_DIR = "samples"
STOP_FILE = "STOP"
REQUEUE_FILE = "REQUEUE"
HUNG_FILE = "HUNG"
LOCK_FILE = "LOCK"
HEARTBEAT_FILE = "heartbeat.json"


def rank_log(run: Path, rank: int) -> Path:
    """Return the log file of one rank."""
    return run / LOGS_DIR / f"rank_{rank:05d}.log"


def stacks_file(run: Path, rank: int) -> Path:
    """Return the file for the stacks of one rank's threads, written when it makes no progress."""
    return run / LOGS_DIR / f"stacks_{rank:05d}.txt"


def samples_file(run: Path, rank: int) -> Path:
    """Return the file for the ids that one rank reads."""
    return run / SAMPLES_DIR / f"rank_{rank:05d}.jsonl"


def predictions_file(run: Path, split: str, step: int) -> Path:
    """Return the file for the predictions of an evaluation of ``split`` at ``step``."""
    return run / PREDICTIONS_DIR / f"{split}_step_{step:08d}.jsonl"


def evaluation_file(run: Path, split: str, step: int) -> Path:
    """Return the file for what `rating-train evaluate` found on ``split`` at ``step``."""
    return run / EVALUATIONS_DIR / f"{split}_step_{step:08d}.json"


def folders(run: Path) -> list[Path]:
    """Return the subdirectories that every run has from its start."""
    return [run / name for name in (PREDICTIONS_DIR, CHECKPOINTS_DIR, LOGS_DIR)]
