"""Tiling: pixels, prompt and ratings are those of the stock processor and model, for ten image shapes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Idefics3Processor, PreTrainedTokenizerFast

from rating_train.data.prompt import (
    AFTER_IMAGE,
    END,
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    PromptWords,
    load_tokenizer,
)
from rating_train.data.tiling.collate import TiledCollator
from rating_train.data.tiling.prompt import TiledPromptEncoder
from rating_train.data.tiling.tiles import grid_of, tiles_of
from rating_train.demo.tokenizer import make_tokenizer
from rating_train.errors import UserError
from rating_train.model.cost import count_forward, image_tokens, visual_tokens
from tests.unit.model.test_regressor import architecture, differences, our_outputs, regressor, stock_outputs

try:  # transformers 5: Pillow's; the other one takes bicubic for Lanczos where torchvision is older than 0.27
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil as Idefics3ImageProcessor,
    )
except ImportError:
    from transformers import Idefics3ImageProcessor

#: (width, height) in pixels: squares and long ones, both ways, smaller and larger than the tiles, odd sides.
SHAPES = [
    (500, 500),
    (1500, 1500),
    (640, 480),
    (480, 640),
    (1001, 333),
    (333, 1001),
    (2048, 512),
    (50, 700),
    (2500, 1999),
    (37, 41),
]
LISTING = {
    "title": "Sturdy red kettle",
    "description": "Boils\n\nwater",
    "features": "One litre",
    "main_category": "Home",
}
TILE, SIDE = 32, 4


def picture(width: int, height: int) -> Image.Image:
    g = np.random.default_rng(width * height)
    small = Image.fromarray(g.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The demo's, with the markers of tiles that a published one has."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(["Sturdy red kettle, Model K01", "Boils water for tea, Home"] * 5, folder, vocab_size=270)
    found = load_tokenizer(str(folder))
    found.add_special_tokens([f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)])
    return found


def processor(tokenizer: Tokenizer, tile_px: int) -> Idefics3Processor:
    """The stock processor that SmolVLM names in its preprocessor_config.json, for tiles of another size."""
    images = Idefics3ImageProcessor(
        size={"longest_edge": SIDE * tile_px}, max_image_size={"longest_edge": tile_px},
        resample=Image.Resampling.LANCZOS, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|im_end|>", additional_special_tokens=list(SPECIAL_TOKENS)
    )
    return Idefics3Processor(images, own, image_seq_len=(tile_px // 16) ** 2)


def stock_text(listing: dict[str, str]) -> str:
    fields = [
        f" {listing[name]}" if listing[name] else ""
        for name in ("title", "description", "features", "main_category")
    ]
    first, *others = PromptWords().pieces()
    template = [first.removeprefix(AFTER_IMAGE), *others]
    return f"<|im_start|>User:{IMAGE_TOKEN}" + "".join(t + f for t, f in zip(template, fields)) + END


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_pixels_are_those_of_the_stock_processor(shape: tuple[int, int]) -> None:
    """At SmolVLM2's own sizes: 2,048 pixels on the longest side, tiles of 512."""
    stock = Idefics3ImageProcessor(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}, resample=Image.Resampling.LANCZOS,
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    found = stock(picture(*shape), return_row_col_info=True, return_tensors="np")
    tiles = tiles_of(picture(*shape), 512, 2048)
    assert grid_of(*shape, 512, 2048) == (found["rows"][0][0], found["cols"][0][0])
    assert np.array_equal(tiles.transpose(0, 3, 1, 2), found["pixel_values"][0])


