"""A loss of the user's own: ``loss.kind: my_module:my_loss`` names a function that this module imports and tries out.

Legend: b items of a micro-batch.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rating_train.config.schema import LossConfig
from rating_train.errors import UserError
from rating_train.files import sha256_file

#: (scores, ratings, rating_counts), each (b,) float32 -> (b,) float32, or a float32 scalar.
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

SIGNATURE = "def my_loss(scores, ratings, rating_counts), which returns a float32 tensor of shape (items,) or a scalar"


@dataclass(frozen=True)
class CustomLoss:
    """A function that was imported and tried, and what tells it from another: where it is, and the file's hash."""

    kind: str
    function: LossFunction
    file: str
    sha256: str

    def facts(self) -> dict[str, str]:
        """Return what provenance.json records."""
        return {"kind": self.kind, "file": self.file, "sha256": self.sha256}


def load_custom_loss(config: LossConfig) -> CustomLoss | None:
    """Import the function that ``loss.kind`` names and try it on two items; ``None`` for a built-in loss.

    The current directory is searched first, as ``python -m`` does.

    Raises:
        UserError: the module or the function is not there, cannot be imported, or does not fulfil the contract.
    """
    if not config.is_custom:
        return None
    where = f"loss.kind={config.kind}"
    module, function = _import(config.kind, where)
    try:
        inspect.signature(function).bind(None, None, None)
    except (TypeError, ValueError) as e:
        raise UserError(
            f"the loss cannot be called with three arguments ({e})", where=where, expected=SIGNATURE
        ) from e
    _try(function, config, where)
    file = _file_of(function) or _file_of(module)
    if file is None:
        raise UserError(
            "the loss has no file, so a run could not record what trained it",
            where=where,
            fix="put the function into a .py file",
        )
    return CustomLoss(config.kind, function, str(file), sha256_file(file))


def _import(kind: str, where: str) -> tuple[Any, LossFunction]:
    """Return the module and the function."""
    name, _, attribute = kind.partition(":")
    folder = os.getcwd()
    if sys.path[:1] not in ([""], [folder]):
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    fix = f"a file losses.py in {folder} is `losses:FUNCTION`; another folder must be in PYTHONPATH"
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as e:  # whatever the user's file does
        absent = isinstance(e, ModuleNotFoundError) and f"{name}.".startswith(f"{e.name}.")
        what = f"there is no module {name!r}" if absent else f"{name} cannot be imported ({_reason(e)})"
        raise UserError(what, where=where, fix=fix if absent else "correct the file") from e
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = "has no function" if function is None else "is not a function:"
        raise UserError(f"{module.__name__} {problem} {attribute!r}", where=where, expected=SIGNATURE)
    return module, function


def _try(function: LossFunction, config: LossConfig, where: str) -> None:
    """Call the function on two items, and differentiate the result."""
    scores = torch.tensor([3.5, 4.5], requires_grad=True)
    ratings, counts = torch.tensor([4.0, 4.25]), torch.tensor([10.0, 1000.0])
    try:
        with torch.enable_grad():
            result = function(scores, ratings, counts)
    except Exception as e:
        raise UserError(f"the loss fails on two items ({_reason(e)})", where=where, expected=SIGNATURE) from e
    problem = result_problem(result, 2, config)
    if not problem and not result.requires_grad:
        problem = "its result does not depend on the scores, so nothing could be trained"
    if not problem and not bool(torch.isfinite(result).all()):
        problem = f"it gives {result.tolist()} for two ordinary items, which is not finite"
    if not problem:
        (gradient,) = torch.autograd.grad(result.sum(), scores, allow_unused=True)
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            problem = f"its gradient by the scores of two ordinary items is {gradient}, which is not finite"
    if problem:
        raise UserError(f"the loss cannot be used: {problem}", where=where, expected=SIGNATURE)


def result_problem(result: object, items: int, config: LossConfig) -> str:
    """Return what is wrong with the type and shape of a result for ``items`` items, or ""."""
    if not isinstance(result, Tensor):
        return f"it returns {type(result).__name__}, not a tensor"
    if result.dtype != torch.float32:
        return f"it returns {str(result.dtype).removeprefix('torch.')}, not float32"
    if result.shape == (items,):
        return ""
    if result.ndim:
        return f"it returns shape {tuple(result.shape)} for {items} items"
    if config.count_weight != "none":
        return f"it returns a scalar, of which loss.count_weight={config.count_weight} can weigh no item"
    return ""


def _reason(error: BaseException) -> str:
    """The error with the line of the user's file where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    at = f", {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {error}{at}"


def _file_of(thing: Any) -> Path | None:
    """The Python file that a function or module comes from."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(thing))
    except (TypeError, ValueError):
        return None
    return Path(file).resolve() if file is not None and os.path.isfile(file) else None
