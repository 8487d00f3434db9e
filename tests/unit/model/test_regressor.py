"""The regressor is the stock SmolVLM with pooling and a head; its checkpoints load completely or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, Idefics3Model, SmolVLMModel

from rating_train.config.schema import ModelConfig
from rating_train.demo.model import demo_architecture
from rating_train.errors import UserError
from rating_train.model.architecture import (
    KNOWN_ARCHITECTURES,
    Architecture,
    VisionArchitecture,
    read_architecture,
)
from rating_train.model.attention import ATTENTION
from rating_train.model.backbones import BACKBONES
from rating_train.model.load import load_backbone, save_random_backbone
from rating_train.model.regressor import RatingRegressor, build_regressor, part_of

VOCAB, IMAGE_START = 300, 6
B, TEXT = 5, 30


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request to the hub. (The libraries read the environment when they are imported: too late here.)"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True, raising=False)


def architecture(pretrained_px: int = 64, family: str = "smolvlm") -> Architecture:
    vision = VisionArchitecture(hidden=64, layers=2, heads=2, mlp=128, patch=8, image_size=pretrained_px)
    return dataclasses.replace(demo_architecture(VOCAB), vision=vision, family=family)


def regressor(arch: Architecture, image_px: int, seed: int = 0) -> RatingRegressor:
    config = ModelConfig(weights="random", head_hidden=24)
    model = build_regressor(config, arch, image_px, IMAGE_START, seed).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():  # larger than the initial weights, so that errors show
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def inputs(visual: int, image_px: int, image_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """images (B, 3, S, S) with a black and a white one among them; ids (B, T) padded on the right; used (B,)."""
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (B, 3, image_px, image_px), generator=g, dtype=torch.uint8)
    images[1], images[3] = 0, 255
    ids = torch.randint(7, VOCAB, (B, TEXT + visual), generator=g)
    ids[:, IMAGE_START : IMAGE_START + visual] = image_token
    least = IMAGE_START + visual + 1
    used = torch.tensor([TEXT + visual, least, least + 5, least + 11, TEXT + visual - 1])
    for item in range(B):
        ids[item, int(used[item]) :] = 2
    return images, ids, used


@torch.no_grad()
def stock_outputs(model: RatingRegressor, images: Tensor, ids: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """The stock forward of transformers, then the mean over real tokens and the head, by hand.

    Returns:
        (B, D) pooled states and (B,) ratings.
    """
    mask = torch.arange(ids.shape[1]) < used[:, None]  # (B, T)
    pixels = (images[:, None].float() / 255 - 0.5) / 0.5  # (B, 1, 3, S, S)
    model.backbone.set_attn_implementation("sdpa")  # its own masks
    hidden = model.backbone(
        input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, use_cache=False
    ).last_hidden_state
    model.backbone.set_attn_implementation(ATTENTION)
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    head = model.head
    inner = torch.relu(pooled @ head.inner.weight.T + head.inner.bias)
    return pooled, (1 + 4 * torch.sigmoid(inner @ head.outer.weight.T + head.outer.bias)).squeeze(-1)


@torch.no_grad()
def our_outputs(model: RatingRegressor, *batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) pooled states, as the head gets them, and (B,) ratings."""
    pooled: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    ratings = model(*batch)
    hook.remove()
    return pooled[0], ratings


