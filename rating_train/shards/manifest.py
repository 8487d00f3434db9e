"""What a dataset directory says of itself: the manifest, the index of each split, and the sizes of the shards.

These checks take milliseconds and are made whenever a split is opened. The manifest holds the hash of each split's
index, the index the size and the hashes of each shard. Shards are hashed elsewhere: ``shards/verify.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rating_train.config.task import task_of
from rating_train.errors import UserError
from rating_train.files import read_json, sha256_file
from rating_train.shards.mds_read import INDEX_NAME, read_index
from rating_train.shards.schema import MANIFEST_NAME, MANIFEST_VERSION, SPLITS

COPY_AGAIN = "copy the dataset again from where it was made, or prepare it again"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a dataset directory.

    Raises:
        UserError: there is no such directory, it is not a dataset, or the manifest is damaged or of another version.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(
            "dataset directory not found", where=root, fix="make it with `rating-train prepare --out`"
        )
    if not root.is_dir():
        raise UserError(
            "the dataset is not a directory", where=root, expected="the directory that `prepare --out` made"
        )
    if not (root / MANIFEST_NAME).is_file():
        raise _not_a_dataset(root)
    manifest = read_json(root / MANIFEST_NAME)
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise UserError(
            f"the dataset has version {found}", where=root, expected=f"version {MANIFEST_VERSION}"
        )
    splits = manifest.get("splits")
    # Split names become paths: a manifest from elsewhere must not name one outside the dataset.
    if not isinstance(splits, dict) or not all(
        name in SPLITS and isinstance(entry, dict) and isinstance(entry.get("index_sha256"), str)
        for name, entry in splits.items()
    ):
        raise UserError(
            "the manifest is damaged: its splits are not readable", where=root / MANIFEST_NAME, fix=COPY_AGAIN
        )
    return manifest


def _not_a_dataset(root: Path) -> UserError:
    what = f"not a dataset: the directory has no {MANIFEST_NAME}"
    build = root.with_name(f"{root.name}.build")
    if root.name.endswith(".build"):
        fix = "run the same `rating-train prepare` command again to finish this build"
    elif build.is_dir():
        fix = f"run the same `rating-train prepare` command again to finish {build}"
    elif (root.parent / MANIFEST_NAME).is_file() and root.name in SPLITS:
        fix = f"this is one split of a dataset; give {root.parent}"
    else:
        found = sorted(p.parent for p in root.glob(f"*/{MANIFEST_NAME}"))
        fix = (
            f"give one of {', '.join(map(str, found[:3]))}"
            if found
            else (
                "give the directory that `rating-train prepare --out` made; if this is a copy, it is incomplete"
            )
        )
    return UserError(what, where=root, fix=fix)


def check_index(path: str | Path, split: str) -> dict[str, Any]:
    """Check a split's index by its hash in the manifest; return the manifest.

    Raises:
        UserError: there is no such split, or its index is missing or not the one that the build wrote.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if split not in manifest["splits"]:
        raise UserError(
            f"the dataset has no split {split!r}",
            where=root / MANIFEST_NAME,
            expected=f"one of {', '.join(manifest['splits'])}" if manifest["splits"] else f"any of {SPLITS}",
            fix="set data.train_split / data.eval_split, or prepare with another --val-fraction",
        )
    index = root / split / INDEX_NAME
    if not index.is_file():
        raise UserError("the split's index is missing", where=index, fix=COPY_AGAIN)
    if sha256_file(index) != manifest["splits"][split]["index_sha256"]:
        raise UserError("the index is not the one in the manifest", where=index, fix=COPY_AGAIN)
    return manifest


def refuse_squares(paths: Sequence[str], manifests: Sequence[dict[str, Any]]) -> None:
    """Refuse to cut images into tiles whose aspect ratio `prepare` did not keep.

    Raises:
        UserError: a dataset stores squares.
    """
    for path, manifest in zip(paths, manifests, strict=True):
        if not manifest.get("options", {}).get("keep_aspect"):
            raise UserError(
                "its images were stored as squares: tiles need their aspect ratio",
                where=f"data.tiling_px, {path}",
                fix="run `rating-train prepare ... --keep-aspect`, or set data.tiling_px=0",
            )


def refuse_unlike(paths: Sequence[str], manifests: Sequence[dict[str, Any]]) -> None:
    """Refuse datasets that cannot be mixed. Versions and columns are the same wherever a dataset could be opened.

    Raises:
        UserError: their images are stored in different sizes, their tasks differ, or two of them are the same dataset.
    """
    tasks = [task_of(manifest) for manifest in manifests]
    for path, task in zip(paths, tasks, strict=True):
        if difference := tasks[0].difference(task):
            raise UserError(
                f"{paths[0]} and {path} have different tasks: {difference}",
                where="data.sources",
                fix="mix datasets that were prepared with the same --task",
            )
    sizes = {path: manifest.get("image_size_px") for path, manifest in zip(paths, manifests, strict=True)}
    if len(set(sizes.values())) > 1:
        raise UserError(
            "the sources store images of different sizes: "
            + ", ".join(f"{path} {size} px" for path, size in sizes.items()),
            where="data.sources",
            expected="one size, so that no source is told by its blur",
            fix="prepare them with the same --image-size-px",
        )
    first: dict[Any, str] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        if (same := first.setdefault(manifest.get("fingerprint"), path)) != path:
            raise UserError(
                f"two sources are the same dataset: {same} and {path}",
                where="data.sources",
                fix="give it once, with the sum of the weights",
            )


def check_split(path: str | Path, split: str) -> dict[str, Any]:
    """Check a split against the manifest before it is read; return the manifest.

    The index is checked by its hash and every shard by its size in bytes. A shard is hashed when it is first read.
    (Streaming checks hashes only when it downloads, never for local shards.)

    Raises:
        UserError: as :func:`check_index`; or shards are missing or have another size.
    """
    manifest = check_index(path, split)
    folder = Path(path) / split
    problems = []
    for shard in read_index(folder):
        name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            problems.append(
                f"{name} {'is missing' if found is None else f'has {found} bytes instead of {size}'}"
            )
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"damaged shards: {shown}", where=folder, fix=COPY_AGAIN)
    return manifest
