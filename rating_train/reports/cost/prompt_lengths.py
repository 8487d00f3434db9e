"""How many text tokens the items of a dataset need at each L, with the backbone's own tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rating_train.config.task import PAPER, Task, task_of
from rating_train.shards.manifest import check_split
from rating_train.shards.mds_read import iter_texts

MOST_ITEMS = 20_000
#: Share of the items that `data.text_tokens` is to hold without a cut.
COVERED = 0.999
INPUTS = ("image", "text")
_ROOM = 8192  # text tokens: no item is cut while it is measured


@dataclass(frozen=True)
class Lengths:
    """Text tokens of items at one L: template and fields, no visual tokens, no padding.

    Attributes:
        field_chars: L.
        tokens: (N,) int64, ascending.
    """

    field_chars: int
    tokens: npt.NDArray[np.int64]

    def needed(self, share: float = COVERED) -> int:
        """Return the tokens that hold ``share`` of the items without a cut."""
        return int(np.quantile(self.tokens, share, method="inverted_cdf"))

    def covered(self, tokens: int) -> float:
        """Return the share of the items that ``tokens`` hold without a cut."""
        return float(np.mean(self.tokens <= tokens))


def measure_lengths(
    items: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    field_chars: Sequence[int],
    task: Task = PAPER,
    inputs: Collection[str] = INPUTS,
) -> dict[int, Lengths]:
    """Tokenize items as training does, at each L.

    Args:
        items: with the text fields of a stored item.
        tokenizer: as :func:`rating_train.data.prompt.load_tokenizer` returns it.
        field_chars: each L, in characters.
        task: names the fields.
        inputs: what the model reads.
    """
    from rating_train.data.prompt import PromptEncoder, prompt_words

    words = prompt_words(task, [name for name in inputs if name in task.inputs])
    encoders = {chars: PromptEncoder(tokenizer, 0, _ROOM, chars, words) for chars in field_chars}
    found: dict[int, list[int]] = {chars: [] for chars in field_chars}
    for item in items:
        fields = {name: item[name] for name in words.names}
        for chars, encoder in encoders.items():
            found[chars].append(encoder.encode(fields).used)
    return {chars: Lengths(chars, np.sort(np.array(n, np.int64))) for chars, n in found.items()}


def lengths_of_data(
    data: Path,
    split: str,
    tokenizer: str,
    revision: str,
    field_chars: Sequence[int],
    inputs: Collection[str] = INPUTS,
) -> dict[int, Lengths]:
    """Measure a prepared dataset, or a random sample of :data:`MOST_ITEMS` of it.

    Raises:
        UserError: no such dataset or split, a damaged shard, no such tokenizer.
    """
    from rating_train.data.prompt import load_tokenizer

    task = task_of(check_split(data, split))
    loaded = load_tokenizer(tokenizer, revision)
    return measure_lengths(iter_texts(data / split, MOST_ITEMS), loaded, field_chars, task, inputs)
