"""What ran, and with which settings: versions, machine, command, every start of a run. Imports no torch."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from rating_train import run_dir
from rating_train.config.load import dump_config
from rating_train.config.schema import Config, to_dict
from rating_train.errors import UserError
from rating_train.files import atomic_write_json, atomic_write_text, path_exists, read_json, retry

log = logging.getLogger(__name__)

_PACKAGES = ("rating_train", "torch", "deepspeed", "transformers", "mosaicml-streaming", "numpy", "pillow")

#: Settings that say where a run is and not what it does.
_PLACES = ("name", "runs_dir")
#: What a change means that a reader may not expect.
_NOTES = {
    "train.seed": "dropout masks follow it, and differ from now on; weights are those of the checkpoint",
    "model.init_from": "not loaded: weights are those of the checkpoint",
    "train.epochs": "the learning rate follows the new total",
    "train.max_steps": "the learning rate follows the new total",
    "stages": "the learning rate follows the new phases",
    "stages.epochs": "the learning rate of the phase follows its new length",
    "stages.steps": "the learning rate of the phase follows its new length",
}

Changes = dict[str, list[Any]]  # key -> [old value, new value]


def provenance(**more: Any) -> dict[str, Any]:
    """Return what runs: versions, machine, command line. No environment variables: they may hold secrets."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "commit": source_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **more,
    }


def source_commit() -> str | None:
    """Return the commit that the package is run from, with "+" if files differ; ``None`` where it is installed.

    An environment inside another project's repository is not taken for that project.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            )
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def record_start(
    run: Path,
    config: Config,
    step: int,
    resumed_from: Path | None,
    custom_loss: dict[str, str] | None = None,
    warm_start: dict[str, Any] | None = None,
    **more: Any,
) -> Changes:
    """Write config.yaml and provenance.json of a run that starts, or resumes, and warn of changed settings.

    provenance.json keeps the settings of the run's first start, and what every later start changed, so that the
    settings of each step can be told.

    Args:
        run: the run directory.
        config: the settings from now on.
        step: the step from which they count.
        resumed_from: the checkpoint; its own run's settings are what the new ones are compared with.
        custom_loss: kind, file and sha256 of a loss of the user's own.
        warm_start: which weights the run starts from, where they are another run's.
        more: further facts for provenance.json.

    Returns:
        The settings that changed.
    """
    source = run if resumed_from is None else resumed_from.resolve().parents[1]
    before = _read_settings(source / run_dir.CONFIG_FILE)
    changes = changed_settings(before, to_dict(config)) if before is not None else {}
    changes |= _changed_loss(source, custom_loss)
    if changes and resumed_from is not None:
        log.warning("the run resumes at step %d with other settings than before: %s", step, describe(changes))
    history = _read_history(run)
    if not history:
        own = _read_settings(run / run_dir.CONFIG_FILE)
        history = [{"step": 0, "config": own}] if own is not None else []
    facts = provenance(resumed_from=str(resumed_from) if resumed_from else None, loss=custom_loss, **more)
    entry: dict[str, Any] = {"started": facts["started"], "command": facts["command"], "step": step}
    entry |= {"loss": custom_loss} if custom_loss else {}
    entry |= {"warm_start": warm_start} if warm_start else {}
    entry |= {"changed": changes} if history else {"config": to_dict(config)}
    atomic_write_text(run / run_dir.CONFIG_FILE, dump_config(config))
    atomic_write_json(run / run_dir.PROVENANCE_FILE, {**facts, "history": [*history, entry]})
    return changes


def _changed_loss(source: Path, now: dict[str, str] | None) -> Changes:
    """The hash of a custom loss, where the run had another file under the same name."""
    if now is None:
        return {}
    before = _read_provenance(source).get("loss")
    if not isinstance(before, dict) or before.get("kind") != now["kind"]:
        return {}
    old, new = before.get("sha256"), now["sha256"]
    return {} if old == new else {f"sha256 of {now['file']}": [old, new]}


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Return the settings that both have, with other values, by their dotted keys."""
    old, new = flat(before), flat(now)
    changes: Changes = {}
    for key, value in new.items():
        if key not in old or old[key] == value or key in _PLACES:
            continue
        if _sections(old[key]) and _sections(value) and len(old[key]) == len(value):
            for index, (one, other) in enumerate(zip(old[key], value)):
                changes |= changed_settings({f"{key}[{index}]": one}, {f"{key}[{index}]": other})
        else:
            changes[key] = [old[key], value]
    return changes


def _sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def describe(changes: Changes) -> str:
    """Return the changes as one line: ``optim.lr.head 0.0004 -> 0.001; ...``."""
    lines = []
    for key, (old, new) in changes.items():
        found = _NOTES.get(re.sub(r"\[\d+\]", "", key))
        note = f" ({found})" if found else ""
        lines.append(f"{key} {old!r} -> {new!r}{note}")
    return "; ".join(lines)


def _read_settings(path: Path) -> dict[str, Any] | None:
    """The settings of a config.yaml; ``None`` where there are none that can be read."""
    try:
        settings = yaml.safe_load(retry(lambda: path.read_text("utf-8"), path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        log.warning(
            "%s cannot be read (%s): changed settings are not noticed", path, " ".join(str(e).split())
        )
        return None
    return settings if isinstance(settings, dict) else None


def _read_history(run: Path) -> list[dict[str, Any]]:
    """The starts that provenance.json holds; of a run from before there was a history, none."""
    history = _read_provenance(run).get("history")
    return history if isinstance(history, list) else []


def _read_provenance(run: Path) -> dict[str, Any]:
    path = run / run_dir.PROVENANCE_FILE
    try:
        content = read_json(path) if path_exists(path) else {}
    except UserError as e:
        log.warning("%s: its history begins anew", e)
        return {}
    return content if isinstance(content, dict) else {}
