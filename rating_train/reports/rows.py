"""Rows of a run's metrics files, numbers in them that may be missing, and files that may be torn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16  # of a metrics file: some hundred rows


def last_row(path: Path) -> dict[str, Any]:
    """Return the last complete row of a metrics file; empty where there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = f.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # empty, torn by a crash, or no row at all
            continue
        if isinstance(row, dict):
            return row
    return {}


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return ``row[key]`` as a finite float; ``None`` where it is missing, null, NaN or not a number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def mapping_in(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON or YAML file holds; empty where it is missing, torn, or holds something else."""
    import yaml  # imported here: `--help` does not need it

    load = yaml.safe_load if path.suffix == ".yaml" else json.loads
    try:
        value = load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def learning_rates(
    train: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[tuple[Mapping[str, Any], float]]]]:
    """Return one curve of (row, rate) for each parameter group, or a single one where the log has one number.

    Groups with equal rates share a curve: drawn separately, the last would hide the others.
    """
    curves: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
    for row in train:
        rates = row.get("lr")
        for name, rate in (rates if isinstance(rates, Mapping) else {"": rates}).items():
            if (value := number({"lr": rate}, "lr")) is not None:
                curves.setdefault(str(name), []).append((row, value))
    shared: dict[str, tuple[list[str], list[tuple[Mapping[str, Any], float]]]] = {}
    for name, values in curves.items():
        key = repr([(r["step"], v) for r, v in values])
        shared.setdefault(key, ([], values))[0].append(name)
    return [(", ".join(names), values) for names, values in shared.values()]