def differences(ours: tuple[Tensor, Tensor], stock: tuple[Tensor, Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(ours, stock)]


@torch.no_grad()
@pytest.mark.parametrize(("family", "kind"), [("smolvlm", SmolVLMModel), ("idefics3", Idefics3Model)])
def test_ratings_equal_the_stock_forward_in_fp32(record_property: Any, family: str, kind: type) -> None:
    """Image and pre-training grids without a common divisor (4 and 7 patches): no position is ambiguous."""
    model = regressor(architecture(56, family), 32)
    assert type(model.backbone) is kind
    batch = inputs(model.visual_tokens, 32, model.backbone.config.image_token_id)
    ours, stock = our_outputs(model, *batch), stock_outputs(model, *batch)
    pooled, ratings = differences(ours, stock)
    record_property("max_difference", ratings)
    print(f"largest difference from the stock forward: pooled {pooled:.1e}, ratings {ratings:.1e} stars")
    assert ours[1].std() > 0.01, "the ratings differ from each other"
    assert pooled < 1e-5 and ratings < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("image_px", [64, 48, 32, 96])
def test_ratings_equal_the_stock_forward_given_the_same_positions(image_px: int) -> None:
    """All but the rule for positions, which test_vision compares with the stock module by itself."""
    model = regressor(architecture(64), image_px)
    batch = inputs(model.visual_tokens, image_px, model.backbone.config.image_token_id)
    ours = our_outputs(model, *batch)
    table = model.backbone.vision_model.embeddings.position_embedding
    hook = table.register_forward_pre_hook(lambda _, args: (model.positions.expand(args[0].shape),))
    stock = stock_outputs(model, *batch)
    hook.remove()
    pooled, ratings = differences(ours, stock)
    print(f"{image_px} px: pooled {pooled:.1e}, ratings {ratings:.1e} stars")
    assert ours[1].std() > 0.01
    assert pooled < 1e-5 and ratings < 1e-5


@torch.no_grad()
def test_what_the_padding_holds_does_not_matter() -> None:
    model = regressor(architecture(), 64)
    images, ids, used = inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)
    other = ids.clone()
    for item in range(B):
        other[item, int(used[item]) :] = torch.randint(0, VOCAB, (ids.shape[1] - int(used[item]),))
    assert torch.equal(model(images, other, used), model(images, ids, used))
    longer = torch.cat([ids, torch.full((B, 17), 2)], dim=1)
    assert torch.allclose(model(images, longer, used), model(images, ids, used), atol=1e-6)


def test_cutting_the_padding_off_changes_neither_ratings_nor_gradients() -> None:
    model = regressor(architecture(), 64)
    images, ids, used = inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)
    ids = torch.cat([ids, torch.full((B, 29), 2)], dim=1)
    found = []
    for length in (ids.shape[1], int(used.max())):
        model.zero_grad()
        ratings = model(images, ids[:, :length], used)
        (ratings - 3).square().mean().backward()
        found.append((ratings.detach(), [p.grad for p in model.parameters()]))
    (full, full_grads), (cut, cut_grads) = found
    assert torch.allclose(full, cut, atol=1e-6, rtol=0)
    for a, b in zip(full_grads, cut_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)  # type: ignore[arg-type]


@torch.no_grad()
def test_an_item_is_rated_the_same_alone_and_in_a_batch() -> None:
    model = regressor(architecture(), 64)
    batch = inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)
    together = model(*batch)
    alone = torch.cat([model(*(t[i : i + 1] for t in batch)) for i in range(B)])
    assert torch.allclose(together, alone, atol=1e-5)


@torch.no_grad()
def test_the_rating_depends_on_the_image_and_on_the_text() -> None:
    model = regressor(architecture(), 64)
    images, ids, used = inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)
    ratings = model(images, ids, used)
    other_text = ids.clone()
    other_text[:, IMAGE_START + model.visual_tokens] += 1
    assert ((model(images, other_text % VOCAB, used) - ratings).abs() > 1e-6).all()
    assert ((model(images.flip(0), ids, used) - ratings).abs() > 1e-6)[[0, 1, 3, 4]].all()


