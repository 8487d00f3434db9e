"""Read complete parameters from the shards that DeepSpeed saved at ZeRO stage 1, 2 or 3 on any number of ranks.

Two layouts, as observed in DeepSpeed 0.19.8. In both, a group is the parameters of one optimizer group in order::

    stages 1, 2   the group is one flat vector, padded at its end, partitioned evenly over the ranks
    stage 3       each parameter is padded at its end and partitioned evenly over the ranks; a rank's vector is the
                  concatenation of its pieces

Files are memory-mapped: a rank that needs part of a parameter reads only that part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rating_train.checkpoint.safe_load import load
from rating_train.checkpoint.store import InvalidCheckpoint
from rating_train.files import retry

MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
_OPTIMIZER_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_MODEL_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt$")


@dataclass(frozen=True)
class Place:
    """Position of a trained parameter: its group, and the elements before it (stage 3: in each rank's vector)."""

    group: int
    shape: torch.Size
    offset: int


class Shards:
    """The complete parameters of one checkpoint.

    Args:
        engine: the directory of the engine's shards.
        stage: the ZeRO stage that wrote them, 1 to 3.

    Raises:
        InvalidCheckpoint: the files do not match the layout of that stage.
    """

    def __init__(self, engine: Path, stage: int) -> None:
        self.stage = stage
        self._optimizer_files = _by_rank(engine, _OPTIMIZER_RANK)
        self._opened: dict[int, dict[str, Any]] = {}
        if stage == 3:
            self._models = [load(path) for path in _by_rank(engine, _MODEL_RANK)]
        else:
            self._models = [load(engine / "mp_rank_00_model_states.pt")]
        if any(any(group) for group in self._optimizer(0).get("param_alignment_paddings", [])):
            raise InvalidCheckpoint(
                "its parameters are padded individually, a layout that no known stage writes"
            )
        self.places = dict(self._find_places())

    @property
    def ranks(self) -> int:
        return len(self._optimizer_files)

    def _optimizer(self, rank: int) -> dict[str, Any]:
        """Open a rank's file when something of it is needed: at stages 1 and 2, most ranks need few of them."""
        if rank not in self._opened:
            self._opened[rank] = load(self._optimizer_files[rank])["optimizer_state_dict"]
        return self._opened[rank]

    def _find_places(self) -> Iterator[tuple[str, Place]]:
        for group, shapes in enumerate(self._models[0]["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                yield name, Place(group, shape, offset)
                offset += -(-shape.numel() // self.ranks) if self.stage == 3 else shape.numel()

    def read(self, name: str, key: str) -> Tensor:
        """Return a trained parameter's fp32 master weight (``fp32``), ``exp_avg`` or ``exp_avg_sq``, in its shape.

        Raises:
            KeyError: no trained parameter has this name.
        """
        place = self.places[name]
        numel, first, last = place.shape.numel(), 0, self.ranks - 1
        if self.stage < 3:  # the ranks that hold a part of it
            size = len(self._vector(0, place.group, key))
            first, last = place.offset // size, max(0, place.offset + numel - 1) // size
        vectors = [self._vector(rank, place.group, key) for rank in range(first, last + 1)]
        if self.stage == 3:
            return read_per_parameter(vectors, place.offset, numel).view(place.shape)
        return read_flat(vectors, place.offset - first * size, numel).view(place.shape)

    def steps(self) -> Tensor:
        """Return the number of updates that Adam has counted, () float32, the same for all parameters."""
        return torch.as_tensor(self._state(0)[0]["step"], dtype=torch.float32).clone()

    def frozen(self) -> dict[str, Tensor]:
        """Return parameters and buffers that are not trained, in the dtype of the forward pass (bf16 or fp32)."""
        first = self._models[0]
        if self.stage < 3:
            return {name: value for name, value in first["module"].items() if name not in self.places}
        return {
            name: torch.cat([model["frozen_param_fragments"][name].flatten() for model in self._models])[
                : shape.numel()
            ].view(shape)
            for name, shape in (first["frozen_param_shapes"] or {}).items()
        }

    @property
    def counters(self) -> dict[str, int]:
        """DeepSpeed's own counts of steps and samples."""
        return {name: self._models[0][name] for name in ("global_steps", "global_samples", "skipped_steps")}

    def _state(self, rank: int) -> dict[int, dict[str, Any]]:
        inner = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return self._optimizer(rank)[inner]["state"]

    def _vector(self, rank: int, group: int, key: str) -> Tensor:
        if key != MASTER:
            return self._state(rank)[group][key]
        name = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        return self._optimizer(rank)[name][group].detach()


def read_flat(vectors: list[Tensor], offset: int, numel: int) -> Tensor:
    """Return ``numel`` elements, starting at ``offset``, of a flat vector partitioned evenly into ``vectors``."""
    size = len(vectors[0])
    pieces = []
    for rank, vector in enumerate(vectors):
        start = rank * size
        first, last = max(offset, start), min(offset + numel, start + size)
        if first < last:
            pieces.append(vector[first - start : last - start])
    return torch.cat(pieces)


def read_per_parameter(vectors: list[Tensor], offset: int, numel: int) -> Tensor:
    """Return a parameter of ``numel`` elements whose even pieces begin at ``offset`` of every rank's vector."""
    width = -(-numel // len(vectors))
    return torch.cat([vector[offset : offset + width] for vector in vectors])[:numel]


def write_flat(target: Tensor, rank: int, readers: Iterator[tuple[int, Any]]) -> None:
    """Fill a rank's part of a flat vector.

    Args:
        target: (P,) this rank's part, elements [rank * P, (rank + 1) * P) of the vector. Padding becomes 0.
        rank: this rank.
        readers: for each parameter in order, its number of elements and a function that returns it.
    """
    size, offset = len(target), 0
    start = rank * size
    target.zero_()
    for numel, read in readers:
        first, last = max(offset, start), min(offset + numel, start + size)
        if first < last:  # parameters outside this rank's part are not read
            target[first - start : last - start] = read().flatten()[first - offset : last - offset]
        offset += numel


def write_per_parameter(target: Tensor, rank: int, ranks: int, readers: Iterator[tuple[int, Any]]) -> None:
    """Fill a rank's vector with its even piece of every parameter; arguments as in :func:`write_flat`."""
    offset = 0
    target.zero_()
    for numel, read in readers:
        width = -(-numel // ranks)
        piece = read().flatten()[rank * width : (rank + 1) * width]
        target[offset : offset + len(piece)] = piece
        offset += width


def _by_rank(engine: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of all ranks, in rank order.

    Raises:
        InvalidCheckpoint: there are none, or one is missing.
    """
    paths = retry(lambda: list(engine.iterdir()), engine)
    found = {int(m.group(1)): path for path in paths if (m := pattern.search(path.name))}
    if not found or sorted(found) != list(range(len(found))):
        raise InvalidCheckpoint(f"{engine} has files of ranks {sorted(found)}, not one file per rank")
    return [found[rank] for rank in sorted(found)]
