"""From a file that somebody else made to a square RGB JPEG, or to a reason why not.

Reading (an :class:`ImageStore`) and converting (:func:`square_jpeg`) are two steps, so that a picture may
come from a folder, an archive or the cache of fetched URLs (``catalogue.image_store`` has these).

Everything about the file is distrusted: where its path leads, its size in bytes and pixels, its format,
its completeness. Legend: S = side of the stored square in pixels.

Reasons given here: ``image_missing``, ``image_outside_root``, ``image_too_large``, ``image_empty``,
``image_not_an_image``, ``image_unreadable``, ``image_unsupported``.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from PIL import Image

DEFAULT_MAX_PIXELS = 89_000_000  # about Pillow's own threshold: 256 MiB as RGB
DEFAULT_MAX_BYTES = 64 << 20
EXTENSIONS = (".jpg", ".png", ".jpeg", ".webp")

# Only these decoders run on foreign bytes: others start programs (EPS) or have no business here.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_WIDE_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageProblem(Exception):
    """An image cannot be used: ``reason`` is a fixed word, ``detail`` is for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class ImageStore(Protocol):
    """Where the bytes of images come from. Picklable, for worker processes: handles are opened where they are used."""

    def read(self, image: str, item_id: str) -> bytes:
        """The undecoded bytes of a listing's image. Errors: :class:`ImageProblem`, never an ``OSError``."""
        ...


Box = tuple[float, float, float, float]


def find_image(root: str | Path, image: str, item_id: str) -> Path:
    """The local file of a listing's image: its path, else its URL's last part, else ``<id>.jpg`` and so on.

    Args:
        root: the images folder. Nothing outside it is ever opened, whatever ``..`` or links say.
        image: a path relative to ``root``, or an http(s) URL (nothing is fetched), or ``""``.
        item_id: used for the ``<id>.jpg/.png/.jpeg/.webp`` of last resort; "" has none.

    Errors: :class:`ImageProblem` with ``image_outside_root`` or ``image_missing``.
    """
    real_root = os.path.realpath(root)
    for name in image_names(image, item_id):
        try:
            path = os.path.realpath(os.path.join(real_root, name))
            if os.path.commonpath((real_root, path)) != real_root:
                raise ImageProblem("image_outside_root", name[:200])
            if stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block or never end
                return Path(path)
        except (OSError, ValueError):  # absent, no permission, a NUL byte, a name too long, a circle of links
            continue
    raise missing(image, item_id)


def image_names(image: str, item_id: str) -> list[str]:
    """The names under which a listing's image is looked for, in this order, whatever the store is.

    Without an ``item_id`` there is no name of last resort: a listing's other images are to come before it.
    """
    names = [_url_name(image) if is_url(image) else image]
    if item_id and os.path.basename(item_id) == item_id:
        names += [item_id + extension for extension in EXTENSIONS]
    return [name for name in names if name and name not in (".", "..")]


def missing(image: str, item_id: str) -> ImageProblem:
    """The problem of an image that is found under none of its names."""
    return ImageProblem("image_missing", image[:200] or f"no image is named, and there is no {item_id}.jpg")


def is_url(image: str) -> bool:
    """True for an http(s) address, False for a path."""
    return image.lower().startswith(("http://", "https://"))


def _url_name(url: str) -> str:
    try:
        return unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    except ValueError:
        return ""


