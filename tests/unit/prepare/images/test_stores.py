"""Stores: a folder, a zip and a tar give the same bytes under the same names, and nothing of a member is trusted."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import resource
import struct
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from rating_train.errors import UserError
from rating_train.prepare.images.archives import TarStore, ZipStore
from rating_train.prepare.images.lookup import FolderStore, ImageProblem, ImageStore
from rating_train.prepare.images.stores import CacheStore, LayeredStore, open_store

FILES = {
    "sub/a.jpg": b"picture a",
    "51+ab_L.jpg": b"picture of a url",
    "B1.webp": b"picture of an id",
    "empty.jpg": b"",
    "large.jpg": b"x" * 2000,
    "edge.jpg": b"y" * 1000,
}
MAX_BYTES = 1000
Make = Callable[[Path, dict[str, bytes]], ImageStore]


def folder(path: Path, files: dict[str, bytes]) -> ImageStore:
    for name, data in files.items():
        (path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "images" / name).write_bytes(data)
    return open_store(path / "images", max_bytes=MAX_BYTES)


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path / "images.zip", "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path / "images.zip"


def make_tar(path: Path, files: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path / "images.tar", "w", **options) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path / "images.tar"


def zipped(path: Path, files: dict[str, bytes]) -> ImageStore:
    return open_store(make_zip(path, files), max_bytes=MAX_BYTES)


def tarred(path: Path, files: dict[str, bytes]) -> ImageStore:
    return open_store(make_tar(path, files), max_bytes=MAX_BYTES)


def under_a_top_folder(path: Path, files: dict[str, bytes]) -> ImageStore:
    return tarred(path, {f"./images/{name}": data for name, data in files.items()})


def reason(store: ImageStore, image: str, item_id: str = "B9") -> str:
    with pytest.raises(ImageProblem) as caught:
        store.read(image, item_id)
    assert caught.value.detail
    return caught.value.reason


ALL = pytest.mark.parametrize("make", [folder, zipped, tarred, under_a_top_folder])
ARCHIVES = pytest.mark.parametrize("make", [zipped, tarred])


@ALL
def test_the_same_names_in_the_same_order(make: Make, tmp_path: Path) -> None:
    store = make(tmp_path, FILES)
    for s in (store, pickle.loads(pickle.dumps(store))):
        assert s.read("sub/a.jpg", "B1") == b"picture a"
        assert s.read("sub/../sub/a.jpg", "B1") == b"picture a"
        assert s.read("https://m.example/I/51+ab_L.jpg?x=1", "B1") == b"picture of a url"
        assert s.read("https://m.example/I/absent.jpg", "B1") == b"picture of an id"
        assert s.read("", "B1") == b"picture of an id"
        assert s.read("edge.jpg", "B1") == b"y" * MAX_BYTES
        assert s.read("sub/a.jpg", "B1") == b"picture a", "again, after the others"


@ALL
def test_reasons(make: Make, tmp_path: Path) -> None:
    store = make(tmp_path, FILES)
    assert reason(store, "large.jpg") == "image_too_large"
    assert reason(store, "empty.jpg") == "image_empty"
    for image in ("", "absent.jpg", "sub", ".", "a\0b", "http://[", "http://x/..", "x" * 5000):
        assert reason(store, image) == "image_missing", image
    for image in ("../a.jpg", "sub/../../a.jpg", "/etc/passwd"):
        assert reason(store, image) == "image_outside_root", image
    assert reason(store, "", item_id="../B1") == "image_missing"


@ARCHIVES
def test_members_with_hostile_names_do_not_exist(make: Make, tmp_path: Path) -> None:
    hostile = ("../evil.jpg", "/abs.jpg", "a/../../up.jpg", "__MACOSX/images/m.jpg")
    store = make(tmp_path / "", {**dict.fromkeys(hostile, b"evil"), "good/g.jpg": b"good"})
    for name in hostile:
        last = name.rsplit("/", 1)[-1]
        assert reason(store, last) == "image_missing"
        assert reason(store, f"http://x/{last}") == "image_missing"
    assert store.read("g.jpg", "-") == b"good"
    assert not (tmp_path.parent / "evil.jpg").exists() and not (tmp_path / "good").exists()


@ARCHIVES
def test_a_last_part_that_several_members_have_names_none(make: Make, tmp_path: Path) -> None:
    store = make(tmp_path, {"x/1.jpg": b"one", "y/1.jpg": b"two", "y/2.jpg": b"three"})
    assert reason(store, "http://x/1.jpg") == "image_missing", "better no picture than the wrong one"
    assert store.read("http://x/2.jpg", "-") == b"three"
    assert store.read("x/1.jpg", "-") == b"one"
    assert reason(store, "z/2.jpg") == "image_missing", "a path is not cut down to its last part"


@ARCHIVES
def test_the_last_member_of_a_name_counts(make: Make, tmp_path: Path) -> None:
    store = make(tmp_path, {"a/1.jpg": b"old", "./a/1.jpg": b"new"})
    assert store.read("a/1.jpg", "-") == store.read("1.jpg", "-") == b"new"


# --- zip ----------------------------------------------------------------------------------------------


def test_a_zip_bomb_is_inflated_up_to_the_limit_only(tmp_path: Path) -> None:
    path = make_zip(tmp_path, {"bomb.jpg": bytes(50_000_000), "b.jpg": b"fine"})
    assert path.stat().st_size < 100_000
    assert reason(ZipStore(path, MAX_BYTES), "bomb.jpg") == "image_too_large"
    lying = path.read_bytes().replace((50_000_000).to_bytes(4, "little"), (900).to_bytes(4, "little"))
    path.write_bytes(lying)
    store = ZipStore(path, MAX_BYTES)
    assert reason(store, "bomb.jpg") in ("image_unreadable", "image_too_large")
    assert store.read("b.jpg", "-") == b"fine"


def test_zip_members_that_are_no_plain_files(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("packed.jpg", b"z" * 500, compress_type=zipfile.ZIP_LZMA)
        archive.mkdir("folder.jpg") if hasattr(archive, "mkdir") else archive.writestr("folder.jpg/", "")
    store = ZipStore(path)
    assert reason(store, "link.jpg") == reason(store, "folder.jpg") == "image_missing"
    assert reason(store, "packed.jpg") == "image_unreadable", "its dictionary may be of any size"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_in_a_zip_member_is_seen(tmp_path: Path, method: int) -> None:
    path = make_zip(tmp_path, {"a.jpg": bytes(range(256)) * 3, "b.jpg": b"fine"}, method)
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(data)
    store = ZipStore(path)
    assert reason(store, "a.jpg") == "image_unreadable"
    assert store.read("b.jpg", "-") == b"fine"


def test_a_zip_whose_members_overlap_is_bounded_member_by_member(tmp_path: Path) -> None:
    """Thousands of members that share one packed stream of zeros: 40 GB declared in 100 KB."""
    path = tmp_path / "overlap.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("0.jpg")
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, "w") as member:
            member.write(bytes(20_000_000))
        archive.writestr("good.jpg", b"good")
        for n in range(1, 2000):
            archive.filelist.append(twin := copy.copy(info))
            twin.filename = twin.orig_filename = f"{n}.jpg"
        archive._didModify = True  # type: ignore[attr-defined]
    assert path.stat().st_size < 200_000
    store = ZipStore(path, MAX_BYTES)
    assert {reason(store, f"{n}.jpg") for n in (0, 1, 1999)} <= {"image_too_large", "image_unreadable"}
    assert store.read("good.jpg", "-") == b"good"


# --- tar ----------------------------------------------------------------------------------------------


def test_tar_members_that_are_no_plain_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
    with tarfile.open(path, "w") as archive:
        for n, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{n}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    for n in range(len(kinds)):
        assert reason(TarStore(path), f"{n}.jpg") == "image_missing"


def tar_header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a size field of any content and a right checksum."""
    member = tarfile.TarInfo(name)
    member.type = kind
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136], header[148:156] = size.ljust(12, b"\0"), b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax(**fields: str) -> bytes:
    """An extended header with these fields."""
    return tarfile.TarInfo._create_pax_generic_header(  # type: ignore[attr-defined]
        {name.replace("__", "."): value for name, value in fields.items()}, tarfile.XHDTYPE, "utf-8"
    )


