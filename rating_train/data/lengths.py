"""Lengths of micro-batches: how far each is padded. Functions of the items' tokens, on the host.

Attention is causal, padding stands on the right, and the pooling leaves it out: no score depends on how much of it
there is. So a micro-batch is cut to its longest item, rounded up to a multiple of a few tokens, so that only a small
set of lengths occurs (of a few dozen kernels and graphs, not of hundreds).
"""

from __future__ import annotations

from collections.abc import Sequence

from rating_train.config.schema import Config


def cut_length(used: Sequence[int], full: int, multiple: int) -> int:
    """Return the length to which a micro-batch is cut, in tokens.

    Args:
        used: tokens of each item before padding.
        full: T, the length to which the items are padded.
        multiple: what the length is rounded up to a multiple of; 0 keeps ``full``.
    """
    if not multiple or not used:
        return full
    return min(full, -(-max(used) // multiple) * multiple)


def possible_lengths(shortest: int, full: int, multiple: int) -> list[int]:
    """Return every length that :func:`cut_length` can give to items of at least ``shortest`` tokens, ascending."""
    if not multiple:
        return [full]
    first = -(-shortest // multiple) * multiple
    return [*range(first, full, multiple), full]


def longest_first(used: Sequence[int]) -> list[int]:
    """Return the positions of items by descending tokens, equal ones in their order.

    The longest micro-batch comes first, so that a step that does not fit in memory fails at its beginning, and an
    allocator finds room for the later ones in what the first has left.
    """
    return sorted(range(len(used)), key=lambda i: -used[i])


def cut_lengths(used: Sequence[int], micro_items: int, full: int, multiple: int) -> list[int]:
    """Return the length of each item as it is computed, when a batch is divided into micro-batches in order."""
    result: list[int] = []
    for begin in range(0, len(used), micro_items):
        part = used[begin : begin + micro_items]
        result += [cut_length(part, full, multiple)] * len(part)
    return result


def text_tokens_of(config: Config) -> int:
    """Return the tokens of a sequence that are not visual: of a model that reads no field, those of the template.

    Raises:
        UserError: the template is to be counted, and the tokenizer cannot be loaded.
    """
    if config.model_fields:
        return config.data.text_tokens
    from rating_train.data.prompt import PromptEncoder, load_tokenizer, prompt_words  # late: imports torch

    tokenizer = load_tokenizer(config.model.tokenizer or config.model.backbone, config.model.revision)
    words = prompt_words(config.task, config.model.inputs)
    return PromptEncoder(tokenizer, 0, 0, config.data.field_chars, words).layout.text_tokens