def test_tokens_and_ratings_are_those_of_the_stock_processor_and_model(tokenizer: Tokenizer) -> None:
    arch = architecture(56)  # no position of a patch is ambiguous, see test_regressor
    model = regressor(arch, TILE)
    visual = visual_tokens(arch, TILE)
    encoder = TiledPromptEncoder(tokenizer, visual, 300, 100, SIDE, PromptWords())
    stock = processor(tokenizer, TILE)
    stock.image_seq_len = visual
    samples, largest = [], 0.0
    for shape in SHAPES:
        file = io.BytesIO()
        picture(*shape).save(file, "PNG")
        samples.append(
            {"id": str(shape), **LISTING, "image": file.getvalue(), "rating": 4.0, "rating_count": 9}
        )
    batch = TiledCollator(encoder, TILE, SIDE * TILE, ("PNG",))(samples)
    assert batch.images.shape == (10, SIDE**2 + 1, 3, TILE, TILE)
    model.image_token_id = model.backbone.config.image_token_id = encoder.image_token_id
    pooled, ratings = our_outputs(model, batch.images, batch.input_ids, batch.used_tokens)
    for n, shape in enumerate(SHAPES):
        found = stock(text=stock_text(LISTING), images=[picture(*shape)], return_tensors="pt")
        used = int(batch.used_tokens[n])
        assert batch.input_ids[n, :used].tolist() == found["input_ids"][0].tolist()
        count = found["pixel_values"].shape[1]
        scaled = (batch.images[n, :count].float() / 255 - 0.5) / 0.5
        assert torch.allclose(scaled, found["pixel_values"][0], atol=1e-5)
        ids = batch.input_ids[n : n + 1, :used]
        theirs = stock_outputs(model, batch.images[n, :count], ids, batch.used_tokens[n : n + 1])
        largest = max(largest, *differences((pooled[n : n + 1], ratings[n : n + 1]), theirs))
    print(f"largest difference from the stock forward: {largest:.1e}")
    assert largest < 1e-5


def test_with_the_published_tokenizer_the_markers_are_single_tokens(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared_data / "smolvlm_tokenizer" / "tokenizer.json"))
    encoder = TiledPromptEncoder(tokenizer, 64, 176, 100, SIDE, PromptWords())
    stock = processor(tokenizer, 512)
    stock.image_seq_len = 64
    arch = architecture()
    assert image_tokens(arch, 512, SIDE) - visual_tokens(arch, 512) == 16 * (visual_tokens(arch, 512) + 2) + 4
    assert encoder.layout.visual_tokens == 16 * (64 + 2) + 4 + 64, "the closed form of the cost"
    for shape in [(500, 500), (1000, 300), (300, 900)]:
        (encoded,) = encoder.encode_tiled([LISTING], [grid_of(*shape, 512, 2048)])
        found = stock(text=stock_text(LISTING), images=[picture(*shape)], return_tensors="np")
        assert encoded.ids[: encoded.used].tolist() == found["input_ids"][0].tolist()


def test_the_cost_of_tiles_is_that_of_their_encoder_passes_and_their_tokens() -> None:
    arch = architecture(TILE)
    tokens = image_tokens(arch, TILE, SIDE) + 100
    tiled, square = count_forward(arch, TILE, tokens, SIDE), count_forward(arch, TILE, tokens)
    assert tiled.linear_macs["vision"] == 17 * square.linear_macs["vision"]
    assert tiled.attention_macs["vision"] == 17 * square.attention_macs["vision"]
    assert tiled.linear_macs["connector"] == 17 * square.linear_macs["connector"]
    assert tiled.linear_macs["decoder"] == square.linear_macs["decoder"]


def test_an_image_that_cannot_be_decoded_is_named(tokenizer: Tokenizer) -> None:
    collator = TiledCollator(
        TiledPromptEncoder(tokenizer, 4, 300, 100, SIDE, PromptWords()), TILE, SIDE * TILE
    )
    file = io.BytesIO()
    picture(60, 40).save(file, "JPEG")
    for content in (b"\xff\xd8broken", file.getvalue()[:-300]):
        with pytest.raises(ValueError, match="item 'B01' cannot be decoded"):
            collator([{"id": "B01", **LISTING, "image": content, "rating": 4.0, "rating_count": 9}])


def test_text_that_leaves_no_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="leave no room"):
        TiledPromptEncoder(tokenizer, 16, 20, 100, SIDE, PromptWords())
