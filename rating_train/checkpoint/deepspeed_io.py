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
    if stage == 0:
        file = directory / ENGINE_DIR / "mp_rank_00_model_states.pt"
        state = torch.load(file, map_location="cpu", weights_only=False)
        return {k: v.float() for k, v in state["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()  # it prints its progress, in the midst of a command's own output
    with contextlib.redirect_stdout(said):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(directory), tag=ENGINE_DIR)
    log.debug("DeepSpeed: %s", said.getvalue().replace("\n", "; "))
    return weights