SPARSE = {"GNU__sparse__major": "1", "GNU__sparse__minor": "0", "GNU__sparse__name": "x.jpg"}
HOSTILE_TARS = {
    "2 GiB of a long name": tar_header("././@LongLink", b"%011o" % (2 << 30), tarfile.GNUTYPE_LONGNAME),
    "2 GiB of attributes": tar_header("pax", b"%011o" % (2 << 30), tarfile.XHDTYPE),
    "a size below zero": tar_header("a.jpg", b"\xff" * 4 + struct.pack(">q", -512)) + bytes(1024),
    "back to the start": tar_header("a.jpg", b"0")
    + tar_header("b.jpg", b"\xff" * 4 + struct.pack(">q", -1024)),
    "a size below zero in attributes": pax(size="-1024") + tar_header("a.jpg", b"1000") + bytes(2048),
    "a sparse map that does not end": pax(**SPARSE) + tar_header("x.jpg", b"1000") + b"100000\n",
    "a sparse map of 10^12 entries": pax(**SPARSE)
    + tar_header("x.jpg", b"1000")
    + b"%d\n1\n" % 10**12
    + bytes(505),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_hostile_tar_headers_take_neither_memory_nor_for_ever(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(HOSTILE_TARS[name])
    if "2 GiB" in name:  # all of it is there, and takes no space on the disk
        os.truncate(path, (2 << 30) + 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"not a readable tar archive.*a\.tar"):
        TarStore(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(tmp_path: Path, format: int) -> None:
    name = "/".join(["folder" * 5] * 4) + "/ä.jpg"
    store = TarStore(make_tar(tmp_path, {name: b"long", "b.jpg": b"short"}, format=format))
    assert (store.read(name, "-"), store.read("b.jpg", "-")) == (b"long", b"short")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused(tmp_path: Path, suffix: str) -> None:
    with tarfile.open(tmp_path / f"a.tar.{suffix}", f"w:{suffix}") as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UserError, match="no random access"):
        open_store(tmp_path / f"a.tar.{suffix}")
    (tmp_path / f"a.tar.{suffix}").rename(tmp_path / "named_otherwise.tar")
    with pytest.raises(UserError, match="no random access"):
        open_store(tmp_path / "named_otherwise.tar")


def test_a_damaged_or_cut_tar_is_refused(tmp_path: Path) -> None:
    """tarfile itself takes a damaged header for the end, and the members behind it would be gone in silence."""
    path = make_tar(tmp_path, {f"{n}.jpg": bytes([n]) * 700 for n in range(5)})
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[2 * 1536 + 150] ^= 0xFF  # in the checksum of the third header
    for bad in (bytes(damaged), intact[: 3 * 1536 + 100], intact[: 3 * 1536 + 700], b"no tar at all" * 100):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="not a readable tar"):
            TarStore(path)
    path.write_bytes(intact[: 5 * 1536])  # without end marker: all members are there
    assert TarStore(path).read("4.jpg", "-") == b"\x04" * 700


def test_a_tar_that_changed_since_its_scan_is_refused(tmp_path: Path) -> None:
    store = TarStore(make_tar(tmp_path, FILES))
    frozen = pickle.dumps(store)
    store.close()
    make_tar(tmp_path, {"other.jpg": b"z" * 20_000})
    for s in (store, pickle.loads(frozen)):
        with pytest.raises(UserError, match="changed"):
            s.read("sub/a.jpg", "-")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damage_anywhere_is_a_user_error_a_reason_or_the_bytes(tmp_path: Path, kind: str) -> None:
    files = {f"images/{n}.jpg": bytes([n]) * 300 for n in range(8)}
    path = make_zip(tmp_path, files) if kind == "zip" else make_tar(tmp_path, files)
    intact, chosen = path.read_bytes(), random.Random(3)
    for _ in range(300):
        data = bytearray(intact)
        for _ in range(chosen.choice((1, 8))):
            data[chosen.randrange(len(data))] = chosen.randrange(256)
        path.write_bytes(data)
        try:
            store = open_store(path, max_bytes=MAX_BYTES)
        except UserError:
            continue
        for n in range(8):
            try:
                assert len(store.read(f"{n}.jpg", "-")) <= MAX_BYTES
            except ImageProblem as e:
                assert e.reason.startswith("image_")


@ARCHIVES
def test_a_forked_reader_does_not_disturb_its_parent(make: Make, tmp_path: Path) -> None:
    store = make(tmp_path, {f"{n}.jpg": bytes([n]) * 999 for n in range(100)})
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            good = all(store.read(f"{n}.jpg", "-") == bytes([n]) * 999 for n in range(100))
            os._exit(0 if good else 1)
        children.append(child)
    assert all(store.read(f"{n}.jpg", "-") == bytes([n]) * 999 for n in range(100))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


# --- the cache, layers, choosing ----------------------------------------------------------------------

URL = "https://m.example/I/51+ab_L.jpg"


def test_cache(tmp_path: Path) -> None:
    cache = CacheStore(tmp_path / "cache", MAX_BYTES)
    assert reason(cache, URL) == reason(cache, "a.jpg") == reason(cache, "") == "image_missing"
    cache.put_problem(URL, ImageProblem("fetch_gone", "HTTP 404"))
    assert reason(cache, URL) == "fetch_gone" and not cache.has(URL)
    cache.put(URL, b"bytes")
    assert cache.has(URL) and cache.problem(URL) is None
    again = pickle.loads(pickle.dumps(cache))
    assert again.read(URL, "-") == b"bytes"
    (kept,) = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert kept.parent.parent.parent == tmp_path / "cache" and kept.name.startswith(
        kept.parent.parent.name + kept.parent.name
    )
    cache.put(URL, b"z" * 1001)
    assert reason(cache, URL) == "image_too_large"


def test_a_recorded_problem_that_is_no_utf8_can_be_written_again(tmp_path: Path) -> None:
    """Older versions recorded header bytes as they came, and a build met them again in every attempt."""
    cache, url = CacheStore(tmp_path), "http://x/a.jpg"
    cache.put_problem(url, ImageProblem("fetch_redirect", ""))
    (record,) = tmp_path.rglob("*.problem")
    record.write_text('{"url": "", "reason": "fetch_redirect", "detail": "to caf\\udce9"}', "ascii")
    with pytest.raises(ImageProblem) as caught:
        cache.read(url, "")
    assert caught.value.detail == "to caf?"


@pytest.mark.parametrize("content", ["", "[]", "{}", "no json", '{"reason": "x"}'])
def test_an_unreadable_record_of_a_problem_is_none(tmp_path: Path, content: str) -> None:
    cache = CacheStore(tmp_path)
    cache.put_problem(URL, ImageProblem("fetch_gone", "HTTP 404"))
    next(tmp_path.rglob("*.problem")).write_text(content)
    assert cache.problem(URL) is None


def test_layers(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "B1.jpg").write_bytes(b"local")
    store = open_store(tmp_path / "images", cache=tmp_path / "cache")
    assert isinstance(store, LayeredStore)
    store.cache.put_problem(URL, ImageProblem("fetch_gone", "HTTP 404"))
    assert store.read(URL, "B1") == b"local"
    assert reason(store, URL, "B2") == "fetch_gone"
    assert reason(store, "../x", "B2") == "image_outside_root"
    store.cache.put(URL, b"fetched")
    assert (store.read(URL, "B1"), store.read("B1.jpg", "-")) == (b"fetched", b"local")


def test_choosing(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), FolderStore)
    assert isinstance(open_store(make_zip(tmp_path, FILES)), ZipStore)
    assert isinstance(open_store(make_tar(tmp_path, FILES)), TarStore)
    assert isinstance(open_store(None, cache=tmp_path), CacheStore)
    (tmp_path / "a.rar").write_bytes(b"x")
    (tmp_path / "a.zip").write_bytes(b"x" * 100)
    for spec in (None, "", tmp_path / "absent", tmp_path / "a.rar", tmp_path / "a.zip"):
        with pytest.raises(UserError):
            open_store(spec)


@ARCHIVES
def test_worker_processes_read_archives(make: Make, tmp_path: Path) -> None:
    store = make(tmp_path, {f"{n}.png": bytes([n]) for n in range(0, 40, 2)})
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        read = list(pool.map(store.read, [f"{n}.png" for n in range(0, 40, 2)], ["-"] * 20))
    assert read == [bytes([n]) for n in range(0, 40, 2)]
