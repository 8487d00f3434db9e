"""Stage 1 in bf16: what a GPU scatters is what gloo averages, on ranks that agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import REPO, Ranks


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", [2, 4])
def test_scattered_gradients_train_as_averaged_ones(number: int, ranks: Ranks, tmp_path: Path) -> None:
    """With two ranks a sum has one order, so all is bit-equal; with four, gloo may add in another one."""
    ranks.run(number, REPO / "tests" / "dist" / "partitioned_worker.py", tmp_path / "out.pt")
    everyone = torch.load(tmp_path / "out.pt", weights_only=False)
    assert len(everyone) == number
    tolerance = {"rtol": 0, "atol": 0} if number == 2 else {"rtol": 1e-2, "atol": 1e-5}
    for everywhere, scattered in everyone:
        for name in ("losses", "norms"):
            assert scattered[name] == pytest.approx(everywhere[name], rel=0 if number == 2 else 1e-3)
        for name in ("weights", "states"):
            for one, other in zip(everywhere[name], scattered[name], strict=True):
                torch.testing.assert_close(one, other, **tolerance)
    first = everyone[0][1]
    for _, scattered in everyone[1:]:
        assert scattered["norms"] == first["norms"], "every rank clips by the same norm"
        assert all(torch.equal(a, b) for a, b in zip(scattered["weights"], first["weights"], strict=True))
