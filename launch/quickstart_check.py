"""Print the last lines of quickstart.sh: the run's PLCC against the upper bounds of the demo catalogue."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rating_train.run_dir import EVAL_LOG
from rating_train.scoring.ces import CONVENTIONS

LEAST_SHARE_OF_PERFECT = 0.85


def last_evaluation(run: Path) -> dict[str, Any]:
    """Return the newest row that the verb `evaluate` wrote."""
    rows = [json.loads(line) for line in (run / EVAL_LOG).read_text("utf-8").splitlines()]
    return [row for row in rows if row["source"] == "evaluate"][-1]


def compare(plcc: float | None, upper_bounds: dict[str, Any]) -> tuple[list[str], bool]:
    """Return the lines to print, and whether the model is good enough."""
    if plcc is None:
        return ["PLCC is undefined: all predictions are the same"], False
    perfect = upper_bounds["plcc_perfect"]
    lines = [f"a perfect model      {perfect:.4f}   {100 * plcc / perfect:.1f} % of it reached"]
    good = plcc >= LEAST_SHARE_OF_PERFECT * perfect
    for name, key in (("the best image-only", "plcc_image_only"), ("the best text-only ", "plcc_text_only")):
        beaten = plcc > upper_bounds[key]
        good = good and beaten
        lines.append(f"{name}  {upper_bounds[key]:.4f}   {'beaten' if beaten else 'NOT beaten'}")
    return lines, good


def main() -> int:
    """Print the comparison; exit code 1 if it is enforced and fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("upper_bounds", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--enforce", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    row = last_evaluation(args.run)
    lines, good = compare(row["plcc"], json.loads(args.upper_bounds.read_text("utf-8")))
    shown = "undefined" if row["plcc"] is None else f"{row['plcc']:.4f}"
    print(f"PLCC                 {shown}   on {row['n']} validation items, step {row['step']}")
    print("\n".join(lines))
    for name, label in CONVENTIONS.items():
        value = row[f"ces_{name}"]
        print(f"CES                  {'undefined' if value is None else f'{value:.4f}'}   [{name}: {label}]")
    if good:
        return 0
    needed = f"above both single-modality upper bounds, and {LEAST_SHARE_OF_PERFECT:.0%} of a perfect model"
    print(f"expected: {needed}" + ("" if args.enforce else " (not enforced: QUICKSTART_CHECK=0)"))
    return 1 if args.enforce else 0


if __name__ == "__main__":
    raise SystemExit(main())