def test_gradients_reach_every_parameter() -> None:
    model = regressor(architecture(), 64)
    model(*inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []
    assert {part_of(n) for n, p in model.named_parameters() if p.grad.abs().max() > 0} == {  # type: ignore[union-attr]
        "vision",
        "connector",
        "decoder",
        "head",
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_complete_from_the_end_of_the_model_to_its_beginning(checkpointing: bool) -> None:
    """Buffers are sent in that order: one whose last gradient comes late would keep back all that follow."""
    config = ModelConfig(
        weights="random", head_hidden=24, head_dropout=0.0, gradient_checkpointing=checkpointing
    )
    model = build_regressor(config, architecture(), 64, IMAGE_START, seed=1).train()
    parts: list[str] = []
    part = {parameter: part_of(name) for name, parameter in model.named_parameters()}
    for parameter in part:
        parameter.register_post_accumulate_grad_hook(lambda p: parts.append(part[p]))
    model(*inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)).sum().backward()
    assert len(parts) == len(list(model.parameters()))
    assert list(dict.fromkeys(parts)) == ["head", "decoder", "connector", "vision"]
    assert parts == sorted(parts, key=["head", "decoder", "connector", "vision"].index), (
        "one part after the other"
    )


def test_gradient_checkpointing_changes_no_gradient() -> None:
    config = ModelConfig(weights="random", head_hidden=24, head_dropout=0.0)
    grads = []
    for checkpointing in (False, True):
        changed = dataclasses.replace(config, gradient_checkpointing=checkpointing)
        model = build_regressor(changed, architecture(), 64, IMAGE_START, seed=1).train()
        model(*inputs(model.visual_tokens, 64, model.backbone.config.image_token_id)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])  # type: ignore[arg-type]


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = ModelConfig(weights="random", head_hidden=24)
    a, b, c = (build_regressor(config, architecture(), 64, IMAGE_START, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(a.state_dict().values(), b.state_dict().values(), c.state_dict().values()))
    assert all(torch.equal(x, y) for x, y, _ in pairs) and not all(torch.equal(x, z) for x, _, z in pairs)


@pytest.mark.parametrize("image_px", [60, 40, 24])
def test_an_image_side_that_does_not_divide_is_refused(image_px: int) -> None:
    """60 is not a multiple of the patch; 40 and 24 give 5 and 3 patches a side, which a 2x2 shuffle cannot merge."""
    with pytest.raises((UserError, ValueError), match=rf"{image_px}"):
        regressor(architecture(), image_px)


# --- loading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder written by SmolVLMForConditionalGeneration.save_pretrained, LM head included."""
    folder = tmp_path_factory.mktemp("saved")
    save_random_backbone(architecture(), folder, seed=4)
    return folder


def test_a_published_idefics3_is_read_and_loaded(tmp_path: Path) -> None:
    arch = architecture(family="idefics3")
    save_random_backbone(arch, tmp_path, seed=4)
    config = ModelConfig(backbone=str(tmp_path), head_hidden=arch.head_hidden)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "idefics3"
    assert read_architecture(config) == arch
    assert isinstance(load(config), Idefics3Model)


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], None]], ModelConfig]:
    def edit(change: Callable[[dict[str, Tensor]], None]) -> ModelConfig:
        for file in saved.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(saved / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return ModelConfig(backbone=str(tmp_path))

    return edit


def load(config: ModelConfig) -> torch.nn.Module:
    return load_backbone(config, read_architecture(config))


def test_a_saved_checkpoint_loads_every_tensor_and_leaves_only_the_lm_head(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    _, info = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"} and "lm_head.weight" in stored
    backbone = load(ModelConfig(backbone=str(saved)))
    state = backbone.state_dict()
    names = {n.removeprefix("model."): n for n in stored if n != "lm_head.weight"}
    assert set(names) == set(state)
    assert all(torch.equal(state[short], stored[full]) for short, full in names.items())
    assert all(p.dtype == torch.float32 for p in backbone.parameters())
    assert not any("lm_head" in n for n, _ in backbone.named_modules())


def test_a_saved_folder_describes_the_architecture_that_wrote_it(saved: Path) -> None:
    config = ModelConfig(backbone=str(saved), head_hidden=48)
    assert read_architecture(config) == architecture()


def test_a_saved_random_backbone_is_the_same_for_the_same_seed(saved: Path, tmp_path: Path) -> None:
    save_random_backbone(architecture(), tmp_path, seed=4)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_bf16_checkpoint_is_loaded_as_fp32(edited: Any) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    assert {p.dtype for p in load(edited(halve)).parameters()} == {torch.float32}


@pytest.mark.parametrize("part", ["vision_model", "connector", "text_model"])
def test_a_checkpoint_with_a_missing_tensor_is_refused(edited: Any, part: str) -> None:
    dropped: list[str] = []

    def drop(tensors: dict[str, Tensor]) -> None:
        dropped.append(next(n for n in sorted(tensors) if f".{part}." in n and n.endswith("proj.weight")))
        del tensors[dropped[0]]

    config = edited(drop)
    with pytest.raises(UserError, match=r"does not fit the backbone: 1 tensors missing") as caught:
        load(config)
    assert dropped[0].removeprefix("model.") in str(caught.value)


def test_a_checkpoint_with_an_extra_tensor_is_refused(edited: Any) -> None:
    config = edited(lambda t: t.update({"model.text_model.layers.7.extra.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"1 tensors unexpected .*extra\.weight"):
        load(config)


def test_a_checkpoint_without_an_lm_head_is_fine(edited: Any) -> None:
    load(edited(lambda t: t.pop("lm_head.weight")))


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(edited: Any) -> None:
    config = edited(
        lambda t: t.update({"model.connector.modality_projection.proj.weight": torch.zeros(3, 3)})
    )
    with pytest.raises(UserError, match=r"could not be loaded|of another shape"):
        load(config)


def test_a_torn_checkpoint_is_refused(edited: Any) -> None:
    config = edited(lambda t: None)
    path = Path(config.backbone) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.backbone"):
        load(config)


@pytest.mark.parametrize("backbone", ["no/such-model-anywhere", "./absent-folder", "/absent/folder"])
def test_an_unknown_backbone_is_one_user_error(backbone: str) -> None:
    with pytest.raises(UserError, match=rf"could not be loaded.*model\.backbone={backbone}"):
        read_architecture(ModelConfig(backbone=backbone))
    with pytest.raises(UserError, match=r"could not be loaded"):
        load_backbone(ModelConfig(backbone=backbone), architecture())


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file not found.*config\.json"):
        read_architecture(ModelConfig(backbone=str(tmp_path)))


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(UserError, match=r"model_type is 'llama'"):
        read_architecture(ModelConfig(backbone=str(tmp_path)))


# --- the published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "backbone", "head"),
    [("256M", 228_099_648, 576 * 288 + 288 + 288 + 1), ("500M", None, 960 * 288 + 288 + 288 + 1)],
)
def test_the_published_architectures_have_the_published_sizes_without_an_lm_head(
    size: str, backbone: int | None, head: int
) -> None:
    config = ModelConfig(backbone=f"HuggingFaceTB/SmolVLM2-{size}-Video-Instruct", weights="random")
    arch = read_architecture(config)
    assert arch.head_hidden == 288 and KNOWN_ARCHITECTURES[config.backbone].text == arch.text
    with torch.device("meta"):
        module = AutoModel.from_config(BACKBONES["smolvlm"].config(arch))
        model = RatingRegressor(module, arch, 384, IMAGE_START)
    counted = sum(p.numel() for p in model.backbone.parameters())
    assert backbone is None or counted == backbone
    assert sum(p.numel() for p in model.head.parameters()) == head
    assert sum(p.numel() for p in model.parameters()) == counted + head
    assert not any("lm_head" in name for name, _ in model.named_modules())
    assert model.visual_tokens == 36


def test_the_lm_head_is_the_difference_to_the_published_count() -> None:
    """256,484,928 parameters with an LM head of its own; 228,099,648 without."""
    arch = read_architecture(ModelConfig(weights="random"))
    assert 256_484_928 - arch.text.vocab * arch.text.hidden == 228_099_648


@torch.no_grad()
def test_the_visual_tokens_of_the_recipe_are_36_at_384_and_64_at_512() -> None:
    arch = read_architecture(ModelConfig(weights="random"))
    small = dataclasses.replace(
        arch,
        text=dataclasses.replace(
            arch.text, hidden=96, heads=3, kv_heads=1, head_dim=32, layers=1, mlp=64, vocab=49280
        ),
        vision=dataclasses.replace(arch.vision, hidden=32, heads=2, layers=1, mlp=32),
    )
    for image_px, tokens in ((384, 36), (512, 64)):
        model = RatingRegressor(
            AutoModel.from_config(BACKBONES["smolvlm"].config(small)), small, image_px, IMAGE_START
        ).eval()
        assert model.visual_tokens == tokens
        ids = torch.full((1, IMAGE_START + tokens + 4), 9)
        images = torch.zeros(1, 3, image_px, image_px, dtype=torch.uint8)
        assert model(images, ids, torch.tensor([ids.shape[1]])).shape == (1,)
