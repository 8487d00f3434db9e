"""The best and the worst items of an evaluation, with their images and texts from the shards."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rating_train.errors import UserError
from rating_train.reports.page.render import data_uri
from rating_train.scoring.predictions import Prediction
from rating_train.shards.mds_read import BadShard, read_columns, read_index, read_shard

_THUMBNAIL_PX = 176
_TITLE_CHARS = 160


def find_items(data: Path, split: str, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return id -> stored item; without those that are not there, or cannot be read."""
    wanted, found = set(ids), {}
    try:
        for shard in read_index(data / split):
            path = data / split / shard["raw_data"]["basename"]
            places = {
                place for place, item in enumerate(read_columns(path, shard, ("id",))) if item["id"] in wanted
            }
            if places:
                found.update({item["id"]: item for item in read_shard(path, shard, places)})
            if len(found) == len(wanted):
                break
    except (OSError, UserError, BadShard):  # the report is worth having without pictures
        pass
    return found


def cards(
    rows: Sequence[Prediction], ids: Sequence[str], stored: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what is shown of each item, in the order of ``ids``."""
    by_id = {row.id: row for row in rows}
    shown = []
    for identity in ids:
        row, item = by_id.get(identity), stored.get(identity, {})
        if row is None or row.rating is None:
            continue
        error = row.score - row.rating
        shown.append(
            {
                "image": _thumbnail(item.get("image")),
                "true": f"{row.rating:.2f}",
                "predicted": f"{row.score:.2f}",
                "error": f"{error:+.2f}",
                "side": "over" if error > 0 else "under",
                "count": "" if row.rating_count is None else f", {row.rating_count:,} ratings",
                "title": " ".join(str(item.get("title") or identity).split())[:_TITLE_CHARS],
                "category": row.category or "",
            }
        )
    return shown


def _thumbnail(content: Any) -> str:
    """Return a small JPEG as an address that holds it; "" where there is none."""
    from PIL import Image

    if not isinstance(content, bytes):
        return ""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            out = io.BytesIO()
            image.convert("RGB").save(out, "JPEG", quality=78)
    except (OSError, SyntaxError, ValueError):
        return ""
    return data_uri(out.getvalue())
