"""Capture, load and consolidate DeepSpeed's checkpoint shards, on any number of ranks.

Loading on another number of ranks does not use DeepSpeed's universal format (as of 0.19.8): its converter writes
every parameter to disk three times before anything is loaded; its loader fails on a rank that holds no share of some
optimizer group, which is the usual case for the head's biases on many GPUs, omits frozen weights, and at stage 3
gives every group the weight decay of the first. Reading the shards directly avoids all of this and needs no disk space.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rating_train.checkpoint.safe_load import SafeCheckpointEngine, load
from rating_train.checkpoint.store import InvalidCheckpoint
from rating_train.checkpoint.zero_shards import MASTER, MOMENTS, Shards, write_flat, write_per_parameter
from rating_train.files import retry

log = logging.getLogger(__name__)

ENGINE_DIR = "engine"
MODEL_STATES = "mp_rank_00_model_states.pt"
Shard = dict[str, Any]  # path within the checkpoint -> content

#: (names of a group's parameters, key) -> the number of elements of each, and a function that reads it.
_Readers = Callable[[list[str], str], Iterator[tuple[int, Any]]]
_Fill = Callable[[_Readers, torch.Tensor | None], None]


def capture_shards(ds: Any) -> Shard:
    """Copy this rank's part of weights, fp32 master weights and optimizer state to memory. A collective.

    Runs DeepSpeed's own saving, but keeps the files in memory: nothing is written, so neither a full nor a slow disk
    can fail or stall one rank between DeepSpeed's barriers.

    Returns:
        The content of each file that DeepSpeed would write, by its path within the checkpoint; all tensors are on the
        CPU and share no memory with the engine.
    """
    catcher = _Catcher()
    ds._copy_recovery_script = lambda _path: (
        None
    )  # a consolidation script; `consolidated_weights` replaces it
    try:
        with _checkpoint_engine(ds, catcher):
            ds.save_checkpoint("unused", tag=ENGINE_DIR, save_latest=False)
    finally:
        del ds._copy_recovery_script
    return catcher.files


@contextlib.contextmanager
def _checkpoint_engine(ds: Any, other: Any) -> Iterator[None]:
    """Have DeepSpeed read and write through another checkpoint engine for a while."""
    own = ds.checkpoint_engine
    ds.checkpoint_engine = other
    try:
        yield
    finally:
        ds.checkpoint_engine = own


class _Catcher:
    """A DeepSpeed checkpoint engine that keeps copies of the states it is given instead of writing them."""

    def __init__(self) -> None:
        self.files: Shard = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[f"{ENGINE_DIR}/{Path(path).name}"] = copy_to_memory(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing is written."""

    def create(self, info: Any) -> None:
        """Nothing is written."""

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return False


def copy_to_memory(state: Any) -> Any:
    """Return a deep copy of nested containers, with tensors as compact copies on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(state, dict):
        copied = copy.copy(state)
        for key, value in state.items():
            copied[key] = copy_to_memory(value)
        return copied
    if type(state) in (list, tuple):
        return type(state)(copy_to_memory(value) for value in state)
    return copy.deepcopy(state)


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in nested containers: the size of their file, within a few KiB."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(tensor_bytes(value) for value in values)


def read_shards(ds: Any, directory: Path, saved_stage: int, saved_ranks: int) -> None:
    """Load a checkpoint written from :func:`capture_shards` into the engine. A collective.

    The same stage, number of ranks and optimizer groups use DeepSpeed's own loading; anything else is read through
    :class:`~.zero_shards.Shards`. No code that a file may hold is run (see :mod:`.safe_load`).
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in ds.optimizer.param_groups]
    stage = ds.zero_optimization_stage()
    folder = directory / ENGINE_DIR
    alike = saved_stage == stage and (stage == 0 or saved_ranks == dist.get_world_size())
    if alike and not (stage == 1 and _is_divided_otherwise(ds, folder)):
        with _names_of(folder) as names, _checkpoint_engine(ds, SafeCheckpointEngine(folder)):
            loaded, _ = ds.load_checkpoint(
                str(names), tag=ENGINE_DIR, load_module_strict=True, load_lr_scheduler_states=False
            )
        if loaded is None:
            raise InvalidCheckpoint(f"DeepSpeed found no shards in {folder}")
    else:
        _read_resharded(ds, Shards(folder, saved_stage))
    # Betas and weight decay follow the configuration, not the checkpoint.
    for group, own in zip(ds.optimizer.param_groups, settings, strict=True):
        group.update(own)


def _is_divided_otherwise(ds: Any, folder: Path) -> bool:
    """Whether the same parameters stood in other groups: `zero.bucket_mb` divides them, and did not always."""
    names = {id(p): name for name, p in ds.module.named_parameters()}
    own = [[names[id(p)] for p in group] for group in _groups_and_masters(ds.optimizer)[0]]
    saved = [list(shapes) for shapes in load(folder / MODEL_STATES)["param_shapes"]]
    return own != saved and {n for group in own for n in group} == {n for group in saved for n in group}


@contextlib.contextmanager
def _names_of(folder: Path) -> Iterator[Path]:
    """Give a local directory whose ``engine/`` has an empty file for each file of ``folder``.

    DeepSpeed looks its files up by ``glob`` and ``os.path.exists``, once: on a shared file system that is away for a
    moment it finds nothing, and the start fails. It looks here instead; the content is read with retries.
    """
    found = retry(lambda: os.listdir(folder), folder)
    with tempfile.TemporaryDirectory(prefix="rating_train_") as local:
        names = Path(local) / ENGINE_DIR
        names.mkdir()
        for name in found:
            (names / name).touch()
        yield Path(local)


