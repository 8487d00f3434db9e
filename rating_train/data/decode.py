"""Decoding of stored images. Runs in the DataLoader workers.

Three libraries decode a JPEG file to the same pixels: each calls libjpeg-turbo with its exact inverse transform and
smooth upsampling. The first that is installed is taken: simplejpeg, torchvision, Pillow (docs/performance.md has their
speed). What has another size, mode or format always goes through Pillow.

Legend: S pixels per side.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

#: All that ``prepare`` stores.
STORED_FORMATS = ("JPEG",)

#: Decodes a JPEG file of S x S pixels in colour, into an array if one is given: (S, S, 3) uint8. ``None``: other bytes.
_Decoder = Callable[[bytes, int, "np.ndarray | None"], "np.ndarray | None"]


def decode_square(
    content: bytes,
    size_px: int,
    item_id: str,
    formats: tuple[str, ...] = STORED_FORMATS,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image to (S, S, 3) uint8 pixels, resized bilinearly without keeping the aspect ratio if needed.

    Args:
        content: bytes of a stored image.
        size_px: S.
        item_id: named in errors.
        formats: what it may be. Pillow would otherwise run any of its decoders, as the first bytes ask for.
        out: (S, S, 3) uint8, contiguous: where the pixels are written; a new array where it is ``None``.

    Raises:
        ValueError: the bytes are not such an image; the message names the item.
    """
    try:
        if "JPEG" in formats and (pixels := _decoder()(content, size_px, out)) is not None:
            return pixels
        image: Image.Image = Image.open(io.BytesIO(content), formats=formats)  # its header alone
        image = image.convert("RGB") if image.mode != "RGB" else image
        if image.size != (size_px, size_px):
            image = image.resize((size_px, size_px), Image.Resampling.BILINEAR)
        return _written(np.asarray(image), out)
    except (OSError, SyntaxError, RuntimeError) as e:
        raise ValueError(f"the stored image of item {item_id!r} cannot be decoded: {e}") from e


def _written(pixels: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return pixels
    out[...] = pixels
    return out


@functools.cache
def _decoder() -> _Decoder:
    """Return the fastest decoder that is installed."""
    return _simplejpeg() or _torchvision() or (lambda content, size_px, out: None)


def _simplejpeg() -> _Decoder | None:
    try:
        import simplejpeg
    except ImportError:
        return None

    def decode(content: bytes, size_px: int, out: np.ndarray | None) -> np.ndarray | None:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            if (height, width, colours) != (size_px, size_px, "YCbCr"):
                return None
            return simplejpeg.decode_jpeg(content, buffer=out)
        except ValueError:  # no JPEG file, or a damaged one: Pillow decides
            return None

    return decode


def _torchvision() -> _Decoder | None:
    """Return torchvision's operator. It is called directly: the function around it warns at every call."""
    try:
        import torchvision.io  # noqa: F401  registers the operator

        operator = torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None

    def decode(content: bytes, size_px: int, out: np.ndarray | None) -> np.ndarray | None:
        try:
            image = Image.open(io.BytesIO(content), formats=STORED_FORMATS)
        except (OSError, SyntaxError):  # no JPEG file, or a damaged one
            return None
        if image.size != (size_px, size_px) or image.mode != "RGB":
            return None
        # Channels as stored, no rotation by Exif: (3, S, S).
        pixels = operator(torch.frombuffer(bytearray(content), dtype=torch.uint8), 0, False)
        return _written(pixels.permute(1, 2, 0).numpy(), out)

    return decode
