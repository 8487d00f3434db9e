"""Dynamic tiling of an image, as the processor of stock SmolVLM does it: squares cut from it, then all of it.

The image is resized so that its longest side has ``longest_px`` pixels (a smaller one is enlarged), then so that both
sides are multiples of a tile's, and is cut; last comes the complete image, resized to one tile. Filter: Lanczos.

Legend: S side of a tile in pixels, N images of an item.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def tiled_size(width: int, height: int, tile_px: int, longest_px: int) -> tuple[int, int, int, int]:
    """Return the sizes that an image is resized to, first and then: (width, height, width, height), in pixels.

    The processor's arithmetic: the shorter side is cut to a whole number, rounded up to an even one, then up to tiles.
    """
    ratio = width / height
    if width >= height:
        first = longest_px, _even(int(longest_px / ratio))
        across = _up(first[0], tile_px)
        then = across, _up(int(across / (first[0] / first[1])), tile_px)
    else:
        first = _even(int(longest_px * ratio)), longest_px
        down = _up(first[1], tile_px)
        then = _up(int(down * (first[0] / first[1])), tile_px), down
    return *first, *then


def grid_of(width: int, height: int, tile_px: int, longest_px: int) -> tuple[int, int]:
    """Return the (rows, columns) of tiles of an image of this size."""
    _, _, across, down = tiled_size(width, height, tile_px, longest_px)
    return down // tile_px, across // tile_px


def tiles_of(image: Image.Image, tile_px: int, longest_px: int) -> np.ndarray:
    """Cut an RGB image into tiles, row by row, and add the complete image.

    Returns:
        (N, S, S, 3) uint8 with N = rows x columns + 1.
    """
    lanczos = Image.Resampling.LANCZOS
    width, height, across, down = tiled_size(*image.size, tile_px, longest_px)
    resized = image.resize((width, height), lanczos).resize((across, down), lanczos)
    rows, columns = down // tile_px, across // tile_px
    pixels = np.asarray(resized).reshape(rows, tile_px, columns, tile_px, 3).swapaxes(1, 2)
    complete = np.asarray(resized.resize((tile_px, tile_px), lanczos))
    tiles = pixels.reshape(rows * columns, tile_px, tile_px, 3)
    return np.concatenate([tiles, complete[None]])


def _even(side: int) -> int:
    return max(1, side + side % 2)


def _up(side: int, tile_px: int) -> int:
    return math.ceil(side / tile_px) * tile_px
