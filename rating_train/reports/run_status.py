"""``rating-train status``: how far a run is, whether it moves, who owns it, and which checkpoints are valid.

Only reads files. What cannot be determined is ``None``, with its reason under ``undefined``.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rating_train import run_dir
from rating_train.checkpoint import store
from rating_train.checkpoint.state import STATE_FILE
from rating_train.errors import UserError
from rating_train.log import duration, on_terminal
from rating_train.processes import process_lives
from rating_train.reports.rows import last_row, mapping_in, number
from rating_train.resilience.lock_file import LockState, describe, read_state

_MIB = 2**20
#: A run is stalled after this many of its usual steps without progress, but never before this many seconds.
_STALLED_STEPS, _STALLED_SECONDS = 5, 15.0


def read_status(run: Path, quick: bool = False) -> dict[str, Any]:
    """Return the status as JSON values.

    Args:
        run: run directory; the run may be training, finished or killed.
        quick: whether to check only the sizes of checkpoint files.

    Raises:
        UserError: the folder is not a run directory.
    """
    _check_is_run(run)
    root = run / run_dir.CHECKPOINTS_DIR
    undefined: dict[str, str] = {}
    owner = _owner(run, undefined)  # first: verifying is slow, and training continues meanwhile
    checkpoints = _checkpoints(root, quick)
    state = _newest_state(root, checkpoints)
    listing = sorted(root.iterdir()) if root.is_dir() else []
    return {
        "run": str(run),
        "progress": _progress(run, state, owner, undefined),
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


def _check_is_run(run: Path) -> None:
    """Refuse a folder that no run wrote: require content that only a run leaves, not just its file names."""
    fix = "give the folder that `rating-train train` made"
    if not run.is_dir():
        what = "it is a file" if run.exists() else "there is no such folder"
        raise UserError(f"not a run directory: {what}", where=run, fix=fix)
    signs = (
        bool(_json_object(run / run_dir.LOCK_FILE)),
        bool(_json_object(run / run_dir.HEARTBEAT_FILE)),
        bool(store.steps_present(run / run_dir.CHECKPOINTS_DIR)),
        bool(last_row(run / run_dir.TRAIN_LOG)),
        "name" in mapping_in(run / run_dir.CONFIG_FILE),
    )
    if not any(signs):
        names = (
            run_dir.CONFIG_FILE,
            run_dir.TRAIN_LOG,
            run_dir.LOCK_FILE,
            f"{run_dir.CHECKPOINTS_DIR}/step_*",
        )
        raise UserError(
            f"not a run directory: it has no readable {', '.join(names[:-1])} and no {names[-1]}",
            where=run,
            fix=fix,
        )


def _is_left_over(path: Path) -> bool:
    """Return whether a crash, or a write in progress, left this file under a temporary name."""
    return ".tmp-" in path.name or path.name.startswith(f"{run_dir.LOCK_FILE}.stale-")


def _progress(
    run: Path, state: dict[str, Any], owner: dict[str, Any], undefined: dict[str, str]
) -> dict[str, Any]:
    """Return how far the run is, by the newest of its log, its heartbeat and its newest valid checkpoint."""
    row, beat = last_row(run / run_dir.TRAIN_LOG), owner["heartbeat"] or {}
    saved = state.get("train_state")
    steps = [s.get("step") for s in (row, beat, saved if isinstance(saved, dict) else {})]
    known = [s for s in steps if isinstance(s, int)]
    total = next((t for s in (beat, state) if isinstance(t := s.get("total_steps"), int)), None)
    seconds, idle = number(row, "step_seconds"), _idle_seconds(beat, owner)
    stages = mapping_in(run / run_dir.CONFIG_FILE).get("stages")
    progress = {
        "step": max(known, default=None),
        "total_steps": total,
        **({"phase": row.get("phase"), "phases": len(stages)} if isinstance(stages, list) else {}),
        "epoch": number(row, "epoch"),
        "loss": number(row, "loss"),
        "samples_per_second": number(row, "samples_per_second"),
        "step_seconds": seconds,
        "tokens_per_second": number(row, "tokens_per_second"),
        "padding_share": number(row, "padding_share"),
        "tflops_per_rank": number(row, "tflops_per_rank"),
        "mfu": number(row, "mfu"),
        "idle_seconds": idle,
        "stalled": owner["state"] == "alive" and _is_stalled(beat, idle, seconds),
        "eta_seconds": None,
        "logged_step": row.get("step"),
    }
    if progress["step"] is not None and total is not None and seconds is not None and not progress["stalled"]:
        progress["eta_seconds"] = max(0, total - progress["step"]) * seconds
    why = f"{run_dir.TRAIN_LOG} has no rows" if not row else "the last row has none (not finite)"
    reasons = {
        **dict.fromkeys(("epoch", "loss", "samples_per_second", "step_seconds", "logged_step"), why),
        **dict.fromkeys(("tokens_per_second", "padding_share", "tflops_per_rank"), f"{why}, or an older one"),
        "mfu": "the device's speed is not known",
        "phase": why,
        "step": "no row, no heartbeat with a step, no valid checkpoint",
        "total_steps": "neither a heartbeat nor a valid checkpoint names it",
        "idle_seconds": "no heartbeat says when the last step was",
        "eta_seconds": "needs the step, the total, the seconds per step, and a run that moves",
    }
    undefined.update({f"progress.{key}": reasons[key] for key in reasons if progress.get(key, 0) is None})
    return progress


def _idle_seconds(beat: dict[str, Any], owner: dict[str, Any]) -> float | None:
    """Return seconds since the last step or evaluated batch, by the owner's clock up to its last beat."""
    progress, beaten = number(beat, "progress_unix_time"), number(beat, "unix_time")
    if progress is None or beaten is None:
        return None
    return round(max(0.0, beaten - progress) + max(0.0, owner["heartbeat_age_seconds"] or 0.0), 1)


