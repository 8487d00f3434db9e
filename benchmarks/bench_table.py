"""One table of results of `rating-train bench --json` and of `peers/run.py --json`: a line for each speed.

python benchmarks/bench_table.py FILE...
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

SHOWN = ("items/s", "TFLOP/s", "of the same steps on the device")


def main() -> None:
    print("| run | part | figure | median | unit | of the limit |\n| --- | --- | --- | --- | --- | --- |")
    machine = {}
    for path in map(Path, sys.argv[1:]):
        content = json.loads(path.read_text("utf-8"))
        if "machine" not in content:  # items/s of each peer in each round
            for name, rates in content.items():
                ratio = statistics.median(a / b for a, b in zip(rates, content.get("DDP", rates)))
                print(
                    f"| {path.stem} | train | {name} | {statistics.median(rates):.4g} | items/s | {ratio:.2f} x DDP |"
                )
            continue
        machine = content["machine"]
        for row in content["rows"]:
            if row["unit"] in SHOWN:
                share = "" if row["ratio"] is None else f"{100 * row['ratio']:.1f}%"
                cells = (path.stem, row["part"], row["name"], f"{row['value']:.4g}", row["unit"], share)
                print(f"| {' | '.join(cells)} |")
    told = {name: machine[name] for name in ("device", "cores", "torch") if name in machine}
    print("\n" + ", ".join(f"{name} {value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
