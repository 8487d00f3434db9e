"""``rating-train status``: how far a run is, who is running it, and which of its checkpoints are whole.

Reads files only, and writes none. What cannot be said is ``None``, with its reason under ``undefined``.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.checkpoint import store
from rating_train.checkpoint.state import STATE_FILE
from rating_train.errors import UserError
from rating_train.log import on_terminal
from rating_train.processes import process_lives
from rating_train.resilience.lock_file import describe, read_state

_TAIL_BYTES = 1 << 16  # of a metrics file: some hundred rows
_MIB = 2**20


def read_status(run: Path, quick: bool = False) -> dict[str, Any]:
    """The status as JSON values.

    Args:
        run: run directory, of a run that is training, has ended or was killed.
        quick: whether to check sizes only.

    Raises:
        UserError: the folder is no run directory.
    """
    names = (run_dir.CONFIG_FILE, run_dir.CHECKPOINTS_DIR, run_dir.LOCK_FILE, run_dir.TRAIN_LOG)
    if not any((run / name).exists() for name in names):
        raise UserError(
            f"not a run directory: it has none of {', '.join(names)}",
            where=run,
            fix="give the folder that `rating-train train` made",
        )
    root = run / run_dir.CHECKPOINTS_DIR
    undefined: dict[str, str] = {}
    owner = _owner(run, undefined)  # first: verifying takes long, and the run goes on meanwhile
    checkpoints = _checkpoints(root, quick)
    state = _newest_state(root, checkpoints)
    listing = sorted(root.iterdir()) if root.is_dir() else []
    return {
        "run": str(run),
        "progress": _progress(run, state, owner["heartbeat"], undefined),
        "best": _best(root, state, undefined),
        "owner": owner,
        "checkpoints": checkpoints,
        "checked": "sizes" if quick else "sizes and SHA-256",
        "pointers": [_pointer(root, name, checkpoints) for name in (store.LATEST, store.BEST)],
        "markers": [name for name in (run_dir.STOP_FILE, run_dir.REQUEUE_FILE) if (run / name).exists()],
        "temporary": [p.name for p in [*sorted(run.iterdir()), *listing] if _is_left_over(p)],
        "abandoned": [p.name for p in listing if p.name.startswith("abandoned-")],
        "free_bytes": shutil.disk_usage(run).free,
        "undefined": undefined,
    }


def _is_left_over(path: Path) -> bool:
    """Something that a crash, or a write going on now, left under a temporary name."""
    return ".tmp-" in path.name or path.name.startswith(f"{run_dir.LOCK_FILE}.stale-")


def _progress(
    run: Path, state: dict[str, Any], beat: dict[str, Any] | None, undefined: dict[str, str]
) -> dict[str, Any]:
    """Where the run is: by the newest of its log, its heartbeat and its newest valid checkpoint."""
    row = _last_row(run / run_dir.TRAIN_LOG)
    saved = state.get("train_state")
    steps = [s.get("step") for s in (row, beat or {}, saved if isinstance(saved, dict) else {})]
    known = [s for s in steps if isinstance(s, int)]
    total = next((t for s in (beat or {}, state) if isinstance(t := s.get("total_steps"), int)), None)
    progress = {
        "step": max(known, default=None),
        "total_steps": total,
        "epoch": _number(row, "epoch"),
        "loss": _number(row, "loss"),
        "samples_per_second": _number(row, "samples_per_second"),
        "eta_seconds": None,
        "logged_step": row.get("step"),
    }
    seconds = _number(row, "step_seconds")
    if progress["step"] is not None and total is not None and seconds is not None:
        progress["eta_seconds"] = max(0, total - progress["step"]) * seconds
    why = f"{run_dir.TRAIN_LOG} has no rows" if not row else "the last row has none (not finite)"
    for key in ("epoch", "loss", "samples_per_second", "logged_step"):
        if progress[key] is None:
            undefined[f"progress.{key}"] = why
    if progress["step"] is None:
        undefined["progress.step"] = "no row, no heartbeat with a step, no valid checkpoint"
    if total is None:
        undefined["progress.total_steps"] = "neither a heartbeat nor a valid checkpoint names it"
    if progress["eta_seconds"] is None:
        undefined["progress.eta_seconds"] = "needs the step, the total and the seconds per step"
    return progress


def _best(root: Path, state: dict[str, Any], undefined: dict[str, str]) -> dict[str, Any]:
    """The best metric and its step: of best.json, or else of the newest valid checkpoint."""
    content = _json_object(root / store.BEST)
    saved = state.get("train_state")
    saved = saved if isinstance(saved, dict) else {}
    value, step = _number(content, "value"), content.get("step")
    if value is None:
        value, step = _number(saved, "best_value"), saved.get("best_step")
    if value is None:
        undefined["best"] = "no evaluation with a defined metric has been saved"
    config = root.parent / run_dir.CONFIG_FILE
    return {"metric": _select_metric(config), "value": value, "step": step if value is not None else None}


def _select_metric(config: Path) -> str | None:
    import yaml  # here, as the command line's help needs none

    try:
        return str(yaml.safe_load(config.read_text("utf-8"))["train"]["select_metric"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _owner(run: Path, undefined: dict[str, str]) -> dict[str, Any]:
    """Who holds the lock and what was last heard: state is none, alive, dead or unknown."""
    lock, beat = read_state(run / run_dir.LOCK_FILE), read_state(run / run_dir.HEARTBEAT_FILE)
    content = beat.content if beat else {}
    heard = _number(content, "unix_time")
    age = round(time.time() - heard, 1) if heard is not None else None
    if age is None:
        undefined["owner.heartbeat_age_seconds"] = f"there is no readable {run_dir.HEARTBEAT_FILE}"
    result = {"lock": None, "state": "none", "heartbeat": content or None, "heartbeat_age_seconds": age}
    if lock is None:
        return result
    lives = process_lives(lock.content)
    if lives is None:  # on another host: whether the counter goes up is all that can be known
        period = _number(content, "beat_seconds")
        end = time.monotonic() + 1.5 * min(period or 5.0, 60.0)
        while lives is None and time.monotonic() < end:
            time.sleep(0.2)
            if (
                read_state(run / run_dir.HEARTBEAT_FILE) != beat
                or read_state(run / run_dir.LOCK_FILE) != lock
            ):
                lives = True
    if lives is None:
        undefined["owner.state"] = "its process cannot be seen from this host, and it did not beat just now"
    state = {True: "alive", False: "dead", None: "unknown"}[lives]
    return {**result, "lock": lock.content, "owner": describe(lock.content), "state": state}


def _checkpoints(root: Path, quick: bool) -> list[dict[str, Any]]:
    """Every directory that is named like a checkpoint, newest first, with its problem or ``""``."""
    result = []
    found = store.steps_present(root)
    sizes = {path: _size(path) for _, path in found}
    done, started = 0, time.monotonic()
    for step, path in found:
        problem = store.problem(path, hashes=not quick)
        if problem and not path.exists():
            continue  # pruned by the running job in this moment
        result.append(
            {"name": path.name, "step": step, "valid": not problem, "problem": problem, "bytes": sizes[path]}
        )
        done += sizes[path]
        if on_terminal() and not quick:
            rate = done / max(time.monotonic() - started, 1e-9)
            left = (sum(sizes.values()) - done) / max(rate, 1e-9)
            print(f"checked {path.name}, {rate / _MIB:.0f} MiB/s, {left:.0f} s left", file=sys.stderr)
    return result


def _size(directory: Path) -> int:
    """Bytes of all files below; of a checkpoint that is being pruned, what is left."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _newest_state(root: Path, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """state.json of the newest valid checkpoint; empty where there is none."""
    valid = next((c for c in checkpoints if c["valid"]), None)
    return _json_object(root / valid["name"] / STATE_FILE) if valid else {}


def _pointer(root: Path, name: str, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a pointer points, and whether that can be loaded."""
    if not (root / name).exists():
        return {"name": name, "step": None, "problem": "there is none"}
    step = _json_object(root / name).get("step")
    if not isinstance(step, int):
        return {"name": name, "step": None, "problem": "it cannot be read"}
    target = next((c for c in checkpoints if c["step"] == step), None)
    problem = (
        "" if target and target["valid"] else "that checkpoint is INVALID" if target else "there is no such"
    )
    return {"name": name, "step": step, "problem": problem}


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a metrics file; empty where there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = f.read().split(b"\n")
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # empty, or torn by a crash
            continue
        if isinstance(row, dict):
            return row
    return {}


