"""From one engine to the next in one process: weights out of the old one, its memory back, masters into the new one.

What a DeepSpeed engine holds, and what becomes of it (0.19.8)::

    hooks on parameters     of the reduction (stages 1 to 3) and of gathering (stage 3): `destroy` removes them;
                            those of stage 0 are this project's, and removed here
    attributes of a         methods bound to it, its master, its share at stage 3: removed here, for in C++ a
    parameter               parameter may outlive its last reference in Python
    globals of stage 3      a stack of modules, and a cache keyed by them: emptied here
    flat weights, buckets   gone with the last reference; the next engine gets a new model, so that none is left
    allocator's blocks      returned to the device, or buckets of other sizes would come on top of the old ones
    process groups          kept: DeepSpeed uses its one copy of the world group again, so no communicator is added
"""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from rating_train.checkpoint.deepspeed_io import write_masters
from rating_train.engine.engine import Engine
from rating_train.engine.gradient_buckets import GradientBuckets


@torch.no_grad()
def complete_weights(engine: Engine) -> dict[str, Tensor]:
    """Return all weights of the model, in fp32 on the CPU of every rank. A collective.

    Trained weights are the fp32 masters; frozen ones have none, and are converted from what computes.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    stage, weights = engine.ds.zero_optimization_stage(), {}
    for name, parameter in engine.model.named_parameters():  # one at a time, to bound memory
        if stage > 0 and parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter).view(_shape(parameter))
        elif stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().clone()
        else:
            value = parameter.detach()
        weights[name] = value.to("cpu", torch.float32, copy=True)
    return weights


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, of which stage 3 leaves nothing on a rank that does not need it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def release(engine: Engine) -> None:
    """Give back the memory of an engine, whose weights are somewhere else; nothing of it can be used afterwards."""
    parameters = list(engine.model.parameters())
    if engine.ds.zero_optimization_stage() == 3:
        _forget_modules()
    engine.ds.destroy()
    engine.ds = None
    engine.groups = []
    if isinstance(engine.buckets, GradientBuckets):  # those of stage 1 are hooks of its optimizer
        engine.buckets.remove()
    engine.buckets = None
    for parameter in parameters:
        vars(parameter).clear()
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)
    parameters.clear()
    if engine.config.train.compile != "none":
        torch.compiler.reset()  # graphs hold the parameters that they were made for
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _forget_modules() -> None:
    """Empty what stage 3 keeps in its modules: the model of each engine so far, and a cache keyed by submodules.

    Both are private to 0.19.8. Where another version lacks them, there is nothing to empty.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )

    getattr(parameter_offload, "FWD_MODULE_STACK", []).clear()
    decorated = getattr(Coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(decorated, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def start_from(engine: Engine, weights: dict[str, Tensor]) -> None:
    """Give the masters of a new engine the weights that its model was built with, unrounded. A collective."""
    if engine.ds.zero_optimization_stage() > 0:
        write_masters(engine.ds, weights)
