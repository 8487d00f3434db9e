"""The closed-form cost against the published numbers and against torch's own FLOP counter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rating_train.errors import UserError
from rating_train.model.architecture import KNOWN_ARCHITECTURES, Architecture, architecture_from_config
from rating_train.model.cost import count_forward, count_parameters, visual_tokens
from rating_train.reports.cost_report import cost_report, measure_cost
from rating_train.scoring.ces import CONVENTIONS
from tests.helpers.cli import fresh_python

SMALL = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-256M-Video-Instruct"]
LARGE = KNOWN_ARCHITECTURES["HuggingFaceTB/SmolVLM2-500M-Video-Instruct"]

# As published files are: what equals the defaults of transformers is left out.
SMALL_CONFIG: dict[str, Any] = {
    "model_type": "smolvlm",
    "image_token_id": 49190,
    "pad_token_id": 128002,
    "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "vocab_size": 49280,
    },
    "vision_config": {
        "model_type": "smolvlm_vision",
        "hidden_size": 768,
        "image_size": 512,
        "num_attention_heads": 12,
        "patch_size": 16,
    },
}

# Deliberately uneven: heads x head_dim is not the hidden size, and no two widths are equal.
TINY_CONFIG: dict[str, Any] = {
    "model_type": "smolvlm",
    "image_token_id": 7,
    "scale_factor": 2,
    "text_config": {
        "model_type": "llama",
        "head_dim": 24,
        "hidden_size": 64,
        "intermediate_size": 144,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 1,
        "vocab_size": 203,
    },
    "vision_config": {
        "hidden_size": 48,
        "image_size": 64,
        "intermediate_size": 112,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 8,
    },
}


def test_parameters_of_the_256m_model_are_exact() -> None:
    counts = count_parameters(SMALL)
    assert counts["backbone_total"] == 228_099_648
    assert counts["head"] == 576 * 288 + 288 + 288 + 1
    assert counts["total"] == counts["backbone_total"] + counts["head"]
    assert counts["vision"] + counts["connector"] + counts["decoder"] == counts["backbone_total"]
    # The published checkpoint has an untied LM head besides.
    assert counts["backbone_total"] + SMALL.text.vocab * SMALL.text.hidden == 256_484_928
    assert not SMALL.tie_word_embeddings


@pytest.mark.parametrize(("image_px", "visual", "giga_macs"), [(384, 36, 72.0), (512, 64, 113.0)])
def test_published_macs(image_px: int, visual: int, giga_macs: float) -> None:
    assert visual_tokens(SMALL, image_px) == visual
    forward = count_forward(SMALL, image_px, visual + 176)
    assert forward.total("mac_linear") / 1e9 == pytest.approx(giga_macs, rel=0.01)


def test_the_conventions_are_consistent() -> None:
    totals = count_forward(SMALL, 384, 212).totals()
    assert list(totals) == list(CONVENTIONS)
    assert totals["flop_linear"] == 2 * totals["mac_linear"]
    assert totals["flop_attention"] == 2 * totals["mac_attention"]
    products = 2 * (12 * 576**2 * 768 + 30 * 212**2 * 576)
    assert totals["mac_attention"] - totals["mac_linear"] == products


@pytest.mark.parametrize("image_px", [-64, 32, 380, 400])
def test_image_size_that_does_not_divide(image_px: int) -> None:
    with pytest.raises(UserError, match="multiple of 64"):
        visual_tokens(SMALL, image_px)


def test_a_model_without_an_image_has_no_visual_tokens() -> None:
    assert visual_tokens(SMALL, 0) == 0


def test_sequence_shorter_than_the_image() -> None:
    with pytest.raises(UserError, match="36 visual tokens"):
        count_forward(SMALL, 384, 35)


def test_unknown_convention() -> None:
    with pytest.raises(UserError, match="mac_linear"):
        count_forward(SMALL, 384, 212).by_part("gflops")


def test_architecture_of_a_published_config() -> None:
    assert architecture_from_config(SMALL_CONFIG, "config.json") == SMALL
    assert architecture_from_config(SMALL_CONFIG, "config.json", head_hidden=100).head_hidden == 100


def test_rope_theta_where_transformers_5_writes_it() -> None:
    text = {k: v for k, v in SMALL_CONFIG["text_config"].items() if k != "rope_theta"}
    text["rope_parameters"] = {"rope_theta": 100000, "rope_type": "default"}
    assert architecture_from_config({**SMALL_CONFIG, "text_config": text}, "x") == SMALL


def test_every_problem_of_a_config_is_in_one_error() -> None:
    broken = {
        "model_type": "smolvlm",
        "scale_factor": 0,
        "text_config": {"hidden_size": "wide", "num_attention_heads": 9, "num_key_value_heads": 2},
    }
    with pytest.raises(UserError) as error:
        architecture_from_config(broken, "config.json")
    for part in ("scale_factor", "text_config.hidden_size", "key/value heads", "vision_config"):
        assert part in str(error.value)
    assert error.value.where == "config.json"


def test_an_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="model_type is 'llava', expected one of smolvlm, idefics3"):
        architecture_from_config({"model_type": "llava"}, "config.json")


def test_image_token_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match="outside the vocabulary"):
        architecture_from_config({**SMALL_CONFIG, "image_token_id": 49280}, "config.json")


def test_cost_report_names_every_convention() -> None:
    text = cost_report(SMALL, 384, 176, plcc=0.700)
    for name in CONVENTIONS:
        assert name in text
    assert "mac_linear (the paper's)" in text
    assert "228,099,648" in text
    assert "72.025" in text
    report = measure_cost(SMALL, 384, 176, plcc=None)
    assert [row.ces for row in report.rows] == [None] * 4
    assert "needs a PLCC" in cost_report(SMALL, 384, 176, plcc=None)


def test_large_model_costs_more() -> None:
    assert count_parameters(LARGE)["total"] > 2 * count_parameters(SMALL)["total"]
    assert count_forward(LARGE, 384, 212).total("mac_linear") > count_forward(SMALL, 384, 212).total(
        "mac_linear"
    )


def test_closed_form_needs_no_torch() -> None:
    program = (
        "import sys, rating_train.reports.cost_report\n"
        "heavy = {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    fresh_python(program)


def _counted(config: dict[str, Any], image_px: int, text_tokens: int) -> tuple[dict[str, int], int]:
    """Parameters by part and FLOPs of one forward, as torch counts them on a random model."""
    import torch
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import SmolVLMConfig, SmolVLMModel

    arch = architecture_from_config(config, "test")
    torch.manual_seed(0)
    model = SmolVLMModel(SmolVLMConfig(**json.loads(json.dumps(config)))).eval()
    model.set_attn_implementation("sdpa")
    hidden = arch.text.hidden
    head = nn.Sequential(nn.Linear(hidden, arch.head_hidden), nn.ReLU(), nn.Linear(arch.head_hidden, 1))
    visual = visual_tokens(arch, image_px)
    ids = torch.full((1, visual + text_tokens), 3)
    ids[:, :visual] = arch.image_token_id
    pixels = torch.rand(1, 1, 3, image_px, image_px) + 0.1
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, use_cache=False)
        head(out.last_hidden_state.mean(dim=1))
    modules = {
        "vision": model.vision_model,
        "connector": model.connector,
        "decoder": model.text_model,
        "head": head,
        "backbone_total": model,
    }
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    parameters["total"] = parameters["backbone_total"] + parameters["head"]
    return parameters, counter.get_total_flops()


def _assert_agrees(arch: Architecture, config: dict[str, Any], image_px: int, text_tokens: int) -> None:
    parameters, flops = _counted(config, image_px, text_tokens)
    assert count_parameters(arch) == parameters
    expected = count_forward(arch, image_px, visual_tokens(arch, image_px) + text_tokens)
    difference = expected.total("flop_attention") / flops - 1
    print(
        f"closed form {expected.total('flop_attention'):.0f}, counter {flops}, difference {difference:+.2e}"
    )
    assert abs(difference) < 1e-3


@pytest.mark.parametrize(("image_px", "text_tokens"), [(64, 21), (32, 50)])
def test_tiny_model_against_the_flop_counter(image_px: int, text_tokens: int) -> None:
    _assert_agrees(architecture_from_config(TINY_CONFIG, "tiny"), TINY_CONFIG, image_px, text_tokens)


def test_256m_model_against_the_flop_counter() -> None:
    _assert_agrees(SMALL, SMALL_CONFIG, 384, 176)


def test_saved_config_of_transformers_reads_back(tmp_path: Path) -> None:
    from transformers import SmolVLMConfig

    SmolVLMConfig(**json.loads(json.dumps(SMALL_CONFIG))).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert architecture_from_config(saved, tmp_path) == SMALL
