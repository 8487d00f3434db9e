"""A synthetic catalogue whose best possible score is known.

Every product has a photo and a title, and its rating is

    rating = clip(BASE + STD * (sqrt(0.45) * v + sqrt(0.45) * t + sqrt(0.10) * e), 1, 5)

with v, t and e independent, of mean 0 and variance 1:

- v, only in the image: how warm (orange) or cold (blue) the product and the light on its backdrop are;
- t, only in the title: two or three words of praise or blame;
- e: noise, in neither.

So a model that reads both can reach a correlation of about sqrt(0.90) = 0.95, and one that reads only the
image, or only the text, about sqrt(0.45) = 0.67. ``upper_bounds.json`` has the exact numbers.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from rating_train.errors import UserError
from rating_train.files import atomic_write_json, atomic_write_text

CATALOGUE_NAME = "catalogue.jsonl"
UPPER_BOUNDS_NAME = "upper_bounds.json"
IMAGES_NAME = "images"

LOWEST, HIGHEST = 1.0, 5.0  # stars
BASE = 3.5  # stars; 2.7 standard deviations below 5, so that few ratings are clipped
STD = 0.55  # stars
IMAGE_SHARE = 0.45
TEXT_SHARE = 0.45
NOISE_SHARE = 0.10

PRAISE = ("Durable", "Reliable", "Sturdy", "Superb", "Premium", "Elegant", "Precise", "Comfy")
BLAME = ("Flimsy", "Leaky", "Wobbly", "Noisy", "Brittle", "Clumsy", "Rusty", "Sloppy")
# Two or three words, each praise or blame with probability 1/2: the sum has variance 2 or 3.
_TEXT_STD = math.sqrt(2.5)

_BRANDS = ("Acmo", "Brivo", "Cantel", "Dorva", "Elmira", "Fenwick", "Gorlan", "Hestia", "Ivaro", "Juno")
_CATALOGUE: dict[str, tuple[str, ...]] = {
    "Home & Kitchen": ("Kettle", "Toaster", "Teapot", "Mixing Bowl", "Desk Lamp", "Storage Box"),
    "Electronics": ("Speaker", "Headphones", "Charger", "Webcam", "Keyboard", "Power Bank"),
    "Sports & Outdoors": ("Water Bottle", "Yoga Mat", "Camping Stove", "Bike Pump", "Tent Peg Set"),
    "Toys & Games": ("Puzzle", "Building Set", "Toy Truck", "Board Game", "Plush Bear"),
    "Office Products": ("Stapler", "Pen Holder", "Paper Tray", "Label Printer", "Notebook"),
}
_FEATURES = (
    "Comes with a printed manual in six languages",
    "Ships in a plain cardboard box",
    "Fits most standard shelves",
    "One year limited warranty",
    "Designed for everyday use at home",
    "Weighs less than it looks",
    "Replacement parts are sold separately",
    "Wipe with a damp cloth to clean",
)
_WARM = np.array([235.0, 120.0, 30.0])
_COLD = np.array([30.0, 105.0, 235.0])
_SHAPES = ("box", "disc", "bottle", "lamp")


class _Item(NamedTuple):
    """One product: its catalogue line, its image, and the parts of its rating (unit variance each)."""

    line: dict[str, Any]
    jpeg: bytes
    image_signal: float
    text_signal: float


def make_catalogue(out: Path, items: int = 3000, seed: int = 17) -> dict[str, Any]:
    """Write ``catalogue.jsonl``, ``images/*.jpg`` and ``upper_bounds.json`` to ``out``; return the bounds.

    ``out`` is the images folder for ``prepare``. The same arguments give the same bytes (with the same
    versions of NumPy and Pillow). Items do not depend on their number: a smaller catalogue is a prefix of a
    larger one.

    Args:
        out: folder to write to, created if absent; files of an earlier call are replaced.
        items: number of products, at least 2.
        seed: non-negative integer.

    Returns:
        ``n``, ``seed``, ``rating_mean``, ``rating_std`` (stars), and the Pearson correlations over all items,
        in float64, of the rating with ``plcc_perfect`` (the rating without its noise), ``plcc_image_only``
        and ``plcc_text_only`` (the same with only one part known).

    Raises:
        UserError: fewer than two items, a negative seed, or a folder that cannot be written.
    """
    if items < 2 or seed < 0:
        raise UserError(
            "a demo catalogue needs items >= 2 and seed >= 0", where=f"items={items}, seed={seed}"
        )
    lines: list[str] = []
    parts = np.zeros((items, 3))  # rating, image signal, text signal
    try:
        (out / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
        for number in range(1, items + 1):
            item = _make_item(number, seed)
            (out / item.line["image_path"]).write_bytes(item.jpeg)
            lines.append(json.dumps(item.line) + "\n")
            parts[number - 1] = item.line["average_rating"], item.image_signal, item.text_signal
        upper_bounds = {"seed": seed, **_upper_bounds(*parts.T)}
        atomic_write_json(out / UPPER_BOUNDS_NAME, upper_bounds)
        atomic_write_text(out / CATALOGUE_NAME, "".join(lines))
    except OSError as e:
        raise UserError(
            f"cannot write the demo catalogue ({e})", where=out, fix="choose another --out"
        ) from e
    return upper_bounds


def _upper_bounds(rating: np.ndarray, image: np.ndarray, text: np.ndarray) -> dict[str, Any]:
    """Return the correlations of the rating (n,) with what each perfect predictor would predict (n,)."""
    a, b = STD * math.sqrt(IMAGE_SHARE), STD * math.sqrt(TEXT_SHARE)
    predictors = {
        "plcc_perfect": BASE + a * image + b * text,
        "plcc_image_only": BASE + a * image,
        "plcc_text_only": BASE + b * text,
    }
    result: dict[str, Any] = {
        "n": len(rating),
        "rating_mean": float(rating.mean()),
        "rating_std": float(rating.std()),
    }
    for name, predicted in predictors.items():
        clipped = np.clip(predicted, LOWEST, HIGHEST)
        defined = clipped.std() > 0 and rating.std() > 0
        result[name] = float(np.corrcoef(clipped, rating)[0, 1]) if defined else None
    return result


def _make_item(number: int, seed: int) -> _Item:
    rng = np.random.default_rng([seed, number])
    warmth = float(rng.uniform(-1, 1))
    words = rng.integers(2, 4)
    praise = rng.random(words) < 0.5
    image_signal = warmth * math.sqrt(3)  # a uniform variable on [-1, 1] has variance 1/3
    text_signal = float(np.where(praise, 1, -1).sum()) / _TEXT_STD
    rating = BASE + STD * (
        math.sqrt(IMAGE_SHARE) * image_signal
        + math.sqrt(TEXT_SHARE) * text_signal
        + math.sqrt(NOISE_SHARE) * float(rng.standard_normal())
    )
    category = str(rng.choice(list(_CATALOGUE)))
    noun = str(rng.choice(_CATALOGUE[category]))
    brand = str(rng.choice(_BRANDS))
    quality = " ".join(str(rng.choice(PRAISE if good else BLAME)) for good in praise)
    features = [str(f) for f in rng.choice(_FEATURES, size=int(rng.integers(1, 4)), replace=False)]
    item_id = f"B0DEMO{number:05d}"
    # The brand comes first, so that every word of praise or blame follows a space and has one tokenization.
    title = f"{brand} {quality} {noun}, Model {noun[0]}{number:05d}"
    url = f"https://images.example.com/I/{item_id}.jpg"
    line: dict[str, Any] = {
        "parent_asin": item_id,
        "main_category": category,
        "title": title,
        "average_rating": round(min(max(rating, LOWEST), HIGHEST), 2),
        "rating_number": max(10, round(float(rng.lognormal(5.0, 1.3)))),
        "features": features,
        "description": [f"The {brand} {noun.lower()} from our {category.lower()} range."],
        "images": {"hi_res": [None], "large": [url], "thumb": [url], "variant": ["MAIN"]},
        "image_path": f"{IMAGES_NAME}/{item_id}.jpg",
    }
    return _Item(line, _photo(rng, warmth), image_signal, text_signal)


# --- the picture --------------------------------------------------------------------------------------


def _photo(rng: np.random.Generator, warmth: float) -> bytes:
    """Draw a JPEG of a product on a lit backdrop, ``warmth`` in [-1, 1]; all else about it is random."""
    width, height = (int(v) for v in rng.integers(128, 221, size=2))
    colour = _COLD + (_WARM - _COLD) * (warmth + 1) / 2  # (3,) RGB
    image = _backdrop(rng, width, height, colour)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 6))):  # clutter, in uninformative colours
        _speck(rng, draw, width, height)
    _product(rng, draw, width, height, colour)
    noise = rng.normal(0, 6, size=(height, width, 1))
    pixels = np.clip(np.asarray(image, dtype=np.float64) + noise, 0, 255).astype(np.uint8)  # (H, W, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def _backdrop(rng: np.random.Generator, width: int, height: int, colour: np.ndarray) -> Image.Image:
    """Draw a grey wall, brighter at the top or the bottom, with a third of the product's tint."""
    bright, dark = float(rng.uniform(190, 245)), float(rng.uniform(130, 185))
    ramp = np.linspace(bright, dark, height)[:, None, None] * np.ones((1, width, 1))
    if rng.random() < 0.5:
        ramp = ramp[::-1]
    tint = colour - colour.mean()
    return Image.fromarray(np.clip(ramp + tint / 3, 0, 255).astype(np.uint8))


def _speck(rng: np.random.Generator, draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    side = float(rng.uniform(0.06, 0.16)) * min(width, height)
    x, y = float(rng.uniform(0, width - side)), float(rng.uniform(0, height - side))
    fill = _rgb(rng.uniform(20, 235, size=3))
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape((x, y, x + side, y + side), fill=fill)


def _product(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, width: int, height: int, colour: np.ndarray
) -> None:
    """Draw a silhouette over much of the image, with a shadow, a highlight and a label."""
    w, h = float(rng.uniform(0.55, 0.8)) * width, float(rng.uniform(0.55, 0.8)) * height
    x, y = float(rng.uniform(0.05, 0.95)) * (width - w), float(rng.uniform(0.05, 0.95)) * (height - h)
    fill = _rgb(colour * float(rng.uniform(0.85, 1.05)))
    draw.ellipse((x, y + 0.9 * h, x + w, y + 1.05 * h), fill=(70, 70, 70))
    shape = str(rng.choice(_SHAPES))
    if shape == "box":
        draw.rounded_rectangle((x, y, x + w, y + h), radius=0.08 * min(w, h), fill=fill)
    elif shape == "disc":
        draw.ellipse((x, y, x + w, y + h), fill=fill)
    elif shape == "bottle":
        draw.rectangle((x + 0.35 * w, y, x + 0.65 * w, y + 0.3 * h), fill=fill)
        draw.rounded_rectangle((x, y + 0.25 * h, x + w, y + h), radius=0.15 * min(w, h), fill=fill)
    else:
        corners = [(x + 0.2 * w, y), (x + 0.8 * w, y), (x + w, y + 0.7 * h), (x, y + 0.7 * h)]
        draw.polygon(corners, fill=fill)
        draw.rectangle((x + 0.4 * w, y + 0.65 * h, x + 0.6 * w, y + h), fill=fill)
    shine = _rgb(colour * 0.6 + 255 * 0.4)
    draw.ellipse((x + 0.3 * w, y + 0.35 * h, x + 0.42 * w, y + 0.5 * h), fill=shine)
    draw.rectangle((x + 0.4 * w, y + 0.55 * h, x + 0.65 * w, y + 0.62 * h), fill=(240, 240, 240))


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(values, 0, 255))
    return red, green, blue
