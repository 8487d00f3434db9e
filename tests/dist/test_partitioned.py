"""Stage 1 in bf16: what a GPU scatters is what gloo averages, on ranks that agree, in buffers of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import REPO, Ranks


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [2, 4])
def test_gradients_train_alike_scattered_divided_and_resumed(number: int, ranks: Ranks, tmp_path: Path) -> None:
    """With two ranks a sum has one order, so all is bit-equal; with four, gloo may add in another one."""
    ranks.run(number, REPO / "tests" / "dist" / "partitioned_worker.py", tmp_path / "out.pt")
    everyone = torch.load(tmp_path / "out.pt", weights_only=False)
    assert len(everyone) == number
    exact = number == 2
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-5}
    for found in everyone:
        everywhere, scattered = found["everywhere"], found["scattered"]
        for name in ("losses", "norms"):
            assert scattered[name] == pytest.approx(everywhere[name], rel=0 if exact else 1e-3)
        for name in ("weights", "states"):
            for one, other in zip(everywhere[name], scattered[name], strict=True):
                torch.testing.assert_close(one, other, **tolerance)
        whole, divided = found["whole"], found["divided"]
        assert divided["buffers"] > whole["buffers"] + 5, "otherwise nothing is compared"
        for name, reference in (("divided", whole), ("whole, then divided", whole), ("divided, then whole", divided)):
            losses = found[name]["losses"]
            assert losses == pytest.approx(reference["losses"][-len(losses) :], rel=0 if exact else 1e-3), name
            for one, other in zip(reference["weights"], found[name]["weights"], strict=True):
                torch.testing.assert_close(one, other, **tolerance)
        assert found["whole, then divided"]["buffers"] == divided["buffers"]
    first = everyone[0]
    for found in everyone[1:]:
        for name, run in found.items():
            assert run["norms"] == first[name]["norms"], "every rank clips by the same norm"
            assert all(torch.equal(a, b) for a, b in zip(run["weights"], first[name]["weights"], strict=True))
