"""Images: every kind of good file becomes the same kind of square, every kind of bad one a reason."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rating_train.prepare.images.lookup import DEFAULT_MAX_BYTES, ImageProblem, find_image, read_bounded
from rating_train.prepare.images.square import square_file, square_jpeg

S = 32
RED, WHITE = (200, 30, 30), (255, 255, 255)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def load_square_jpeg(path: Path, size: int, max_bytes: int = DEFAULT_MAX_BYTES, **options: Any) -> bytes:
    return square_jpeg(read_bounded(path, max_bytes), size, **options)


def square(path: Path, size: int = S, **options: Any) -> np.ndarray:
    """The loaded square as (S, S, 3) float."""
    data = load_square_jpeg(path, size, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (size, size))
        return np.asarray(image, dtype=float)


def problem(path: Path, size: int = S, **options: Any) -> str:
    with pytest.raises(ImageProblem) as caught:
        load_square_jpeg(path, size, **options)
    assert caught.value.detail
    return caught.value.reason


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))


# --- good files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode in ("CMYK", "YCbCr") else "a.png"
    plain = Image.new("RGB", (50, 70), WHITE)
    pixels = square(save(tmp_path / name, plain.convert(mode)))
    assert np.abs(pixels - 255).max() < 4


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_formats(tmp_path: Path, extension: str) -> None:
    pixels = square(save(tmp_path / f"a.{extension}", Image.new("RGB", (50, 70), RED)))
    assert np.abs(pixels - RED).max() < 12


def test_cmyk_jpeg(tmp_path: Path) -> None:
    pixels = square(save(tmp_path / "a.jpg", Image.new("RGB", (50, 70), RED).convert("CMYK")))
    assert np.abs(pixels - RED).max() < 12


def test_transparency_goes_over_white(tmp_path: Path) -> None:
    clear = save(tmp_path / "a.png", Image.new("RGBA", (40, 40), (0, 0, 0, 0)))
    assert square(clear).min() > 250
    half = square(save(tmp_path / "b.png", Image.new("RGBA", (40, 40), (0, 0, 0, 128))))
    assert np.abs(half - 127).max() < 4
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert square(save(tmp_path / "c.png", palette, transparency=0)).min() > 250
    rgb_key = save(tmp_path / "d.png", Image.new("RGB", (40, 40), (1, 2, 3)), transparency=(1, 2, 3))
    assert square(rgb_key).min() > 250


def test_16_bit_grey_keeps_its_scale(tmp_path: Path) -> None:
    values = np.full((40, 40), 0x8000, dtype=np.uint16)
    assert np.abs(square(save(tmp_path / "a.png", Image.fromarray(values))) - 128).max() < 3
    wide = Image.fromarray(values.astype(np.int32))
    assert np.abs(square(save(tmp_path / "b.tif", wide)) - 128).max() < 3
    eight_bits = Image.fromarray(np.full((40, 40), 200, dtype=np.uint16))
    assert np.abs(square(save(tmp_path / "c.png", eight_bits)) - 200).max() < 3


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (40, 40), RED), Image.new("RGB", (40, 40), WHITE)
    path = save(tmp_path / "a.gif", first, save_all=True, append_images=[second])
    assert np.abs(square(path) - RED).max() < 12


def save_turned(path: Path, upright: Image.Image, orientation: int, **options: Any) -> Path:
    """Save a picture that lies as the tag says, so that whoever honours the tag sees it upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it so
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, stored, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "raw.tif", "lzw.tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, name: str) -> None:
    """The file of exactly S x S as well: its bytes cannot be kept if it lies on its side."""
    upright = Image.new("RGB", (S, S), WHITE)
    upright.paste(RED, (0, 0, S // 2, S // 2))  # red in the upper left
    saving = {"a.jpg": {"quality": 95}, "lzw.tif": {"compression": "tiff_lzw"}}.get(name, {})
    pixels = square(save_turned(tmp_path / name, upright, orientation, **saving))
    assert (
        pixels[4, 4, 1] < 80 and pixels[4, -4, 1] > 200 and pixels[-4, 4, 1] > 200 and pixels[-4, -4, 1] > 200
    )


def test_the_resize_is_bilinear_over_the_complete_picture(tmp_path: Path) -> None:
    source = noise(100, 60)
    expected = np.asarray(source.resize((S, S), Image.Resampling.BILINEAR), dtype=float)
    pixels = square(save(tmp_path / "a.png", source), quality=95)
    assert np.abs(pixels - expected).mean() < 12  # JPEG of coloured noise; a crop would be off by 30


def test_a_fitting_jpeg_keeps_its_bytes_and_others_do_not(tmp_path: Path) -> None:
    fitting = save(tmp_path / "a.jpg", noise(S, S), quality=70)
    assert load_square_jpeg(fitting, S) == fitting.read_bytes()
    grey = save(tmp_path / "b.jpg", noise(S, S).convert("L"))
    assert load_square_jpeg(grey, S) != grey.read_bytes()
    padded = tmp_path / "c.jpg"
    padded.write_bytes(fitting.read_bytes() + b"tail")
    assert len(load_square_jpeg(padded, S)) < 3 * S * S
    heavy = save(tmp_path / "d.jpg", noise(S, S), comment=b"x" * 4000)
    assert len(load_square_jpeg(heavy, S)) < 4000, "bulk that is not picture is not stored"


def test_same_bytes_every_time(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(90, 50))
    assert load_square_jpeg(path, S) == load_square_jpeg(path, S)


@pytest.mark.parametrize("size", [(900, 700), (901, 705)])
def test_decoding_large_jpegs_at_a_reduced_scale_changes_little(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    smooth = noise(9, 9).resize(size, Image.Resampling.BICUBIC)
    jpeg = save(tmp_path / "a.jpg", smooth, quality=95)
    with Image.open(jpeg) as full:  # the same pixels, decoded at full size
        png = save(tmp_path / "a.png", full.convert("RGB"))
    assert np.abs(square(jpeg) - square(png)).mean() < 2


# --- bad files ----------------------------------------------------------------------------------------


def test_files_that_are_no_images(tmp_path: Path) -> None:
    assert problem(tmp_path / "absent.jpg") == "image_missing"
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert problem(tmp_path / "empty.jpg") == "image_empty"
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    assert problem(tmp_path / "page.jpg") == "image_not_an_image"
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert problem(tmp_path / "script.eps") == "image_not_an_image", "no decoder that starts a program"


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, extension: str, keep: float) -> None:
    path = save(tmp_path / f"a.{extension}", noise(80, 80))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert problem(path) in {"image_unreadable", "image_not_an_image"}


def test_a_truncated_fitting_jpeg_is_not_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(S, S))
    path.write_bytes(path.read_bytes()[:-200])
    assert problem(path) == "image_unreadable"


def test_damage_anywhere_is_a_reason_or_a_picture(tmp_path: Path) -> None:
    """400 files with flipped bytes: the decoders' many exceptions all become an ImageProblem."""
    rng = np.random.default_rng(5)
    for extension in ("jpg", "png", "webp", "gif", "tif"):
        intact = save(tmp_path / f"w.{extension}", noise(48, 48)).read_bytes()
        for n in range(80):
            data = bytearray(intact)
            for at in rng.integers(0, min(len(data), 200 if n % 2 else len(data)), size=6):
                data[at] = int(rng.integers(0, 256))
            path = tmp_path / f"x.{extension}"
            path.write_bytes(bytes(data))
            try:
                square(path, max_pixels=1_000_000)
            except ImageProblem as e:
                assert e.reason.startswith("image_")


@pytest.mark.parametrize("side", [10_000, 60_000])  # over this bound; over Pillow's own as well
@pytest.mark.filterwarnings("error")
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    assert problem(tmp_path / "bomb.png") == "image_too_large"


def test_bounds_on_bytes_and_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(50, 50))
    assert problem(path, max_bytes=1000) == "image_too_large"
    assert problem(path, max_pixels=2499) == "image_too_large"
    square(path, max_pixels=2500)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def packed(kind: bytes, zeros: int) -> bytes:
    return chunk(kind, b"name\0\0" + zlib.compress(bytes(zeros), 9))


