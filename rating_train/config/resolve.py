"""Derive what a configuration implies once the numbers of ranks and items are known. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rating_train.config.schema import Config, SourceConfig
from rating_train.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided: global_items = ranks x micro_items x accumulation, exactly."""

    global_items: int
    ranks: int
    micro_items: int
    accumulation: int

    @property
    def rank_items(self) -> int:
        """Items that one rank reads for one optimizer step."""
        return self.micro_items * self.accumulation


def plan_batch(global_items: int, micro_items: int, ranks: int) -> BatchPlan:
    """Divide the global batch over ranks and accumulation steps.

    Args:
        global_items: items of an optimizer step over all ranks.
        micro_items: items per forward pass; 0 takes a rank's complete batch.
        ranks: number of processes.

    Raises:
        UserError: the global batch does not divide; the message lists sizes that do.
    """
    if global_items % ranks:
        divisors = [r for r in range(1, global_items + 1) if global_items % r == 0]
        lower, upper = (global_items // ranks) * ranks, -(-global_items // ranks) * ranks
        sizes = " or ".join(str(s) for s in sorted({lower, upper} - {0}))
        raise UserError(
            f"a global batch of {global_items} items does not divide over {ranks} ranks",
            where="batch.global_items",
            expected=f"a multiple of the number of ranks; for {global_items} items: {_list(divisors)} ranks",
            fix=f"set batch.global_items={sizes}, or start another number of ranks",
        )
    rank_items = global_items // ranks
    micro = micro_items or rank_items
    if rank_items % micro:
        valid = [m for m in range(1, rank_items + 1) if rank_items % m == 0]
        raise UserError(
            f"a rank batch of {rank_items} items ({global_items} over {ranks} ranks) does not divide into "
            f"micro-batches of {micro}",
            where="batch.micro_items",
            expected=f"one of {_list(valid)}",
            fix=f"set batch.micro_items={max(m for m in valid if m <= micro) if micro < rank_items else 0}",
        )
    return BatchPlan(global_items, ranks, micro, rank_items // micro)


def _list(numbers: list[int]) -> str:
    return ", ".join([*map(str, numbers[:16]), *(["..."] if len(numbers) > 16 else [])])


def total_steps(config: Config, train_items: int) -> int:
    """Count the optimizer steps of a run: every sample is seen at least ``epochs`` times.

    The last global batch is filled with the first samples of the following epoch.
    """
    return phase_ends(config, train_items)[-1]


def phase_ends(config: Config, train_items: int) -> list[int]:
    """Return how many steps are done when each phase ends; one number for a run without ``stages``.

    Epochs of several phases add up before they are rounded to steps: the phases of two runs of equal length end their
    epochs at the same step. ``train.max_steps`` cuts off what follows it.
    """
    if config.stages is None:
        lengths: list[tuple[float, int]] = [(config.train.epochs, 0)]
    else:
        lengths = [(stage.epochs or 0.0, stage.steps or 0) for stage in config.stages]
    ends: list[int] = []
    exact, most = 0.0, config.train.max_steps
    for epochs, steps in lengths:
        exact += steps + epochs * train_items / config.batch.global_items
        end = max(1 + (ends[-1] if ends else 0), math.ceil(exact - 1e-9))
        if most and end >= most:
            return [*ends, most]
        ends.append(end)
    return ends


def order_fingerprint_inputs(config: Config, data_fingerprints: Sequence[str]) -> dict[str, object]:
    """Collect everything that decides which samples a step reads. A resumed run must agree on all of it.

    World size, micro-batch and DataLoader workers are left out on purpose: they do not change the order. So are the
    places of the datasets.

    Args:
        config: the configuration.
        data_fingerprints: of the datasets to train on, in the order of ``data.sources``.
    """
    d = config.data
    mixture: dict[str, object] = {}
    if d.sources:
        mixture = {"weights": [str(share) for share in source_shares(d.sources)]}
    return {
        "data_fingerprint": list(data_fingerprints) if d.sources else data_fingerprints[0],
        **mixture,
        "train_split": d.train_split,
        "shuffle": d.shuffle,
        "shuffle_seed": d.shuffle_seed,
        "shuffle_block_samples": d.shuffle_block_samples,
        "num_canonical_nodes": d.num_canonical_nodes,
        "global_items": config.batch.global_items,
    }


def source_shares(sources: Sequence[SourceConfig]) -> list[Fraction]:
    """Return the share of each source, which add up to 1 exactly: weights 7 and 3 are 7/10 and 3/10, as 0.7 and 0.3."""
    weights = [Fraction(repr(source.weight)) for source in sources]
    return [weight / sum(weights) for weight in weights]
