"""Train every combination with the engine and with 40 lines of plain PyTorch, on 2 ranks, and write the differences.

Usage: torchrun --nproc-per-node=2 parity_worker.py OUT.json fp32|bf16
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param

from rating_train.distributed import world as worlds
from rating_train.config.load import config_from_dict
from rating_train.config.resolve import plan_batch
from rating_train.data.collate import Batch
from rating_train.engine.engine import build_engine
from rating_train.config.lr_schedule import lr_factor
from rating_train.model.architecture import Architecture, TextArchitecture, VisionArchitecture
from rating_train.model.loss import rating_loss
from rating_train.model.param_groups import param_groups
from rating_train.model.attention import choose_attention
from rating_train.model.regressor import build_regressor

STEPS, ITEMS, TOKENS, PX, RANKS = 4, 8, 24, 64, 2
ARCHITECTURE = Architecture(
    text=TextArchitecture(hidden=48, layers=2, heads=3, kv_heads=1, head_dim=16, mlp=96, vocab=256),
    vision=VisionArchitecture(hidden=32, layers=2, heads=2, mlp=64, patch=16, image_size=128),
    scale_factor=2,
    image_token_id=5,
    pad_token_id=2,
    head_hidden=16,
)


def configuration(stage: int, accumulation: int, clip: float, freeze: list[str], precision: str):
    # eps damps Adam where a gradient is zero but for rounding (key biases): there g / (|g| + 1e-8) is noise.
    return config_from_dict(
        {
            "model": {"weights": "random", "head_hidden": 16, "head_dropout": 0.0, "freeze": freeze},
            "zero": {"stage": stage},
            "train": {"precision": precision},
            "batch": {"global_items": ITEMS, "micro_items": ITEMS // 2 // accumulation, "length_multiple_tokens": 3},
            "optim": {
                "lr": {"vision": 1e-3, "connector": 2e-3, "decoder": 1e-3, "head": 4e-3},
                "clip_norm": clip,
                "eps": 1e-3,
                "weight_decay": 0.1,
                "warmup_fraction": 0.5,
            },
        }
    )


def batches() -> list[Batch]:
    """The same global batches on every rank."""
    g = torch.Generator().manual_seed(3)
    result = []
    for _ in range(STEPS):
        used = torch.randint(12, TOKENS - 3, (ITEMS,), generator=g)
        result.append(
            Batch(
                ids=[str(i) for i in range(ITEMS)],
                categories=["c"] * ITEMS,
                images=torch.randint(0, 256, (ITEMS, 3, PX, PX), generator=g, dtype=torch.uint8),
                input_ids=torch.randint(6, 250, (ITEMS, TOKENS), generator=g),
                used_tokens=used,
                lengths=used.tolist(),  # the engine cuts micro-batches, the reference does not
                ratings=torch.rand(ITEMS, generator=g) * 4 + 1,
                rating_counts=torch.ones(ITEMS),
                truncated_tokens=0,
            )
        )
    return result


def reference(model, config, data, micro_items):
    """Plain PyTorch on the complete global batch: fp32 master weights, fp32 gradients, clipping, AdamW."""
    bf16, stage0 = config.train.precision == "bf16", config.zero.stage == 0
    low = copy.deepcopy(model)  # the weights that compute
    if bf16 and not stage0:
        for p in low.parameters():
            p.data = p.data.bfloat16()
            model_p = dict(model.named_parameters())
        for name, p in low.named_parameters():  # masters start from the rounded weights, as DeepSpeed's do
            model_p[name].data.copy_(p.data.float())
    groups = param_groups(model, config.optim)
    options = [{"params": list(g.parameters), "weight_decay": g.weight_decay} for g in groups]
    # The same kernel as the engine: another rounds the last bit differently, and bf16 then amplifies that.
    optimizer = torch.optim.AdamW(options, lr=0.0, betas=(0.9, 0.999), eps=config.optim.eps, fused=True)
    pairs = [(m, p) for m, p in zip(model.parameters(), low.parameters(), strict=True) if m.requires_grad]
    losses = []
    for step, batch in enumerate(data):
        for group, g in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = g.peak_lr * lr_factor(step, STEPS, config.optim)
        micros = batch.split(micro_items)
        accumulation = len(micros) // RANKS
        sums = [torch.zeros_like(m) for m, _ in pairs]
        total = 0.0
        for turn in range(accumulation):  # one micro-batch of every rank at a time, as the ranks do
            reduced = [torch.zeros_like(m) for m, _ in pairs]
            for micro in micros[turn::accumulation]:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and stage0):
                    scores = low(micro.images, micro.input_ids, micro.used_tokens)
                loss = rating_loss(scores, micro.ratings, micro.rating_counts, config.loss) / accumulation
                total += float(loss.detach())
                for r, g in zip(reduced, torch.autograd.grad(loss, [p for _, p in pairs]), strict=True):
                    r += g.float() / RANKS
            for s, r in zip(sums, reduced, strict=True):
                s += r
        for (master, _), s in zip(pairs, sums, strict=True):
            master.grad = s
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_([m for m, _ in pairs], config.optim.clip_norm)
        optimizer.step()
        for master, p in pairs:
            p.data.copy_(master.data)
        losses.append(total / RANKS)
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def compare(stage, accumulation, clip, freeze, precision, world, device):
    config = configuration(stage, accumulation, clip, freeze, precision)
    model = build_regressor(config.model, ARCHITECTURE, PX, 3, seed=17)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = plan_batch(ITEMS, config.batch.micro_items, world.size)
    data = batches()
    alike = copy.deepcopy(model)
    choose_attention(alike.backbone, device, precision == "bf16")  # or attention rounds otherwise
    expected_losses, expected = reference(alike, config, data, plan.micro_items)
    assert plan.ranks == RANKS and plan.accumulation == accumulation
    engine = build_engine(model, config, plan, device)
    losses = []
    for step, batch in enumerate(data):
        mine = batch.split(plan.rank_items)[world.rank]
        loss = engine.step(mine, step, STEPS).clone()
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world.size)
    worst, moved, frozen_moved = 0.0, 0.0, 0.0
    for name, p in engine.model.named_parameters():
        if p.requires_grad:
            now = (safe_get_full_fp32_param(p) if stage else p.detach()).reshape(before[name].shape)
            worst = max(worst, float((now - expected[name]).abs().max()))
            moved = max(moved, float((expected[name] - before[name]).abs().max()))
        elif stage < 3:
            change = (p.detach().float() - before[name].to(p.dtype).float()).abs().max()
            frozen_moved = max(frozen_moved, float(change))
    norm = engine.grad_norm
    reduced_as = {str(engine.ds.optimizer.get_param_comm_dtype(p)) for p in engine.model.parameters()} if stage > 1 else []
    engine.ds.destroy()
    return {
        "stage": stage, "accumulation": accumulation, "clip": clip, "frozen": bool(freeze), "precision": precision,
        "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)),
        "weight_difference": worst, "largest_update": moved, "frozen_moved": frozen_moved, "grad_norm": norm,
        "losses": losses, "reduced_as": sorted(reduced_as),
    }  # fmt: skip


def main() -> None:
    out, precision = Path(sys.argv[1]), sys.argv[2]
    world = worlds.detect()
    device = worlds.connect(world)
    rows = []
    for stage, accumulation, clip, freeze in itertools.product(
        (0, 1, 2, 3), (1, 2), (0.0, 0.5), ([], ["vision", "connector"])
    ):
        rows.append(compare(stage, accumulation, clip, freeze, precision, world, device))
    if world.is_main:
        out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    from rating_train.cli import leave

    main()
    leave(0)
