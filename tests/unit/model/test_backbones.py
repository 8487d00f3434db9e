"""Families of backbones: each fills the interface that the regressor uses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModel

from rating_train.demo.model import demo_architecture
from rating_train.model.architecture import READERS, architecture_from_config
from rating_train.model.backbones import BACKBONES


def test_every_family_can_be_read_and_built() -> None:
    assert set(READERS) == set(BACKBONES)


@pytest.mark.parametrize("family", BACKBONES)
def test_a_configuration_survives_the_way_there_and_back(family: str) -> None:
    architecture = dataclasses.replace(demo_architecture(300), family=family)
    written = BACKBONES[family].config(architecture)
    assert written.model_type == family
    assert architecture_from_config(written.to_dict(), "test", architecture.head_hidden) == architecture


@pytest.mark.parametrize("family", BACKBONES)
def test_every_parameter_belongs_to_one_part(family: str) -> None:
    architecture = dataclasses.replace(demo_architecture(300), family=family)
    with torch.device("meta"):
        model = AutoModel.from_config(BACKBONES[family].config(architecture))
    prefixes = BACKBONES[family].parts
    for name, _ in model.named_parameters():
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    assert set(prefixes.values()) == {"vision", "connector", "decoder"}
