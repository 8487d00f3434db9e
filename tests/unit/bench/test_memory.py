"""The memory of a family of processes: children count, and what grows is seen."""

from __future__ import annotations

import subprocess
import sys

from rating_train.bench.memory import family_bytes, memory_rows


def test_what_a_child_holds_is_counted() -> None:
    before = family_bytes()
    program = "held = bytes(range(256)) * 2**18; print('ready', flush=True); input()"  # 64 MiB
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert family_bytes() - before > 60 * 2**20
    child.communicate("\n", timeout=30)


def test_growth_is_a_share_of_what_was_there_early() -> None:
    early, late = memory_rows([100 * 2**20, 300 * 2**20], [120 * 2**20, 300 * 2**20])
    assert early.value == 200 and early.ratio is None
    assert late.value == 210 and late.ratio == 1.05 and late.spread == (120, 300)
    assert late.larger_is_better is None, "no speed"
