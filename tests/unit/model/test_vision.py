"""The vision tower for fixed squares: the stock positions and pixels, without the stock loop over images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, Idefics3ImageProcessor
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from rating_train.demo.model import demo_architecture
from rating_train.errors import UserError
from rating_train.model.backbones import BACKBONES
from rating_train.model.vision import encode_images, position_ids, scale_pixels

# (image, patch, pre-training image): the recipe's two sizes, the demo's, a smaller and a larger one.
SIZES = pytest.mark.parametrize(
    "size",  # image_px, patch, pretrained_px
    [(384, 16, 512), (512, 16, 512), (64, 8, 64), (32, 8, 64), (256, 16, 512), (768, 16, 512)],
)


def sides(image_px: int, patch: int, pretrained_px: int) -> tuple[int, int]:
    """Patches along a side of the image, and of the table of positions."""
    return image_px // patch, pretrained_px // patch


def stock_positions(image_px: int, patch: int, pretrained_px: int, dtype: torch.dtype) -> torch.Tensor:
    """The positions that the stock module looks up for one square of real patches."""
    config = SmolVLMVisionConfig(
        hidden_size=8, num_attention_heads=2, patch_size=patch, image_size=pretrained_px
    )
    module = SmolVLMVisionEmbeddings(config).to(dtype)
    seen: list[torch.Tensor] = []
    module.position_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    n = image_px // patch
    with torch.no_grad():
        module(torch.zeros(1, 3, image_px, image_px, dtype=dtype), torch.ones(1, n, n, dtype=torch.bool))
    return seen[0].reshape(-1)


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(
        BACKBONES["smolvlm"].config(demo_architecture(512)), attn_implementation="sdpa"
    ).eval()


def images(count: int = 4, size: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)


@SIZES
def test_positions_are_those_of_the_stock_module_in_bf16(size: tuple[int, int, int]) -> None:
    """The dtype in which the published checkpoints were trained and are run."""
    assert torch.equal(position_ids(*size), stock_positions(*size, torch.bfloat16))


@SIZES
def test_positions_differ_from_the_stock_module_in_fp32_only_by_its_known_rounding(
    size: tuple[int, int, int],
) -> None:
    """In fp32 its factor (1 - 1e-6) moves a patch on a bin's edge into the bin below (transformers issue 41190)."""
    n, grid = sides(*size)
    ours = position_ids(*size).reshape(n, n)
    stock = stock_positions(*size, torch.float32).reshape(n, n)
    for mine, theirs in (
        (ours // grid, stock // grid),
        (ours.T % grid, stock.T % grid),
    ):  # rows, then columns
        for i in range(n):
            slip = int(mine[i, 0] - theirs[i, 0])
            assert slip == 0 or (slip == 1 and i > 0 and i * grid % n == 0), f"patch {i}"
            assert torch.equal(mine[i] - theirs[i], torch.full((n,), slip))


@pytest.mark.parametrize(("image_px", "patch"), [(512, 16), (64, 8)])
def test_an_image_of_the_pre_trained_size_uses_every_position_once(image_px: int, patch: int) -> None:
    n = image_px // patch
    assert position_ids(image_px, patch, image_px).tolist() == list(range(n * n))


@SIZES
def test_positions_lie_in_the_table_and_grow_along_rows_and_columns(size: tuple[int, int, int]) -> None:
    n, grid = sides(*size)
    positions = position_ids(*size).reshape(n, n)
    assert positions.dtype == torch.int64
    assert positions.min() >= 0 and positions.max() < grid * grid
    rows, columns = positions // grid, positions % grid
    assert (rows == rows[:, :1]).all() and (columns == columns[:1]).all() and torch.equal(rows, columns.T)
    assert (rows[1:, 0] >= rows[:-1, 0]).all()


@pytest.mark.parametrize("image_px", [100, 383, 8])
def test_a_side_that_is_no_multiple_of_the_patch_is_refused(image_px: int) -> None:
    with pytest.raises(UserError, match=r"not a multiple of the patch size 16.*data\.image_px"):
        position_ids(image_px, 16, 512)


def test_pixels_are_scaled_as_the_stock_processor_scales_them() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    scaled = scale_pixels(every)
    assert scaled.dtype == torch.float32 and scaled.min() == -1 and scaled.max() == 1
    processor = Idefics3ImageProcessor(do_resize=False, do_image_splitting=False, do_pad=False)
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3
    # As an array for the slow processor of transformers 4, as a tensor for the fast one of transformers 5.
    tensors = int(transformers.__version__.split(".")[0]) >= 5
    image = every[0].float() if tensors else every[0].permute(1, 2, 0).numpy()
    stock = torch.as_tensor(processor.normalize(processor.rescale(image, 1 / 255), [0.5] * 3, [0.5] * 3))
    stock = stock if tensors else stock.permute(2, 0, 1)
    assert torch.allclose(scaled[0], stock.float(), atol=1e-6)


def test_no_image_of_bytes_can_look_like_the_stock_codes_padding() -> None:
    """The stock code drops an image whose scaled pixels are all 0.0; no byte is scaled to that."""
    every = torch.arange(256, dtype=torch.uint8)
    assert (scale_pixels(every) != 0).all()


@pytest.mark.parametrize("value", [0, 127, 128, 255])
@torch.no_grad()
def test_an_image_of_one_colour_keeps_its_row_and_leaves_its_neighbours_alone(
    backbone: Any, value: int
) -> None:
    batch = images()
    batch[1] = value
    positions = position_ids(64, 8, 64)
    together = encode_images(backbone, batch, positions)
    assert together.shape == (4, 16, 96)
    for i in range(4):
        alone = encode_images(backbone, batch[i : i + 1], positions)[0]
        assert torch.allclose(together[i], alone, atol=1e-5), f"row {i}"
    assert (together[1] - together[0]).abs().max() > 0.01


@torch.no_grad()
def test_an_image_scaled_to_zeros_would_shift_the_stock_rows_but_not_ours(
    backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: with pixels that are exactly 0.0 the stock code gives one row less, up to transformers 5.17."""
    from rating_train.model import vision

    batch = images()
    pixels = scale_pixels(batch)
    pixels[1] = 0
    stock = backbone.get_image_features(pixels[:, None])
    rows = len(stock if isinstance(stock, torch.Tensor) else stock.pooler_output)
    assert rows == 3 or int(transformers.__version__.split(".")[0]) >= 5
    monkeypatch.setattr(vision, "scale_pixels", lambda _: pixels)
    assert encode_images(backbone, batch, position_ids(64, 8, 64)).shape[0] == 4


@torch.no_grad()
def test_a_bf16_backbone_gives_bf16_tokens_close_to_fp32(backbone: Any) -> None:
    import copy

    half = copy.deepcopy(backbone).to(torch.bfloat16)
    positions = position_ids(64, 8, 64)
    tokens = encode_images(half, images(), positions)
    full = encode_images(backbone, images(), positions)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - full).abs().max() < 0.1 * full.abs().max()
