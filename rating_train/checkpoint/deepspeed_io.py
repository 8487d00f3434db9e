"""The door to DeepSpeed's checkpoint files: engine shards out, in, and consolidated to one state dict."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch

from rating_train.checkpoint.store import InvalidCheckpoint

log = logging.getLogger(__name__)

ENGINE_DIR = "engine"
MODEL_STATES = "mp_rank_00_model_states.pt"
_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_")


def write_shards(ds: Any, directory: Path) -> None:
    """Every rank writes its part of weights, fp32 master weights and optimizer state. A collective."""
    ds.save_checkpoint(str(directory), tag=ENGINE_DIR, save_latest=False)


def read_shards(ds: Any, directory: Path) -> None:
    """Load what :func:`write_shards` wrote, for the same ranks and stage. A collective.

    Only verified directories come here: these files are pickles.
    """
    loaded, _ = ds.load_checkpoint(
        str(directory), tag=ENGINE_DIR, load_module_strict=True, load_lr_scheduler_states=False
    )
    if loaded is None:
        raise InvalidCheckpoint(f"DeepSpeed found no shards in {directory / ENGINE_DIR}")


def writer_of(name: str) -> int:
    """The rank that wrote a file of a checkpoint: that in its name, else rank 0."""
    match = _RANK_FILE.search(name) or re.search(r"rank_(\d+)\.pt$", name)
    return int(match.group(1)) if match else 0


def consolidated_weights(directory: Path, stage: int) -> dict[str, torch.Tensor]:
    """The whole model's weights in fp32 on the CPU, from the shards of any stage and any number of ranks.

    Stages 1 to 3 give the fp32 master weights.
    """
    engine = directory / ENGINE_DIR
    if stage == 0:
        return {k: v.float() for k, v in _load(engine / MODEL_STATES)["module"].items()}
    bf16_optimizer = sorted(
        engine.glob("bf16_zero_pp_rank_*_optim_states.pt"), key=lambda p: writer_of(p.name)
    )
    if stage == 1 and bf16_optimizer:  # which DeepSpeed's own consolidation (0.19.8) refuses
        return _join_partitions(_load(engine / MODEL_STATES), [_load(p) for p in bf16_optimizer])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()  # it prints its progress, in the midst of a command's own output
    with contextlib.redirect_stdout(said):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=ENGINE_DIR)
    log.debug("DeepSpeed: %s", said.getvalue().replace("\n", "; "))
    if stage < 3:  # at stage 1 it leaves out frozen weights (0.19.8); the whole module is in the model states
        weights = _load(engine / MODEL_STATES)["module"] | weights
    return {k: v.float() for k, v in weights.items()}  # frozen weights have no fp32 master


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=False)  # verified bytes only come here


def _join_partitions(model: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """fp32 master weights of DeepSpeed's BF16_Optimizer (stage 1): flat groups, cut evenly over the ranks.

    Args:
        model: the model states: bf16 weights (frozen ones too), and names and shapes of every optimizer group.
        ranks: the optimizer states of all ranks, in rank order.
    """
    weights = {k: v.float() for k, v in model["module"].items()}
    partitions = [r["optimizer_state_dict"]["single_partition_of_fp32_groups"] for r in ranks]
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([p[group].detach() for p in partitions])
        offset = 0
        for name, shape in shapes.items():
            weights[name] = flat[offset : offset + shape.numel()].reshape(shape).clone()
            offset += shape.numel()
    return weights
