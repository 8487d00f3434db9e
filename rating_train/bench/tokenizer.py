"""The tokenizer of a benchmark: from disk where it is there, else by one quick question to the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from rating_train.config.schema import ModelConfig
from rating_train.data.prompt import load_tokenizer
from rating_train.errors import UserError

log = logging.getLogger(__name__)

#: A hub that has not answered by then is not asked again; its library would ask six times, with growing waits.
HUB_SECONDS = 5.0


def tokenizer_folder(model: ModelConfig) -> str | None:
    """Return where the tokenizer of a configuration is: a folder; ``None`` if neither the disk nor the hub has it.

    Args:
        model: ``tokenizer`` or ``backbone`` is a folder or a hub id.

    Returns:
        The id itself where the hub's files are kept in another cache than its library's own.
    """
    where = model.tokenizer or model.backbone
    if Path(where).is_dir():
        return where if _loads(where) else None
    if folder := _cached(where, model.revision):
        return folder
    if not _hub_answers() or not _loads(where, model.revision):  # the second downloads it
        return None
    return _cached(where, model.revision) or where


def _loads(where: str, revision: str = "") -> bool:
    try:
        load_tokenizer(where, revision)
    except UserError:
        return False
    return True


def _cached(name: str, revision: str) -> str | None:
    """Return the folder in the hub's cache that holds a tokenizer; no network is asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json", revision=revision or None)
    except HFValidationError:  # no id: a path of a folder that is not there
        return None
    folder = str(Path(found).parent) if isinstance(found, str) else ""
    return folder if folder and _loads(folder) else None


def _hub_answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as e:  # of requests or of httpx, by the version of huggingface_hub
        log.info("%s does not answer (%s)", constants.ENDPOINT, type(e).__name__)
        return False
    return True