def _is_stalled(beat: dict[str, Any], idle: float | None, step_seconds: float | None) -> bool:
    if idle is None or step_seconds is None or beat.get("phase") != "training":
        return False
    return idle > max(_STALLED_SECONDS, _STALLED_STEPS * step_seconds)


def _best(root: Path, state: dict[str, Any], undefined: dict[str, str]) -> dict[str, Any]:
    """Return the best metric and its step, from best.json or else from the newest valid checkpoint."""
    content = _json_object(root / store.BEST)
    saved = state.get("train_state")
    saved = saved if isinstance(saved, dict) else {}
    value, step = number(content, "value"), content.get("step")
    if value is None:
        value, step = number(saved, "best_value"), saved.get("best_step")
    if value is None:
        undefined["best"] = "no evaluation with a defined metric has been saved"
    train = mapping_in(root.parent / run_dir.CONFIG_FILE).get("train")
    metric = content.get("metric") or (train.get("select_metric") if isinstance(train, dict) else None)
    return {"metric": metric, "value": value, "step": step if value is not None else None}


def _owner(run: Path, undefined: dict[str, str]) -> dict[str, Any]:
    """Return who holds the lock, and the last heartbeat; ``state`` is none, alive, dead or unknown."""
    lock, beat = _read(run / run_dir.LOCK_FILE), _read(run / run_dir.HEARTBEAT_FILE)
    content = beat.content if beat else {}
    heard = number(content, "unix_time")
    age = round(time.time() - heard, 1) if heard is not None else None
    if age is None:
        undefined["owner.heartbeat_age_seconds"] = f"there is no readable {run_dir.HEARTBEAT_FILE}"
    result = {"lock": None, "state": "none", "heartbeat": content or None, "heartbeat_age_seconds": age}
    if lock is None:
        return result
    lives = process_lives(lock.content)
    if lives is None:  # on another host: all that can be seen is whether its heartbeat changes
        period = number(content, "beat_seconds")
        end = time.monotonic() + 1.5 * min(period or 5.0, 60.0)
        while lives is None and time.monotonic() < end:
            time.sleep(0.2)
            if _read(run / run_dir.HEARTBEAT_FILE) != beat or _read(run / run_dir.LOCK_FILE) != lock:
                lives = True
    if lives is None:
        undefined["owner.state"] = "its process cannot be seen from this host, and it did not beat just now"
    state = {True: "alive", False: "dead", None: "unknown"}[lives]
    return {**result, "lock": lock.content, "owner": describe(lock.content), "state": state}


