"""`prepare` from files to shards: counts add up, a dataset is complete or absent, and it reads back."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streaming import LocalDataset, MDSWriter

from rating_train.commands import prepare as prepare_verb
from rating_train.demo.catalogue import make_catalogue
from rating_train.errors import UserError
from rating_train.files import read_json, read_json_lines, sha256_file
from rating_train.prepare import build
from rating_train.prepare.images import fetch, square
from rating_train.prepare.images.lookup import ImageProblem
from rating_train.prepare.images.stores import CacheStore
from rating_train.prepare.options import PrepareOptions
from rating_train.prepare.parts.part import DONE_NAME
from rating_train.prepare.plan.rules import PlanRules
from rating_train.prepare.run import prepare
from rating_train.shards import writer
from rating_train.shards.schema import MANIFEST_NAME, MDS_COLUMNS, QUARANTINE_NAME
from tests.helpers.listings import listing

S = 32
N = 60


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    make_catalogue(folder, items=N)
    return folder


def options(catalogue: Path, out: Path, **changes: Any) -> PrepareOptions:
    given: dict[str, Any] = {
        "source": (str(catalogue / "catalogue.jsonl"),),
        "images": str(catalogue),
        "out": str(out),
        "image_size_px": S,
        "val_fraction": 0.25,
        "shard_size_mb": 1,
    }
    return PrepareOptions(**{**given, **changes})


def samples(folder: Path) -> list[dict[str, Any]]:
    dataset = LocalDataset(local=str(folder))
    return [dataset[i] for i in range(len(dataset))]


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def edited_catalogue(catalogue: Path, folder: Path, edit: Callable[[list[dict[str, Any]]], list[Any]]) -> str:
    """A catalogue beside the images with some lines changed; bytes are taken as they are."""
    lines = edit([json.loads(line) for line in (catalogue / "catalogue.jsonl").read_text().splitlines()])
    path = folder / "edited.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return str(path)


def test_round_trip(catalogue: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    manifest = prepare(options(catalogue, out, max_text_chars=30))
    assert manifest == read_json(out / MANIFEST_NAME)
    assert (manifest["read"], manifest["kept"], manifest["dropped"]) == (N, N, {})
    assert manifest["columns"] == MDS_COLUMNS and manifest["image_size_px"] == S
    assert manifest["sources"][0]["rows"] == N
    assert sorted(p.name for p in out.iterdir()) == [MANIFEST_NAME, QUARANTINE_NAME, "train", "val"]
    assert [p.name for p in out.parent.iterdir()] == ["data"], "no temporary folder is left"

    lines = [json.loads(line) for line in (catalogue / "catalogue.jsonl").read_text().splitlines()]
    by_id = {line["parent_asin"]: line for line in lines}
    seen: list[str] = []
    for split in ("train", "val"):
        entry, got = manifest["splits"][split], samples(out / split)
        assert entry["items"] == len(got) > 0
        ratings = np.array([s["rating"] for s in got], dtype=np.float64)
        assert entry["rating_mean"] == pytest.approx(ratings.mean(), abs=1e-9)
        assert entry["rating_std"] == pytest.approx(ratings.std(), abs=1e-9)
        assert entry["index_sha256"] == sha256_file(out / split / "index.json")
        shards = list((out / split).glob("*.mds"))
        assert (entry["shards"], entry["bytes"]) == (len(shards), sum(p.stat().st_size for p in shards))
        for sample in got:
            line = by_id[sample["id"]]
            assert set(sample) == set(MDS_COLUMNS)
            assert sample["title"] == line["title"][:30] and sample["main_category"] == line["main_category"]
            assert sample["features"] == " ".join(line["features"])[:30]
            assert sample["rating"] == np.float32(line["average_rating"])
            assert sample["rating_count"] == line["rating_number"]
            with Image.open(io.BytesIO(sample["image"])) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (S, S))
        seen += [s["id"] for s in got]
    assert sorted(seen) == sorted(by_id), "every item once, on one side"


def test_workers_do_not_change_a_byte(catalogue: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fingerprints = {
        prepare(options(catalogue, out, workers=n))["fingerprint"] for n, out in ((1, one), (2, two))
    }
    assert len(fingerprints) == 1
    a, b = content(one), content(two)
    assert a.pop(MANIFEST_NAME) != b.pop(MANIFEST_NAME), "the manifest names the options"
    assert a == b


def test_every_bad_record_is_counted_and_named(catalogue: Path, tmp_path: Path) -> None:
    size = (catalogue / "images" / "B0DEMO00010.jpg").read_bytes()
    bad_images = {"zero.jpg": b"", "torn.jpg": size[:500], "page.jpg": b"<html>"}
    for name, data in bad_images.items():
        (catalogue / name).write_bytes(data)

    def edit(lines: list[dict[str, Any]]) -> list[Any]:
        lines[1]["average_rating"] = 7
        lines[2]["average_rating"] = float("nan")
        lines[3]["rating_number"] = 3
        lines[4].update(title=" ", features=[], description=None)
        lines[5]["parent_asin"] = lines[0]["parent_asin"]
        lines[6].update(image_path="gone.jpg", images=None)
        lines[7]["image_path"] = "../outside.jpg"
        lines[8]["image_path"] = "zero.jpg"
        lines[9]["image_path"] = "torn.jpg"
        lines[10]["image_path"] = "page.jpg"
        lines[6]["parent_asin"] = "no-file-of-this-name"
        return [*lines[:20], b'{"parent_asin": ', b'{"title": "\xff"}', b"", *lines[20:]]

    source = edited_catalogue(catalogue, tmp_path, edit)
    out = tmp_path / "data"
    manifest = prepare(options(catalogue, out, source=(source,)))
    assert manifest["dropped"] == {
        "bad_rating": 2,
        "bad_json": 1,
        "not_utf8": 1,
        "few_ratings": 1,
        "empty_text": 1,
        "duplicate_id": 1,
        "image_missing": 1,
        "image_outside_root": 1,
        "image_empty": 1,
        "image_unreadable": 1,
        "image_not_an_image": 1,
    }
    assert manifest["read"] == N + 2 == manifest["kept"] + sum(manifest["dropped"].values())
    assert manifest["kept"] == sum(entry["items"] for entry in manifest["splits"].values())
    rows = list(read_json_lines(out / QUARANTINE_NAME))
    assert len(rows) == sum(manifest["dropped"].values())
    assert {tuple(row) for row in rows} == {("source", "line", "id", "reason", "detail")}
    where = {row["reason"]: row["line"] for row in rows}
    assert (where["few_ratings"], where["bad_json"], where["image_empty"]) == (4, 21, 9)
    assert {row["source"] for row in rows} == {source}


def test_several_sources_and_duplicates_across_them(catalogue: Path, tmp_path: Path) -> None:
    source = edited_catalogue(catalogue, tmp_path, lambda lines: lines[:5])
    both = (str(catalogue / "catalogue.jsonl"), source)
    manifest = prepare(options(catalogue, tmp_path / "data", source=both))
    assert manifest["dropped"] == {"duplicate_id": 5}
    assert [s["rows"] for s in manifest["sources"]] == [N, 5]


def challenge_csv(catalogue: Path, folder: Path, cells: dict[int, str], ratings: bool = True) -> str:
    """The catalogue in the challenge's columns, the images of some rows replaced."""
    lines = [json.loads(line) for line in (catalogue / "catalogue.jsonl").read_text().splitlines()]
    columns = ["parent_asin", "main_category", "title", "features", "description", "image_paths"]
    columns += ["average_rating", "rating_number"] if ratings else []
    with open(folder / "input.csv", "w", newline="") as f:
        rows = csv.DictWriter(f, columns, extrasaction="ignore")
        rows.writeheader()
        for i, line in enumerate(lines):
            texts = {name: " ".join(line[name] or []) for name in ("features", "description")}
            rows.writerow({**line, **texts, "image_paths": cells.get(i, line["image_path"])})
    return str(folder / "input.csv")


