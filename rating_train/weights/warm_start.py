"""Warm start: a new run takes the weights of another one, and says which."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rating_train import run_dir
from rating_train.checkpoint import store
from rating_train.checkpoint.deepspeed_io import consolidated_weights
from rating_train.checkpoint.resume import choose_checkpoint
from rating_train.checkpoint.state import STATE_FILE
from rating_train.config.load import load_config
from rating_train.config.schema import PARTS, ModelConfig
from rating_train.errors import UserError
from rating_train.files import read_json, sha256_file
from rating_train.log import text_table
from rating_train.model.architecture import KNOWN_ARCHITECTURES, Architecture, read_architecture
from rating_train.model.regressor import RatingRegressor, part_of
from rating_train.weights.exported import WEIGHTS_NAME, exported_architecture, exported_weights, is_exported

log = logging.getLogger(__name__)

_WHERE = "model.init_from"
_NAMED = 4  # tensors named in an error


@dataclass(frozen=True)
class Source:
    """Weights that were found and verified, not read yet. Travels from rank 0 to the others.

    Attributes:
        folder: the checkpoint, or the exported folder.
        zero_stage: of the checkpoint; ``None`` for an exported folder.
        sha256: of the file that vouches for the weights: COMPLETE.json, or model.safetensors.
    """

    folder: Path
    zero_stage: int | None
    sha256: str


def find_source(given: str) -> Source:
    """Find the weights of a run, of one of its checkpoints, or of an exported folder. Rank 0.

    Raises:
        UserError: none of these, or a checkpoint that does not verify.
    """
    path = Path(given)
    if is_exported(path):
        return Source(path, None, sha256_file(path / WEIGHTS_NAME))
    if (path / run_dir.CONFIG_FILE).is_file():
        folder = choose_checkpoint(path / run_dir.CHECKPOINTS_DIR, "best")
    elif (path / STATE_FILE).is_file():
        folder = path
        if problem := store.problem(folder):
            raise UserError(f"the checkpoint cannot be trusted: {problem}", where=f"{_WHERE}={given}")
    else:
        raise UserError(
            "neither a run, nor a checkpoint of one, nor an exported folder",
            where=f"{_WHERE}={given}",
            expected="the folder that `rating-train train` or `rating-train export` made, or RUN/checkpoints/step_N",
        )
    stage = read_json(folder / STATE_FILE)["identity"]["topology"]["zero_stage"]
    return Source(folder, stage, sha256_file(folder / store.COMPLETE))


def check_source(config: ModelConfig, architecture: Architecture | None) -> None:
    """Refuse a source that is not there or has another width, before any work. Reads no weights.

    Args:
        config: the section ``model``.
        architecture: the model's shape, where it is known without a network.

    Raises:
        UserError: see above; with both widths.
    """
    source = find_source(config.init_from)
    theirs = _architecture_of(source)
    if theirs is None or architecture is None:
        return  # the tensors are compared later
    widths = (
        ("decoder", theirs.text.hidden, architecture.text.hidden),
        ("vision", theirs.vision.hidden, architecture.vision.hidden),
    )
    problems = [
        f"its {part} is {their} wide, this model's is {own}"
        for part, their, own in widths
        if their != own and part in config.init_parts
    ]
    if problems:
        raise _does_not_fit(config.init_from, problems)


def _architecture_of(source: Source) -> Architecture | None:
    """The shape of what a source holds, where no network is needed for it."""
    if source.zero_stage is None:
        return exported_architecture(source.folder)
    file = source.folder.resolve().parents[1] / run_dir.CONFIG_FILE
    if not file.is_file():
        return None
    model = load_config(file).model
    known = model.backbone in KNOWN_ARCHITECTURES or Path(model.backbone).is_dir()
    return read_architecture(model) if known else None


@torch.no_grad()
def warm_start(model: RatingRegressor, source: Source, parts: list[str]) -> dict[str, Any]:
    """Fill the ``parts`` of a model with the weights of a source, and log what was done with each.

    The head is taken as a whole or not at all: one layer of it means nothing to another one.

    Returns:
        Facts for provenance.json: the source, and by part what was taken, left and drawn anew.

    Raises:
        UserError: the backbone's tensors are not those of the model, with the shapes of both.
    """
    if source.zero_stage is None:
        theirs = exported_weights(source.folder)
    else:
        theirs = consolidated_weights(source.folder, source.zero_stage)
    own = model.state_dict()
    wanted = {name for name in own if part_of(name) in parts}
    unfit = {name for name in wanted if name not in theirs or theirs[name].shape != own[name].shape}
    if any(part_of(name) == "head" for name in unfit):
        wanted -= {name for name in wanted if part_of(name) == "head"}
    unfit &= wanted
    if unfit:
        problems = [
            f"{name} is {_shape(theirs, name)}, expected {_shape(own, name)}" for name in sorted(unfit)
        ]
        more = [f"{len(problems) - _NAMED} more tensors"] if len(problems) > _NAMED else []
        raise _does_not_fit(str(source.folder), [*problems[:_NAMED], *more])
    for name in wanted:
        own[name].copy_(theirs[name])
    facts: dict[str, Any] = {"source": str(source.folder), "sha256": source.sha256, "parts": {}}
    for part in PARTS:
        names = [name for name in own if part_of(name) == part]
        taken = [name for name in names if name in wanted]
        kept = "drawn anew" if part == "head" else "as the backbone has it"
        facts["parts"][part] = {
            "here": "taken" if taken else kept,
            "tensors": len(names),
            "parameters": sum(own[name].numel() for name in names),
        }
    facts["left"] = sorted(set(theirs) - wanted)
    lines = [[part, *map(str, fact.values())] for part, fact in facts["parts"].items()]
    log.info(
        "warm start from %s; %d of its tensors are left%s\n%s",
        source.folder, len(facts["left"]), f" ({', '.join(facts['left'][:_NAMED])})" if facts["left"] else "",
        "\n".join(text_table(["part", "weights", "tensors", "parameters"], lines)),
    )  # fmt: skip
    return facts


def _shape(tensors: dict[str, Tensor], name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) or "a number" if name in tensors else "missing"


def _does_not_fit(given: str, problems: list[str]) -> UserError:
    return UserError(
        f"its weights do not fit this model: {'; '.join(problems)}",
        where=f"{_WHERE}={given}",
        expected="weights of the same backbone",
        fix="set model.backbone to that of the source, or leave the part out of model.init_parts",
    )
