"""`model.init_from`: a run takes another one's weights, says which, and refuses what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rating_train.checkpoint.deepspeed_io import consolidated_weights
from rating_train.config.load import load_config
from rating_train.export.options import ExportOptions
from rating_train.export.write import export
from rating_train.model.regressor import RatingRegressor, build_regressor, part_of
from rating_train.training.setup import read_model_inputs
from rating_train.weights.warm_start import find_source, warm_start
from tests.conftest import Ranks, full
from tests.helpers.runs import assert_same

pytestmark = pytest.mark.timeout(180)

#: Nothing is learned, so that the weights after a step are those that it started from.
FIXED = {"optim": {"lr": dict.fromkeys(("vision", "connector", "decoder", "head"), 0.0)}}


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return consolidated_weights(run / "checkpoints" / f"step_{step:08d}", 2)


def provenance(run: Path) -> dict[str, Any]:
    return json.loads((run / "provenance.json").read_text())


def test_a_run_starts_from_the_weights_of_another_and_resumes_from_its_own(
    ranks: Ranks, trained_run: Path, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained_run, source)
    other = {"data": {"image_px": 32, "text_tokens": 112, "field_chars": 60}, **FIXED}
    config = tiny_config(
        model={"init_from": str(source), "rating_bias": 1.0}, train={"max_steps": 1}, **other
    )
    output = ranks.train(2, config)
    assert "warm start from" in output and "0 of its tensors are left" in output
    run = tmp_path / "runs" / "run"
    # DeepSpeed makes the fp32 master weights of a bf16 run from the model's bf16 weights.
    theirs = {name: value.bfloat16().float() for name, value in weights_of(trained_run, 6).items()}
    assert_same(weights_of(run, 1), theirs, "weights")
    (start,) = provenance(run)["history"]
    assert {fact["here"] for fact in start["warm_start"]["parts"].values()} == {"taken"}
    assert sum(fact["tensors"] for fact in start["warm_start"]["parts"].values()) == len(weights_of(run, 1))
    shutil.rmtree(source)  # what a run has started from may go
    settings = yaml.safe_load(config.read_text())
    settings["train"]["max_steps"] = 2
    config.write_text(yaml.safe_dump(settings))
    output = ranks.train(1, config)
    assert "resuming from step 1 of 2" in output and "warm start" not in output
    assert "warm_start" not in provenance(run)["history"][1]
    assert_same(weights_of(run, 2), theirs, "weights")


def test_another_width_is_refused_with_both_before_any_work(
    ranks: Ranks, trained_run: Path, demo: Path, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(demo / "model", wide)
    shape = json.loads((wide / "config.json").read_text())
    shape["text_config"]["hidden_size"], shape["vision_config"]["hidden_size"] = 192, 128
    (wide / "config.json").write_text(json.dumps(shape))
    model = {"backbone": str(wide), "weights": "random", "init_from": str(trained_run)}
    own = json.loads((demo / "model" / "config.json").read_text())
    output = ranks.train(1, tiny_config(model=model), code=1)
    for part, key, width in (("decoder", "text_config", 192), ("vision", "vision_config", 128)):
        assert f"its {part} is {own[key]['hidden_size']} wide, this model's is {width}" in output
    assert not (tmp_path / "runs" / "run" / "config.yaml").exists()


def test_what_is_no_source_is_refused(ranks: Ranks, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny_config(model={"init_from": str(tmp_path / "nothing")})
    assert "neither a run, nor a checkpoint of one, nor an exported folder" in ranks.train(1, config, code=1)


def model_of(run: Path, *settings: str) -> tuple[RatingRegressor, list[str]]:
    """A new model as the settings have it, with weights of its own."""
    config = load_config(run / "config.yaml", [*settings, "model.weights=random"])
    inputs = read_model_inputs(config)
    start = inputs.prompt.layout.image_start
    return build_regressor(config.model, inputs.architecture, 64, start, 5), config.model.init_parts


def test_a_head_of_another_size_is_drawn_anew_and_listed(trained_run: Path) -> None:
    checkpoint = trained_run / "checkpoints" / "step_00000006"
    theirs = weights_of(trained_run, 6)
    model, parts = model_of(trained_run, "model.head_hidden=24", "model.rating_bias=1.15")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    facts = warm_start(model, find_source(str(checkpoint)), parts)
    assert facts["parts"]["head"]["here"] == "drawn anew" and facts["parts"]["decoder"]["here"] == "taken"
    assert facts["left"] == sorted(name for name in theirs if part_of(name) == "head")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if part_of(name) == "head" else theirs[name]), name
    assert model.head.outer.bias.item() == pytest.approx(1.15), "one stray tensor of a head means nothing"


def test_only_the_parts_that_are_asked_for(trained_run: Path) -> None:
    model, parts = model_of(trained_run, "model.init_parts=[vision, connector]")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    facts = warm_start(model, find_source(str(trained_run)), parts)
    theirs = weights_of(trained_run, 6)
    assert facts["parts"]["decoder"]["here"] == "as the backbone has it"
    for name, value in model.state_dict().items():
        taken = part_of(name) in ("vision", "connector")
        assert torch.equal(value, theirs[name] if taken else before[name]), name


@full
def test_from_an_exported_folder(trained_run: Path, tmp_path: Path) -> None:
    export(ExportOptions(run=str(trained_run), out=str(tmp_path / "out"), items=64, device="cpu"))
    model, parts = model_of(trained_run)
    facts = warm_start(model, find_source(str(tmp_path / "out")), parts)
    assert facts["left"] == []
    assert_same(dict(model.state_dict()), weights_of(trained_run, 6), "weights")
