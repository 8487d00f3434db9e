"""Verify every byte of a dataset directory against its manifest. Imports no torch and no streaming.

The chain of trust: the manifest holds the hash of each split's index, the index the size and the hashes of each shard,
the shard the samples. :func:`shard_problem` checks one shard; :func:`verify_dataset` checks everything and lists all
problems. What is checked whenever a split is opened: ``shards/manifest.py``.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rating_train.config.task import PAPER, Target, task_of
from rating_train.errors import UserError
from rating_train.files import sha256_json
from rating_train.shards.manifest import check_index, read_manifest
from rating_train.shards.mds_read import INDEX_NAME, BadShard, read_index, read_shard
from rating_train.shards.schema import MANIFEST_NAME, PREDICT_SPLIT

_CHUNK_BYTES = 1 << 22
#: Hash names by speed, the fastest first: about 11,000, 1,400 and 1,300 MB/s on one core.
_BY_SPEED = ("xxh64", "sha1", "sha256")


def hash_function(name: str) -> Callable[[], Any] | None:
    """Return the constructor of a hash by its name in an MDS index; ``None`` if this machine has no such hash."""
    if name in hashlib.algorithms_available:
        return lambda: hashlib.new(name)
    try:
        return getattr(importlib.import_module("xxhash"), name, None)
    except ImportError:
        return None


def fastest_hash(hashes: Mapping[str, str]) -> str | None:
    """Return the recorded hash that is fastest to check here; ``None`` if none can be checked."""
    known = [name for name in (*_BY_SPEED, *sorted(hashes)) if name in hashes and hash_function(name)]
    return known[0] if known else None


def hash_file(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return a file's hex digests by name, from one pass in pieces of 4 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    digests = {name: make() for name in names if (make := hash_function(name))}
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            for digest in digests.values():
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def shard_problem(path: Path, size: int, hashes: Mapping[str, str], all_hashes: bool = False) -> str:
    """Return what is wrong with a shard file's bytes, in one sentence; "" if its size and hash are as recorded.

    Args:
        path: the shard.
        size: in bytes, as the index records it.
        hashes: name -> hex digest, as the index records them.
        all_hashes: check all of them and not only the fastest.

    Raises:
        OSError: the file cannot be read (``FileNotFoundError``: it is not there).
    """
    found = path.stat().st_size
    if found != size:
        return f"has {found} bytes instead of {size}"
    fastest = fastest_hash(hashes)
    if fastest is None:
        return f"has no recorded hash that can be checked here (recorded: {', '.join(hashes) or 'none'})"
    for name, digest in hash_file(path, hashes if all_hashes else [fastest]).items():
        if digest != hashes[name]:
            return f"has {name} {digest} instead of {hashes[name]}"
    return ""


@dataclass(frozen=True)
class Problem:
    """One problem. ``shard`` is SPLIT/NAME, or "" if it concerns no shard."""

    shard: str
    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard or Path(self.path).name} {self.what} ({self.path})"


@dataclass
class VerifyReport:
    """What was checked, and every problem. ``bytes`` were hashed; ``seconds`` is the wall time."""

    path: str
    shards: int = 0
    bytes: int = 0
    items: int = 0
    decoded: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def mb_per_second(self) -> float:
        """10^6 bytes hashed (and, where asked for, decoded) per second."""
        return self.bytes / 1e6 / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class _Task:
    split: str
    path: Path
    entry: Mapping[str, Any]
    wanted: set[int] | None  # places of the samples to decode; None decodes all
    target: Target | None = None  # None: the split's items have none


def verify_dataset(
    path: str | Path,
    decode: int | None = None,
    workers: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check every shard's size and every recorded hash, the indices, the counts, and that there are no other files.

    Args:
        path: dataset directory.
        decode: number of samples to decode (text, numbers and the image's pixels): ``None`` none, -1 all, else this
            many chosen at random over the splits, the same ones each time.
        workers: threads; hashing and JPEG decoding run outside the interpreter's lock.
        on_progress: called with (bytes done, total bytes) after each shard.

    Returns:
        The report, with every problem: a damaged shard does not hide the next one.

    Raises:
        UserError: there is no directory or no readable manifest, and so nothing to compare with.
    """
    started = time.monotonic()
    root = Path(path)
    manifest = read_manifest(root)
    report = VerifyReport(str(root))
    tasks = [
        task for split in manifest["splits"] for task in _check_split_files(root, split, manifest, report)
    ]
    tasks = _choose_samples(tasks, decode)
    stored = {name: entry.get("index_sha256") for name, entry in manifest["splits"].items()}
    if manifest.get("fingerprint") != sha256_json(stored):
        report.problems.append(
            Problem("", str(root / MANIFEST_NAME), "has a fingerprint that is not that of its splits")
        )
    total = sum(t.entry["raw_data"]["bytes"] for t in tasks)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for task, (decoded, problems) in zip(tasks, pool.map(_check_shard, tasks)):
            report.shards += 1
            report.bytes += task.entry["raw_data"]["bytes"]
            report.decoded += decoded
            report.problems += problems
            if on_progress:
                on_progress(report.bytes, total)
    report.seconds = time.monotonic() - started
    return report


