"""Token ids of many short texts. Runs in the DataLoader workers.

A byte-level tokenizer first splits a text into words, and then merges the bytes of each word by itself. So the ids of a
text are those of its words, and words repeat: here each is tokenized once and kept. That takes a fifth of the
library's time. The library tokenizes the words, and every text with other characters than those of Western languages.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain, filterfalse
from typing import Any

import numpy as np
from tokenizers import Tokenizer

#: Bytes of a token id.
ID_BYTES = 8

#: Characters of the words that are kept, with their ids some 8 MB. Then all are dropped, and the collection restarts.
MOST_CHARS = 1 << 18

#: Characters whose kind no version of Unicode changes: Latin letters, punctuation, the signs of euro and trademark.
_PLAIN = "\x00-\u024f\u2010-\u2027\u2030-\u205e\u20ac\u2122"


def _of_kind(kind: str) -> str:
    """Return the characters above ASCII, of those that are plain, of a general category of Unicode."""
    return "".join(
        char for char in map(chr, range(0x80, 0x250)) if unicodedata.category(char).startswith(kind)
    )


_LETTERS, _NUMBERS, _SPACES = "A-Za-z" + _of_kind("L"), "0-9" + _of_kind("N"), r" \t\n\r\f\v\x85\xa0"
_WORD = rf"'(?:[stmd]|re|ve|ll)| ?[{_LETTERS}]+"
_OTHER = rf" ?[^{_SPACES}{_LETTERS}{_NUMBERS}]+"
_BLANK = rf"[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
#: How a ``ByteLevel`` pre-tokenizer splits plain text: the pattern of GPT-2 with the classes of Unicode written out.
_WORDS = re.compile(rf"{_WORD}| ?[{_NUMBERS}]+|{_OTHER}|{_BLANK}")
#: The same on what a ``Digits`` pre-tokenizer leaves around each digit.
_WORDS_AND_DIGITS = re.compile(rf"{_WORD}|[{_NUMBERS}]|{_OTHER}|[{_SPACES}]+(?=[{_NUMBERS}])|{_BLANK}")
_is_plain = re.compile(f"[{_PLAIN}]*").fullmatch

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


class FieldTokenizer:
    """A tokenizer of plain text: the text of a special token ("<image>") is text like any other. Picklable.

    Args:
        tokenizer: whose ids are given; a copy of it is kept.
        most_chars: limit of the words that are kept.
    """

    def __init__(self, tokenizer: Tokenizer, most_chars: int = MOST_CHARS) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._split = word_split(self._tokenizer)
        self._most_chars = most_chars
        self._ids: dict[str, bytes] = {}  # of each word
        self._chars = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # not preserved by pickling

    def encode_all(self, texts: Sequence[str]) -> list[bytes]:
        """Return the token ids of each text, as :func:`id_bytes`."""
        if self._split is None:
            return self._encode(texts)
        found = [self._joined(text) for text in texts]
        missing = [i for i, ids in enumerate(found) if ids is None]
        self._learn([texts[i] for i in missing])
        for i in missing:
            found[i] = self._joined(texts[i])
        others = [i for i in missing if found[i] is None]
        for i, ids in zip(others, self._encode([texts[i] for i in others])):
            found[i] = ids
        return found  # type: ignore[return-value]  # all are there now

    def _joined(self, text: str) -> bytes | None:
        """Return the ids of a text's words; ``None`` if one is not known, or the text is not plain."""
        assert self._split is not None
        if not (text.isascii() or _is_plain(text)):
            return None
        try:
            return b"".join(map(self._ids.__getitem__, self._split(text)))
        except KeyError:
            return None

    def _learn(self, texts: Sequence[str]) -> None:
        """Tokenize the words of texts that are not known."""
        assert self._split is not None
        if self._chars > self._most_chars:
            self._ids, self._chars = {}, 0
        words = chain.from_iterable(self._split(text) for text in texts if _is_plain(text))
        unknown = list(set(filterfalse(self._ids.__contains__, words)))
        self._ids.update(zip(unknown, self._encode(unknown)))
        self._chars += sum(map(len, unknown))

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        if not texts:
            return []
        # The fast call leaves out offsets, which nothing here needs.
        return [id_bytes(e.ids) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def id_bytes(ids: Sequence[int]) -> bytes:
    """Return token ids as the bytes of int64 numbers, which are joined without a Python number for each."""
    return np.array(ids, np.int64).tobytes()


def word_split(tokenizer: Tokenizer) -> Callable[[str], list[str]] | None:
    """Return what splits a plain text into the words that a tokenizer merges by themselves; ``None`` if not known."""
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__()) if tokenizer.pre_tokenizer else {}
    steps = [
        {name: value for name, value in step.items() if name != "trim_offsets"}
        for step in steps.get("pretokenizers", [steps])
    ]
    pattern = {1: _WORDS, 2: _WORDS_AND_DIGITS}.get(len(steps))
    if pattern is None or steps != [_DIGITS, _BYTE_LEVEL][-len(steps) :]:
        return None
    context_free = (
        tokenizer.normalizer is None
        and not getattr(tokenizer.model, "dropout", None)
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )
    return pattern.findall if context_free else None
