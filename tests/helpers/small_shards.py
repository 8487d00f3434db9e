"""A dataset of many small shards, made of another one's samples: for tests of damage and of caches."""

from __future__ import annotations

import json
from pathlib import Path

from streaming import MDSWriter

from rating_train.files import sha256_file, sha256_json
from rating_train.shards.mds_read import INDEX_NAME, iter_sampled, read_index
from rating_train.shards.schema import MANIFEST_NAME, MDS_COLUMNS


def reshard(source: Path, out: Path, shard_bytes: int, copies: int = 1) -> Path:
    """The samples of ``source``, ``copies`` times (ids get a suffix), in shards of about so many bytes."""
    manifest = json.loads((source / MANIFEST_NAME).read_text())
    for split, entry in manifest["splits"].items():
        folder = out / split
        with MDSWriter(
            columns=dict(MDS_COLUMNS), out=str(folder), hashes=["sha1", "xxh64"], size_limit=shard_bytes
        ) as writer:
            for copy in range(copies):
                for sample in iter_sampled([source / split]):
                    writer.write({**sample, "id": f"{sample['id']}-{copy}"})
        shards = read_index(folder)
        entry.update(
            items=sum(s["samples"] for s in shards),
            shards=len(shards),
            bytes=sum(s["raw_data"]["bytes"] for s in shards),
            index_sha256=sha256_file(folder / INDEX_NAME),
        )
    manifest["fingerprint"] = sha256_json({k: e["index_sha256"] for k, e in manifest["splits"].items()})
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    return out


def flip_a_byte(path: Path, at: int) -> None:
    """Change one byte in place; the size stays."""
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 0x20]))