def square_jpeg(data: bytes, size_px: int, quality: int = 90, max_pixels: int = DEFAULT_MAX_PIXELS) -> bytes:
    """The picture in an image file's bytes as the bytes of an S x S RGB JPEG (S = ``size_px``).

    The whole picture is squashed (no crop, no padding) with a bilinear filter; EXIF orientation is
    applied, transparency goes over white, of an animation the first frame counts. A file that already is
    an upright RGB JPEG of S x S keeps its bytes: compressing twice would only lose.

    Errors: :class:`ImageProblem`. ``max_pixels`` holds before any pixel is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused or mended here
            return _convert(data, size_px, quality, max_pixels)
    except ImageProblem:
        raise
    except Image.DecompressionBombError as e:
        raise ImageProblem("image_too_large", str(e)) from e
    except Image.UnidentifiedImageError as e:
        raise ImageProblem("image_not_an_image", f"starts with {data[:8]!r}") from e
    except Exception as e:  # the decoders raise a dozen kinds on damaged input: none may end a build
        raise ImageProblem("image_unreadable", f"{type(e).__name__}: {e}"[:200]) from e


class FolderStore:
    """Images that lie in a folder, found as :func:`find_image` says; at most ``max_bytes`` each."""

    def __init__(self, root: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.root, self.max_bytes = str(root), max_bytes

    def read(self, image: str, item_id: str) -> bytes:
        """The bytes of the file that was found. Errors: :class:`ImageProblem`."""
        return read_bounded(find_image(self.root, image, item_id), self.max_bytes)


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """A file's bytes, of which there must be at least one. Errors: :class:`ImageProblem`."""
    try:
        with open(path, "rb") as f:
            data = f.read(max_bytes + 1)
    except FileNotFoundError as e:
        raise ImageProblem("image_missing", str(path)) from e
    except OSError as e:
        raise ImageProblem("image_unreadable", str(e)) from e
    return check_size(data, max_bytes)


def check_size(data: bytes, max_bytes: int) -> bytes:
    """``data``, if it is neither empty nor longer than ``max_bytes``. Errors: :class:`ImageProblem`."""
    if not data:
        raise ImageProblem("image_empty", "the file has no bytes")
    if len(data) > max_bytes:
        raise ImageProblem("image_too_large", f"more than {max_bytes} bytes")
    return data


def _convert(data: bytes, size_px: int, quality: int, max_pixels: int) -> bytes:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageProblem("image_too_large", f"{width} x {height} pixels, at most {max_pixels} in all")
        upright = _UPRIGHT.get(_orientation(image))
        is_target = image.format == "JPEG" and image.mode == "RGB" and image.size == (size_px, size_px)
        # The side stays at least twice the target, so that the bilinear filter still sees real detail.
        drafted = image.draft(image.mode, (2 * size_px, 2 * size_px))
        image.load()  # here a truncated file shows
        # The bound keeps out a file whose bulk is metadata, the ending one that lacks its last bytes.
        if is_target and upright is None and len(data) <= 3 * size_px**2 and data.endswith(b"\xff\xd9"):
            return data
        # A reduced picture may end within its last pixel: the box is what of it belongs to the original.
        square = _to_rgb_square(image, size_px, drafted[1] if drafted else None)
    if upright is not None:
        square = square.transpose(upright)
    square.info.clear()  # Pillow would write the source's comment into the new file
    out = io.BytesIO()
    square.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the picture
        return 1


def _to_rgb_square(image: Image.Image, size_px: int, box: Box | None) -> Image.Image:
    """Squash ``box`` (all by default) to (S, S) RGB, resizing in a mode in which averages make sense."""
    size, bilinear = (size_px, size_px), Image.Resampling.BILINEAR
    if image.mode in _WIDE_GREY:
        wide = image.convert("I")
        # Always /256, not by the picture's own maximum: equal values must stay equal across pictures.
        scaled = wide.point(lambda value: value * (1 / 256)) if _maximum(wide) > 255 else wide
        return scaled.convert("L").resize(size, bilinear).convert("RGB")
    if image.mode == "F":
        raise ImageProblem("image_unsupported", "floating-point pixels have no known scale")
    if image.has_transparency_data:
        # Pillow resizes RGBA premultiplied: the same as over white first, at a fraction of the memory.
        small = image.convert("RGBA").resize(size, bilinear)
        white = Image.new("RGBA", size, (255, 255, 255, 255))
        return Image.alpha_composite(white, small).convert("RGB")
    return image.convert("RGB").resize(size, bilinear, box)


def _maximum(image: Image.Image) -> float:
    high = image.getextrema()[1]
    assert isinstance(high, int | float)  # one band
    return high
