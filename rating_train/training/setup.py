"""What several verbs need: the process group, the backbone's shape and prompt, one row of an evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rating_train import log as logs
from rating_train.config.schema import Config
from rating_train.data.prompt import PromptEncoder, load_tokenizer, prompt_words
from rating_train.data.tiling.prompt import TiledPromptEncoder
from rating_train.distributed import world as worlds
from rating_train.distributed.collectives import on_main
from rating_train.errors import UserError
from rating_train.model.accounting import item_cost
from rating_train.model.architecture import Architecture, read_architecture
from rating_train.model.cost import visual_tokens
from rating_train.processes import keep_freed_memory
from rating_train.scoring.metrics import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInputs:
    """A configuration with what its backbone implies, known before any weight or shard is read."""

    config: Config
    architecture: Architecture
    prompt: PromptEncoder


def read_model_inputs(config: Config) -> ModelInputs:
    """Read the backbone's configuration and tokenizer.

    Raises:
        UserError: unknown backbone, an image size that does not divide, a tokenizer that does not fit.
    """
    return model_inputs_of(config, read_architecture(config.model))


def model_inputs_of(config: Config, architecture: Architecture) -> ModelInputs:
    """Read the tokenizer of a backbone whose architecture is known. Errors: as :func:`read_model_inputs`."""
    visual = visual_tokens(architecture, config.model_px)
    where = config.model.tokenizer or config.model.backbone
    tokenizer = load_tokenizer(where, config.model.revision)
    if tokenizer.get_vocab_size() > architecture.text.vocab:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} ids, the backbone embeds {architecture.text.vocab}",
            where=where,
            fix="set model.tokenizer to the backbone's own",
        )
    data, words = config.data, prompt_words(config.task, config.model.inputs)
    if data.tiles_per_side and words.image:
        prompt: PromptEncoder = TiledPromptEncoder(
            tokenizer, visual, data.text_tokens, data.field_chars, data.tiles_per_side, words
        )
    else:
        prompt = PromptEncoder(tokenizer, visual, data.text_tokens, data.field_chars, words)
    return ModelInputs(config, architecture, prompt)


def evaluation_row(
    model_inputs: ModelInputs,
    scores: Scores,
    *,
    step: int,
    split: str,
    source: str,
    seconds: float,
    lengths: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """Return one row of eval.jsonl: the scores, the reasons of undefined ones, and CES named by convention.

    Args:
        lengths: tokens of an item before padding -> number of items; for CES at the true length.
    """
    length = model_inputs.prompt.layout.length
    data = model_inputs.config.data
    cost = item_cost(
        model_inputs.architecture,
        model_inputs.config.model_px,
        length,
        Counter(lengths).elements(),
        data.tiles_per_side,
    )
    return {
        "step": step,
        "split": split,
        "source": source,
        **scores.as_dict(),
        **cost.as_row(scores.plcc),
        "seconds": round(seconds, 3),
        "items_per_second": round(scores.n / seconds, 2) if seconds > 0 else None,
    }


def join_job(timeout_minutes: float = 10.0, wanted: str = "auto") -> tuple[worlds.World, torch.device]:
    """Join the process group, and log to the terminal until a log file is known. A collective.

    Args:
        timeout_minutes: of every collective.
        wanted: ``train.device``.

    Returns:
        This process's place, and its device.
    """
    world = worlds.detect()
    logs.set_up(world.rank)
    device = worlds.connect(world, timeout_minutes, wanted)
    if device.type == "cpu":
        keep_freed_memory()
    nodes = f", {world.nodes} nodes" if world.nodes > 1 else ""
    on_main(lambda: log.info("%d ranks%s on %s", world.size, nodes, device.type))
    return world, device
