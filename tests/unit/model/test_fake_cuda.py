"""CUDA without a GPU: fake tensors of device ``cuda`` through transfer, forward pass, losses and optimizer.

A fake tensor has a device, a dtype and a shape, but no contents. Mixing devices raises, and so does reading a value
back to the host (DataDependentOutputException). The autograd engine refuses fake CUDA tensors without a driver, so
the backward pass is traced on fake CPU tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call

from rating_train.config.schema import LossConfig, ModelConfig
from rating_train.data.collate import Batch
from rating_train.engine.optimizer import GuardedAdamW
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.head import dropout_keys
from rating_train.model.loss import rating_loss
from rating_train.model.regressor import RatingRegressor, empty_regressor, part_of

ARCHITECTURE = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
#: The widths of the full model on few layers, for the combinations: every layer is the same code.
SHALLOW = dataclasses.replace(
    ARCHITECTURE,
    text=dataclasses.replace(ARCHITECTURE.text, layers=2),
    vision=dataclasses.replace(ARCHITECTURE.vision, layers=2),
)
LOSSES = [
    LossConfig(kind=kind, count_weight=weight, plcc_weight=plcc)  # type: ignore[arg-type]
    for kind, weight, plcc in itertools.product(("mse", "huber"), ("none", "log", "sqrt"), (0.0, 0.5))
]
ITEMS, PX, IMAGE_START, TOKENS = 4, 384, 5, 212

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 9) and not torch.cuda.is_available(),
    reason="torch 2.8 asks the driver for a copy to a fake CUDA device; there is none",
)


def fake_tensors(
    model: nn.Module, device: str, dtype: torch.dtype, freeze: tuple[str, ...]
) -> dict[str, Tensor]:
    """Fake parameters (trained or frozen) in ``dtype``, and fake buffers in their own, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = torch.empty(parameter.shape, dtype=dtype, device=device)
        tensors[name].requires_grad_(part_of(name) not in freeze)
    for name, buffer in model.named_buffers():
        tensors[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return tensors


def fake_batch() -> Batch:
    """A batch in (fake) host memory."""
    return Batch(
        ids=[str(i) for i in range(ITEMS)],
        categories=["c"] * ITEMS,
        images=torch.empty(ITEMS, 3, PX, PX, dtype=torch.uint8),
        input_ids=torch.empty(ITEMS, TOKENS, dtype=torch.int64),
        used_tokens=torch.empty(ITEMS, dtype=torch.int64),
        ratings=torch.empty(ITEMS),
        rating_counts=torch.empty(ITEMS),
        truncated_tokens=0,
        id_hashes=torch.empty(ITEMS, dtype=torch.int64),
    )


def regressor(architecture: Any = SHALLOW, dropout: float = 0.1) -> RatingRegressor:
    return empty_regressor(ModelConfig(head_dropout=dropout), architecture, PX, IMAGE_START).train()


def scores(model: RatingRegressor, tensors: dict[str, Tensor], micro: Batch) -> Tensor:
    keys = dropout_keys(micro.id_hashes, seed=17, step=3)
    return functional_call(model, tensors, (micro.images, micro.input_ids, micro.used_tokens, keys))


def states_of(model: RatingRegressor) -> dict[str, Tensor]:
    """What each part gives out in the next forward pass, by part; filled by hooks."""
    seen: dict[str, Tensor] = {}
    backbone = model.backbone
    modules = {"vision": backbone.vision_model.post_layernorm, "connector": backbone.connector}
    for part, module in {**modules, "decoder": backbone.text_model.norm, "head": model.head}.items():
        module.register_forward_hook(lambda _m, _a, output, part=part: seen.update({part: output}))
    return seen


@pytest.mark.parametrize("freeze", [(), ("vision", "connector"), ("vision", "connector", "decoder")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_loss_of_a_bf16_model_stays_on_the_device(freeze: tuple[str, ...], dropout: float) -> None:
    model = regressor(dropout=dropout)
    seen = states_of(model)
    with FakeTensorMode():
        tensors = fake_tensors(model, "cuda", torch.bfloat16, freeze)
        for micro in fake_batch().split(2):
            micro = micro.to(torch.device("cuda"))
            rated = scores(model, tensors, micro)
            for config in LOSSES:
                loss = rating_loss(rated, micro.ratings, micro.rating_counts, config)
                assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.ndim == 0
                assert loss.requires_grad
    assert {part: state.dtype for part, state in seen.items()} == {
        "vision": torch.bfloat16,
        "connector": torch.bfloat16,
        "decoder": torch.bfloat16,
        "head": torch.float32,
    }
    assert seen["connector"].shape == (2, 36, 576) and seen["decoder"].shape == (2, TOKENS, 576)
    assert seen["vision"].requires_grad == ("vision" not in freeze), "a frozen tower builds no graph"


def test_the_complete_model_runs_its_forward_pass_on_fake_cuda() -> None:
    model = regressor(ARCHITECTURE)
    with FakeTensorMode():
        tensors = fake_tensors(model, "cuda", torch.bfloat16, ())
        assert (
            sum(t.numel() for n, t in tensors.items() if n.startswith("backbone.") and t.requires_grad)
            == 228_099_648
        )
        rated = scores(model, tensors, fake_batch().to(torch.device("cuda")))
    assert rated.device.type == "cuda" and rated.dtype == torch.float32 and rated.shape == (ITEMS,)


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast"])
def test_fp32_weights_with_and_without_autocast(precision: str) -> None:
    """Stage 0 in bf16 is autocast, which torch allows for a real CUDA device only: on fake CPU tensors."""
    model = regressor()
    seen = states_of(model)
    device = "cuda" if precision == "fp32" else "cpu"
    with FakeTensorMode(), torch.autocast(device, torch.bfloat16, enabled=precision != "fp32"):
        tensors = fake_tensors(model, device, torch.float32, ())
        rated = scores(model, tensors, fake_batch().to(torch.device(device)))
    assert rated.dtype == seen["head"].dtype == torch.float32
    assert seen["connector"].dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_gradients_have_the_dtype_of_their_weights_and_frozen_parts_have_none() -> None:
    """On fake CPU tensors; the sum of all micro-batches' losses, as the engine has them."""
    model = regressor()
    with FakeTensorMode():
        tensors = fake_tensors(model, "cpu", torch.bfloat16, ("vision", "connector"))
        for micro in fake_batch().split(2):
            loss = rating_loss(scores(model, tensors, micro), micro.ratings, micro.rating_counts, LOSSES[-1])
            (loss / 2).backward()
        for name, tensor in tensors.items():
            frozen = not tensor.is_floating_point() or not tensor.requires_grad
            assert (tensor.grad is None) == frozen, name
            assert frozen or (tensor.grad.dtype, tensor.grad.shape) == (torch.bfloat16, tensor.shape)  # type: ignore[union-attr]


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_clipping_and_the_guarded_step_read_nothing_back(clip: float) -> None:
    model = regressor()
    with FakeTensorMode():
        tensors = fake_tensors(model, "cuda", torch.float32, ())
        weights = [nn.Parameter(t.detach()) for n, t in tensors.items() if t.requires_grad]
        optimizer = GuardedAdamW(weights, clip, lr=1e-3, fused=True)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            optimizer.step()
        assert optimizer.found_inf.device.type == "cuda"
        for state in optimizer.state.values():
            assert {v.device.type for v in state.values()} == {"cuda"}
            assert {v.dtype for v in state.values()} == {torch.float32}


def test_fake_tensors_do_refuse_what_the_tests_above_rule_out() -> None:
    with FakeTensorMode():
        on_device, on_host = torch.empty(3, device="cuda"), torch.empty(3)
        with pytest.raises(RuntimeError, match=r"cuda:0(,| and) cpu"):
            on_device + on_host
        with pytest.raises(DataDependentOutputException):
            on_device.sum().item()
        with pytest.raises(DataDependentOutputException):
            bool(on_device.sum() > 0)
