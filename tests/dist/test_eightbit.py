"""`optim.kind: adamw_8bit`: moments in 8 bits, resumed bit-equal, moved to another number of ranks, refused early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rating_train.checkpoint.safe_load import load
from rating_train.config.load import load_config
from rating_train.errors import UserError
from tests.conftest import Ranks
from tests.helpers.runs import assert_same, global_batches, losses

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `eightbit`)")
pytestmark = pytest.mark.timeout(300)

STATES = "engine/mp_rank_00_model_states.pt"


def config_of(write: Callable[..., Path], name: str, last_step: int, **optim: object) -> Path:
    """A run that ends at ``last_step``; the learning rate is constant, so the end does not change it."""
    sections: dict[str, Any] = {
        "batch": {"global_items": 12},
        "zero": {"stage": 0},
        "optim": {"kind": "adamw_8bit", "schedule": "constant", "warmup_fraction": 0.0, **optim},
        "train": {"epochs": 9, "max_steps": last_step, "keep_last": 9},
        "eval": {"max_items": 12},
    }
    path = write(name, **sections)
    return path.rename(path.with_name(f"{name}_{last_step}.yaml"))


def states(run: Path, step: int) -> dict[str, Any]:
    return load(run / "checkpoints" / f"step_{step:08d}" / STATES)


def test_it_resumes_bit_equal_and_on_another_number_of_ranks(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    worker = ("-m", "tests.dist.train_worker")
    first = [config_of(tiny_config, name, step) for name, step in (("straight", 6), ("broken", 3), ("moved", 3))]
    ranks.run(2, *worker, *first)
    ranks.run(2, *worker, config_of(tiny_config, "broken", 6))
    ranks.run(1, *worker, config_of(tiny_config, "moved", 6))
    straight, broken, moved = (tmp_path / "runs" / name for name in ("straight", "broken", "moved"))
    a, b = states(straight, 6), states(broken, 6)
    assert_same(a["module"], b["module"], "weights")
    assert_same(a["optimizer"], b["optimizer"], "optimizer")
    assert losses(straight) == losses(broken)
    assert global_batches(straight) == global_batches(moved)
    # bf16 rounds other micro-batches otherwise, and moments in 8 bits round anew.
    assert losses(moved) == pytest.approx(losses(straight), rel=2e-2)
    moments = {t.dtype for s in a["optimizer"]["state"].values() for t in quantized(s)}
    assert moments == {torch.uint8}
    output = ranks.train(2, config_of(tiny_config, "broken", 7, kind="adamw"), code=1)
    assert "optimizer was 'adamw_8bit' and is now 'adamw'" in output


def quantized(state: dict[str, Any]) -> list[torch.Tensor]:
    """The first and second moment of a parameter, where they have scales."""
    inner = state.get("__bnb_optimizer_quant_state__", state)
    return [inner["state1"], inner["state2"]] if "absmax1" in inner else []


def test_its_loss_follows_that_of_adamw(
    ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    files = [config_of(tiny_config, kind, 8, kind=kind) for kind in ("adamw", "adamw_8bit")]
    ranks.run(1, "-m", "tests.dist.train_worker", *files)
    plain, eight = (losses(tmp_path / "runs" / kind) for kind in ("adamw", "adamw_8bit"))
    assert plain[0] == eight[0] and plain[1:] != eight[1:]
    assert eight == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_that_divide_the_moments_refuse_it(tiny_config: Callable[..., Path], stage: int) -> None:
    with pytest.raises(UserError, match=rf"needs `zero.stage` 0 \(it is {stage}\)"):
        load_config(tiny_config(zero={"stage": stage}, optim={"kind": "adamw_8bit"}))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    from rating_train.engine.eightbit import GuardedAdamW8bit

    torch.manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((64, 128), (64,)))
    groups = [{"params": [weight], "bits": 8}, {"params": [bias], "bits": 32}]
    optimizer = GuardedAdamW8bit(groups, clip_norm=0.5, lr=1e-2, weight_decay=0.1)
    copies = [p.detach().clone().requires_grad_() for p in (weight, bias)]
    plain = torch.optim.AdamW(copies, lr=1e-2, weight_decay=0.1)
    for p, q in zip((weight, bias), copies):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    torch.nn.utils.clip_grad_norm_(copies, 0.5)
    optimizer.step()
    plain.step()
    assert torch.allclose(bias, copies[1], atol=1e-6) and torch.allclose(weight, copies[0], atol=1e-2)
    before = [p.detach().clone() for p in (weight, bias)]
    moments = optimizer.state[weight]["state1"].clone()
    bias.grad[3] = float("nan")  # type: ignore[index]
    optimizer.step()
    assert float(optimizer.found_inf) == 1 and optimizer.state[weight]["step"] == 1
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])
    assert torch.equal(optimizer.state[weight]["state1"], moments) and moments.dtype == torch.uint8