def packed_images(catalogue: Path, folder: Path, kind: str) -> str:
    """The images, and some that cannot be used, as a folder or an archive."""
    root = folder / "root"
    (root / "images").mkdir(parents=True)
    for path in (catalogue / "images").iterdir():  # not <id>.jpg, which is found without a name
        shutil.copy(path, root / "images" / path.name.replace("B0DEMO", "p"))
    good = (root / "images" / "p00010.jpg").read_bytes()
    for name, data in {"empty.jpg": b"", "torn.jpg": good[:500], "page.jpg": b"<html>"}.items():
        (root / "images" / name).write_bytes(data)
    return str(root) if kind == "folder" else shutil.make_archive(str(folder / "images"), kind, root)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_challenges_csv_takes_the_first_usable_image(catalogue: Path, tmp_path: Path, kind: str) -> None:
    a, b = "images/p00002.jpg", "images/p00003.jpg"
    cells = {
        **{i: f"images/p{i + 1:05d}.jpg" for i in range(N)},
        0: f"{a};{b}",
        1: f"images/torn.jpg;images/gone.jpg;{b};{a}",
        2: f"../outside.jpg;images/empty.jpg;images/page.jpg;{a}",
        3: "images/torn.jpg;images/gone.jpg",
        4: "images/gone.jpg",
        5: "",
    }
    source, store = challenge_csv(catalogue, tmp_path, cells), packed_images(catalogue, tmp_path, kind)
    given = {"source": (source,), "images": store, "part_items": 4, "require_image": True}
    manifest = prepare(options(catalogue, tmp_path / "data", **given))
    assert manifest["dropped"] == {"no_image": 1, "image_none_usable": 1, "image_missing": 1}
    assert manifest["images"] == {
        "listings_with_several": 4,
        "fell_back_to_a_later_one": 2,
        "extra_unused": 2,
        "refused": {
            "image_empty": 1,
            "image_missing": 2,
            "image_not_an_image": 1,
            "image_outside_root": 1,
            "image_unreadable": 2,
        },
    }
    named = {row["id"]: row for row in read_json_lines(tmp_path / "data" / QUARANTINE_NAME)}
    several = named["B0DEMO00004"]
    assert (several["reason"], several["line"]) == ("image_none_usable", 5)
    for said in ("images/torn.jpg: image_unreadable (", "images/gone.jpg: image_missing ("):
        assert said in several["detail"]
    got = {s["id"]: s["image"] for split in manifest["splits"] for s in samples(tmp_path / "data" / split)}
    assert len(got) == manifest["kept"] == N - 3
    first, second = got["B0DEMO00001"], got["B0DEMO00002"]
    assert got["B0DEMO00003"] == first != second, "the file a, and the file b"
    printed = prepare_verb.summary_table("data", manifest)
    assert "4 listings name several: 2 took a later one, 2 images left unused" in printed


