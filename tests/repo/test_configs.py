"""Every YAML file of configs/ loads and means something; base.yaml is the schema, word for word."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rating_train.config.document import render_base_yaml
from rating_train.config.load import load_config
from rating_train.config.resolve import plan_batch
from rating_train.config.schema import Config, to_dict
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.model.cost import count_parameters, visual_tokens
from tests.repo.conftest import REPO

pytestmark = pytest.mark.timeout(60)

CONFIGS = sorted(p for p in (REPO / "configs").rglob("*.yaml") if p.parent.name != "tasks")
NAMES = [str(p.relative_to(REPO / "configs")) for p in CONFIGS]
ABLATIONS = [p for p in CONFIGS if p.parent.name == "ablations"]
REFERENCE = REPO / "configs" / "full_ft_228m.yaml"
PAPER = REPO / "configs" / "paper_frozen_228m.yaml"


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """``{"data.path": ...}`` of nested sections."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def test_base_yaml_is_the_schema_written_out() -> None:
    text = (REPO / "configs" / "base.yaml").read_text()
    assert text == render_base_yaml(), "run: python -m rating_train.config.document > configs/base.yaml"


def test_base_yaml_is_equal_to_the_defaults_and_has_every_field() -> None:
    path = REPO / "configs" / "base.yaml"
    assert load_config(path) == Config()
    assert flat(yaml.safe_load(path.read_text())).keys() == flat(to_dict(Config())).keys()


def test_base_yaml_holds_the_documentation_of_every_field() -> None:
    comments = " ".join(
        line.strip().removeprefix("#").strip()
        for line in render_base_yaml().splitlines()
        if line.strip().startswith("#")
    )

    def fields(section: Any) -> list[dataclasses.Field[Any]]:
        found = []
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            found += [field, *(fields(value) if dataclasses.is_dataclass(value) else [])]
        return found

    every = fields(Config())
    assert len(every) > 60
    for field in every:
        doc = field.metadata["doc"]
        assert doc.endswith("."), field.name
        assert doc in comments, field.name


def test_the_command_writes_the_same_text() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rating_train.config.document"],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=30,
    )
    assert done.returncode == 0 and done.stdout == render_base_yaml()


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_it_loads_and_its_batch_divides(path: Path) -> None:
    config = load_config(path)
    plan_batch(config.batch.global_items, config.batch.micro_items, 4)
    assert config.name == (path.stem if path.stem != "base" else "run"), "runs of two files must not collide"


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem not in ("base", "demo_cpu", "small_cpu")], ids=lambda p: p.stem
)
def test_its_backbone_is_known_and_its_image_divides(path: Path) -> None:
    config = load_config(path)
    architecture = KNOWN_ARCHITECTURES[config.model.backbone]
    assert visual_tokens(architecture, config.data.image_px) == {384: 36, 512: 64}[config.data.image_px]
    assert config.model.head_hidden == architecture.head_hidden
    if "500m" not in path.stem:
        assert count_parameters(architecture)["backbone_total"] == 228_099_648


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_says_only_what_differs(path: Path) -> None:
    own = yaml.safe_load(path.read_text())
    base = (path.parent / own.pop("base")).resolve()
    assert base in (REFERENCE, PAPER) or base in ABLATIONS
    reference, result = flat(to_dict(load_config(base))), flat(to_dict(load_config(path)))
    differing = {key for key in reference if reference[key] != result[key]}
    assert differing == set(flat(own)), "a key that repeats the base hides what the ablation is about"


def test_the_papers_recipe() -> None:
    config = load_config(REPO / "configs" / "paper_frozen_228m.yaml")
    assert set(config.model.freeze) == {"vision", "connector"}
    assert (config.batch.global_items, config.data.image_px, config.data.field_chars) == (64, 384, 100)
    assert (config.optim.lr.decoder, config.optim.lr.head) == (4e-4, 4e-4)
    assert (config.optim.schedule, config.optim.warmup_fraction) == ("linear", 0.03)
    assert (
        config.train.epochs <= 5
        and config.train.early_stop_evals > 0
        and config.train.select_metric == "plcc"
    )
    assert (config.model.head_hidden, config.model.head_dropout, config.loss.kind) == (288, 0.1, "mse")


def test_the_default_recipe_trains_everything_with_four_learning_rates() -> None:
    config = load_config(REFERENCE)
    rates = to_dict(config.optim.lr)
    assert config.model.freeze == [] and len(set(rates.values())) == 4
