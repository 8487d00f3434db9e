"""Memory of one micro-batch, without the memory: its forward and backward pass are traced with fake tensors.

A fake tensor (``torch._subclasses.fake_tensor``) has a shape, a dtype and a device, but no contents. Every storage
that the model or autograd makes is counted while it lives, so the largest sum is what an allocator would have to
hold: saved activations, temporary results and gradients. Not counted is what kernels allocate inside themselves
(cuDNN, cuBLAS and split attention backward passes do), nor what an allocator rounds up.

The tensors are fake *CPU* tensors: torch's autograd engine refuses fake CUDA tensors on a machine without a driver.
Both devices save the same tensors for the backward pass, but for a few bytes of random state in attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rating_train.config.schema import Config
from rating_train.data.lengths import text_tokens_of
from rating_train.model.architecture import Architecture
from rating_train.model.head import dropout_keys
from rating_train.model.loss import rating_loss
from rating_train.model.regressor import RatingRegressor, empty_regressor

#: Called with each parameter when its gradient is complete.
GradientHook = Callable[[nn.Parameter], None]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made while it is active, for as long as they live.

    Args:
        existing: tensors from before; they are not counted, also where an operator returns a view of one.

    Attributes:
        now: bytes of the storages that live.
        peak: largest ``now`` so far.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.now = self.peak = 0
        for tensor in existing:
            self.add(tensor)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return output

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size or tensor.device.type == "meta":
            return
        self._known.add(key)
        # Torch keeps the Python object of a storage for as long as the storage itself lives.
        weakref.finalize(storage, self._free, key, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class MicroBatchMemory:
    """Bytes of one forward and backward pass, in addition to weights and to gradients that were there before.

    Attributes:
        items: items of the micro-batch.
        saved: held between the forward and the backward pass: inputs and activations.
        peak: largest sum at any time, new gradients included.
    """

    items: int
    saved: int
    peak: int


def trace_micro_batch(
    config: Config,
    architecture: Architecture,
    items: int,
    *,
    existing_gradients: bool,
    on_gradient: Callable[[LiveBytes], GradientHook] | None = None,
) -> MicroBatchMemory:
    """Trace the forward and backward pass of a micro-batch of full length.

    Args:
        config: which model, precision, loss, freezing and checkpointing. At ZeRO stage 0, bf16 is autocast.
        architecture: the backbone's shape.
        items: items of the micro-batch.
        existing_gradients: whether gradients of earlier micro-batches are there and are added to.
        on_gradient: makes the hook that is called with each parameter when its gradient is complete.
    """
    model = empty_regressor(config.model, architecture, config.model_px, image_start=1).train()
    with FakeTensorMode():
        dtype = torch.bfloat16 if config.forward_precision == "bf16" else torch.float32
        fill_with_fakes(model, dtype, existing_gradients)
        parameters = list(model.parameters())
        gradients = (p.grad for p in parameters if p.grad is not None)
        with LiveBytes(chain(parameters, gradients, model.buffers())) as live:
            hook = on_gradient(live) if on_gradient else None
            for parameter in parameters:
                if hook is not None and parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(hook)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.forward_precision == "autocast"):
                loss = _loss(model, config, items)
            saved = live.now
            loss.backward()  # type: ignore[no-untyped-call]
    return MicroBatchMemory(items, saved, live.peak)


def fill_with_fakes(model: nn.Module, dtype: torch.dtype, gradients: bool) -> None:
    """Replace the parameters and buffers of a model by fake ones; inside a ``FakeTensorMode``.

    Args:
        model: built on any device, for example ``meta``.
        dtype: of the parameters. Buffers keep theirs.
        gradients: whether trained parameters get a (fake) gradient.
    """
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
                new.grad = torch.empty_like(new) if gradients and new.requires_grad else None
                module._parameters[name] = new
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _loss(model: RatingRegressor, config: Config, items: int) -> Tensor:
    """Compute the loss of a fake micro-batch: the batch on the device, keys, forward pass and loss, as the engine."""
    tokens = model.visual_tokens + text_tokens_of(config)
    images = _images(model, config, items)
    ids = torch.empty(items, tokens, dtype=torch.int64)
    used, hashes = torch.empty(items, dtype=torch.int64), torch.empty(items, dtype=torch.int64)
    ratings, counts = torch.empty(items), torch.empty(items)
    scores = model(images, ids, used, dropout_keys(hashes, config.train.seed, 0))
    return rating_loss(scores, ratings, counts, config.loss, transform=config.task.target.transform)


def _images(model: RatingRegressor, config: Config, items: int) -> Tensor:
    """Return fake images of a micro-batch, or what `data.features` has in their place, as the engine takes them."""
    if not config.data.features:
        return torch.empty(items, 3, config.model_px, config.model_px, dtype=torch.uint8)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return torch.empty(items, model.visual_tokens, model.head.inner.in_features, dtype=dtype)