def test_the_file_of_last_resort_comes_after_all_images_that_are_named(
    catalogue: Path, tmp_path: Path
) -> None:
    one, two, three = (catalogue / "images" / f"B0DEMO0000{n}.jpg" for n in (1, 2, 3))
    root = tmp_path / "root"
    root.mkdir()
    for name, path in (("named", one), (two.stem, two), (one.stem, three)):
        shutil.copy(path, root / f"{name}.jpg")
    source = challenge_csv(catalogue, tmp_path, {0: "gone.jpg;named.jpg", 1: "gone.jpg;also-gone.jpg"})
    given = options(catalogue, tmp_path / "data", source=(source,), images=str(root), limit=2)
    manifest = prepare(given)
    got = {s["id"]: s["image"] for split in manifest["splits"] for s in samples(tmp_path / "data" / split)}
    expected = {one.stem: one, two.stem: two}  # of the first, not what lies under <id>.jpg
    assert got == {name: square.square_jpeg(path.read_bytes(), S) for name, path in expected.items()}


def test_the_challenges_csv_without_ratings_is_refused(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = challenge_csv(catalogue, tmp_path, {}, ratings=False)
    monkeypatch.setattr(build, "make_plan", lambda *_: pytest.fail("it is refused before anything is read"))
    with pytest.raises(UserError, match=r"lacks rating\|average_rating; .*rating_number.*add these columns"):
        prepare(options(catalogue, tmp_path / "data", source=(str(catalogue / "catalogue.jsonl"), source)))
    assert [p.name for p in tmp_path.iterdir()] == ["input.csv"]


def test_the_window_is_over_listings_that_name_an_image(catalogue: Path, tmp_path: Path) -> None:
    """The most and the least rated ones have no image: with ``require_image`` the next ones take their places."""

    def edit(lines: list[dict[str, Any]]) -> list[Any]:
        for i, line in enumerate(lines):
            line.update(main_category="Toys", rating_number=1000 - i)
            if i in (0, 1, N - 1):
                line.update(image_path=None, images=[])
        return lines

    source = edited_catalogue(catalogue, tmp_path, edit)
    given = {"source": (source,), "top_per_category": 5, "bottom_per_category": 4, "stage": "plan"}
    for required, places in (
        (False, [*range(5), *range(N - 4, N)]),
        (True, [*range(2, 7), *range(N - 5, N - 1)]),
    ):
        out = tmp_path / f"data-{required}"
        counts = prepare(options(catalogue, out, require_image=required, **given))
        rows = read_json_lines(Path(f"{out}.build") / "plan" / "part_00000.jsonl")
        assert [row["line"] - 1 for row in rows] == places
        assert counts["dropped"].get("no_image", 0) == (3 if required else 0)


def test_variants_stay_on_one_side(catalogue: Path, tmp_path: Path) -> None:
    def edit(lines: list[dict[str, Any]]) -> list[Any]:
        for i, line in enumerate(lines):
            line.update(group_id=i // 3, main_category="Toys", title=f"Product number {i // 6} of ours ({i})")
        return lines

    source = edited_catalogue(catalogue, tmp_path, edit)
    manifest = prepare(options(catalogue, tmp_path / "data", source=(source,), val_fraction=0.4))
    assert manifest["groups"] == {"count": N // 6, "largest": 6}
    sides: dict[int, set[str]] = {}
    for split in manifest["splits"]:
        for sample in samples(tmp_path / "data" / split):
            sides.setdefault((int(sample["id"][-5:]) - 1) // 6, set()).add(split)
    assert len(sides) == N // 6 and all(len(splits) == 1 for splits in sides.values())


def test_too_many_dropped_stops_and_keeps_the_quarantine(catalogue: Path, tmp_path: Path) -> None:
    empty = tmp_path / "no_images"
    empty.mkdir()
    out = tmp_path / "data"
    with pytest.raises(UserError, match=r"too many records dropped.*image_missing"):
        prepare(options(catalogue, out, images=str(empty)))
    kept = tmp_path / f"data.{QUARANTINE_NAME}"
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, "no_images"]
    rows = list(read_json_lines(kept))
    assert len(rows) == N // 2 + 1 and rows[0]["reason"] == "image_missing", (
        "it stops when the verdict is certain"
    )

    source = edited_catalogue(catalogue, tmp_path, lambda lines: [b"junk" for _ in lines])
    with pytest.raises(UserError, match=r"too many records dropped.*bad_json 60"):
        prepare(options(catalogue, out, source=(source,)))
    assert not out.exists() and len(list(read_json_lines(kept))) == N


def test_records_left_out_by_choice_are_no_failure(catalogue: Path, tmp_path: Path) -> None:
    def edit(lines: list[dict[str, Any]]) -> list[Any]:
        return [{**line, "rating_number": 2 if i % 3 else 50} for i, line in enumerate(lines)]

    source = edited_catalogue(catalogue, tmp_path, edit)
    manifest = prepare(options(catalogue, tmp_path / "data", source=(source,), max_dropped_fraction=0.0))
    assert manifest["dropped"] == {"few_ratings": N * 2 // 3}


def test_refusals(catalogue: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    with pytest.raises(UserError, match="source file not found"):
        prepare(options(catalogue, out, source=(str(tmp_path / "absent.jsonl"),)))
    with pytest.raises(UserError, match="images folder not found"):
        prepare(options(catalogue, out, images=str(tmp_path / "absent")))
    with pytest.raises(
        UserError,
        match=r"4 problems: .*leave nothing.*jpeg_quality.*shard_size_mb.*workers",
    ):
        prepare(options(catalogue, out, jpeg_quality=0, val_fraction=1.0, shard_size_mb=0, workers=0))
    with pytest.raises(UserError, match="no item is left"):
        prepare(options(catalogue, out, min_rating_count=10**9))
    assert not list(tmp_path.iterdir())
    out.mkdir()
    with pytest.raises(UserError, match="exists"):
        prepare(options(catalogue, out))
    assert not list(out.iterdir()), "an existing folder is never touched, not even an empty one"


def uninterrupted(catalogue: Path, folder: Path, **changes: Any) -> dict[str, bytes]:
    """The files of a build that nothing disturbs, but for the manifest (which names ``out``)."""
    prepare(options(catalogue, folder / "reference", **changes))
    files = content(folder / "reference")
    del files[MANIFEST_NAME]
    return files


def shards_of(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(out).items() if name != MANIFEST_NAME}


def test_a_failure_midway_is_no_dataset_and_the_same_command_continues(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def break_at_40(data: bytes, *args: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return real(data, *args)

    out, real = tmp_path / "data", square.square_jpeg
    monkeypatch.setattr(square, "square_jpeg", break_at_40)
    with pytest.raises(UserError, match=r"stopped by SIGINT.*same command again"):
        prepare(options(catalogue, out, part_items=16))
    assert calls == 40 and [p.name for p in tmp_path.iterdir()] == ["data.build"]
    parts = tmp_path / "data.build" / "parts"
    assert sorted(p.name for p in parts.iterdir()) == ["part_00000", "part_00001"], (
        "no temporary folder is left"
    )
    prepare(options(catalogue, out, part_items=16))
    assert calls == 40 + N - 32, "finished parts are not made again"
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert shards_of(out) == uninterrupted(catalogue, tmp_path, part_items=16)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_the_end_is_no_dataset_and_the_same_command_continues(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, "no space left on device")

    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "atomic_write_json", full)
        expected = (
            pytest.raises(UserError, match=r"disk is full.*free disk space.*same command")
            if number == errno.ENOSPC
            else pytest.raises(OSError, match="no space")
        )
        with expected:
            prepare(options(catalogue, out))
    assert [p.name for p in tmp_path.iterdir()] == ["data.build"]
    prepare(options(catalogue, out))
    assert shards_of(out) == uninterrupted(catalogue, tmp_path)


@pytest.mark.parametrize("module", ["plan", "parts"])
def test_a_source_that_changes_is_noticed(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    source = Path(edited_catalogue(catalogue, tmp_path, lambda lines: lines))
    where, name = {"plan": (build.planner, "make_plan"), "parts": (build, "build_parts")}[module]
    real = getattr(where, name)

    def then_change(*args: Any) -> Any:
        result = real(*args)
        lines = source.read_text().splitlines()
        source.write_text("\n".join(lines[:-1]) + "\n")
        return result

    monkeypatch.setattr(where, name, then_change)
    given = options(catalogue, tmp_path / "data", source=(str(source),))
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(given)
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(where, name, real)
    with pytest.raises(UserError, match=r"changed sources.*sources was.*remove"):
        prepare(given)


def test_an_unfinished_build_is_not_continued_with_other_options(catalogue: Path, tmp_path: Path) -> None:
    given = options(catalogue, tmp_path / "data", stage="plan")
    assert prepare(given)["parts"] == 1
    with pytest.raises(UserError, match=r"other options.*image_size_px was 32, now 48.*remove .*data\.build"):
        prepare(options(catalogue, tmp_path / "data", image_size_px=48))
    more = {"workers": 2, "max_dropped_fraction": 0.1}  # these do not touch the items
    assert prepare(options(catalogue, tmp_path / "data", **more))["kept"] == N


def test_stages_make_the_same_as_one_command(catalogue: Path, tmp_path: Path) -> None:
    out, small = tmp_path / "data", {"part_items": 7}
    with pytest.raises(UserError, match="no finished plan"):
        prepare(options(catalogue, out, stage="parts", **small))
    assert prepare(options(catalogue, out, stage="plan", **small))["parts"] == 9
    with pytest.raises(UserError, match=r"--only 0:10: the plan has 9 parts"):
        prepare(options(catalogue, out, stage="parts", only="0:10", **small))
    for share in range(4):
        prepare(options(catalogue, out, stage="parts", only=f"{share}/5", **small))
    with pytest.raises(UserError, match=r"2 of 9 parts are missing: 7, 8"):
        prepare(options(catalogue, out, stage="merge", **small))
    prepare(options(catalogue, out, stage="parts", only="6:9", workers=2, **small))
    prepare(options(catalogue, out, stage="merge", **small))
    assert shards_of(out) == uninterrupted(catalogue, tmp_path, **small)
    assert len(samples(out / "train")) + len(samples(out / "val")) == N


@pytest.mark.parametrize("damage", ["shard", "index.json", "quarantine.jsonl", "byte"])
def test_a_damaged_part_is_named_and_not_merged(catalogue: Path, tmp_path: Path, damage: str) -> None:
    out, small = tmp_path / "data", {"part_items": 20}
    for stage in ("plan", "parts"):
        prepare(options(catalogue, out, stage=stage, **small))
    part = tmp_path / "data.build" / "parts" / "part_00001"
    if damage in ("shard", "byte"):
        (file,) = part.glob("train/*.mds")
        flipped = bytes([file.read_bytes()[-1] ^ 1])
        file.write_bytes(file.read_bytes()[:-1] + (flipped if damage == "byte" else b""))
    elif damage == "index.json":
        file = part / "train" / damage
        file.write_bytes(file.read_bytes().replace(b"0", b"1"))
    else:
        file = part / damage
        file.unlink()
    with pytest.raises(UserError, match=rf"part 1: .*{file.name}.*remove .*part_00001"):
        prepare(options(catalogue, out, verify_parts=damage == "byte", **small))
    assert not out.exists()
    shutil.rmtree(part)
    prepare(options(catalogue, out, **small))
    assert shards_of(out) == uninterrupted(catalogue, tmp_path, **small)


def test_shards_are_what_streaming_writes(catalogue: Path, tmp_path: Path) -> None:
    prepare(options(catalogue, tmp_path / "data"))
    rows = samples(tmp_path / "data" / "train")
    written = sorted((tmp_path / "data" / "train").iterdir())
    limit = 20_000
    with MDSWriter(
        columns=MDS_COLUMNS, out=str(tmp_path / "theirs"), hashes=["sha1", "xxh64"], size_limit=limit
    ) as theirs:
        ours = writer.SplitWriter(tmp_path / "ours", limit)
        for row in rows:
            theirs.write({**row, "rating": np.float32(row["rating"])})
            row = dict(row)
            image = row.pop("image")
            ours.write(listing(row.pop("id"), **row, image="", group=""), image)
        ours.finish()
    assert len(written) == 2 and len(list((tmp_path / "ours").iterdir())) > 3
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")


SLOW_BUILD = """
import sys, time
from rating_train.prepare.images import square
from rating_train.prepare.run import PrepareOptions, prepare
real = square.square_jpeg
def slow(*args):
    time.sleep(0.5)
    return real(*args)
square.square_jpeg = slow
prepare(PrepareOptions(source=(sys.argv[1],), images=sys.argv[2], out=sys.argv[3], image_size_px=32, val_fraction=0.25))
"""


def test_a_killed_build_is_no_dataset_and_the_next_one_sweeps_it(catalogue: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    arguments = [str(catalogue / "catalogue.jsonl"), str(catalogue), str(out)]
    slow = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, *arguments])
    same = options(catalogue, out, shard_size_mb=64)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("data.build/parts/part_00000.tmp-*/train")):
            assert slow.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        prepare(options(catalogue, tmp_path / "other"))
        (living,) = tmp_path.glob("data.build/parts/part_00000.tmp-*")
        with pytest.raises(UserError, match="another command is working on this build"):
            prepare(same)
        writer.sweep(living.parent, r"part_\d+")
        assert living.exists(), "a living build keeps its folder"
    finally:
        os.kill(slow.pid, signal.SIGKILL)
        slow.wait()
    assert living.exists() and not out.exists()
    assert not list(living.parent.rglob(DONE_NAME))
    foreign = tmp_path / "data.tmp-some-other-host-1-00000000"
    foreign.mkdir()
    prepare(same)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", foreign.name, "other"]


def test_fetched_images_come_from_the_cache(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(lines: list[dict[str, Any]]) -> list[Any]:
        for i, line in enumerate(lines):
            line["image_path"] = f"https://images.example/{line['image_path']}"
            if i == 3:
                line["image_path"] = "https://images.example/gone.jpg"
        return lines

    asked: list[str] = []

    def fetch_all(requests: list[tuple[str, str]], cache: Path, *_: Any) -> None:
        store = CacheStore(cache)
        for _, url in requests:
            asked.append(url)
            if url.endswith("gone.jpg"):
                store.put_problem(url, ImageProblem("fetch_gone", "404"))
            else:
                store.put(url, (catalogue / url.removeprefix("https://images.example/")).read_bytes())

    source = edited_catalogue(catalogue, tmp_path, edit)
    given = options(catalogue, tmp_path / "data", source=(source,), images="", fetch=True, part_items=9)
    monkeypatch.setattr(fetch, "fetch_all", fetch_all)
    manifest = prepare(given)
    assert manifest["dropped"] == {"fetch_gone": 1} and manifest["kept"] == N - 1
    assert len(asked) == N and not (tmp_path / "data.build").exists()
    with pytest.raises(UserError, match="neither --images nor --fetch"):
        prepare(options(catalogue, tmp_path / "other", images=""))


def test_dry_run_counts_and_writes_nothing(catalogue: Path, tmp_path: Path) -> None:
    dry = prepare(options(catalogue, tmp_path / "data", dry_run=True))
    assert not list(tmp_path.iterdir())
    real = prepare(options(catalogue, tmp_path / "data"))
    assert dry["kept"] == real["kept"] == N
    assert {k: v["items"] for k, v in dry["splits"].items()} == {
        k: v["items"] for k, v in real["splits"].items()
    }


def test_limit_and_test_split(catalogue: Path, tmp_path: Path) -> None:
    manifest = prepare(options(catalogue, tmp_path / "data", limit=50, test_fraction=0.3))
    assert manifest["read"] == 50 and list(manifest["splits"]) == ["train", "val", "test"]


def test_command_line(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    parser = argparse.ArgumentParser()
    prepare_verb.add_arguments(parser)
    source, out = str(catalogue / "catalogue.jsonl"), str(tmp_path / "data")
    caplog.set_level(logging.INFO)
    least = ["--source", source, "--images", str(catalogue), "--out", out]
    args = parser.parse_args([*least, "--image-size-px", "32", "--val-fraction", "0.25"])
    assert prepare_verb.run(args) == 0
    printed = capsys.readouterr().out
    assert f"prepared {out}" in printed and "dropped          0" in printed
    assert f"images: {N} of {N}" in caplog.text
    defaults = vars(parser.parse_args(least))
    assert defaults.pop("init_task") == ""  # of the verb alone
    rules, plain = PrepareOptions(**defaults).rules, PlanRules()
    names = [field.name for field in dataclasses.fields(PlanRules)]
    assert [getattr(rules, name) for name in names] == [getattr(plain, name) for name in names]
    assert set(defaults) == {f.name for f in dataclasses.fields(PrepareOptions)}, "every option has a flag"
    assert PrepareOptions(**{**defaults, "source": (source,)}) == PrepareOptions(
        source=(source,), images=str(catalogue), out=out
    )


def test_help_and_dry_run_need_neither_torch_nor_streaming() -> None:
    code = "import sys, rating_train.prepare.run; sys.exit(bool({'torch', 'streaming'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_catalogue(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "electronics"
    source = str(folder / "products.jsonl")
    manifest = prepare(
        PrepareOptions(
            source=(source,),
            images=str(folder),
            out=str(tmp_path / "data"),
            image_size_px=64,
            limit=300,
            val_fraction=0.1,
        )
    )
    assert manifest["kept"] == 300 and manifest["splits"]["val"]["items"] > 0
