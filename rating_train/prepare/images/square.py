"""From the bytes of an image file that anybody may have made to a square RGB JPEG, or to a reason why not.

Everything about the file is distrusted: its size in pixels, its format, its completeness. Legend: S = side of the
stored square in pixels.

Reasons given here: ``image_not_an_image``, ``image_too_large``, ``image_unreadable``, ``image_unsupported``.
"""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image

from rating_train.prepare.images.lookup import DEFAULT_MAX_BYTES, ImageProblem, check_size

DEFAULT_MAX_PIXELS = 89_000_000  # about Pillow's own threshold: 256 MiB as RGB

# Only these decoders run on untrusted bytes: others start programs (EPS) or are not needed.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEG_KINDS = ("JPEG", "MPO")  # Pillow's name for a JPEG with further pictures behind the first; same decoder
_WIDE_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION = 0x0112
_MAX_SCANNED = 20  # scans of a JPEG of the largest size; ten are usual, and a small file may hold thousands
_SCAN = b"\xff\xda"
_JPEG_MARKER = re.compile(
    rb"\xff[\x02-\xcf\xda-\xfe]"
)  # not in a scan's data: 00, RST; without a length: TEM, SOI
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]


def square_jpeg(
    data: bytes,
    size_px: int,
    quality: int = 90,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    keep_aspect: bool = False,
) -> bytes:
    """Return the picture in an image file's bytes as the bytes of an S x S RGB JPEG.

    The complete picture is resized without keeping its aspect ratio (no crop, no padding), with a bilinear filter.
    EXIF orientation is applied, transparency is composited over white, and the first frame of an animation is taken.
    A file that already is an upright RGB JPEG of S x S keeps its bytes: compressing twice would only lose quality.

    Args:
        data: the bytes of the file.
        size_px: S.
        quality: of the JPEG, 1 to 95.
        max_pixels: larger pictures are refused before a pixel is decoded.
        keep_aspect: in place of a square, the picture in its own shape, S pixels on its longest side at most.

    Raises:
        ImageProblem: the bytes are not a usable picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused or repaired here
            return _convert(data, size_px, quality, max_pixels, keep_aspect)
    except ImageProblem:
        raise
    except Image.DecompressionBombError as e:
        raise ImageProblem("image_too_large", str(e)) from e
    except Image.UnidentifiedImageError as e:
        raise ImageProblem("image_not_an_image", f"starts with {data[:8]!r}") from e
    except Exception as e:  # decoders raise a dozen kinds on damaged input, and none may end a build
        raise ImageProblem("image_unreadable", f"{type(e).__name__}: {e}"[:200]) from e


def grey_square(size_px: int) -> bytes:
    """Return the placeholder of an item without an image: a JPEG of middle grey, which the model sees as 0."""
    with io.BytesIO() as file:
        Image.new("RGB", (size_px, size_px), (128, 128, 128)).save(file, "JPEG")
        return file.getvalue()


def square_file(picture: bytes | Image.Image, size_px: int, quality: int = 90) -> bytes:
    """Return the square of a picture as :func:`square_jpeg` makes it, also of one that is open already.

    A picture that was opened and not decoded yet counts as its file. One that was decoded, or drawn, has no file: it is
    resized from its pixels, which for a large JPEG differ slightly from the decoder's own reduction.

    Args:
        picture: bytes of an image file, or a picture. It is not changed.
        size_px: S.
        quality: of the JPEG, 1 to 95.

    Returns:
        bytes of an image file: a JPEG, or a PNG of a picture that was decoded from such a square JPEG.

    Raises:
        ImageProblem: it cannot be used.
    """
    data = picture if isinstance(picture, bytes) else _undecoded_bytes(picture)
    if data is not None:
        return square_jpeg(data, size_px, quality)
    assert isinstance(picture, Image.Image)
    orientation = _orientation(picture)
    if _is_target(picture, (size_px, size_px)) and orientation not in _UPRIGHT:
        out = io.BytesIO()
        picture.save(out, "PNG", compress_level=1)
        return out.getvalue()
    try:
        return _encoded(_to_rgb(picture, (size_px, size_px), None), orientation, quality)
    except (OSError, ValueError) as e:
        raise ImageProblem("image_unreadable", f"{type(e).__name__}: {e}"[:200]) from e


def _undecoded_bytes(picture: Image.Image) -> bytes | None:
    """Return the file of a picture that was opened and not decoded yet; ``None`` for any other."""
    file = getattr(picture, "fp", None)
    if not getattr(picture, "tile", None) or file is None or not file.seekable():
        return None
    position = file.tell()
    file.seek(0)
    data: bytes = file.read(DEFAULT_MAX_BYTES + 1)
    file.seek(position)
    return check_size(data, DEFAULT_MAX_BYTES)


def _convert(data: bytes, size_px: int, quality: int, max_pixels: int, keep_aspect: bool) -> bytes:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageProblem("image_too_large", f"{width} x {height} pixels, at most {max_pixels} in all")
        most_scans = _MAX_SCANNED * max_pixels // (width * height)
        if image.format in _JPEG_KINDS and data.count(_SCAN) > most_scans and _jpeg_scans(data) > most_scans:
            raise ImageProblem(
                "image_too_large", f"more than {most_scans} scans of {width} x {height} pixels"
            )
        orientation = _orientation(image)  # of the header: what a PNG says after its pixels does not count
        target = _target(image.size, size_px, keep_aspect)
        is_target = _is_target(image, target) and orientation not in _UPRIGHT
        # The side stays at least twice the target, so that the bilinear filter still sees real detail.
        drafted = image.draft(image.mode, (2 * target[0], 2 * target[1]))
        image.load()  # a truncated file raises here
        if image.format == "TIFF":  # Pillow has turned it upright while loading, and has removed the tag
            orientation, target = _orientation(image), _target(image.size, size_px, keep_aspect)
        # The bound excludes a file that is mostly metadata, the last marker one that lacks its end.
        if is_target and len(data) <= 3 * size_px**2 and data.endswith(b"\xff\xd9"):
            return data
        # The original may end within the last pixel of a reduced picture: the box is the part that belongs to it.
        square = _to_rgb(image, target, drafted[1] if drafted else None)
    return _encoded(square, orientation, quality)


def _target(size: tuple[int, int], size_px: int, keep_aspect: bool) -> tuple[int, int]:
    """Return the size to store, in pixels: the square, or the picture's own shape, which is never enlarged."""
    if not keep_aspect:
        return size_px, size_px
    scale = min(1.0, size_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _is_target(image: Image.Image, size: tuple[int, int]) -> bool:
    return image.format == "JPEG" and image.mode == "RGB" and image.size == size


def _encoded(square: Image.Image, orientation: int, quality: int) -> bytes:
    if orientation in _UPRIGHT:
        square = square.transpose(_UPRIGHT[orientation])
    square.info.clear()  # otherwise Pillow writes the source's comment into the new file
    out = io.BytesIO()
    square.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG: each one makes the decoder pass over all pixels again."""
    scans, at = 0, 2
    while marker := _JPEG_MARKER.search(data, at):
        scans += marker[0] == _SCAN
        # A segment has a length of two bytes; what follows a scan's segment is searched for the next marker.
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF does not make the picture unusable
        return 1


def _to_rgb(image: Image.Image, size: tuple[int, int], box: Box | None) -> Image.Image:
    """Resize ``box`` (all by default) to ``size`` in RGB, in a mode in which averages are meaningful."""
    bilinear = Image.Resampling.BILINEAR
    if image.mode in _WIDE_GREY:
        wide = image.convert("I")
        # Divided by 256 and never by the picture's own maximum, so that pictures stay comparable. One without a value
        # above 255 holds 8 bits in a wide type: of 16 bits, it would be black.
        scaled = wide.point(lambda value: value * (1 / 256)) if _maximum(wide) > 255 else wide
        return scaled.convert("L").resize(size, bilinear).convert("RGB")
    if image.mode == "F":
        raise ImageProblem("image_unsupported", "floating-point pixels have no known scale")
    if image.has_transparency_data:
        # Pillow resizes RGBA premultiplied: the same as compositing first, at a fraction of the memory.
        small = image.convert("RGBA").resize(size, bilinear)
        white = Image.new("RGBA", size, (255, 255, 255, 255))
        return Image.alpha_composite(white, small).convert("RGB")
    return image.convert("RGB").resize(size, bilinear, box)


def _maximum(image: Image.Image) -> float:
    high = image.getextrema()[1]
    assert isinstance(high, int | float)  # one band
    return high