def gif(screen: int, frame: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\x00;"


def bmp(width: int, height: int) -> bytes:
    head = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)


def webp(kind: bytes, body: bytes) -> bytes:
    content = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(content)) + content


def tiff(width: int, height: int, strips: int = 1) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, strips, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 2**32 - 1)]
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(tags))
        + b"".join(struct.pack("<HHII", *t) for t in tags)
        + bytes(4)
    )


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (16, 16))))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def encoded(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


#: A few bytes that ask for very much memory -> the reason why they are refused.
BOMBS = {
    "png 100000 x 100000": (png(100_000, 100_000), "image_too_large"),
    "png 2^31 x 2^31": (png(2**31 - 1, 2**31 - 1), "image_too_large"),
    "png text of 300 MB": (png(10, 10, packed(b"zTXt", 300_000_000)), "image_unreadable"),
    "png many texts": (png(10, 10, *[packed(b"zTXt", 1_000_000)] * 200), "image_unreadable"),
    "png profile of 300 MB": (png(10, 10, packed(b"iCCP", 300_000_000)), "image_unreadable"),
    "gif screen": (gif(65535, 65535), "image_too_large"),
    "gif frame": (gif(10, 65535), "image_too_large"),
    "bmp": (bmp(100_000, 100_000), "image_too_large"),
    "bmp negative": (bmp(100, -(2**31)), "image_too_large"),
    "webp lossless": (webp(b"VP8L", b"\x2f" + struct.pack("<I", 2**28 - 1) + bytes(20)), "image_too_large"),
    "webp extended": (webp(b"VP8X", b"\x02\0\0\0" + b"\xff" * 6), "image_too_large"),
    "tiff": (tiff(2**31, 2**31), "image_too_large"),
    "tiff strips": (tiff(100, 100, strips=2**30 - 1), "image_not_an_image"),
    "jpeg": (jpeg(65535, 65535), "image_too_large"),
}


def test_bombs_are_refused_before_they_take_memory() -> None:
    """In a process of its own: its peak would otherwise be that of an earlier test."""
    code = (
        "import pickle, resource, sys\n"
        "from rating_train.prepare.images.lookup import ImageProblem\n"
        "from rating_train.prepare.images.square import square_jpeg\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "bombs = pickle.load(sys.stdin.buffer)\n"
        "for name, (data, _) in bombs.items():\n"
        "    before = peak()\n"
        "    try:\n"
        "        square_jpeg(data, 32)\n"
        "    except ImageProblem as e:\n"
        "        print(name, e.reason, peak() - before, sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(BOMBS), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = {
        name: (reason, int(mib))
        for name, reason, mib in (r.split("|") for r in done.stdout.decode().splitlines())
    }
    assert {name: reason for name, (reason, _) in found.items()} == {n: r for n, (_, r) in BOMBS.items()}
    assert not {name: mib for name, (_, mib) in found.items() if mib > 100}


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_takes_hours() -> None:
    """Each scan makes the decoder pass over all pixels again, and an empty one is a few bytes."""
    data = encoded(Image.new("L", (2000, 2000)), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]

    def with_scans(more: int) -> bytes:
        return data[:-2] + scan * more + data[-2:]

    with pytest.raises(ImageProblem) as caught:
        square_jpeg(with_scans(1000), S)
    assert caught.value.reason == "image_too_large" and "scans of 2000 x 2000 pixels" in caught.value.detail
    assert len(with_scans(1000)) < 200_000
    assert square_jpeg(with_scans(5), S) == square_jpeg(data, S)
    # The bytes of a marker inside metadata are no scan.
    comment = b"\xff\xfe" + struct.pack(">H", 30_002) + b"\xff\xda" * 15_000
    assert square_jpeg(data[:2] + comment + data[2:], S) == square_jpeg(data, S)


def test_scans_are_counted_in_a_jpeg_that_holds_a_second_picture() -> None:
    """Pillow gives such a file another name, MPO, and the same decoder."""
    out = io.BytesIO()
    big, small = Image.new("L", (2000, 2000)), Image.new("L", (20, 20))
    big.save(out, "MPO", save_all=True, append_images=[small], progressive=True)
    data = out.getvalue()
    end = data.index(b"\xff\xd9")
    scan = data[data.rindex(b"\xff\xda", 0, end) : end]
    square_jpeg(data, S)
    with pytest.raises(ImageProblem, match=r"image_too_large.*scans of 2000 x 2000 pixels"):
        square_jpeg(data[:end] + scan * 1000 + data[end:], S)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.zeros((9, 9), dtype=np.float32)))
    assert problem(path) == "image_unsupported"


