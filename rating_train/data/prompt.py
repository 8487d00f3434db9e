"""Encoding of a listing's text as token ids of a fixed length.

Layout of the T = visual + text tokens of an item, padded on the right; of the paper's task::

    <|im_start|>User:<fake_token_around_image><global-img> | <image> x V | <fake_token_around_image>The average
    user rating ... Title: {title}, Description: {description}, Features: {features}, Category: {main_category}
    <end_of_utterance> | padding

The question and the words that introduce a field are the task's. A model that reads text alone has neither the visual
tokens nor the marks around them. Each field is first cut to L characters. Pieces are tokenized separately, so that the
image's positions are constant and a field can be cut without touching the template.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rating_train.config.task import PAPER_FIELDS, PAPER_QUESTION, Task
from rating_train.data.field_tokenizer import ID_BYTES, FieldTokenizer, id_bytes
from rating_train.errors import UserError

BEFORE_TEXT = "<|im_start|>User:"
BEFORE_IMAGE = f"{BEFORE_TEXT}<fake_token_around_image><global-img>"
AFTER_IMAGE = "<fake_token_around_image>"
END = "<end_of_utterance>"
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = ("<|im_start|>", PAD_TOKEN, "<fake_token_around_image>", "<global-img>", IMAGE_TOKEN, END)


@dataclass(frozen=True)
class PromptWords:
    """What a prompt says. The default is the paper's.

    Attributes:
        question: the sentence before the fields.
        fields: name of each field and the words that introduce it, in order; none for a model that reads images alone.
        image: whether the prompt holds an image.
    """

    question: str = PAPER_QUESTION
    fields: tuple[tuple[str, str], ...] = PAPER_FIELDS
    image: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(name for name, _ in self.fields)

    def pieces(self) -> list[str]:
        """Return the template's text after the image: a piece before each field, or one where there is none."""
        words = [f", {words}" for _, words in self.fields]
        first = f" {words[0][2:]}" if words else ""
        return [(AFTER_IMAGE if self.image else "") + self.question + first, *words[1:]]


def prompt_words(task: Task, inputs: Collection[str]) -> PromptWords:
    """Return what the prompt of a task says to a model that reads ``inputs``: ``image``, ``text``, or both."""
    fields = task.fields if "text" in inputs else []
    return PromptWords(task.question, tuple((f.name, f.words) for f in fields), "image" in inputs)


def readable(words: PromptWords, texts: Mapping[str, str], field_chars: int) -> str:
    """Return a prompt as a person reads it, each text cut to ``field_chars`` characters."""
    parts = [piece.removeprefix(AFTER_IMAGE) for piece in words.pieces()]
    said = [f" {text}" if (text := texts[name].strip()[:field_chars].strip()) else "" for name in words.names]
    fields = "".join(part + text for part, text in zip(parts, said)) if said else parts[0]
    return ("[image] " if words.image else "") + fields


@dataclass(frozen=True)
class PromptLayout:
    """Positions within the T tokens of an item."""

    image_start: int
    visual_tokens: int
    text_tokens: int

    @property
    def length(self) -> int:
        """T, the tokens of an item, including visual tokens and padding."""
        return self.visual_tokens + self.text_tokens


@dataclass(frozen=True)
class EncodedPrompt:
    """``ids``: (T,) int64; ``used``: tokens before padding; ``cut``: field tokens that did not fit."""

    ids: NDArray[np.int64]
    used: int
    cut: int


def load_tokenizer(backbone: str, revision: str = "") -> Tokenizer:
    """Load the backbone's own tokenizer, by hub id or folder.

    Raises:
        UserError: no tokenizer is there, or it lacks SmolVLM's special tokens.
    """
    try:
        fast = AutoTokenizer.from_pretrained(backbone, revision=revision or None)
        tokenizer: Tokenizer = fast.backend_tokenizer
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(
            f"no tokenizer could be loaded ({str(e).splitlines()[0]})",
            where=f"model.backbone={backbone}",
            expected="a hub id that can be reached, or a folder with tokenizer.json",
            fix="check the path; without a network, download the model elsewhere and set "
            "model.backbone=FOLDER (docs/troubleshooting.md, Offline nodes)",
        ) from e
    missing = [t for t in SPECIAL_TOKENS if tokenizer.token_to_id(t) is None]
    if missing:
        raise UserError(
            f"the tokenizer lacks {', '.join(missing)}", where=backbone, expected="a SmolVLM tokenizer"
        )
    return tokenizer