def _json_object(path: Path) -> dict[str, Any]:
    state = read_state(path)
    return state.content if state else {}


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def render(status: dict[str, Any]) -> str:
    """The status for a person."""
    p, best, owner, why = status["progress"], status["best"], status["owner"], status["undefined"]

    def shown(key: str, form: str) -> str:
        value = p[key]
        return f"undefined ({why[f'progress.{key}']})" if value is None else format(value, form)

    lines = [
        f"run          {status['run']}",
        f"progress     step {shown('step', 'd')} of {shown('total_steps', 'd')}, epoch {shown('epoch', '.3f')}",
        f"             loss {shown('loss', '.4f')}, {shown('samples_per_second', '.1f')} samples/s, "
        f"{shown('eta_seconds', '.0f')} s left",
    ]
    metric = best["metric"] or "metric"
    value = (
        f"undefined ({why['best']})"
        if best["value"] is None
        else f"{best['value']:.4f} at step {best['step']}"
    )
    lines.append(f"best {metric:<8}{value}")
    lines.append(
        f"owner        {owner['state']}" + (f": {owner['owner']}" if owner["lock"] is not None else "")
    )
    if owner["heartbeat"]:
        age = owner["heartbeat_age_seconds"]
        ago = "at an unknown time" if age is None else f"{age:.0f} s ago by this host's clock"
        lines.append(f"heartbeat    {ago}: {owner['heartbeat'].get('phase', 'unknown')}")
    lines += [
        f"checkpoint   {c['name']} {c['bytes'] / _MIB:.1f} MiB "
        + ("valid" if c["valid"] else f"INVALID ({c['problem']})")
        for c in status["checkpoints"]
    ] or ["checkpoint   none"]
    lines += [
        f"{q['name']:<13}"
        + " ".join(filter(None, [str(q["step"] or ""), f"({q['problem']})" if q["problem"] else ""]))
        for q in status["pointers"]
    ]
    for key in ("markers", "temporary", "abandoned"):
        if status[key]:
            lines.append(f"{key:<13}{', '.join(status[key])}")
    lines.append(f"disk         {status['free_bytes'] / 2**30:.1f} GiB free; checked {status['checked']}")
    return "\n".join(lines)