def _check_split_files(
    root: Path, split: str, manifest: Mapping[str, Any], report: VerifyReport
) -> Iterator[_Task]:
    """Check a split's index, counts and directory; yield its shards for checking.

    A wrong index is reported, and the shards are checked against it all the same, which shows whether only the index
    was replaced.
    """
    folder, wrong = root / split, report.problems
    try:
        check_index(root, split)
    except UserError as e:
        wrong.append(Problem("", e.where, e.what))
    try:
        shards = read_index(folder)
    except UserError as e:
        if not any(p.path == e.where for p in wrong):
            wrong.append(Problem("", e.where, e.what))
        return
    entry = manifest["splits"][split]
    counts = {
        "items": sum(s["samples"] for s in shards),
        "shards": len(shards),
        "bytes": sum(s["raw_data"]["bytes"] for s in shards),
    }
    report.items += counts["items"]
    for what, found in counts.items():
        if found != entry.get(what, found):
            wrong.append(
                Problem("", str(folder / INDEX_NAME), f"counts {found} {what}, the manifest {entry[what]}")
            )
    named = {s["raw_data"]["basename"] for s in shards}
    target = None if split == PREDICT_SPLIT else task_of(manifest).target
    for file in sorted(folder.iterdir()):
        if file.name not in named and file.name != INDEX_NAME:
            wrong.append(Problem(f"{split}/{file.name}", str(file), "is not named in the index"))
    for s in shards:
        yield _Task(split, folder / s["raw_data"]["basename"], s, set(), target)


def _choose_samples(tasks: list[_Task], decode: int | None) -> list[_Task]:
    """Return the same tasks with the samples to decode."""
    if not decode:
        return tasks
    if decode < 0:
        return [replace(t, wanted=None) for t in tasks]
    items = sum(t.entry["samples"] for t in tasks)
    chosen = sorted(random.Random(0).sample(range(items), min(decode, items)))
    result, first = [], 0
    for t in tasks:
        last = first + t.entry["samples"]
        result.append(replace(t, wanted={c - first for c in chosen if first <= c < last}))
        first = last
    return result


def _check_shard(task: _Task) -> tuple[int, list[Problem]]:
    """Hash one shard and decode its samples; return (samples decoded, problems)."""
    name = f"{task.split}/{task.path.name}"
    raw = task.entry["raw_data"]
    try:
        what = shard_problem(task.path, raw["bytes"], raw["hashes"], all_hashes=True)
    except FileNotFoundError:
        what = "is missing"
    except OSError as e:
        what = f"cannot be read: {e.strerror or e}"
    if what:  # then its samples are not decoded
        return 0, [Problem(name, str(task.path), what)]
    decoded, problems = 0, []
    try:
        if task.wanted is None or task.wanted:
            for sample in read_shard(task.path, task.entry, task.wanted):
                decoded += 1
                if reason := sample_problem(sample, task.target):
                    problems.append(
                        Problem(name, str(task.path), f"contains item {sample.get('id')!r}, whose {reason}")
                    )
    except (OSError, BadShard) as e:
        problems.append(Problem(name, str(task.path), f"cannot be decoded: {e}"))
    return decoded, problems


def sample_problem(sample: Mapping[str, Any], target: Target | None = PAPER.target) -> str:
    """Return why a decoded sample cannot be trained on (without a ``target``: not scored); "" if it can."""
    from PIL import Image

    rating = sample.get("rating")
    if target is not None:
        inside = False
        if isinstance(rating, float) and not math.isnan(rating):  # float32 may round a bound to beyond it
            inside = any(not target.problem(r) for r in (rating, rating * (1 - 1e-7), rating * (1 + 1e-7)))
        if not inside:
            wrong = "is not in" if target.bounded else "does not fit"
            return f"{target.name} {rating} {wrong} {_shown(target.lower)}..{_shown(target.upper)}"
    if "image" not in sample:
        return ""
    try:
        with Image.open(io.BytesIO(sample["image"]), formats=("JPEG",)) as image:
            image.load()
    except Exception as e:  # the decoder raises many kinds on damaged input, Pillow its own on a bomb
        return f"image cannot be decoded: {e}"
    return ""


def _shown(bound: float | None) -> str:
    return "" if bound is None else f"{bound:g}"
