"""Every trained parameter is in exactly one group, with the learning rate of its part and the decay of its kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from rating_train.config.schema import PARTS, LearningRates, ModelConfig, OptimConfig
from rating_train.demo.model import demo_architecture
from rating_train.model.head import dropout_keys
from rating_train.model.param_groups import for_optimizer, group_table, param_groups
from rating_train.model.regressor import RatingRegressor, build_regressor, part_of

RATES = LearningRates(vision=1e-5, connector=2e-5, decoder=3e-5, head=4e-5)
OPTIM = OptimConfig(lr=RATES, weight_decay=0.05)


def model(*freeze: str) -> RatingRegressor:
    config = ModelConfig(weights="random", freeze=list(freeze), head_hidden=16)
    return build_regressor(config, demo_architecture(512), image_px=64, image_start=3, seed=0)


@pytest.fixture(scope="module")
def full() -> RatingRegressor:
    return model()


@pytest.mark.parametrize(
    "freeze",
    [c for n in range(4) for c in itertools.combinations(PARTS, n)],
    ids=lambda c: "+".join(c) or "none",
)
def test_each_trained_parameter_is_in_exactly_one_group_and_no_frozen_one_is(freeze: tuple[str, ...]) -> None:
    regressor = model(*freeze)
    groups = param_groups(regressor, OPTIM)
    grouped = [id(p) for g in groups for p in g.parameters]
    trained = {id(p): n for n, p in regressor.named_parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trained)
    for name, parameter in regressor.named_parameters():
        assert parameter.requires_grad == (part_of(name) not in freeze), name
    assert {g.name.split("/")[0] for g in groups} == set(PARTS) - set(freeze)


def test_every_group_has_the_rate_of_its_part_and_only_its_parameters(full: RatingRegressor) -> None:
    part = {id(p): part_of(n) for n, p in full.named_parameters()}
    for group in param_groups(full, OPTIM):
        name = group.name.split("/")[0]
        assert {part[id(p)] for p in group.parameters} == {name}
        assert group.peak_lr == getattr(RATES, name)


def test_matrices_decay_and_biases_norms_and_embeddings_do_not(full: RatingRegressor) -> None:
    decay = {id(p): g.weight_decay for g in param_groups(full, OPTIM) for p in g.parameters}
    seen = set()
    for module in full.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, (nn.Linear, nn.Conv2d)) and name == "weight"
            assert decay[id(parameter)] == (0.05 if is_matrix else 0.0), (type(module).__name__, name)
            seen.add((type(module).__name__, name))
    assert {("Embedding", "weight"), ("LayerNorm", "weight"), ("LlamaRMSNorm", "weight")} <= seen
    assert {("Conv2d", "weight"), ("Linear32", "weight"), ("Linear32", "bias")} <= seen


def test_groups_come_in_the_same_order_every_time() -> None:
    names = [g.name for g in param_groups(model(), OPTIM)]
    shapes = [[tuple(p.shape) for p in g.parameters] for g in param_groups(model(), OPTIM)]
    assert names == [g.name for g in param_groups(model(), OPTIM)]
    assert shapes == [[tuple(p.shape) for p in g.parameters] for g in param_groups(model(), OPTIM)]
    assert names == [
        "vision/decay",
        "vision/no_decay",
        "connector/decay",
        "decoder/decay",
        "decoder/no_decay",
        "head/decay",
        "head/no_decay",
    ]


def test_torch_optimizers_take_the_groups_and_frozen_parts_do_not_move() -> None:
    regressor = model("vision", "connector")
    before = {n: p.detach().clone() for n, p in regressor.named_parameters()}
    groups = param_groups(regressor, OPTIM)
    options = for_optimizer(groups)
    assert [o["lr"] for o in options] == [0.0] * len(groups)
    optimizer = torch.optim.AdamW(options)
    for group, o in zip(groups, optimizer.param_groups):
        o["lr"] = group.peak_lr
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=g, dtype=torch.uint8)
    ids = torch.randint(7, 500, (2, 40), generator=g)
    keys = dropout_keys(torch.tensor([1, 2]), seed=1, step=0)
    regressor(images, ids, torch.tensor([40, 30]), keys).sum().backward()
    optimizer.step()
    for name, parameter in regressor.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (part_of(name) in ("decoder", "head")), name


def test_the_table_adds_up_to_all_parameters() -> None:
    regressor = model("vision")
    text = group_table(regressor, param_groups(regressor, OPTIM))
    numbers = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in text.splitlines()[2:]}
    trained, frozen = numbers.pop("trained"), numbers.pop("frozen")
    assert trained == sum(numbers.values()) > 0
    assert trained + frozen == sum(p.numel() for p in regressor.parameters())
    assert frozen == sum(p.numel() for n, p in regressor.named_parameters() if part_of(n) == "vision")


def test_a_parameter_of_no_part_is_refused() -> None:
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        part_of("lm_head.weight")
