"""A plain PyTorch loop: DistributedDataParallel, autocast, AdamW, as its documentation writes it.

torchrun --nproc-per-node 2 benchmarks/peers/ddp.py CONFIG [--set A.B=V] [--warmup W] [--steps N]
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from setting import Clock, forward_arguments, read_setting
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


def main() -> None:
    setting = read_setting(connect=True)
    cuda, accumulation = setting.device.type == "cuda", setting.plan.accumulation
    model = DistributedDataParallel(
        setting.model.to(setting.device), device_ids=[setting.device.index] if cuda else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=cuda)
    sampler: DistributedSampler = DistributedSampler(setting.dataset)
    loader = DataLoader(
        setting.dataset,
        batch_size=setting.plan.micro_items,
        sampler=sampler,
        num_workers=setting.config.data.workers,
        collate_fn=setting.collate,
        pin_memory=cuda,
        drop_last=True,
    )
    model.train()
    clock, micro, epoch, done = Clock(setting), 0, 0, False
    while not done:
        sampler.set_epoch(epoch)
        epoch += 1
        for batch in loader:
            batch = batch.to(setting.device)
            micro += 1
            last = micro % accumulation == 0
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
                    scores = model(**forward_arguments(batch))
                loss = torch.nn.functional.mse_loss(scores, batch.ratings)
                (loss / accumulation).backward()
            if not last:
                continue
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if done := clock.step():
                break
    clock.report()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