@torch.no_grad()
def _read_resharded(ds: Any, shards: Shards) -> None:
    """Fill this rank's parts of master weights and moments, then refresh the weights that the model computes with."""

    def readers(names: list[str], key: str) -> Iterator[tuple[int, Any]]:
        for name in names:
            yield shards.places[name].shape.numel(), lambda name=name: shards.read(name, key)

    with _open_masters(ds) as fill:
        fill(readers, shards.steps())
        _restore_frozen(ds, shards.frozen(), ds.zero_optimization_stage() == 3)
    for name, value in shards.counters.items():
        setattr(ds, name, value)


@torch.no_grad()
def write_masters(ds: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Set the master weights of a new engine of stages 1 to 3, and with them those that the model computes with.

    DeepSpeed makes the masters from weights that it has rounded to bf16 before.

    Args:
        ds: the DeepSpeed engine.
        weights: all trained weights, complete, fp32, on every rank.
    """

    def readers(names: list[str], _key: str) -> Iterator[tuple[int, Any]]:
        for name in names:
            yield weights[name].numel(), lambda name=name: weights[name]

    with _open_masters(ds) as fill:
        fill(readers, None)


@contextlib.contextmanager
def _open_masters(ds: Any) -> Iterator[_Fill]:
    """Give a function that fills this rank's parts of the master weights; then copy them to the model's weights."""
    names = {id(p): name for name, p in ds.module.named_parameters()}
    optimizer, rank, ranks = ds.optimizer, dist.get_rank(), dist.get_world_size()
    stage3 = ds.zero_optimization_stage() == 3

    def fill(readers: _Readers, steps: torch.Tensor | None) -> None:
        """Fill from ``readers`` (names of a group, key): the masters, and the moments too where ``steps`` is given."""
        for params, master in zip(*_groups_and_masters(optimizer), strict=True):
            targets = {MASTER: master.data}
            if steps is not None:
                state = _adam_state(optimizer.optimizer, master, steps.clone())  # each group counts its own
                targets |= {key: state[key] for key in MOMENTS}
            for key, target in targets.items():
                found = readers([names[id(p)] for p in params], key)
                if stage3:
                    write_per_parameter(target, rank, ranks, found)
                else:
                    write_flat(target, rank, found)

    if stage3:
        optimizer.checkpoint_event_prologue()  # partitions every parameter
    yield fill
    if stage3:
        _copy_masters_to_stage3_weights(optimizer)
        optimizer.checkpoint_event_epilogue()  # gathers small parameters again
    else:
        optimizer.update_lp_params()


def _adam_state(adam: torch.optim.Optimizer, master: torch.Tensor, steps: torch.Tensor) -> dict[str, Any]:
    """Return AdamW's state of one vector, created where no step has created it yet, with its count set to ``steps``."""
    state: dict[str, Any] = adam.state[master]
    for key in MOMENTS:
        state.setdefault(key, torch.zeros_like(master))
    state["step"] = steps.to(master.device if adam.defaults.get("fused") else "cpu")
    return state


def _groups_and_masters(optimizer: Any) -> tuple[list[Any], list[Any]]:
    """Return each group's parameters in flat order, and this rank's fp32 master vector of each group."""
    for groups, masters in (
        ("fp16_groups", "fp32_partitioned_groups_flat"),  # stage 3
        ("bf16_groups", "fp32_groups_flat_partition"),  # stage 1 in bf16
        ("bit16_groups", "single_partition_of_fp32_groups"),  # stages 1 and 2
    ):
        if hasattr(optimizer, groups):
            return getattr(optimizer, groups), getattr(optimizer, masters)
    raise RuntimeError(
        f"unknown ZeRO optimizer {type(optimizer).__name__}: a checkpoint of another topology cannot be loaded into it"
    )


def _restore_frozen(ds: Any, frozen: dict[str, torch.Tensor], stage3: bool) -> None:
    parameters = {name: p for name, p in ds.module.named_parameters() if name in frozen}
    if not stage3:
        for name, parameter in parameters.items():
            parameter.copy_(frozen[name])
        return
    import deepspeed

    for name, parameter in parameters.items():  # gathered one at a time, to bound memory
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(frozen[name])


def _copy_masters_to_stage3_weights(optimizer: Any) -> None:
    """Copy the fp32 partitions to the partitions that the model computes with, as DeepSpeed's stage-3 loading does."""
    groups = zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    )
    for master, flat, parts in groups:
        flat.data.copy_(master.data)
        for part, values in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = values.data


def consolidated_weights(directory: Path, stage: int) -> dict[str, torch.Tensor]:
    """Return all weights of the model in fp32 on the CPU, from shards of any stage and any number of ranks.

    Stages 1 to 3 give the fp32 master weights; frozen weights have no master copy and are converted to fp32.
    """
    engine = directory / ENGINE_DIR
    if stage == 0:
        module = load(engine / MODEL_STATES)["module"]
        return {name: value.float() for name, value in module.items()}
    shards = Shards(engine, stage)
    weights = {name: value.float() for name, value in shards.frozen().items()}
    return weights | {name: shards.read(name, MASTER) for name in shards.places}
