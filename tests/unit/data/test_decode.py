"""Stored images become the pixels that were stored, whichever library decodes them; what is damaged is named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rating_train.data import decode
from rating_train.data.decode import decode_square
from tests.unit.data.test_collate import S, jpeg


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoder(request: pytest.FixtureRequest) -> Any:
    found = getattr(decode, f"_{request.param}")()
    if found is None:
        pytest.skip(f"{request.param} is not installed here")
    return found


@pytest.fixture(params=["the fastest", "torchvision", "Pillow"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is installed."""
    if request.param != "the fastest":
        monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    if request.param == "Pillow":
        monkeypatch.setattr(decode, "_torchvision", lambda: None)
    decode._decoder.cache_clear()
    yield
    decode._decoder.cache_clear()


@pytest.mark.usefixtures("installed")
def test_an_image_of_the_right_size_is_decoded_and_not_resampled() -> None:
    data = jpeg()
    pixels = decode_square(data, S, "a")
    assert pixels.shape == (S, S, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_decoder_gives_the_pixels_of_pillow(
    decoder: decode._Decoder, subsampling: int, progressive: bool
) -> None:
    out = io.BytesIO()
    noise = np.random.default_rng(subsampling).integers(0, 256, size=(S, S, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    expected, room = np.asarray(Image.open(out)), np.zeros((2, S, S, 3), np.uint8)
    pixels = decoder(out.getvalue(), S, None)
    assert pixels is not None and np.array_equal(pixels, expected)
    decoder(out.getvalue(), S, room[1])
    assert np.array_equal(room[1], expected) and not room[0].any(), "into its own place"


@pytest.mark.parametrize("stored", [12, 48, 33])
def test_an_image_of_another_size_is_resized_bilinearly(stored: int) -> None:
    data = jpeg(stored)
    pixels = decode_square(data, S, "a")
    expected = Image.open(io.BytesIO(data)).resize((S, S), Image.Resampling.BILINEAR)
    assert pixels.shape == (S, S, 3)
    assert np.array_equal(pixels, np.asarray(expected))
    assert np.abs(pixels.astype(float).mean() - np.asarray(Image.open(io.BytesIO(data))).mean()) < 6


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("size", [S, 30])
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_an_image_of_another_mode_becomes_rgb(mode: str, size: int) -> None:
    assert decode_square(jpeg(size, mode=mode), S, "a").shape == (S, S, 3)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("size", [S, 40])
@pytest.mark.parametrize("damage", ["empty", "text", "head only", "half", "a torn png", "a broken png"])
def test_a_corrupt_image_is_an_error_that_names_the_item(damage: str, size: int) -> None:
    intact = jpeg(size)
    png = io.BytesIO()
    Image.open(io.BytesIO(intact)).save(png, "PNG")
    content = {
        "empty": b"",
        "text": b"<html>not here</html>",
        "head only": intact[:60],
        "half": intact[: len(intact) // 2],
        "a torn png": png.getvalue()[:-30],
        "a broken png": png.getvalue().replace(b"IDAT", b"I\0AT", 1),
    }[damage]
    with pytest.raises(ValueError, match="item 'B00-7'"):
        decode_square(content, S, "B00-7")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("stored", ["PNG", "GIF", "TIFF", "BMP", "PPM"])
def test_an_image_that_prepare_does_not_store_meets_no_decoder(stored: str) -> None:
    other = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(other, stored)
    with pytest.raises(ValueError, match="item 'B00-7'"):
        decode_square(other.getvalue(), S, "B00-7")
    if stored == "PNG":  # what a picture from memory becomes for scoring
        assert decode_square(other.getvalue(), S, "B00-7", ("JPEG", "PNG")).shape == (S, S, 3)


@pytest.mark.usefixtures("installed")
def test_any_changed_byte_gives_pixels_or_an_error_that_names_the_item() -> None:
    intact = jpeg()
    rng = np.random.default_rng(11)
    refused = 0
    for position in rng.choice(len(intact), size=min(600, len(intact)), replace=False):
        content = bytearray(intact)
        content[position] ^= int(rng.integers(1, 256))
        try:
            assert decode_square(bytes(content), S, "B00-7").shape == (S, S, 3)
        except ValueError as e:
            assert "B00-7" in str(e)
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("stored", [S, 30])
@pytest.mark.usefixtures("installed")
def test_pixels_are_written_where_they_are_wanted(stored: int) -> None:
    room = np.zeros((3, S, S, 3), np.uint8)
    decode_square(jpeg(stored), S, "a", out=room[1])
    assert np.array_equal(room[1], decode_square(jpeg(stored), S, "a"))
    assert not room[0].any() and not room[2].any()
