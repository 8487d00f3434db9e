"""``torch.compile``: the layers of both towers one by one, or the whole model; one graph for each length.

A compiled layer keeps its place in the model, so parameters keep their names. Layer by layer, the gradients of a layer
are complete when its own backward graph has run, and can be reduced while the next one runs; one graph of the whole
model gives all of them at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rating_train.errors import UserError
from rating_train.model.regressor import RatingRegressor

#: Graphs that a run may take, at most: each is some seconds of compilation at the start.
MOST_LENGTHS = 32
#: Graphs of one length: training, evaluation, each with the first layer's inputs and with those of the others.
_GRAPHS_PER_LENGTH = 4


def compile_model(
    model: RatingRegressor, how: str, lengths: Sequence[int], backend: str = "inductor"
) -> None:
    """Mark a model, or its layers, to be compiled at the first call with each length. In place.

    Args:
        model: the regressor.
        how: none, blocks or model.
        lengths: all that micro-batches can have, in tokens.
        backend: of ``torch.compile``; ``aot_eager`` traces both passes and needs no compiler.

    Raises:
        UserError: there are too many lengths.
    """
    if how == "none":
        return
    if len(lengths) > MOST_LENGTHS:
        raise UserError(
            f"train.compile={how} would compile {len(lengths)} graphs, one for each length of a micro-batch",
            where="batch.length_multiple_tokens",
            expected=f"at most {MOST_LENGTHS} lengths",
            fix="set batch.length_multiple_tokens=16, or train.compile=none",
        )
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS_PER_LENGTH * len(lengths) + 4)
    # Not dynamic: kernels for one length are faster, and their number is bounded.
    options: Any = {"fullgraph": True, "dynamic": False, "backend": backend}
    if how == "model":
        # Not model.compile(): that traces DeepSpeed's hooks too, and again whenever a counter of theirs moves.
        model.forward = torch.compile(model.forward, **options)  # type: ignore[method-assign]
        return
    for layer in model.family.blocks(model.backbone):
        layer.compile(**options)


def warm_up(
    model: RatingRegressor,
    lengths: Sequence[int],
    images: Tensor,
    autocast: bool,
    before: Callable[[int], None],
) -> None:
    """Run a forward and a backward pass of every length, so that no step of the run compiles.

    Gradients are computed and dropped: no hook of a parameter runs, so nothing is accumulated or reduced.

    Args:
        model: on its device, in the dtype that it trains in.
        lengths: in tokens.
        images: of a micro-batch, of the shape and dtype of every step's.
        autocast: whether the run's forward pass runs under bf16 autocast (ZeRO stage 0).
        before: called before each length, with it.
    """
    model.train()
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    items = len(images)
    keys = torch.zeros(items, dtype=torch.int64, device=device)
    full = torch.zeros(items, max(lengths), dtype=torch.int64, device=device)
    for length in sorted(lengths, reverse=True):
        before(length)
        used: Tensor = torch.full((items,), length, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scores = model(images, full[:, :length], used, keys)
        torch.autograd.grad(scores.sum(), trained, allow_unused=True)
