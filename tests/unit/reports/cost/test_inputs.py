"""What a model does not read is not counted: no vision tower without an image, no field tokens without a text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rating_train.cli import main
from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.data.lengths import text_tokens_of
from rating_train.data.workers.memory_need import shared_memory_need
from rating_train.files import atomic_write_json, read_json
from rating_train.model.cost import count_forward, count_parameters, training_flops, visual_tokens
from rating_train.reports.cost.sweep import parse_sweep, run_sweep
from rating_train.reports.planning import make_plan
from rating_train.training.setup import read_model_inputs
from tests.conftest import tiny_settings

pytestmark = pytest.mark.timeout(120)


def configured(demo: Path, folder: Path, inputs: list[str]) -> tuple[Path, Config]:
    settings = tiny_settings("tiny", folder / "runs", demo)
    settings["model"] = {**settings["model"], "inputs": inputs}  # type: ignore[dict-item]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder / "tiny.yaml", load_config(folder / "tiny.yaml")


@pytest.mark.parametrize("inputs", [["text"], ["image"]])
def test_cost_plan_and_sweep_count_what_is_trained(
    inputs: list[str], demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = configured(demo, tmp_path, inputs)
    found = read_model_inputs(config)
    arch, layout = found.architecture, found.prompt.layout
    text = layout.text_tokens
    assert text_tokens_of(config) == text and (text < 96) == (inputs == ["image"])
    forward = count_forward(arch, config.model_px, layout.length)
    total = count_parameters(arch, config.model_px)["total"]

    plan = make_plan(config, arch, 1000, 1, "h100", rate=10.0)
    assert plan.trained + plan.frozen == total and plan.flops == training_flops(forward, [])

    assert main(["cost", str(file), "--budget"]) == 0
    printed = capsys.readouterr().out
    shown = "no image = 0" if inputs == ["text"] else f"image 64 x 64 px = {visual_tokens(arch, 64)}"
    assert f"Input of one item: {shown} visual tokens" in printed
    assert f"+ {text} text tokens = sequence of {layout.length}" in printed
    assert re.search(rf"^total\s+{total:,} ", printed, flags=re.M)

    (setting,) = run_sweep(str(file), [], parse_sweep(["data.field_chars=50"])).settings
    assert setting.cost.parameters == total and setting.image_px == config.model_px
    if inputs == ["image"]:
        assert setting.text_tokens == setting.mean_text_tokens == text, "every item is the template"


def test_batches_without_an_image_need_no_room_for_one(demo: Path, tmp_path: Path) -> None:
    file, _ = configured(demo, tmp_path, ["text"])
    text = load_config(file, ["data.workers=2"])
    both = load_config(file, ["data.workers=2", "model.inputs=[image, text]"])
    batches = 2 * (2 * text.data.prefetch_batches + 2)  # of training and of evaluation
    need = shared_memory_need(both, 1, 1) - shared_memory_need(text, 1, 1)
    assert need == batches * 12 * 3 * 64 * 64


def test_the_task_of_the_dataset_says_what_there_is_to_read(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration alone would have texts counted that no item has."""
    manifest = read_json(demo / "data" / "manifest.json")
    (tmp_path / "data").mkdir()
    atomic_write_json(tmp_path / "data" / "manifest.json", {**manifest, "task": {"fields": []}})
    file, config = configured(demo, tmp_path, ["image", "text"])
    assert main(["cost", str(file), "--set", f"data.path={tmp_path / 'data'}"]) == 0
    template = text_tokens_of(load_config(file, ["model.inputs=[image]"]))
    assert f"+ {template} text tokens" in capsys.readouterr().out and template < config.data.text_tokens
