"""What an optimizer step launches and waits for, at every stage, counted by a dispatch mode on 2 ranks."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from benchmarks.step_operations import StepOperations
from rating_train.data.collate import Batch
from tests.conftest import REPO, Ranks

LAYERS, PARAMETERS = "1,2", 46  # of the vision tower and the decoder; tensors with the head


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    import contextlib

    out = tmp_path_factory.mktemp("operations") / "rows.json"
    with contextlib.closing(Ranks()) as ranks:
        ranks.run(
            2, REPO / "benchmarks" / "step_operations.py", "--layers", LAYERS, "--json", out, timeout=280
        )
    return {row["stage"]: row for row in json.loads(out.read_text())}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_of_ours_waits_for_the_device_or_copies_host_data(rows: dict[int, dict], stage: int) -> None:
    row = rows[stage]
    assert row["parameters"] == PARAMETERS and row["kernels"]["backward"] > 100
    for kind in ("read_backs", "host_data"):
        ours = [who for who in row[kind] if not who.startswith("deepspeed/")]
        assert not ours, f"{kind}: {ours}"


@pytest.mark.timeout(300)
def test_what_deepspeed_still_reads_back_is_known(rows: dict[int, dict]) -> None:
    """docs/performance.md names them; a new version of DeepSpeed that adds one shows here."""
    assert rows[0]["read_backs"] == rows[1]["read_backs"] == {}
    allowed = {"is_invalid_grad_norm", "clip_tensors_by_global_norm"}
    for stage in (2, 3):
        assert {who.split()[-1] for who in rows[stage]["read_backs"]} <= allowed, rows[stage]["read_backs"]


@pytest.mark.timeout(300)
def test_no_gradient_is_scanned_where_the_norm_decides(rows: dict[int, dict]) -> None:
    """The scan of stage 2 took `abs`, `eq`, `ne` and more for each gradient of the rank."""
    scanned = ("abs", "amax", "amin", "isinf", "isnan", "isfinite", "ne")
    counts = {name: rows[2]["by_operator"].get(name, 0) for name in scanned}
    assert max(counts.values()) < PARAMETERS / 4, counts
    for stage in (0, 1):
        assert rows[stage]["kernels"]["step"] < 1.1 * PARAMETERS, "fused kernels take all tensors at once"


def test_the_counter_sees_read_backs_and_host_data() -> None:
    with StepOperations() as counter:
        value = torch.ones(3).sum()
        bool(value > 2)
        value.item()
        values = torch.tensor([1.0])
        values[values > 0]
        torch.ones(3).view(3, 1).t()
    assert sum(counter.read_backs.values()) == 3
    assert sum(counter.host_data.values()) == 1
    assert counter.kernels == {"ones": 2, "sum": 1, "gt": 2}


def test_a_micro_batch_goes_to_the_device_without_waiting() -> None:
    """Every tensor of a batch, the hashes for the dropout included, is copied asynchronously."""
    copies: list[bool] = []

    class Copies(StepOperations):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket is torch.ops.aten._to_copy:
                # A tensor with gaps would go through memory that is not pinned.
                copies.append(bool((kwargs or {}).get("non_blocking")) and args[0].is_contiguous())
            return super().__torch_dispatch__(func, types, args, kwargs)

    batch = small_batch(4)
    with Copies() as counter:
        for micro in batch.split(2):
            moved = micro.to(torch.device("meta")).cut(2)
            assert all(t.device.type == "meta" for t in vars(moved).values() if isinstance(t, Tensor))
    assert copies == [True] * 12  # 6 tensors of 2 micro-batches
    assert not counter.host_data and not counter.read_backs


def small_batch(items: int) -> Batch:
    return Batch(
        ids=[f"B{i:04d}" for i in range(items)],
        categories=["c"] * items,
        images=torch.zeros(items, 3, 8, 8, dtype=torch.uint8),
        input_ids=torch.zeros(items, 5, dtype=torch.int64),
        used_tokens=torch.full((items,), 5),
        ratings=torch.full((items,), 4.0),
        rating_counts=torch.ones(items),
        truncated_tokens=0,
        lengths=[4] * items,
    )