class PromptEncoder:
    """An encoder of listings into the fixed layout. Picklable: each DataLoader worker holds a copy.

    Args:
        tokenizer: a SmolVLM tokenizer.
        visual_tokens: V, image tokens per item.
        text_tokens: all other tokens per item, template and padding included.
        field_chars: L, characters kept of each field.
        words: what the prompt says. Without fields, ``text_tokens`` is not looked at: every item is as long as the
            template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        visual_tokens: int,
        text_tokens: int,
        field_chars: int,
        words: PromptWords = PromptWords(),  # immutable
    ) -> None:
        def piece(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        self.field_chars = field_chars
        self.words = words
        before = piece(BEFORE_IMAGE if words.image else BEFORE_TEXT)
        after, end = [piece(text) for text in words.pieces()], piece(END)
        self.image_token_id: int = tokenizer.token_to_id(IMAGE_TOKEN)
        self.pad_token_id: int = tokenizer.token_to_id(PAD_TOKEN)
        self._start = id_bytes([*before, *[self.image_token_id] * visual_tokens])
        self._after, self._end = [id_bytes(ids) for ids in after], id_bytes(end)
        template = len(before) + sum(map(len, after)) + len(end)
        text_tokens = text_tokens if words.fields else template
        self.layout = PromptLayout(len(before), visual_tokens, text_tokens)
        self._pad = id_bytes([self.pad_token_id])
        self.field_budget = text_tokens - template
        if self.field_budget < len(words.fields):
            raise UserError(
                f"{text_tokens} text tokens leave no room for the fields: the template alone takes {template}",
                where="data.text_tokens",
                fix=f"set data.text_tokens to at least {template + 4 * len(words.fields)}",
            )
        self._field_tokenizer = FieldTokenizer(tokenizer)

    def encode(self, fields: Mapping[str, str]) -> EncodedPrompt:
        """Encode a listing; ``fields`` holds the texts of ``words``."""
        return self.encode_all([fields])[0]

    def encode_all(
        self, listings: Sequence[Mapping[str, str]], starts: Sequence[bytes] = ()
    ) -> list[EncodedPrompt]:
        """Encode listings.

        Args:
            listings: each with the texts of ``words``.
            starts: of each listing, the ids up to the image's last, where they are not the same in all.
        """
        names = self.words.names
        texts = [fields[name].strip()[: self.field_chars].strip() for fields in listings for name in names]
        tokens = self._field_tokenizer.encode_all([f" {t}" if t else "" for t in texts])
        each = len(names)
        starts = starts or [self._start] * len(listings)
        return [self._assemble(starts[i], tokens[i * each : (i + 1) * each]) for i in range(len(listings))]

    def _assemble(self, start: bytes, fields: Sequence[bytes]) -> EncodedPrompt:
        """Put the ids of a listing's fields into the template after the image, cut to fit and padded."""
        lengths = [len(ids) // ID_BYTES for ids in fields]
        kept = fit_lengths(lengths, self.field_budget)
        parts = [start]
        for place, template in enumerate(self._after):
            parts.append(template)
            if place < len(fields):
                parts.append(fields[place][: ID_BYTES * kept[place]])
        parts.append(self._end)
        used = sum(map(len, parts)) // ID_BYTES
        parts.append(self._pad * (self.layout.length - used))
        return EncodedPrompt(np.frombuffer(b"".join(parts), np.int64), used, sum(lengths) - sum(kept))


def fit_lengths(lengths: Sequence[int], budget: int) -> list[int]:
    """Cap the longest lengths at a common value so that their sum is at most ``budget``."""
    if sum(lengths) <= budget:
        return list(lengths)
    cap, left, rest = 0, budget, sorted(lengths)
    for i, length in enumerate(rest):
        cap = left // (len(rest) - i)
        if length > cap:
            break
        left -= length
    return [min(length, cap) for length in lengths]
