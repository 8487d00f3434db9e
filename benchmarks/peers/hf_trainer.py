"""The Hugging Face Trainer, alone or with DeepSpeed ZeRO-1, as its users set it up.

torchrun --nproc-per-node 2 benchmarks/peers/hf_trainer.py CONFIG [--deepspeed] [--set A.B=V] ...
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from setting import Clock, Setting, forward_arguments, read_setting
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

ZERO_1: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


class WithLoss(nn.Module):
    """The regressor in the shape that the Trainer wants: labels in, loss out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ratings: Tensor, **arguments: Tensor) -> dict[str, Tensor]:
        scores = self.model(**arguments)
        return {"loss": nn.functional.mse_loss(scores, ratings), "scores": scores}


class Timer(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.clock.step()
        return control


def trainer(setting: Setting, folder: str, deepspeed: bool) -> tuple[Trainer, Clock]:
    clock = Clock(setting)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=setting.plan.micro_items,
        gradient_accumulation_steps=setting.plan.accumulation,
        max_steps=setting.warmup + setting.steps,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=setting.bf16,
        use_cpu=setting.device.type == "cpu",
        dataloader_num_workers=setting.config.data.workers,
        remove_unused_columns=False,
        logging_steps=10_000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        deepspeed=ZERO_1 if deepspeed else None,
    )

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = setting.collate(samples)
        return {**forward_arguments(batch), "ratings": batch.ratings}

    made = Trainer(
        model=WithLoss(setting.model),
        args=arguments,
        train_dataset=setting.dataset,
        data_collator=collate,
        callbacks=[Timer(clock)],
    )
    return made, clock


def main() -> None:
    setting = read_setting(connect=False)
    with tempfile.TemporaryDirectory() as folder:
        made, clock = trainer(setting, folder, "--deepspeed" in sys.argv)
        made.train()
        clock.report()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