def test_a_problem_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(ImageProblem("image_missing", "x")))
    assert (again.reason, again.detail) == ("image_missing", "x")


def test_a_problem_can_be_written_whatever_a_server_said() -> None:
    """A header byte outside ASCII arrives as a lone surrogate, which no file in UTF-8 can hold."""
    header = b"http://x/caf\xe9.jpg".decode("ascii", "surrogateescape")
    assert ImageProblem("fetch_redirect", f"to {header}").detail == "to http://x/caf?.jpg"
    assert ImageProblem("fetch_redirect", "to café").detail == "to café"


# --- finding ------------------------------------------------------------------------------------------


def find_reason(root: Path, image: str, item_id: str = "B1") -> str:
    with pytest.raises(ImageProblem) as caught:
        find_image(root, image, item_id)
    return caught.value.reason


def test_find_by_path_url_and_id(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.jpg", "51+ab_L.jpg", "B1.webp"):
        (tmp_path / name).write_bytes(b"x")
    assert find_image(tmp_path, "sub/a.jpg", "B9").name == "a.jpg"
    assert find_image(tmp_path, str(tmp_path / "sub" / "a.jpg"), "B9").name == "a.jpg"
    assert find_image(tmp_path, "https://m.example/images/I/51+ab_L.jpg?x=1", "B9").name == "51+ab_L.jpg"
    assert find_image(tmp_path, "https://m.example/images/I/other.jpg", "B1").name == "B1.webp"
    assert find_image(tmp_path, "", "B1").name == "B1.webp"


@pytest.mark.parametrize(
    "image",
    [
        "",
        "absent.jpg",
        ".",
        "sub",
        "http://[",
        "http://x/..",
        "a\0b",
        "x" * 5000,
        "https://m.example/absent.jpg",
    ],
)
def test_missing(tmp_path: Path, image: str) -> None:
    (tmp_path / "sub").mkdir()
    assert find_reason(tmp_path, image) == "image_missing"


def test_a_path_never_leaves_its_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root2" / "secret.jpg"
    root.mkdir()
    outside.parent.mkdir()
    outside.write_bytes(b"x")
    (root / "link.jpg").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    for image in (
        "../root2/secret.jpg",
        str(outside),
        "link.jpg",
        "folder/secret.jpg",
        "x/../../root2/secret.jpg",
    ):
        assert find_reason(root, image) == "image_outside_root", image
    assert find_reason(root, "", item_id="../root2/secret") == "image_missing"
    assert find_reason(root, "http://x/..%2Froot2%2Fsecret.jpg") == "image_missing"
    (tmp_path / "alias").symlink_to(root)
    (root / "good.jpg").write_bytes(b"x")
    assert find_image(tmp_path / "alias", "good.jpg", "B1").name == "good.jpg", (
        "the root itself may be a link"
    )


def test_circular_links_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert find_reason(tmp_path, "loop.jpg") == find_reason(tmp_path, "pipe.jpg") == "image_missing"


@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((100, 40), (32, 13)),
        ((40, 100), (13, 32)),
        ((20, 10), (20, 10)),
        ((640, 640), (32, 32)),
        ((900, 1), (32, 1)),
    ],
)
def test_a_picture_may_keep_its_shape(tmp_path: Path, size: tuple[int, int], stored: tuple[int, int]) -> None:
    """The longest side becomes S, and a smaller picture is not enlarged; a file that fits keeps its bytes."""
    path = save(tmp_path / "a.jpg", Image.new("RGB", size, RED), quality=95)
    data = load_square_jpeg(path, S, keep_aspect=True)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", stored)
    assert square_jpeg(data, S, keep_aspect=True) == data


