"""Load the files of a checkpoint without running code that is in them.

A checkpoint is a pickle, and a pickle may name any function to call. torch's restricted unpickler builds tensors and
plain containers only; DeepSpeed 0.19 stores three small classes of its own beside them, which are allowed by name.
Checksums alone are no protection: COMPLETE.json of a checkpoint from elsewhere comes from the same place.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from rating_train.errors import UserError
from rating_train.files import retry

#: Classes in the shards of ZeRO stages 1 to 3, found by listing the globals of every file at every stage.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class _Inert:
    """Stands in for a class of DeepSpeed where DeepSpeed is not imported: holds what it is given."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass


def load(path: str | Path, mmap: bool = True) -> Any:
    """Return the content of one file of a checkpoint, its tensors on the CPU.

    Args:
        path: a file that :func:`torch.save` wrote.
        mmap: map the tensors into memory instead of reading them; they are read where they are used.

    Raises:
        UserError: the file asks for a function or class that no checkpoint of this project holds, or is no checkpoint.
    """
    try:
        with torch.serialization.safe_globals([(_class_of(name), name) for name in DEEPSPEED_CLASSES]):
            return retry(lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), path)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as e:
        reason = next((line for line in str(e).splitlines() if "GLOBAL" in line), str(e).splitlines()[0])
        raise UserError(
            f"the file cannot be loaded without running code that is in it ({reason.strip()})",
            where=path,
            expected="tensors, plain values and the classes of DeepSpeed 0.19",
            fix="do not load this checkpoint: neither rating-train nor a known DeepSpeed has written it",
        ) from e


def _class_of(name: str) -> type:
    """The real class where DeepSpeed is imported (it then reads the shard itself), else a stand-in."""
    module, _, attribute = name.rpartition(".")
    if "deepspeed" not in sys.modules:
        return _Inert
    found: type = getattr(importlib.import_module(module), attribute)
    return found


class SafeCheckpointEngine:
    """What DeepSpeed calls a checkpoint engine, for reading: every file goes through :func:`load`.

    Args:
        folder: where the files are; of the paths that DeepSpeed asks for, only the names are used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the content of a file; tensors are on the CPU, from where DeepSpeed copies them."""
        return load(self.folder / Path(path).name, mmap=False)