def _checkpoints(root: Path, quick: bool) -> list[dict[str, Any]]:
    """Return every directory named like a checkpoint, newest first, with its problem or ``""``."""
    result = []
    found = store.steps_present(root)
    sizes = {path: _size(path) for _, path in found}
    done, started = 0, time.monotonic()
    for step, path in found:
        problem = store.problem(path, hashes=not quick)
        if problem and not path.exists():
            continue  # the running job has just pruned it
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
    """Return the bytes of all files below; of a checkpoint that is being pruned, those that are left."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _newest_state(root: Path, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Return state.json of the newest valid checkpoint; empty if there is none."""
    valid = next((c for c in checkpoints if c["valid"]), None)
    return _json_object(root / valid["name"] / STATE_FILE) if valid else {}


def _pointer(root: Path, name: str, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Return where a pointer points, and whether that checkpoint can be loaded."""
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


def _json_object(path: Path) -> dict[str, Any]:
    state = _read(path)
    return state.content if state else {}


def _read(path: Path) -> LockState | None:
    try:
        return read_state(path)
    except OSError:  # a folder of that name, or a read error
        return None


def render(status: dict[str, Any]) -> str:
    """Return the status as text for a terminal; what is not known is left out."""
    owner = status["owner"]
    lines = [f"run          {status['run']}", *_progress_lines(status)]
    best = status["best"]
    value = "none yet" if best["value"] is None else f"{best['value']:.4f} at step {best['step']}"
    lines.append(f"best {best['metric'] or 'metric':<8}{value}")
    lines.append(
        f"owner        {owner['state']}" + (f": {owner['owner']}" if owner["lock"] is not None else "")
    )
    if owner["heartbeat"]:
        age = owner["heartbeat_age_seconds"]
        ago = "at an unknown time" if age is None else f"{duration(age)} ago by this host's clock"
        lines.append(f"heartbeat    {ago}: {owner['heartbeat'].get('phase', 'unknown')}")
    lines += [
        f"checkpoint   {c['name']} {c['bytes'] / _MIB:.1f} MiB "
        + ("valid" if c["valid"] else f"INVALID ({c['problem']})")
        for c in status["checkpoints"]
    ] or ["checkpoint   none"]
    if status["checkpoints"]:
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


def _progress_lines(status: dict[str, Any]) -> list[str]:
    p, alive = status["progress"], status["owner"]["state"] == "alive"
    if p["step"] is None:
        return ["progress     no step yet"]
    total = "" if p["total_steps"] is None else f" of {p['total_steps']}"
    phase = "" if p.get("phase") is None else f", phase {p['phase']} of {p['phases']}"
    epoch = "" if p["epoch"] is None else f", epoch {p['epoch']:.3f}"
    last = (
        f", last progress {duration(p['idle_seconds'])} ago"
        if alive and p["idle_seconds"] is not None
        else ""
    )
    lines = [f"progress     step {p['step']}{total}{phase}{epoch}{last}"]
    facts = [
        f"loss {p['loss']:.4f}" if p["loss"] is not None else "",
        f"{p['samples_per_second']:.1f} samples/s" if p["samples_per_second"] is not None else "",
        f"{duration(p['eta_seconds'])} left" if p["eta_seconds"] is not None else "",
    ]
    work = [
        f"{p['tokens_per_second']:,.0f} tokens/s" if p["tokens_per_second"] is not None else "",
        f"{100 * p['padding_share']:.0f}% padding" if p["padding_share"] is not None else "",
        f"{p['tflops_per_rank']:.3g} TFLOP/s per rank" if p["tflops_per_rank"] is not None else "",
        f"{100 * p['mfu']:.0f}% of the device's bf16 speed" if p["mfu"] is not None else "",
    ]
    if p["loss"] is None and p["logged_step"] is not None:
        facts[0] = f"the loss of step {p['logged_step']} is not finite"
    if any(facts):
        lines.append(f"             {', '.join(filter(None, facts))}")
    if any(work):
        lines.append(f"             {', '.join(filter(None, work))}")
    if p["stalled"]:
        lines.append(
            f"STALLED      no step for {duration(p['idle_seconds'])} (usually {duration(p['step_seconds'])}): a rank "
            f"may be stopped or stuck; see {run_dir.LOGS_DIR}/. The watchdog ends it after train.watchdog_minutes"
        )
    return lines