@pytest.mark.parametrize("orientation", [3, 6, 7])
@pytest.mark.parametrize("extension", ["jpg", "tif"])
def test_a_picture_that_keeps_its_shape_is_turned_upright(
    tmp_path: Path, extension: str, orientation: int
) -> None:
    upright = Image.new("RGB", (40, 100), WHITE)
    upright.paste(RED, (0, 0, 40, 50))  # red above
    path = save_turned(tmp_path / f"a.{extension}", upright, orientation)
    with Image.open(io.BytesIO(load_square_jpeg(path, S, keep_aspect=True))) as image:
        assert image.size == (13, 32)
        pixels = np.asarray(image, dtype=int)
    assert pixels[4, 6, 1] < 80 and pixels[-4, 6, 1] > 200


def test_an_open_tiff_is_turned_upright_once(tmp_path: Path) -> None:
    upright = Image.new("RGB", (S, S), WHITE)
    upright.paste(RED, (0, 0, S // 2, S // 2))
    path = save_turned(tmp_path / "a.tif", upright, 6)
    with Image.open(path) as decoded:
        decoded.load()
        files = [square_file(decoded, S)]
    with Image.open(path) as undecoded:
        files.append(square_file(undecoded, S))
    for file in files:
        pixels = np.asarray(Image.open(io.BytesIO(file)), dtype=int)
        assert pixels[4, 4, 1] < 80 and pixels[4, -4, 1] > 200 and pixels[-4, 4, 1] > 200
