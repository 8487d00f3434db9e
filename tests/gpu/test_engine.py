"""One engine on a GPU at each stage in bf16: losses, attention, memory, and what the host waits for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import DEVICE, REHEARSAL
from tests.helpers.forked import REPO
from tests.helpers.ranks import clean_environment

WORKER = Path(__file__).with_name("worker.py")
SIZES = ["small"] if REHEARSAL else ["small", "full"]

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_of_an_engine(stage: int, size: str, tmp_path: Path, measured: Callable[[str], None]) -> None:
    out = tmp_path / "row.json"
    # Not forked from a process that has imported DeepSpeed: its look for accelerators initialises CUDA.
    done = subprocess.run(
        [
            sys.executable,
            str(WORKER),
            f"--stage={stage}",
            f"--device={DEVICE}",
            f"--size={size}",
            f"--out={out}",
        ],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=REPO,
        env=clean_environment(PYTHONPATH=str(REPO)),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    row = json.loads(out.read_text())

    assert all(math.isfinite(x) and x > 0 for x in row["losses"]) and len(set(row["losses"])) == len(
        row["losses"]
    )
    assert row["norm"] is not None and not any(row["skipped"])
    assert row["devices"] == [DEVICE]
    assert len(row["scores"]) == 8 and all(1 <= score <= 5 for score in row["scores"])

    vision = [call for call in row["attention_calls"] if not call["causal"]]
    decoder = [call for call in row["attention_calls"] if call["causal"]]
    assert len(vision) == len(decoder) == 1, "one kind of call in each tower"
    for call in (*vision, *decoder):
        assert not call["mask"]
        # At stage 0 autocast casts the rotated queries and keys inside the call.
        assert call["dtypes"] == ["torch.bfloat16"] or stage == 0
    assert decoder[0]["gqa"] and decoder[0]["heads"][0] > decoder[0]["heads"][1], "keys are not repeated"
    assert not vision[0]["gqa"]

    if REHEARSAL:
        return
    measured(
        f"allocated {row['allocated'] / 2**30:.2f} GiB at the peak, reserved {row['reserved'] / 2**30:.2f}, "
        f"predicted {row['predicted'] / 2**30:.2f} ({row['predicted'] / row['allocated']:.3f})"
    )
    measured(
        f"waits in torch: {row['synchronisations'] or 'none'}; the profiler's: {row['profile']['waits']}"
    )
    measured(f"{row['profile']['kernels']} kernels a step; attention: {row['profile']['attention']}")
    ours = {where: n for where, n in row["synchronisations"].items() if where.startswith("rating_train/")}
    assert not ours, "our code waits for the device in a steady step"
    assert row["profile"]["attention"], "no fused kernel ran"
