"""Lightning's Trainer with its DDP strategy, as its users write it.

torchrun --nproc-per-node 2 benchmarks/peers/lightning_fit.py CONFIG [--set A.B=V] [--warmup W] [--steps N]
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
from setting import Clock, Setting, forward_arguments, read_setting
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rating_train.data.collate import Batch


class Regression(lightning.LightningModule):
    """The regressor with its loss and its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, _: int) -> Tensor:
        scores = self.model(**forward_arguments(batch))
        return nn.functional.mse_loss(scores, batch.ratings)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.01, fused=fused)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, _: int) -> Batch:
        return batch.to(device)


class Timer(lightning.Callback):
    """Counts optimizer steps."""

    def __init__(self, setting: Setting) -> None:
        self.clock, self.accumulation = Clock(setting), setting.plan.accumulation

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        if (number + 1) % self.accumulation == 0:
            self.clock.step()


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    setting = read_setting(connect=False)
    cuda = setting.device.type == "cuda"
    loader: DataLoader = DataLoader(
        setting.dataset,
        batch_size=setting.plan.micro_items,
        shuffle=True,  # Lightning divides it over the ranks
        num_workers=setting.config.data.workers,
        collate_fn=setting.collate,
        pin_memory=cuda,
        drop_last=True,
    )
    timer = Timer(setting)
    trainer = lightning.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=setting.ranks,
        strategy="ddp" if setting.ranks > 1 else "auto",
        precision="bf16-mixed" if setting.bf16 else "32-true",
        max_steps=setting.warmup + setting.steps,
        max_epochs=-1,
        accumulate_grad_batches=setting.plan.accumulation,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timer],
    )
    trainer.fit(Regression(setting.model), loader)
    timer.clock.report()


if __name__ == "__main__":
    main()
