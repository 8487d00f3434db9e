"""A directory that is no dataset is named as what it is, and nothing in a manifest or an index is trusted."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rating_train.cli import main
from rating_train.errors import UserError
from rating_train.files import sha256_file, sha256_json
from rating_train.shards.manifest import check_split, read_manifest
from rating_train.shards.mds_read import read_index, read_shard
from rating_train.shards.verify import verify_dataset

pytestmark = pytest.mark.timeout(120)


def edit_manifest(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Replace the manifest by what ``change`` returns for it."""
    content = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(change(content)))


def edit_index(data: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index of the training split, and the hashes above it: all of it as its maker would have it."""
    file = data / "train" / "index.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))

    def seal(manifest: dict[str, Any]) -> object:
        manifest["splits"]["train"]["index_sha256"] = sha256_file(file)
        stored = {name: entry["index_sha256"] for name, entry in manifest["splits"].items()}
        return {**manifest, "fingerprint": sha256_json(stored)}

    edit_manifest(data, seal)


NO_DATASETS: dict[str, tuple[str, str]] = {  # path below the folder -> what is said, what to do
    "absent": ("dataset directory not found", "rating-train prepare"),
    "file": ("the dataset is not a directory", "the directory that `prepare --out` made"),
    "empty": ("not a dataset: the directory has no manifest.json", "this is a copy, it is incomplete"),
    "data/train": ("not a dataset", "this is one split of a dataset; give "),
    "started": ("not a dataset", "run the same `rating-train prepare` command again to finish"),
    "started.build": (
        "not a dataset",
        "run the same `rating-train prepare` command again to finish this build",
    ),
    "": ("not a dataset", "give one of "),
}


@pytest.mark.parametrize("name", NO_DATASETS)
def test_what_is_no_dataset_is_named_as_what_it_is(
    data: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data.parent
    (folder / "file").write_text("x")
    for made in ("empty", "started", "started.build"):
        (folder / made).mkdir()
    what, fix = NO_DATASETS[name]
    assert main(["verify", str(folder / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line and fix in line and str(folder / name) in line


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [],
        lambda m: {**m, "version": 2},
        lambda m: {**m, "splits": None},
        lambda m: {**m, "splits": ["train"]},
        lambda m: {**m, "splits": {**m["splits"], "../../elsewhere": m["splits"]["train"]}},
        lambda m: {**m, "splits": {"train": None}},
        lambda m: {**m, "splits": {"train": {**m["splits"]["train"], "index_sha256": None}}},
    ],
    ids=["list", "version", "none", "names", "outside", "entry", "hash"],
)
def test_a_manifest_of_any_content_is_used_or_refused(
    data: Path, change: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(data, change)
    with pytest.raises(UserError, match=r"the dataset has version|the manifest is damaged"):
        read_manifest(data)
    assert main(["verify", str(data)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["raw_data"].update(basename="../../../etc/passwd"),
        lambda s: s["raw_data"].update(basename="/etc/passwd"),
        lambda s: s["raw_data"].update(basename=".."),
        lambda s: s["raw_data"].update(basename=5),
        lambda s: s["raw_data"].update(bytes="many"),
        lambda s: s["raw_data"].update(hashes=None),
        lambda s: s.update(samples=-1),
        lambda s: s.update(samples=None),
        lambda s: s.update(format="csv"),
        lambda s: s.update(compression="zstd"),
        lambda s: s.update(column_sizes=[None]),
        lambda s: s.update(column_names=[["a"]] * len(s["column_names"])),
        lambda s: s.clear(),
    ],
)
def test_an_index_of_any_content_is_used_or_refused(
    data: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit_index(data, lambda index: change(index["shards"][0]))
    with pytest.raises(UserError, match="not an index of uncompressed MDS shards"):
        check_split(data, "train")
    problems = verify_dataset(data).problems
    assert any("not an index" in p.what for p in problems)


def test_a_shard_of_any_size_in_its_header_takes_no_memory(data: Path) -> None:
    """The header and the index agree on 4 billion samples, whose table alone would be 16 GB."""
    shard = next((data / "train").glob("*.mds"))
    entry = {**read_index(data / "train")[0], "samples": 2**32 - 1}
    shard.write_bytes(struct.pack("<I", 2**32 - 1) + shard.read_bytes()[4:])
    with pytest.raises(ValueError, match="ends within its table of offsets"):
        list(read_shard(shard, entry))


def test_a_stored_image_that_is_a_bomb_or_a_program_is_a_problem(data: Path) -> None:
    from rating_train.shards.verify import sample_problem
    from tests.unit.prepare.images.test_square import BOMBS

    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for image in (eps, *(content for content, _ in BOMBS.values())):
        assert "image cannot be decoded" in sample_problem({"rating": 4.0, "image": image})
    for rating in (None, "5", float("nan"), 6.0):
        assert "is not in 1..5" in sample_problem({"rating": rating, "image": b""})
