"""When two listings are one product by their titles: the rule that splits a catalogue, and that groups its items."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

# A shorter normalised title ("t shirt") is too generic to call two listings the same product.
MIN_TITLE_KEY_CHARS = 12

_BRACKETED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}")
_NOT_WORD = re.compile(r"[\W_]+")


def title_key(title: str) -> str:
    """Return a title without what distinguishes variants of one product; ``""`` if too little is left.

    Case, punctuation, compatibility forms and bracketed parts are removed: "Redmi 10 (Blue, 64 GB)" and
    "REDMI 10 (Black)" would share a key if it were long enough. If little is left outside the brackets, the text
    inside them counts as well.
    """
    text = unicodedata.normalize("NFKC", title).casefold()
    for candidate in (_BRACKETED.sub(" ", text), text):
        key = _NOT_WORD.sub(" ", candidate).strip()
        if len(key) >= MIN_TITLE_KEY_CHARS:
            return key
    return ""


def product_group(sample: Mapping[str, Any]) -> str:
    """Return a name of a stored item's product group: 16 hex digits of its category and title key, or of its id.

    ``prepare`` also joins what a source's ``group_id`` joins, and chains of both; shards do not store that.
    """
    key = title_key(sample.get("title", ""))
    name = f"title\t{sample.get('main_category', '')}\t{key}" if key else f"id\t{sample['id']}"
    return blake2b(name.encode("utf-8"), digest_size=8).hexdigest()
